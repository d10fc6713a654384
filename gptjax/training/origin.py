"""The origin of a run's first state: a step of its own, another model's parameters, or neither."""

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any

from gptjax.checkpoints.run_folder import Run
from gptjax.checkpoints.steps import (
    checkpoint_folder,
    quarantined,
    require_steps,
    saved_steps,
)
from gptjax.config import GPTConfig, TrainConfig
from gptjax.conversion.sources import SourceConfig, load_model
from gptjax.errors import CheckpointError, UsageError
from gptjax.model import Params
from gptjax.settings import architecture, names
from gptjax.tokenizer import Tokenizer, load_tokenizer
from gptjax.training.bad_steps import BadStep


def find_start(
    config: TrainConfig, run_dir: Path, bad: BadStep | None
) -> tuple[list[int], Run | None]:
    """Return the steps to go on from, oldest first, or the model to take parameters from.

    Raises:
        UsageError: the folder holds a run that no flag resumes, or lacks the step that was named.
        CheckpointError: there is no step to go on from, or only damaged ones.
    """
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
            "continue it, or another --out_dir"
        )
    damaged = quarantined(run_dir)
    if damaged:
        raise CheckpointError(
            f"{checkpoint_folder(run_dir)} holds only damaged steps ({', '.join(damaged)}); take "
            "another --out_dir to start a new run"
        )
    return [], find_source(config)


def find_source(config: TrainConfig) -> Run | None:
    """Return the model whose parameters a run begins with, None if it begins with random ones."""
    if config.init_from in ("scratch", "auto"):
        return None
    return load_model(config.init_from, SourceConfig(tokenizer_dir=config.tokenizer_dir))


def with_architecture_of(cfg: GPTConfig, theirs: GPTConfig) -> GPTConfig:
    """Return `cfg` with the architecture of `theirs`, so that it fits their parameters."""
    taken = {name: getattr(theirs, name) for name in names(GPTConfig, architecture)}
    return dataclasses.replace(cfg, **taken)


def model_of_source(config: TrainConfig, source: Run, given: Container[str]) -> GPTConfig:
    """Return the source's model as this run uses it.

    Dropout and what concerns the machine are this run's, and the context is no longer than asked
    for.

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
            resize = ", or import that model with --vocab_size" if name == "vocab_size" else ""
            raise UsageError(f"--{name}={ours}: {where} {rule}; leave the flag out{resize}")
    kind = source.tokenizer.kind
    if "tokenizer" in given and config.tokenizer not in ("auto", kind):
        raise UsageError(
            f"--tokenizer={config.tokenizer}: {where} has a tokenizer ({kind}); leave the flag out"
        )
    block_size = min(config.model.block_size, cfg.block_size)
    return dataclasses.replace(cfg, block_size=block_size)


def take_params(fresh: Params, theirs: Params) -> Params:
    """Return a source's parameters, without the positions behind this run's block_size.

    Args:
        fresh: this run's, of which those stay that the source has not.
        theirs: the source's, of a model that differs in block_size alone among the architecture's
            settings, as `model_of_source` sees to.

    Raises:
        UsageError: the source has parameters that this run's model does not have.
    """
    unknown = set(theirs) - set(fresh)
    if unknown:
        name = min(unknown)
        raise UsageError(f"--init_from: its model has {name}, which this run's model does not have")

    def take(name: str, ours: Any) -> Any:
        if name not in theirs:
            return ours
        if isinstance(ours, dict):
            return take_params(ours, theirs[name])
        return theirs[name][tuple(map(slice, ours.shape))]

    return {name: take(name, ours) for name, ours in fresh.items()}


def choose_tokenizer(
    config: TrainConfig, steps: list[int], source: Run | None, run_dir: Path
) -> Tokenizer | str:
    """Return the tokenizer of the source or of the resumed run, or what the flag names."""
    if source is not None:
        return source.tokenizer
    return load_tokenizer(run_dir) if steps and config.tokenizer == "auto" else config.tokenizer
