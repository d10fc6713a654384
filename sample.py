"""Sample text from a trained model: `python sample.py --out_dir=out --start="Once"`."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from gptjax import model, programs, sampling
from gptjax.checkpoints.run_folder import load_run
from gptjax.config import COMPILE_CACHE, DEBUG, DType, GPTConfig, SampleConfig
from gptjax.conversion import sources
from gptjax.errors import DataError, UsageError, plural
from gptjax.files import expand
from gptjax.presets import PRESETS
from gptjax.settings import once, require, require_range
from gptjax.terminal import cli, flags
from gptjax.terminal.console import printable
from gptjax.terminal.output import note
from gptjax.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer, decode


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The settings of `sample.py`."""

    out_dir: str = once("out", "Run folder to sample from.", section="Model", path=True)
    init_from: str = once(
        "resume",
        "resume takes the run in out_dir, scratch an untrained model of the preset, over bytes. "
        "Anything else names a model on the Hugging Face Hub (gpt2, gpt2-medium, ...) or what "
        "convert_gpt2.py imports.",
        path=True,
    )
    preset: str = once("quickstart", "Preset whose model --init_from=scratch makes.")
    checkpoint: str = once(
        "best", "Step to load: best (by validation loss), latest, or its number."
    )
    dtype: DType = once(
        "auto", "Type to compute in. auto is bfloat16 on a GPU or TPU, and float32 on a CPU."
    )
    start: tuple[str, ...] = once(
        (),
        "One or several prompts. FILE:path reads a prompt from a file. With an empty prompt the "
        "model begins by itself. The default is a newline, or an empty prompt if the vocabulary "
        "has no newline.",
        section="Text",
    )
    num_samples: int = once(1, "Number of samples for each prompt.")
    max_new_tokens: int = once(500, "Number of tokens to generate for each sample.")
    seed: int = once(
        1337, "Random seed. A sample depends only on its prompt, the seed and its number."
    )
    stop: tuple[str, ...] = once((), "Strings that end a sample; they are not printed.")
    ignore_eot: bool = once(False, "Continue after the end-of-text token.")
    allow_special: bool = once(False, "Read <|endoftext|> in a prompt as that token, not as text.")
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
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
        require_range(self, "num_samples", 1)
        require_range(self, "max_new_tokens", 0)
        require_range(self, "seed", 0, 2**32 - 1)


def load_model(config: SamplerConfig) -> tuple[GPTConfig, model.Params, Tokenizer]:
    """Return the model of the run folder, of another source, or an untrained one."""
    if config.init_from == "scratch":
        if config.preset not in PRESETS:
            raise UsageError(f"--preset={config.preset}: must be one of {', '.join(PRESETS)}")
        tokenizer = ByteTokenizer()
        cfg = dataclasses.replace(PRESETS[config.preset].model, vocab_size=tokenizer.n_vocab)
        init_params = jax.jit(model.init_params, static_argnums=0)
        return cfg, init_params(cfg, jax.random.key(config.seed)), tokenizer
    if config.init_from == "resume":
        run = load_run(Path(config.out_dir), config.checkpoint)
    else:
        run = sources.load_model(config.init_from, which=config.checkpoint)
    return run.config.model, run.params, run.tokenizer


def read_prompt(start: str, tokenizer: Tokenizer, allow_special: bool) -> tuple[str, list[int]]:
    """Return a prompt and its ids; an empty one becomes the tokenizer's start token."""
    if start.startswith("FILE:"):
        require(start != "FILE:", "start", start, "name the file after the colon")
        path = expand(start.removeprefix("FILE:"))
        try:
            start = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt ({path}) is not UTF-8 at byte {error.start}") from error
        except (OSError, ValueError) as error:  # a ValueError: a NUL or surrogate in the name
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"cannot read the prompt ({path}): {reason}") from error
    ids = tokenizer.encode(start, allow_special=allow_special).tolist()
    return start, ids or [tokenizer.start_id]


def default_start(tokenizer: Tokenizer) -> str:
    """Return a newline, or nothing where the vocabulary has none."""
    try:
        return "\n" if "\n" in decode(tokenizer, tokenizer.encode("\n")) else ""
    except DataError:
        return ""


