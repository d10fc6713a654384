"""What a model is, in the words of nanoGPT, minGPT and their kin."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import GPTConfig
from gptjax.conversion.fields import ACTIVATIONS, check_fields, shown
from gptjax.conversion.hf_config import CHECKED, other_computation
from gptjax.conversion.tensors import LIMITS, make_config
from gptjax.conversion.torch_file import plain
from gptjax.errors import DataError
from gptjax.files import read_json
from gptjax.settings import require

# Where programs keep the model's settings, in a checkpoint or in their configuration.
SECTIONS = ("model_args", "model_config", "gpt_config", "config", "hyper_parameters", "args")
MINGPT = {  # its model_type -> n_layer, n_head, n_embd; source: minGPT's model.py
    "openai-gpt": (12, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "gopher-44m": (8, 16, 512),
    "gpt-mini": (6, 6, 192),
    "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}
TIES = ("tie_head", "tie_weights", "tie_word_embeddings", "tie_embeddings", "weight_tying")
# What stands beside the sizes and changes nothing in the model: of nanoGPT's train.py, of
# minGPT's trainer and its other sections, of makemore (n_embd2 is of its other networks).
OF_TRAINING = {
    *("always_save_checkpoint", "backend", "batch_size", "beta1", "beta2", "betas", "compile"),
    *("dataset", "decay_lr", "device", "eval_interval", "eval_iters", "eval_only", "grad_clip"),
    *("grad_norm_clip", "gradient_accumulation_steps", "init_from", "input_file", "learning_rate"),
    *("log_interval", "lr", "lr_decay_iters", "max_iters", "max_steps", "min_lr", "n_embd2"),
    *("num_workers", "out_dir", "resume", "sample_only", "seed", "type", "wandb_log"),
    *("wandb_project", "wandb_run_name", "warmup_iters", "weight_decay", "work_dir"),
}
MINGPT_SECTIONS = ("system", "data", "trainer")  # beside the one called model


class Found(NamedTuple):
    """What the names and shapes of the tensors say by themselves."""

    sizes: Mapping[str, int | None]  # of LIMITS, without n_head
    bias: bool
    same_head: bool  # whether no head is stored, or one that equals wte
    of_2020: bool  # whether the names are minGPT's of 2020


def about_model(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields about the model, in whatever section they are, and those around them."""
    found = {str(name): value for name, value in fields.items()}
    for _ in range(4):  # as deep as anyone nests them
        sections = [k for k in (*SECTIONS, "model") if plain(found.get(k))]
        if "n_head" in found or not sections:
            break
        inside = plain(found.pop(sections[0]))
        found |= {str(name): value for name, value in inside.items()}
    return found


def said_fields(name: str) -> dict[str, Any] | None:
    """Return what the file that --config names says, None without such a file."""
    if not name:
        return None
    path = Path(name)
    require(path.is_file(), "config", name, "there is no such file; name one in JSON")
    return read_json(path)


def fields_beside(path: Path) -> dict[str, Any] | None:
    """Return what the config.json in a file's folder says, None if there is none."""
    found = path.with_name("config.json")
    return read_json(found) if found.is_file() else None


def is_hugging_faces(fields: Mapping[str, Any]) -> bool:
    """Return whether a configuration is in Hugging Face's words, as far as can be told."""
    theirs = {"n_positions", "n_ctx", "architectures", "transformers_version"}
    ours = {"n_head", "block_size", "model", "model_args"}
    return bool(theirs & set(fields)) or ("model_type" in fields and not ours & set(fields))


