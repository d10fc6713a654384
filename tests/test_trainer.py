"""The parts that train.py puts together, each by itself and without a process."""

import dataclasses
import json
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import distributed, sharding
from gptjax.checkpoints.record import make_record
from gptjax.checkpoints.save import Saver
from gptjax.checkpoints.steps import About
from gptjax.config import TrainConfig, parse_mesh
from gptjax.data.batches import eval_windows, sample_batch
from gptjax.data.datasets import Dataset
from gptjax.errors import DataError, DiskError, NonFiniteError, UsageError
from gptjax.terminal.console import TrainConsole
from gptjax.tokenizer import ByteTokenizer
from gptjax.training import faults, plan
from gptjax.training.adapt import fit_batch
from gptjax.training.feed import BatchFeed, step_starts, step_windows
from gptjax.training.metrics import Record
from gptjax.training.run_log import RunLog
from gptjax.training.run_settings import name_settings
from gptjax.training.start import (
    Progress,
    TrainingRun,
    init_or_restore,
    open_run,
    prepare_folder,
)
from gptjax.training.step import TrainState, abstract_state, digest, init_state, make_train_step
from gptjax.training.validation import validate, write_sample

from .helpers import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint16)
CFG = tiny(vocab_size=256)
CONFIG = TrainConfig(
    model=CFG, batch_size=8, max_iters=12, warmup_iters=2, learning_rate=1e-2, eval_interval=6
)


SIX_STEPS = step_windows(CONFIG, [TOKENS], range(6)).reshape(6, 8, 17)


def change(**settings: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **settings)


# ---- When something is due


def test_what_is_due_when() -> None:
    config = change(eval_interval=5, sample_interval=0, checkpoint_interval=4)
    evaluated = [step for step in range(13) if plan.is_evaluation_due(config, step)]
    assert evaluated == [0, 5, 10, 12]
    assert [step for step in range(13) if plan.is_sample_due(config, step)] == [12]
    assert [step for step in range(13) if plan.is_checkpoint_due(config, step)] == [4, 8, 12]
    assert not plan.is_sample_due(change(sample_tokens=0), 12)
    anything = [step for step in range(13) if plan.is_anything_due(config, step)]
    assert anything == [0, 4, 5, 8, 10, 12]


@pytest.mark.parametrize(
    ("settings", "first", "count"),
    [
        ({}, 0, 4),
        ({"eval_interval": 6}, 0, 3),
        ({"checkpoint_interval": 9}, 0, 3),
        ({"checkpoint_interval": 13}, 0, 4),  # which does not come
        ({"sample_interval": 1}, 0, 1),
        ({"sample_interval": 1, "sample_tokens": 0}, 0, 4),
        ({"stop_step": 5}, 0, 5),
        ({"stop_step": 7}, 0, 1),
        ({}, 2, 2),
        ({"max_iters": 0, "warmup_iters": 0}, 0, 5),  # which makes none
    ],
    ids=str,
)
def test_all_calls_take_equally_many_steps_and_end_where_something_is_due(
    settings: dict[str, int], first: int, count: int
) -> None:
    """Two lengths would be two programs."""
    never = {"eval_interval": 0, "sample_interval": 0, "checkpoint_interval": 0}
    config = change(steps_per_dispatch=5, **never | settings)
    taken, last = plan.steps_per_call(config, first), plan.last_step(config)
    ends = range(first, last + 1, taken)
    due = [step for step in range(first, last + 1) if plan.is_anything_due(config, step)]
    assert set(due) <= {*ends} and last in ends
    assert taken == count


def test_many_steps_need_no_memory_of_their_own() -> None:
    """The learning rates of all steps were once computed at the start: 12 GB for 1e9 steps."""
    config = change(max_iters=10**10, schedule="constant")
    mesh = sharding.make_mesh(jax.devices()[:1])
    abstract = abstract_state(config, mesh)
    step = make_train_step(config, abstract)
    windows = sharding.place(step_windows(config, [TOKENS], [0, 1, 2]), mesh, axis=2)
    _, values = step(init_state(config, abstract), windows)
    assert values["learning_rate"].tolist() == pytest.approx([1e-2 / 3, 1e-2 * 2 / 3, 1e-2])