class Stream:
    """One sample on its way to the reader, which ends at a stop string or the end of text."""

    def __init__(
        self, tokenizer: Tokenizer, config: SamplerConfig, prompt: Sequence[int] = ()
    ) -> None:
        """Begin a sample behind a prompt, with nothing shown."""
        self.decoder = StreamDecoder(tokenizer, prompt)
        self.eos = () if config.ignore_eot else tokenizer.eos
        self.stop = [stop for stop in config.stop if stop]
        self.text = ""  # all that may be shown so far
        self.held = ""  # the end of the text, which a stop string might begin in
        self.ended = False

    def feed(self, ids: list[int]) -> str:
        """Return the text that may be shown after these ids, beside what was shown before."""
        if self.ended:
            return ""
        if ends := [at for at, i in enumerate(ids) if i in self.eos]:
            ids, self.ended = ids[: ends[0]], True
        text = self.held + self.decoder.feed(ids)
        return self._release(text + self.decoder.flush() if self.ended else text)

    def finish(self) -> str:
        """Return what is left at the end."""
        if self.ended:
            return ""
        self.ended = True
        return self._release(self.held + self.decoder.flush())

    def _release(self, text: str) -> str:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        hold = 0
        if found:
            self.ended, text = True, text[: min(found)]
        elif not self.ended:
            beginnings = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
            hold = max((len(part) for part in beginnings if text.endswith(part)), default=0)
        text, self.held = text[: len(text) - hold], text[len(text) - hold :]
        self.text += text
        return text


def write(config: SamplerConfig, text: str) -> None:
    """Print a text at once; on a terminal, unless --raw, with its control characters escaped."""
    raw = config.raw or not sys.stdout.isatty()
    sys.stdout.write(text if raw else printable(text))
    sys.stdout.flush()


def write_samples(
    config: SamplerConfig,
    cfg: GPTConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    starts: tuple[str, ...],
) -> None:
    """Print the samples of these prompts: a single one as it comes, several one by one."""
    prompts = [read_prompt(start, tokenizer, config.allow_special) for start in starts]
    for _, ids in prompts:
        left = len(sampling.cut(ids, cfg.block_size))
        if left < len(ids):
            note(
                f"note: a prompt has {len(ids)} tokens, but the context holds {cfg.block_size}: "
                f"only its last {left} {plural(left, 'token')} will be used"
            )
    rows = [(text, ids, i) for text, ids in prompts for i in range(config.num_samples)]
    streams = [Stream(tokenizer, config, ids if text else ()) for text, ids, _ in rows]
    alone = len(rows) == 1
    if alone:
        write(config, rows[0][0])
    pieces = sampling.generate(
        cfg,
        params,
        [ids for _, ids, _ in rows],
        config.sample,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        samples=[i for _, _, i in rows],
        cache_size=cfg.block_size if config.interactive else 0,
    )
    with cli.delay_interrupt() as interrupted:
        for new in pieces:
            for stream, ids in zip(streams, new.tolist(), strict=True):
                text = stream.feed(ids)
                if alone:
                    write(config, text)
            if interrupted or all(stream.ended for stream in streams):
                break
    if interrupted:
        raise KeyboardInterrupt
    rest = [stream.finish() for stream in streams]
    if alone:
        write(config, rest[0] + "\n")
        return
    for (prompt, _, i), stream in zip(rows, streams, strict=True):
        title = f"---- {printable(prompt)[:40]!r}, sample {i}"
        write(config, f"{title}\n{prompt}{stream.text}\n")


def converse(config: SamplerConfig, sample: Callable[[tuple[str, ...]], None]) -> int:
    """Sample one prompt after another until an empty one; return the exit code."""
    while True:
        try:
            start = input("prompt> ")
        except (EOFError, KeyboardInterrupt) as end:
            write(config, "\n")
            return 130 if isinstance(end, KeyboardInterrupt) else 0
        if not start:
            return 0
        try:
            sample((start,))
        except (DataError, UsageError) as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            write(config, "\n")


def main(argv: list[str]) -> int:
    """Sample text as the flags say; return the exit code."""
    about, prog = "Sample text from a trained GPT.", programs.command("sample.py")
    config = flags.parse(SamplerConfig, argv, SamplerConfig(), about, prog)
    cli.use_compile_cache(config.compile_cache)
    cfg, params, tokenizer = load_model(config)
    cfg = model.resolve(dataclasses.replace(cfg, dtype=config.dtype, dropout=0.0))
    params = model.prepare_for_decoding(cfg, params)
    sample = functools.partial(write_samples, config, cfg, params, tokenizer)
    if config.interactive:
        return converse(config, sample)
    sample(config.start or (default_start(tokenizer),))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
