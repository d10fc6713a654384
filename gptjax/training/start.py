"""The start of a run: its settings, data and devices, its first state, and its folder."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import files, model, sharding
from gptjax.checkpoints import record
from gptjax.checkpoints.restore import restore_newest
from gptjax.checkpoints.run_folder import Run
from gptjax.checkpoints.save import check_space
from gptjax.checkpoints.steps import Meta, saved_steps, set_aside, step_folder
from gptjax.config import GPTConfig, TrainConfig, parse_mesh
from gptjax.config_file import load_config, to_json
from gptjax.data.datasets import MAKERS, Dataset, load_dataset
from gptjax.errors import UsageError
from gptjax.terminal import cli, output
from gptjax.terminal.console import TrainConsole, show_progress
from gptjax.tokenizer import Tokenizer, save_tokenizer
from gptjax.training import bad_steps, faults, metrics, origin, plan
from gptjax.training.adapt import fit_batch, step_rows
from gptjax.training.auto_batch import largest_batch
from gptjax.training.failures import explain_failures
from gptjax.training.loss_scale import abstract_loss_scale, resume_loss_scale
from gptjax.training.run_settings import name_settings, settings_to_go_on
from gptjax.training.step import TrainState, init_state


class TrainingRun(NamedTuple):
    """The parts of a run before any array of its state exists."""

    config: TrainConfig  # whose model has no "auto" left
    stored: TrainConfig  # what config.json gets: the same, but for what "auto" stands for
    run_dir: Path
    dataset: Dataset
    mesh: Mesh
    console: TrainConsole
    record: record.Record  # what belongs to each checkpoint, and is compared on resume
    steps: list[int]  # the saved steps to go on from, oldest first; none in a new run
    source: Run | None  # the model whose parameters a new run begins with
    bad: bad_steps.BadStep | None  # the step to replay
    fault: faults.Fault | None
    stop_signals: list[int]  # grows when one comes
    began: float  # time.monotonic()

    @property
    def primary(self) -> bool:
        """Return whether this process is the one that writes and prints."""
        return jax.process_index() == 0


class Progress(NamedTuple):
    """The point at which a run begins."""

    step: int | None  # the step that was restored, None in a new run
    val_loss: float | None  # after that step, None where it was not evaluated
    best: float  # least validation loss, infinite where there is none


# ---- Settings, data, devices ---------------------------------------------------------------------


def open_run(config: TrainConfig, run_dir: Path, given: Container[str]) -> TrainingRun:
    """Find what the run begins with, read the data, and decide what the settings leave open.

    From here on signals that ask to stop are only noted (see `cli.catch_stop_signals`).

    Args:
        config: the settings.
        run_dir: the run folder, which is ours.
        given: the flags that the user gave: these are honoured, or refused.

    Raises:
        UsageError: a setting cannot be honoured.
        DataError: the data is damaged, too short or cannot be had.
        CheckpointError: there is nothing to go on from.
    """
    began = time.monotonic()
    fault = faults.planned_fault()
    bad = bad_steps.read_bad_step(Path(config.replay)) if config.replay else None
    steps, source = origin.find_start(config, run_dir, bad)
    check_flags(config, given, steps, replaying=bad is not None)
    mesh = sharding.make_mesh(axes=parse_mesh(config.mesh))
    n_devices = sharding.batch_shards(mesh)
    cfg = config.model if source is None else origin.model_of_source(config, source, given)
    sharding.require_equal_parts(mesh, cfg)
    config = dataclasses.replace(config, model=cfg)
    config, batch_note = fit_batch(config, n_devices, given, resumed=bool(steps))
    console = TrainConsole(config.max_iters, quiet=jax.process_index() > 0)
    if batch_note:
        console.note(batch_note)
    tokenizer = origin.choose_tokenizer(config, steps, source, run_dir)
    dataset = read_dataset(config, cfg, tokenizer, console)
    stop_signals = cli.catch_stop_signals()  # until here there is nothing to save
    n_vocab = dataset.tokenizer.n_vocab
    if "vocab_size" in given and cfg.vocab_size != n_vocab:
        raise UsageError(
            f"--vocab_size={cfg.vocab_size}: must be the tokenizer's, {n_vocab} tokens; "
            "leave the flag out"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(cfg, vocab_size=n_vocab))
    if config.batch_size == 0:
        resolved = dataclasses.replace(config, model=model.resolve(config.model, training=True))
        rows = step_rows(config, given)
        size, note = largest_batch(resolved, mesh, 0 if rows % n_devices else rows)
        console.note(note)
        config = dataclasses.replace(config, batch_size=size)
        config, _ = fit_batch(config, n_devices, given, resumed=bool(steps))
    stored = config
    if source is not None or config.tokenizer not in MAKERS:
        # The run folder's own counts when this run is resumed, also if a file is gone by then.
        stored = dataclasses.replace(stored, tokenizer="auto")
    if steps and (run_dir / "config.json").is_file():
        # What it was started from: a replay may have to start there again.
        started = load_config(run_dir / "config.json")
        stored = dataclasses.replace(stored, init_from=started.init_from)
    config = dataclasses.replace(stored, model=model.resolve(stored.model, training=True))
    if "loss_scale" in given and config.loss_scale > 0 and config.model.dtype != "float16":
        raise UsageError(
            f"--loss_scale={config.loss_scale:g}: is for float16, but the computation is in "
            f"{config.model.dtype}; take --dtype=float16, or leave the flag out"
        )
    shards = [*dataset.train, *dataset.val]
    return TrainingRun(
        config,
        stored,
        run_dir,
        dataset,
        mesh,
        console,
        record.make_record(config, shards, dataset.tokenizer, len(dataset.train)),
        steps,
        source,
        bad,
        fault,
        stop_signals,
        began,
    )


def check_flags(
    config: TrainConfig, given: Container[str], steps: list[int], *, replaying: bool
) -> None:
    """Raise UsageError for a flag that does not fit the step with which the run begins."""
    if replaying:
        return
    asked = {"max_iters": config.max_iters, "stop_step": config.stop_step or config.max_iters}
    for name, last in asked.items():
        if steps and last < steps[-1]:
            raise UsageError(f"--{name}={last}: the run has already reached step {steps[-1]}")
    for name in ("resume_step", "allow_change"):
        if name in given and config.init_from not in ("resume", "auto"):
            raise UsageError(f"--{name}: needs --init_from=resume or auto; leave the flag out")


def read_dataset(
    config: TrainConfig, cfg: GPTConfig, tokenizer: Tokenizer | str, console: TrainConsole
) -> Dataset:
    """Return the tokens of both splits, while the console shows the progress."""
    with show_progress(console.console) as progress:
        return load_dataset(
            config.dataset,
            block_size=cfg.block_size,
            val_dataset=config.val_dataset,
            val_fraction=config.val_fraction,
            tokenizer=tokenizer,
            tokenizer_dir=config.tokenizer_dir,
            decode_errors=config.decode_errors,
            allow_special=config.allow_special,
            notify=console.note,
            progress=progress,
        )


# ---- The first state -----------------------------------------------------------------------------


def init_or_restore(run: TrainingRun, abstract: TrainState) -> tuple[TrainState, Progress]:
    """Return the state of the newest intact step of the run, or a fresh one if the run is new.

    Raises:
        CheckpointError: no saved step is intact.
        UsageError: the settings are not those with which the run was saved.
    """
    if run.steps:
        return restore_state(run, abstract)
    state = init_state(run.config, abstract)
    if run.source is not None:
        params = origin.take_params(state.params, run.source.params)
        shardings = sharding.shardings_of(abstract.params)
        state = state._replace(params=jax.device_put(params, shardings))
    return state, Progress(None, None, math.inf)


def restore_state(run: TrainingRun, abstract: TrainState) -> tuple[TrainState, Progress]:
    """Return the state of the newest intact step of `run.steps`; set damaged ones aside."""
    allowed = [name for name in run.config.allow_change.split(",") if name]

    def accept(meta: Meta) -> None:
        record.check_record(meta["record"], run.record, allowed, run.console.note)

    here = abstract.step.sharding
    restored = restore_newest(
        run.run_dir,
        (abstract.params, abstract._replace(loss_scale=None).extra()),
        accept,
        notify=run.console.note,
        only=run.steps,
        optional={"loss_scale": abstract_loss_scale(here)},
    )
    step = jax.device_put(np.int32(restored.step), here)
    state = TrainState(step, restored.params, **restored.extra)
    loss_scale = resume_loss_scale(run.config, state.loss_scale, run.console.note)
    state = state._replace(loss_scale=jax.device_put(loss_scale, here))
    run.console.note(f"resuming at step {restored.step}")
    meta = restored.meta
    return state, Progress(restored.step, meta["val_loss"], meta["best_val_loss"] or math.inf)


# ---- The folder ----------------------------------------------------------------------------------


def prepare_folder(run: TrainingRun, abstract: TrainState, progress: Progress) -> None:
    """Write the files of a run's folder; set aside what is newer than the step it resumes from.

    Raises:
        DiskError: there is not room enough for the checkpoints, unless config.force is set.
    """
    if run.primary:
        if not run.config.force:
            check_space(
                run.run_dir,
                (abstract.params, abstract.opt_state),
                plan.count_saves(run.config),
                "make room, lower --keep_checkpoints, or take --force to start anyway",
            )
        with files.replacing(run.run_dir / "config.json") as settings:
            settings.write(to_json(run.stored).encode())
        save_tokenizer(run.dataset.tokenizer, run.run_dir)
        if progress.step is None:
            (run.run_dir / "metrics.jsonl").write_text("")
            (run.run_dir / "samples.txt").write_text("")
        else:
            file = run.run_dir / "metrics.jsonl"
            metrics.drop_metrics_from(file, progress.step, run.console.note)
    if progress.step is not None:
        newer = [step for step in saved_steps(run.run_dir) if step > progress.step]
        sharding.all_agree(True)  # before one process renames them, all have looked
        for step in newer:
            name = set_aside(step_folder(run.run_dir, step), "aside")
            run.console.note(f"step {step} is set aside as {name}")


@contextlib.contextmanager
def hold_folder(config: TrainConfig, run_dir: Path, given: Container[str]) -> Iterator[None]:
    """Hold the lock of the run folder in this block, and put failures into plain words.

    What cannot be printed is written to unprinted.txt.

    Raises:
        OutputError: another process holds the folder.
    """
    settings = settings_to_go_on(run_dir, config.init_from, config.replay)
    lock = files.locked(run_dir / ".lock") if jax.process_index() == 0 else contextlib.nullcontext()
    with (
        output.forgiving_output(run_dir / "unprinted.txt"),
        lock,
        explain_failures(config),
        name_settings(settings, given),
    ):
        yield