def test_disk_space_is_asked_for_as_many_checkpoints_as_there_will_be() -> None:
    assert plan.count_saves(change(checkpoint_interval=0)) == 2
    assert plan.count_saves(change(checkpoint_interval=1, keep_checkpoints=3)) == 5


def test_small_models_take_several_steps_at_once_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.steps_per_call(CONFIG) == 1
    config = change(max_iters=100, eval_interval=50)
    assert plan.steps_per_call(dataclasses.replace(config, steps_per_dispatch=50)) == 50
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert plan.steps_per_call(config) == 10


# ---- Windows


def test_the_feed_reads_what_the_steps_are_a_function_of() -> None:
    config = change(gradient_accumulation_steps=2)
    mesh = sharding.make_mesh(jax.devices()[:2])
    feed = BatchFeed(config, [TOKENS], mesh, per_call=3)
    windows = feed.windows(5)
    assert windows is not None and windows.shape == (3, 2, 8, 17)
    assert len(windows.sharding.device_set) == 2
    shape = {"batch_size": 8, "block_size": 16, "n_vocab": 256}
    for k, a in np.ndindex(3, 2):
        expected = sample_batch([TOKENS], seed=1337, step=2 * (5 + k) + a, **shape)
        np.testing.assert_array_equal(windows[k, a], expected)
    assert feed.windows(12) is None


def test_rows_of_a_step_are_where_its_windows_come_from() -> None:
    config = change(gradient_accumulation_steps=2)
    starts = step_starts(config, [TOKENS], 3)
    windows = step_windows(config, [TOKENS], [3])
    assert windows.shape == (1, 2, 8, 17)
    for (shard, start), window in zip(starts, windows.reshape(-1, 17), strict=True):
        assert shard == 0
        np.testing.assert_array_equal(TOKENS[start : start + 17], window)


def test_a_step_of_so_many_tokens_is_the_same_on_any_number_of_devices() -> None:
    """Its windows in their order, dropout, and the loss of each of 6 steps; not the passes."""
    model = tiny(vocab_size=256, n_layer=1, n_embd=16, dropout=0.2)
    asked = change(batch_tokens=8 * 16, batch_size=2, model=model)
    alone = sharding.make_mesh(jax.devices()[:1])
    fresh = jax.device_get(init_state(asked, abstract_state(asked, alone)))
    curves, splits = [], set()
    for n_devices in (1, 2, 4, 8):
        config, _ = fit_batch(asked, n_devices, {"batch_tokens"})
        splits.add((config.gradient_accumulation_steps, config.batch_size))
        windows = step_windows(config, [TOKENS], range(6))
        np.testing.assert_array_equal(windows.reshape(6, 8, 17), SIX_STEPS)
        mesh = sharding.make_mesh(jax.devices()[:n_devices])
        abstract = abstract_state(config, mesh)
        state = jax.device_put(fresh, sharding.shardings_of(abstract))
        step, losses = make_train_step(config, abstract), []
        for batch in windows:
            state, values = step(state, sharding.place(batch[None], mesh, axis=2))
            losses.append(float(values["loss"][0]))
        curves.append(losses)
    assert splits == {(4, 2), (2, 4), (1, 8)}
    assert np.ptp(curves, axis=0).max() <= 1e-5, curves
    assert np.ptp(curves, axis=1).min() > 1e-2


def test_a_fault_of_the_data_comes_with_its_step() -> None:
    mesh = sharding.make_mesh(jax.devices()[:1])
    feed = BatchFeed(CONFIG, [TOKENS], mesh, 1, faults.Fault("raise", 2, 2))
    assert feed.windows(1) is not None
    with pytest.raises(DataError):
        feed.windows(2)


# ---- The vote to stop


def test_alone_a_signal_stops_at_once() -> None:
    signals: list[int] = []
    stop = distributed.StopVote(signals, sharding.make_mesh())
    stop.cast()
    assert not stop.count() and not stop.at_once()
    signals.append(signal.SIGTERM)
    assert stop.count() and stop.at_once()


