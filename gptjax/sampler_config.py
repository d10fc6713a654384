"""The settings of `sample.py`, and which of them contradict each other."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from gptjax.config import (
    AUTO_DTYPE,
    CACHE,
    CHECKPOINT,
    COMPILE_CACHE,
    DEBUG,
    KERNELS,
    WEIGHTS,
    DType,
)
from gptjax.sample_config import SampleConfig
from gptjax.settings import flatten, once, require, require_range


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The settings of `sample.py`."""

    out_dir: str = once("out", "Run folder to sample from.", section="Model", path=True)
    init_from: str = once(
        "resume",
        "resume takes the run in out_dir, scratch an untrained model of the preset, over bytes. "
        "novels is a small model of English novels that comes with gptjax, and needs no network. "
        "Anything else names a model on the Hugging Face Hub (gpt2, gpt2-medium, ...) or what "
        "convert_gpt2.py imports.",
        path=True,
    )
    preset: str = once("quickstart", "Preset whose model --init_from=scratch makes.")
    checkpoint: str = once("best", CHECKPOINT)
    dtype: DType = once("auto", f"Type to compute in. {AUTO_DTYPE}")
    kernels: Literal["auto", "off"] = once("auto", KERNELS)
    weights: Literal["auto", "int8"] = once("auto", WEIGHTS)
    cache: Literal["auto", "int8"] = once("auto", CACHE)
    start: tuple[str, ...] = once(
        (),
        "One or several prompts. FILE:path reads a prompt from a file, and - reads it from "
        "standard input. With an empty prompt the model begins by itself. The default is a "
        "newline, or an empty prompt if the vocabulary has no newline.",
        section="Text",
    )
    prompts: str = once(
        "",
        "File of prompts, one a line; - is standard input. Empty lines are skipped.",
        path=True,
    )
    num_samples: int = once(1, "Number of samples for each prompt.")
    max_new_tokens: int = once(500, "Number of tokens to generate for each sample.")
    seed: int = once(
        1337, "Random seed. A sample depends only on its prompt, the seed and its number."
    )
    stop: tuple[str, ...] = once((), "Strings that end a sample; they are not printed.")
    stop_id: tuple[int, ...] = once((), "Token ids that end a sample; they are not printed.")
    ignore_eot: bool = once(False, "Continue after the end-of-text token.")
    allow_special: bool = once(
        False, "Read special tokens such as <|endoftext|> in a prompt as such, not as text."
    )
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    beams: int = once(
        1,
        "Search for the likeliest text with this many beams, and draw nothing at random; 1 = draw. "
        "Penalties and no_repeat_ngram hold, and stop cuts the text that was found. It ends at the "
        "latest where the context is full.",
        section="Beam search",
    )
    length_penalty: float = once(
        1.0, "Compare beams by their log-probability divided by their length to this power."
    )
    draft: str = once(
        "",
        "Draw faster, and the same text up to rounding, with drafts that the model checks several "
        "tokens at a time. ngram drafts what followed the same words in prompt and text; anything "
        "else names a small model of the same tokenizer, as --init_from does, or a run folder. A "
        "prompt or text that repeats itself, and a large model, gain most.",
        section="Speculative decoding",
        path=True,
    )
    draft_tokens: int = once(4, "Number of tokens to draft at a time.")
    json: bool = once(
        False,
        "Print a line of JSON for each sample: prompt, prompt_ids, sample (its number), ids, text, "
        "logprobs, ended (by eot, stop, stop_id or length), ended_by (which string or id), score "
        "with beams, and with a draft how many tokens were drafted and how many of them were "
        "right. ids hold each token drawn, also the one that ended the sample, and logprobs are "
        "theirs by the model itself, before the temperature and all filters.",
        section="Output",
    )
    logprobs: int = once(
        0, "With --json, add likeliest: this many of the likeliest tokens at each position."
    )
    no_echo: bool = once(False, "Print the text without its prompt.")
    batch_size: int = once(
        64, "Number of samples to draw at once. It costs memory, and changes no sample."
    )
    interactive: bool = once(
        False,
        "Ask for one prompt after another. Ctrl-C stops the sample that is being written; an empty "
        "line, Ctrl-D or Ctrl-C at the prompt ends the program.",
        section="Terminal and machine",
    )
    raw: bool = once(False, "Print control characters unchanged, even to a terminal.")
    compile_cache: str = once("auto", COMPILE_CACHE, path=True)
    debug: bool = once(False, DEBUG)

    def __post_init__(self) -> None:
        require_range(self, "num_samples batch_size", 1)
        require_range(self, "beams", 1, 1000)
        require_range(self, "draft_tokens", 1, 64)
        require_range(self, "length_penalty", -100, 100)
        require_range(self, "max_new_tokens logprobs", 0)
        require_range(self, "seed", 0, 2**32 - 1)


# Flags that the first one of each line does not go with.
CONTRADICTIONS = {
    "interactive": ("json", "prompts", "start"),
    "prompts": ("start",),
    "beams": ("temperature", "top_k", "top_p", "min_p", "num_samples", "draft"),
}


def refuse_contradictions(config: SamplerConfig, given: Mapping[str, object]) -> None:
    """Raise UsageError if two flags contradict each other, or one has no effect by itself."""
    values, default = flatten(config), flatten(SamplerConfig())
    on = {name for name in given if values[name] != default[name]}
    values["start"] = " ".join(config.start)  # as it was typed
    for flag, others in CONTRADICTIONS.items():
        for other in others:
            both = flag in on and other in (given if other == "temperature" else on)
            rule = f"does not go with --{other}={values[other]}; leave one of them out"
            require(not both, flag, values[flag], rule)
    rule = "standard input can be read once only; leave one of them out"
    require(config.start.count("-") < 2, "start", values["start"], rule)
    needs = {"logprobs": "json", "length_penalty": "beams", "draft_tokens": "draft"}
    for flag, needed in needs.items():
        rule = f"has an effect only with --{needed}; add it, or leave --{flag} out"
        require(flag not in on or needed in on, flag, values[flag], rule)
