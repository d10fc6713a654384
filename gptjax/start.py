"""Where a run begins: its own newest step, another model's parameters, or nothing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gptjax import checkpoint, cli
from gptjax.bad_steps import BadStep
from gptjax.config import TrainConfig
from gptjax.convert import SourceConfig, load_start
from gptjax.errors import CheckpointError, UsageError
from gptjax.run_folder import Run
from gptjax.tokenizer import Tokenizer, load_tokenizer


def find_start(
    config: TrainConfig, run_dir: Path, bad: BadStep | None
) -> tuple[list[int], Run | None]:
    """The steps to go on from, oldest first, or the run to take parameters and tokenizer from."""
    saved = checkpoint.steps(run_dir)
    if bad is not None:  # from a step before it, or from where the run began
        before = [step for step in saved if step <= bad["step"]]
        return before, None if before else find_source(config)
    if config.init_from == "resume" or (config.init_from == "auto" and saved):
        checkpoint.require_steps(run_dir)
        if config.resume_step < 0:
            return saved, None
        if config.resume_step not in saved:
            raise UsageError(f"--resume_step={config.resume_step}: must be one of {saved}")
        return [config.resume_step], None
    if saved:
        raise UsageError(
            f"--out_dir={run_dir}: holds a run up to step {saved[-1]}; take --init_from=resume to "
            "go on with it, or another --out_dir"
        )
    damaged = checkpoint.quarantined(run_dir)
    if damaged:
        raise CheckpointError(
            f"{checkpoint.folder(run_dir)} holds damaged steps only ({', '.join(damaged)}); take "
            "another --out_dir to start anew"
        )
    return [], find_source(config)


@contextlib.contextmanager
def name_settings(config: TrainConfig, argv: list[str]) -> Iterator[None]:
    """Where a run goes on, say of a refused setting that no flag gave that config.json has it."""
    settings = Path(config.out_dir) / "config.json"
    goes_on = settings.is_file() and (config.init_from in ("resume", "auto") or config.replay)
    try:
        yield
    except UsageError as error:
        flag = str(error).partition("=")[0]
        if not goes_on or not flag.startswith("--") or cli.peek(argv, flag[2:]) is not None:
            raise
        raise UsageError(
            f"{error} ({flag} comes from {settings}; if it is a path, it counts from where the run "
            f"was started: go there, or pass {flag} again)"
        ) from error


def find_source(config: TrainConfig) -> Run | None:
    """The model that a run begins with, None if with a fresh one."""
    if config.init_from in ("scratch", "auto"):
        return None
    return load_start(config.init_from, SourceConfig(tokenizer_dir=config.tokenizer_dir))


def choose_tokenizer(
    config: TrainConfig, steps: list[int], source: Run | None, run_dir: Path
) -> Tokenizer | str:
    """The source's, the resumed run's, or the one that the flag names."""
    if source is not None:
        return source.tokenizer
    return load_tokenizer(run_dir) if steps and config.tokenizer == "auto" else config.tokenizer
