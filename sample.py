"""Sample text from a trained model: `python sample.py --out_dir=out --start="Once"`."""

import dataclasses
import sys
from pathlib import Path

import gptjax  # noqa: F401  (before jax: it sets up the allocator)

# isort: split
import jax

from gptjax import model, sampling
from gptjax.checkpoints.run_folder import load_run
from gptjax.config import DType, GPTConfig, SampleConfig, require, require_range
from gptjax.conversion import sources
from gptjax.errors import DataError, UsageError, plural
from gptjax.files import expand
from gptjax.presets import PRESETS
from gptjax.terminal import cli, flags
from gptjax.terminal.console import printable
from gptjax.terminal.output import note
from gptjax.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    """What `sample.py` needs."""

    out_dir: str = "out"
    """the run folder to sample from"""
    init_from: str = "resume"
    """resume = the run in out_dir; scratch = an untrained model of the preset, over bytes; else a
    name on the Hugging Face Hub (gpt2, gpt2-medium, ...) or what convert_gpt2.py imports"""
    preset: str = "quickstart"
    """whose model --init_from=scratch makes"""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a step"""
    start: tuple[str, ...] = ()
    """prompts, one or several; FILE:path reads one from a file; "" starts from nothing; when none
    is given "\\n", or nothing where the vocabulary has no newline"""
    num_samples: int = 1
    """samples per prompt"""
    max_new_tokens: int = 500
    """tokens per sample"""
    seed: int = 1337
    """of the draws; a sample depends on prompt, seed and its number, not on the others"""
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    stop: tuple[str, ...] = ()
    """strings that end a sample; they are not printed"""
    ignore_eot: bool = False
    """go on after the end-of-text token instead of stopping there"""
    allow_special: bool = False
    """read <|endoftext|> in a prompt as that token, not as text"""
    interactive: bool = False
    """ask for prompt after prompt; Ctrl-C stops the text that is being written; an empty line,
    Ctrl-D or Ctrl-C at the prompt ends"""
    raw: bool = False
    """print control characters as they are, also on a terminal"""
    dtype: DType = "auto"
    """compute dtype: auto, float32, bfloat16 or float16"""
    compile_cache: str = "auto"
    """folder of compiled programs; auto = xla in the cache folder, which is ~/.cache/gptjax or what
    the variable GPTJAX_CACHE names; off = compile every time"""
    debug: bool = False
    """show a traceback where an error would be one line"""

    def __post_init__(self) -> None:
        require_range(self, "num_samples", 1)
        require_range(self, "max_new_tokens", 0)
        require_range(self, "seed", 0, 2**32 - 1)


def load_model(config: Config) -> tuple[GPTConfig, model.Params, Tokenizer]:
    """The model of the run folder, or an untrained one."""
    if config.init_from == "scratch":
        if config.preset not in PRESETS:
            raise UsageError(f"--preset={config.preset}: must be one of {', '.join(PRESETS)}")
        tokenizer = ByteTokenizer()
        cfg = dataclasses.replace(PRESETS[config.preset].model, vocab_size=tokenizer.n_vocab)
        init_params = jax.jit(model.init_params, static_argnums=0)
        return cfg, init_params(cfg, jax.random.key(config.seed)), tokenizer
    run_dir = Path(config.out_dir if config.init_from == "resume" else config.init_from)
    if config.init_from == "resume" or (run_dir / "checkpoints").is_dir():
        run = load_run(run_dir, config.checkpoint)
    else:
        run = sources.load_model(config.init_from)
    return run.config.model, run.params, run.tokenizer


def read_prompt(start: str, tokenizer: Tokenizer, allow_special: bool) -> tuple[str, list[int]]:
    """A prompt and its ids; an empty one becomes the tokenizer's start token."""
    if start.startswith("FILE:"):
        require(start != "FILE:", "start", start, "name the file behind the colon")
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
    """A newline, or nothing where the vocabulary has none."""
    try:
        tokenizer.encode("\n")
    except DataError:
        return ""
    return "\n"


class Stream:
    """One sample on its way to the reader: decodes, and ends at a stop string or end of text."""

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.eot = None if config.ignore_eot else tokenizer.eot
        self.stop = [stop for stop in config.stop if stop]
        self.held = ""  # the end of the text, which a stop string might begin in
        self.ended = False

    def feed(self, ids: list[int]) -> str:
        """The text that may be shown after these ids."""
        if self.ended:
            return ""
        if self.eot in ids:
            ids, self.ended = ids[: ids.index(self.eot)], True
        text = self.held + self.decoder.feed(ids)
        return self._release(text + self.decoder.flush() if self.ended else text)

    def finish(self) -> str:
        """What is left at the end."""
        if self.ended:
            return ""
        self.ended = True
        return self._release(self.held + self.decoder.flush())

    def _release(self, text: str) -> str:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.ended, self.held = True, ""
            return text[: min(found)]
        hold = 0
        if not self.ended:
            hold = max(
                (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
                default=0,
            )
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]


def main(argv: list[str]) -> int:
    """Sample; returns the exit code."""
    config = flags.parse(Config, argv, Config(), "Sample text from a trained GPT.")
    cli.use_compile_cache(config.compile_cache)
    cfg, params, tokenizer = load_model(config)
    cfg = model.resolve(dataclasses.replace(cfg, dtype=config.dtype, dropout=0.0))
    params = model.prepare_for_decoding(cfg, params)
    raw = config.raw or not sys.stdout.isatty()

    def write(text: str) -> None:
        sys.stdout.write(text if raw else printable(text))
        sys.stdout.flush()

    def sample(starts: tuple[str, ...]) -> None:
        """Print the samples of these prompts: a single one as it comes, several one by one."""
        prompts = [read_prompt(start, tokenizer, config.allow_special) for start in starts]
        for _, ids in prompts:
            left = len(sampling.cut(ids, cfg.block_size))
            if left < len(ids):
                note(
                    f"note: a prompt has {len(ids)} tokens, the context {cfg.block_size}: only its "
                    f"last {left} {plural(left, 'token')} will be read"
                )
        rows = [(text, ids, i) for text, ids in prompts for i in range(config.num_samples)]
        streams = [Stream(tokenizer, config) for _ in rows]
        texts = [""] * len(rows)
        alone = len(rows) == 1
        if alone:
            write(rows[0][0])
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
                for row, (stream, ids) in enumerate(zip(streams, new.tolist(), strict=True)):
                    text = stream.feed(ids)
                    texts[row] += text
                    if alone:
                        write(text)
                if interrupted or all(stream.ended for stream in streams):
                    break
        if interrupted:
            raise KeyboardInterrupt
        for row, stream in enumerate(streams):
            text = stream.finish()
            texts[row] += text
            if alone:
                write(text + "\n")
        if not alone:
            for (prompt, _, i), text in zip(rows, texts, strict=True):
                write(f"---- {printable(prompt)[:40]!r}, sample {i}\n{prompt}{text}\n")

    if not config.interactive:
        sample(config.start or (default_start(tokenizer),))
        return 0
    while True:
        try:
            start = input("prompt> ")
        except (EOFError, KeyboardInterrupt) as end:
            write("\n")
            return 130 if isinstance(end, KeyboardInterrupt) else 0
        if not start:
            return 0
        try:
            sample((start,))
        except (DataError, UsageError) as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            write("\n")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