def test_with_others_all_stop_after_the_same_step() -> None:
    """Whichever process got the signal: what counts is a vote that all of them have read."""
    signals: list[int] = []
    stop = distributed.StopVote(signals, sharding.make_mesh(), alone=False)
    stop.cast()
    assert not stop.count()
    signals.append(signal.SIGTERM)
    assert not stop.at_once() and not stop.count()
    stop.cast()
    assert not stop.count()  # this vote is on its way, while the step computes
    stop.cast()
    assert stop.count() and stop.count()


# ---- Validation


def test_validation_is_the_mean_over_its_windows() -> None:
    mesh = sharding.make_mesh(jax.devices()[:2])
    seen: list[np.ndarray] = []

    def losses(windows: jax.Array) -> jax.Array:
        seen.append(np.asarray(windows))
        return jnp.arange(8.0) + 100 * (len(seen) - 1)

    config = change(eval_iters=0, batch_size=8)
    shard = TOKENS[: 16 * 10 + 1]  # 10 windows: the second batch is padded with 6
    found = validate(config, [shard], mesh, losses, lambda: False)
    assert found == pytest.approx((sum(range(8)) + 100 + 101) / 10)
    np.testing.assert_array_equal(np.concatenate(seen)[:10, 0], shard[:-1:16])


@pytest.mark.parametrize("size", [2, 4, 12])
def test_validation_reads_the_same_windows_with_any_batch(size: int) -> None:
    mesh, seen = sharding.make_mesh(jax.devices()[:2]), list[np.ndarray]()

    def losses(windows: jax.Array) -> jax.Array:
        seen.append(np.asarray(windows))
        return jnp.zeros(size)

    config = change(eval_iters=3, batch_size=size, eval_batch_size=4)
    validate(config, [TOKENS], mesh, losses, lambda: False)
    expected = [start for _, start in eval_windows([TOKENS], 16, 12)]
    np.testing.assert_array_equal(np.concatenate(seen)[:, 0], TOKENS[expected])


def test_a_signal_breaks_validation_and_sample_off() -> None:
    config = change(sample_tokens=40)
    mesh = sharding.make_mesh(jax.devices()[:1])
    asked = iter([False, True])
    found = validate(config, [TOKENS], mesh, lambda w: jnp.zeros(8), lambda: next(asked))
    assert found is None
    params = init_state(config, abstract_state(config, mesh)).params
    assert write_sample(config, params, ByteTokenizer(), lambda: True) is None
    asked = iter([False, True])
    cut = write_sample(config, params, ByteTokenizer(), lambda: next(asked))
    whole = write_sample(config, params, ByteTokenizer(), lambda: False)
    assert cut and whole and whole.startswith(cut.rstrip("\ufffd")) and len(cut) < len(whole)


# ---- A run: opening, restoring, recording


@pytest.fixture
def opened(tmp_path: Path, restore_process: None) -> Iterator[TrainingRun]:
    """A new run on a text, as train.py opens it."""
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat and the dog ran\n" * 60)
    config = change(dataset=f"{tmp_path}/corpus.txt", out_dir=f"{tmp_path}/out")
    (tmp_path / "out").mkdir()
    yield open_run(config, tmp_path / "out", set())


def test_opening_settles_what_was_left_open(opened: TrainingRun) -> None:
    n_vocab = opened.dataset.tokenizer.n_vocab
    assert opened.dataset.tokenizer.kind == "char" and 10 < n_vocab < 30
    assert opened.config.model == dataclasses.replace(CFG, vocab_size=n_vocab)
    assert (opened.steps, opened.source, opened.bad, opened.primary) == ([], None, None, True)
    with pytest.raises(UsageError, match="--vocab_size=256"):
        config = dataclasses.replace(opened.config, model=CFG)
        open_run(config, opened.run_dir, {"vocab_size"})


@pytest.mark.parametrize("name", ["resume_step", "allow_change"])
def test_a_flag_that_needs_a_run_to_go_on_is_refused(opened: TrainingRun, name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name}"):
        open_run(opened.config, opened.run_dir, {name})