def read_words(
    fields: Mapping[str, Any], found: Found, where: object, accept: Collection[str] = ()
) -> tuple[GPTConfig, str]:
    """Return the model, and a sentence on what was assumed about it, or "" if all was said.

    Args:
        fields: as of `about_model`, not in Hugging Face's words.
        found: what the tensors say, which the fields may say too, but not otherwise.
        where: the file, for messages.
        accept: fields that the user vouches for.

    Raises:
        DataError: the fields contradict the tensors or GPT-2, are unknown, or say no n_head.
    """
    said, kind = dict(fields), fields.get("model_type")
    # "gpt2" is Hugging Face's word too, but beside it minGPT leaves n_head out.
    of_mingpt = found.of_2020 or (
        isinstance(kind, str) and kind in MINGPT and (kind != "gpt2" or said.get("n_head") is None)
    )
    if of_mingpt and isinstance(kind, str) and kind in MINGPT:
        meant = dict(zip(("n_layer", "n_head", "n_embd"), MINGPT[kind], strict=True))
        said |= {name: meant[name] for name in meant if said.get(name) is None}
    if said.get("n_head") is None:
        raise DataError(
            f"{where}: the tensors do not say how many heads the model has, and no config.json "
            "does",
            "--config=FILE.json",
            'whose text may be as short as {"n_head": 12}',
        )
    computed = {name: said[name] for name in CHECKED - {"model_type"} if name in said}
    problems = other_computation({**computed, "n_embd": found.sizes["n_embd"]})
    by_shape = {**found.sizes, "bias": found.bias}
    for name, size in by_shape.items():
        value = said.get(name)
        if name == "bias" and name in said and type(value) is not bool:
            problems.append(f"bias={value!r}, expected true or false")
        elif None not in (value, size) and (type(value) is not type(size) or value != size):
            problems.append(f"{shown(name, value)}, and the tensors say {size}")
    ties = {name: said[name] for name in TIES if type(said.get(name)) is bool}
    tied = next(iter(ties.values()), found.same_head and not of_mingpt)
    if len({*ties.values()}) > 1:
        problems.append(" contradicts ".join(shown(*tie) for tie in ties.items()))
    if not found.same_head and True in ties.values():
        problems.append(f"{shown(*next(iter(ties.items())))}, and the head differs from wte")
    if kind is not None and not of_mingpt and kind not in ("gpt", "gpt2", "transformer"):
        problems.append(f"{shown('model_type', kind)} is none of {', '.join(MINGPT)}")
    activation, assumed = choose_activation(said, found, of_mingpt)
    known = {*LIMITS, *ties, *OF_TRAINING, *CHECKED, "bias", "dropout"}
    if "model_type" in said:
        known |= {name for name in MINGPT_SECTIONS if isinstance(said.get(name), dict)}
    check_fields(said, known, where, problems, accept)
    sizes = {name: said.get(name) if size is None else size for name, size in found.sizes.items()}
    sizes["n_head"] = said["n_head"]
    cfg = make_config(sizes, where, bias=found.bias, activation=activation, tie_head=tied)
    return cfg, assumed


def choose_activation(
    said: Mapping[str, Any], found: Found, of_mingpt: bool = False
) -> tuple[str, str]:
    """Return which GELU to take, "" if it is none, and a sentence unless the file says it.

    nanoGPT computes the exact form since June 2023, whatever the weights it started from, and
    computed the tanh form before; files without `bias` are older, and only later ones lack biases.
    minGPT of 2020 computes the exact form; minGPT since, makemore and build-nanogpt the tanh form.
    """
    if "activation_function" in said:
        return ACTIVATIONS.get(str(said["activation_function"]), ""), ""
    if found.of_2020:
        taken, reason = "gelu", "the exact form, minGPT's of 2020"
    elif of_mingpt:
        taken, reason = "gelu_tanh", "minGPT's since 2022"
    elif "bias" in said or not found.bias:
        taken, reason = "gelu", "the exact form, nanoGPT's since June 2023"
    elif not found.same_head:
        taken, reason = "gelu_tanh", "minGPT's and makemore's, whose heads are untied too"
    else:
        taken = "gelu_tanh"
        reason = "GPT-2's, and nanoGPT's before June 2023, when its files had no bias setting"
    other = {"gelu_tanh": "the exact form take --activation=gelu"}
    other["gelu"] = "GPT-2's form, as in older files of nanoGPT, take --activation=gelu_tanh"
    return taken, (
        f"the file does not say its activation: {taken} is assumed, {reason}; for {other[taken]}"
    )
