"""Where a run begins: its own newest step, another model's parameters, or nothing."""

import contextlib
import dataclasses
from collections.abc import Container, Iterator
from pathlib import Path

import jax

from gptjax.checkpoints.run_folder import Run
from gptjax.checkpoints.steps import (
    checkpoint_folder,
    quarantined,
    require_steps,
    saved_steps,
)
from gptjax.config import GPTConfig, TrainConfig
from gptjax.config_file import load_config
from gptjax.conversion.sources import SourceConfig, load_model
from gptjax.errors import CheckpointError, UsageError
from gptjax.model import Params
from gptjax.settings import architecture, fields_of, names
from gptjax.tokenizer import Tokenizer, load_tokenizer
from gptjax.training.bad_steps import BadStep


def find_start(
    config: TrainConfig, run_dir: Path, bad: BadStep | None
) -> tuple[list[int], Run | None]:
    """The steps to go on from, oldest first, or the run to take parameters and tokenizer from."""
    saved = saved_steps(run_dir)
    if bad is not None:  # from a step before it, or from where the run began
        before = [step for step in saved if step <= bad["step"]]
        return before, None if before else find_source(config)
    if config.init_from == "resume" or (config.init_from == "auto" and saved):
        require_steps(run_dir)
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
    damaged = quarantined(run_dir)
    if damaged:
        raise CheckpointError(
            f"{checkpoint_folder(run_dir)} holds damaged steps only ({', '.join(damaged)}); take "
            "another --out_dir to start anew"
        )
    return [], find_source(config)


@contextlib.contextmanager
def name_settings(settings: Path | None, given: Container[str]) -> Iterator[None]:
    """Say of a refused setting that no flag gave that it comes from the run that goes on.

    Args:
        settings: its config.json; None where no run goes on.
        given: the flags.
    """
    try:
        yield
    except UsageError as error:
        flag = str(error).partition("=")[0]
        if settings is None or not flag.startswith("--") or flag[2:] in given:
            raise
        where = f"{flag} comes from {settings}"
        if fields_of(TrainConfig)[flag[2:]].metadata["path"]:
            where += (
                ", and a path counts from where the run was started: go there, or pass it again"
            )
        raise UsageError(f"{error} ({where})") from error


def settings_to_go_on(run_dir: Path, init_from: str | None, replay: str | None) -> Path | None:
    """Return the config.json of the run that goes on in this folder, None if none does."""
    path = run_dir / "config.json"
    return path if path.is_file() and (init_from in ("resume", "auto") or replay) else None


def with_shape_of(config: TrainConfig, init_from: str) -> TrainConfig:
    """Return the settings with the model of another run's folder, but for its context length.

    So that flags are checked against the model that there will be, not the preset's.
    """
    path = Path(init_from)
    if not (path / "checkpoints").is_dir() or not (path / "config.json").is_file():
        return config
    theirs = load_config(path / "config.json").model
    theirs = dataclasses.replace(theirs, block_size=config.model.block_size)
    return dataclasses.replace(config, model=with_architecture_of(config.model, theirs))


def find_source(config: TrainConfig) -> Run | None:
    """The model that a run begins with, None if with a fresh one."""
    if config.init_from in ("scratch", "auto"):
        return None
    return load_model(config.init_from, SourceConfig(tokenizer_dir=config.tokenizer_dir))


def with_architecture_of(cfg: GPTConfig, theirs: GPTConfig) -> GPTConfig:
    """Return the model that their parameters belong to, for the rest as `cfg`."""
    taken = {name: getattr(theirs, name) for name in names(GPTConfig, architecture)}
    return dataclasses.replace(cfg, **taken)


def model_of_source(config: TrainConfig, source: Run, given: Container[str]) -> GPTConfig:
    """Return the source's model with this run's dropout and machine settings, and a context no
    longer than asked for.

    Raises:
        UsageError: a flag that was given asks for another model or tokenizer than the source's.
    """
    cfg = with_architecture_of(config.model, source.config.model)
    where = f"the model that --init_from={config.init_from} names"
    for name in names(GPTConfig, architecture):
        ours, theirs = getattr(config.model, name), getattr(cfg, name)
        fits = ours <= theirs if name == "block_size" else ours == theirs
        if name in given and not fits:
            rule = f"allows at most {theirs}" if name == "block_size" else f"has {name}={theirs}"
            raise UsageError(f"--{name}={ours}: {where} {rule}; leave the flag out")
    kind = source.tokenizer.kind
    if "tokenizer" in given and config.tokenizer not in ("auto", kind):
        raise UsageError(
            f"--tokenizer={config.tokenizer}: {where} has its own ({kind}); leave the flag out"
        )
    block_size = min(config.model.block_size, cfg.block_size)
    return dataclasses.replace(cfg, block_size=block_size)


def crop_context(params: Params, shapes: Params) -> Params:
    """Return a source's parameters without the positions behind this run's block_size.

    Args:
        params: of a model that differs in block_size alone, as `model_of_source` sees to.
        shapes: of this run's parameters; what is longer there ends where these end.
    """
    return jax.tree.map(lambda p, to: p[tuple(map(slice, to.shape))], params, shapes)


def choose_tokenizer(
    config: TrainConfig, steps: list[int], source: Run | None, run_dir: Path
) -> Tokenizer | str:
    """The source's, the resumed run's, or the one that the flag names."""
    if source is not None:
        return source.tokenizer
    return load_tokenizer(run_dir) if steps and config.tokenizer == "auto" else config.tokenizer