@pytest.mark.parametrize(
    ("said", "given", "named"),
    [
        ("--dataset=x: no such name", set(), True),
        ("--val_dataset: no tokenizer.json says what made the tokens", set(), True),
        ("--dataset=x: no such name", {"dataset"}, False),
        ("--checkpoint=9: no setting of a run", set(), False),
        ("no flag at all", set(), False),
    ],
)
def test_a_refused_setting_that_no_flag_gave_is_of_the_run(
    said: str, given: set[str], named: bool
) -> None:
    with (
        pytest.raises(UsageError, match=re.escape(said)) as refused,
        name_settings(Path("out/config.json"), given),
    ):
        raise UsageError(said)
    assert ("comes from out/config.json, and a path" in str(refused.value)) == named


def take_steps(run: TrainingRun, count: int) -> tuple[TrainState, list[dict[str, Any]]]:
    """Train without a log or a folder."""
    abstract = abstract_state(run.config, run.mesh)
    state, progress = init_or_restore(run, abstract)
    feed = BatchFeed(run.config, run.dataset.train, run.mesh, 1, run.fault)
    step, values = make_train_step(run.config, abstract, run.fault), []
    for i in range(progress.step or 0, count):
        windows = feed.windows(i)
        assert windows is not None
        state, metrics = step(state, windows)
        values.append(metrics)
    return state, values


def save(run: TrainingRun, state: TrainState, step: int) -> None:
    about: About = {"val_loss": 2.5, "best_val_loss": 2.25, "record": run.record}
    with Saver(run.run_dir, 3) as saver:
        saver.save(step, state.params, {"opt_state": state.opt_state, "guard": state.guard}, about)


@pytest.mark.parametrize("mesh", ["data", "fsdp:4,tensor:2"])
def test_what_is_restored_goes_on_as_if_nothing_had_been(opened: TrainingRun, mesh: str) -> None:
    devices = sharding.make_mesh(axes=parse_mesh(mesh))
    opened = opened._replace(config=dataclasses.replace(opened.config, mesh=mesh), mesh=devices)
    uninterrupted, _ = take_steps(opened, 6)
    abstract = abstract_state(opened.config, opened.mesh)
    prepare_folder(opened, abstract, Progress(None, None, math.inf))
    save(opened, take_steps(opened, 3)[0], 3)
    config = dataclasses.replace(opened.config, init_from="resume")
    again = open_run(config, opened.run_dir, set())
    state, progress = init_or_restore(again, abstract)
    assert progress == (3, 2.5, 2.25) and int(state.step) == 3
    assert digest(take_steps(again, 6)[0]) == digest(uninterrupted)
    few = dataclasses.replace(again.config, sample_tokens=1)  # written on one device
    assert write_sample(few, state.params, again.dataset.tokenizer, lambda: False)
    other, _ = init_or_restore(again, abstract_state(again.config, sharding.make_mesh()))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(other))
    assert digest(other) == digest(state)


def test_going_back_sets_newer_steps_and_records_aside(opened: TrainingRun) -> None:
    abstract = abstract_state(opened.config, opened.mesh)
    prepare_folder(opened, abstract, Progress(None, None, math.inf))
    state = take_steps(opened, 2)[0]
    save(opened, state, 2)
    save(opened, state, 5)
    lines = [{"step": step, "loss": 1.0} for step in (0, 1, 2, 3)]
    (opened.run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    config = dataclasses.replace(opened.config, init_from="resume", resume_step=2)
    again = open_run(config, opened.run_dir, {"resume_step"})
    _, progress = init_or_restore(again, abstract)
    prepare_folder(again, abstract, progress)
    folders = {path.name for path in (opened.run_dir / "checkpoints").iterdir()}
    assert {"2", "aside-5"} <= folders and "5" not in folders
    kept = (opened.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [0, 1]


def test_no_room_on_the_disk_is_said_before_the_first_step(
    opened: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    abstract, fresh = abstract_state(opened.config, opened.mesh), Progress(None, None, math.inf)
    with pytest.raises(DiskError, match="--force"):
        prepare_folder(opened, abstract, fresh)
    forced = opened._replace(config=dataclasses.replace(opened.config, force=True))
    prepare_folder(forced, abstract, fresh)


def make_run(tmp_path: Path, **settings: Any) -> TrainingRun:
    """A run over token arrays, for its log."""
    config = change(**settings)
    dataset = Dataset("tokens", ByteTokenizer(), [TOKENS], [TOKENS[:200]])
    record = make_record(config, [TOKENS], ByteTokenizer(), 1)
    mesh = sharding.make_mesh(jax.devices()[:1])
    fault = faults.planned_fault()
    console = TrainConsole(config.max_iters)
    return TrainingRun(
        config, config, tmp_path, dataset, mesh, console, record, [], None, None, fault, [], 0.0
    )


def records(run: TrainingRun) -> list[dict[str, Any]]:
    path = run.run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_the_log_is_one_call_behind(tmp_path: Path) -> None:
    run = make_run(tmp_path, log_interval=2)
    _, values = take_steps(run, 4)
    seen: list[Record] = []
    with Saver(tmp_path) as saver, RunLog(run, saver, math.inf, 0) as log:
        log.sinks.append(seen.append)  # all that a tracker takes
        for i in range(3):
            log.push(i, values[i])
        assert [record["step"] for record in records(run)] == [1]
        log.push(3, values[3])
        log.flush()
        log.flush()  # of nothing
        with log.paused():
            log.validation(4, 2.0)
            log.validation(4, None)
            log.validation(4, math.nan)
            log.sample(4, "a text")
            log.sample(4, None)
            assert log.drawn is None  # it would delay what else is done in the pause
    assert records(run) == seen and [record["step"] for record in seen] == [1, 3, 4, 4]
    assert seen[3] == {"step": 4, "val_loss": None}  # JSON knows no NaN
    losses = [float(v["loss"][0]) for v in values]
    assert seen[1]["loss"] == pytest.approx(np.mean(losses[2:]))
    assert seen[1]["learning_rate"] == pytest.approx(float(values[3]["learning_rate"][0]))
    assert seen[2] == {"step": 4, "val_loss": 2.0} and log.best == 2.0
    assert "a text" in (tmp_path / "samples.txt").read_text()
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_bar_ends_with_the_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays on the screen, and said there what the evaluation before the last one found."""
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "80")):  # a terminal, for rich
        monkeypatch.setenv(name, value)
    run = make_run(tmp_path)
    with Saver(tmp_path) as saver, RunLog(run, saver, math.inf, 0) as log:
        log.validation(12, 2.5)
    assert "val 2.5000" in run.console.progress.tasks[0].description


def test_a_skipped_step_is_written_down_and_too_many_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTJAX_FAULT", "nan_grad@1-3")
    run = make_run(tmp_path, max_skips=3)
    _, values = take_steps(run, 4)
    with Saver(tmp_path) as saver, RunLog(run, saver, math.inf, 0) as log:
        log.push(0, values[0])
        log.push(1, values[1])
        assert not (tmp_path / "bad_steps").exists()
        log.push(2, values[2])
        bad = json.loads((tmp_path / "bad_steps" / "1.json").read_text())
        assert bad["gradient_norms"]["h/mlp/c_fc/kernel"] == ["nan", "nan"]
        assert bad["rows"] == [list(row) for row in step_starts(run.config, [TOKENS], 1)]
        log.push(3, values[3])
        with pytest.raises(NonFiniteError):
            log.flush()


def test_a_disk_that_is_full_costs_lines_but_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, log_interval=1)
    _, values = take_steps(run, 1)

    def full(record: Record) -> None:
        raise OSError(28, "No space left on device")

    with Saver(tmp_path) as saver, RunLog(run, saver, math.inf, 0) as log:
        log.sinks.insert(0, full)
        log.push(0, values[0])
        log.flush()
    assert [record["step"] for record in records(run)] == [0]
    assert "No space left" in capsys.readouterr().out


def test_time_between_steps_is_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    run = make_run(tmp_path)
    with Saver(tmp_path) as saver, RunLog(run, saver, math.inf, 0) as log:
        log.recorder.since = 100.0
        monkeypatch.setattr("gptjax.training.run_log.time.monotonic", lambda: next(clock))
        with log.paused():
            pass
        assert log.recorder.since == 110.0
        monkeypatch.undo()
