"""What is saved comes back to the bit, and the right steps are kept."""

import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gptjax.checkpoints import restore, steps
from gptjax.checkpoints.restore import restore_newest, restore_params
from gptjax.checkpoints.save import NewestAndBest, Saver, check_space
from gptjax.checkpoints.steps import (
    Meta,
    best_step,
    checkpoint_folder,
    loss_of,
    quarantined,
    require_steps,
    saved_steps,
    step_folder,
)
from gptjax.config import TrainConfig
from gptjax.errors import CheckpointError, DiskError, NonFiniteError, UsageError
from gptjax.sharding import abstract_tree
from gptjax.training import optimizer
from gptjax.training.step import TrainState, digest, fresh_state

from .helpers import init_params, same_structure, tiny

CFG = tiny()


def make_state(name: str = "adamw") -> TrainState:
    config = TrainConfig(model=CFG, optimizer=name)  # type: ignore[arg-type]
    return fresh_state(config, jax.random.key(0))


def save_steps(run_dir: Path, losses: dict[int, float | None], keep: int = 2) -> None:
    state = make_state()
    saver = Saver(run_dir, keep)
    for step, val_loss in losses.items():
        params = jax.tree.map(lambda p, step=step: p + step, state.params)
        saver.save(step, params, {"opt_state": state.opt_state}, {"val_loss": val_loss})
    saver.close()
    assert saver.last == max(losses)


def target(tree: Any) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return abstract_tree(tree, jax.tree.map(lambda _: here, tree))


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_state_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    state = make_state(name)
    extra = {"opt_state": state.opt_state, "guard": state.guard}
    with Saver(tmp_path) as saver:
        saver.save(5, state.params, extra, {"val_loss": 1.25, "imported": "é"})
    found = restore_newest(tmp_path, (target(state.params), target(extra)))
    assert same_structure(found.extra, extra)
    restored = TrainState(state.step, found.params, **found.extra)
    assert digest(restored) == digest(state)
    leaves = found.meta["leaves"]
    assert {name: value for name, value in found.meta.items() if name != "leaves"} == {
        "format": 2,
        "step": 5,
        "val_loss": 1.25,
        "imported": "é",
    }
    assert leaves["params/wte/embedding"]["shape"] == list(state.params["wte"]["embedding"].shape)


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5, 60: 2.5}
    save_steps(tmp_path, losses)
    assert saved_steps(tmp_path) == [20, 50, 60]
    assert best_step(tmp_path) == 20
    params = restore_params(tmp_path, 20, target(make_state().params))
    wte = init_params(CFG, jax.random.key(0))["wte"]["embedding"]
    assert np.array_equal(params["wte"]["embedding"], wte + 20)


def test_the_best_step_of_a_resumed_run_is_kept_which_orbax_would_lose(tmp_path: Path) -> None:
    """Why the policy is ours: `BestN` takes losses from files that only orbax's metrics make."""
    policies = ocp.checkpoint_managers
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics["val_loss"],
        reverse=True,
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    policy = policies.AnyPreservationPolicy([policies.LatestN(1), best])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=lambda metrics: metrics["val_loss"]
    )
    for name in ("orbax", "ours"):
        save_steps(tmp_path / name, {10: 1.0, 20: 2.0}, keep=1)
    with ocp.CheckpointManager(checkpoint_folder(tmp_path / "orbax"), options=options) as manager:
        item = ocp.args.Composite(params=ocp.args.StandardSave({"w": np.zeros(2)}))
        assert manager.save(30, args=item, metrics={"val_loss": 3.0})
    save_steps(tmp_path / "ours", {30: 3.0}, keep=1)
    assert saved_steps(tmp_path / "orbax") == [30]
    assert saved_steps(tmp_path / "ours") == [10, 30]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("order", [[1, 2, 3, 4, 5], [3, 1, 5, 4, 2]])
def test_what_is_kept(keep: int, order: list[int]) -> None:
    def kept(losses: dict[int, float]) -> set[int]:
        infos = [types.SimpleNamespace(step=step) for step in order]
        answers = NewestAndBest(keep, losses).should_preserve(infos, context=None)
        return {step for step, answer in zip(order, answers, strict=True) if answer}

    newest = set(range(6 - keep, 6))
    assert kept({1: 2.0, 2: 1.0, 3: 1.0, 4: 1.5}) == newest | {3}  # of two the newer
    assert kept({2: 1.0, 3: float("inf")}) == newest | {2}  # one without a loss is never the best
    assert kept({}) == newest


def test_without_evaluation_the_newest_is_best(tmp_path: Path) -> None:
    save_steps(tmp_path, {10: None, 20: None})
    assert best_step(tmp_path) == 20


def test_a_save_that_orbax_drops_is_an_error(tmp_path: Path) -> None:
    save_steps(tmp_path, {20: None})
    with pytest.raises(CheckpointError, match="step 10 was not saved"):
        save_steps(tmp_path, {10: None})


def test_nothing_saved(tmp_path: Path) -> None:
    assert saved_steps(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        require_steps(tmp_path)


def test_damage_is_one_line(tmp_path: Path) -> None:
    save_steps(tmp_path, {20: None})
    (step_folder(tmp_path, 20) / "params" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="cannot use step 20") as error:
        restore_params(tmp_path, 20, target(make_state().params))
    assert "\n" not in str(error.value)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, {20: None})
    other = init_params(tiny(n_embd=64), jax.random.key(0))
    with pytest.raises(CheckpointError, match="cannot use step 20"):
        restore_params(tmp_path, 20, target(other))


# ---- Damage


def everything(state: TrainState) -> tuple[Any, Any]:
    return target(state.params), target({"opt_state": state.opt_state})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("two")
    save_steps(run_dir, {10: None, 20: None})
    return run_dir


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_to_any_file_is_found_or_harmless(
    tmp_path: Path, two_steps: Path, damage: Callable[[Path], None]
) -> None:
    """Each file of the newest step in turn; what is restored is what was saved."""
    state = make_state()
    files = [p for p in sorted(step_folder(two_steps, 20).rglob("*")) if p.is_file()]
    used: list[int] = []
    for number, path in enumerate(files):
        if path.stat().st_size == 0:
            continue
        run_dir = tmp_path / str(number)
        shutil.copytree(two_steps, run_dir)
        damage(run_dir / path.relative_to(two_steps))
        said: list[str] = []
        found = restore_newest(run_dir, everything(state), notify=said.append)
        used.append(found.step)
        expected = jax.tree.map(lambda p, step=found.step: p + step, state.params)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected)
        assert bool(said) == (found.step == 10)
        assert (checkpoint_folder(run_dir) / "quarantine-20").exists() == (found.step == 10)
        shutil.rmtree(run_dir)
    assert used.count(10) >= 6 and len(used) >= 10


def test_the_gate_for_damage_turns_red(tmp_path: Path, two_steps: Path, monkeypatch: Any) -> None:
    """The mistake: arrays taken as orbax returns them, here those of another step."""
    for name in ("run", "trusting"):
        shutil.copytree(two_steps, tmp_path / name)
        folder = checkpoint_folder(tmp_path / name)
        shutil.rmtree(folder / "20" / "params")
        shutil.copytree(folder / "10" / "params", folder / "20" / "params")
    state = make_state()
    found = restore_newest(tmp_path / "run", everything(state))
    assert found.step == 10
    monkeypatch.setattr(restore, "first_difference", lambda a, b: None)
    found = restore_newest(tmp_path / "trusting", everything(state))
    assert found.step == 20  # silently wrong
    expected = jax.tree.map(lambda p: p + 20, state.params)
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, found.params, expected)))


def test_two_steps_back_and_no_further(tmp_path: Path) -> None:
    save_steps(tmp_path, {10: None, 20: None, 30: None}, keep=3)
    for step, damage in ((20, flip), (30, truncate)):
        damage(step_folder(tmp_path, step) / "meta" / "metadata")
    said: list[str] = []
    state = make_state()
    assert restore_newest(tmp_path, everything(state), notify=said.append).step == 10
    assert len(said) == 2 and "cannot use step 30" in said[0] and "quarantine-20" in said[1]
    assert saved_steps(tmp_path) == [10]
    shutil.rmtree(step_folder(tmp_path, 10) / "params")
    with pytest.raises(CheckpointError, match="no step is intact: cannot use step 10"):
        restore_newest(tmp_path, everything(state), notify=said.append)
    assert quarantined(tmp_path) == ["quarantine-10", "quarantine-20", "quarantine-30"]


def test_strangers_among_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, {10: None})
    shutil.copytree(step_folder(tmp_path, 10), checkpoint_folder(tmp_path) / "050")
    for name in ("999", "nan", "30.orbax-checkpoint-tmp", "quarantine-5"):
        (checkpoint_folder(tmp_path) / name).mkdir()
    step_folder(tmp_path, 77).write_text("no folder")
    assert saved_steps(tmp_path) == [10]
    save_steps(tmp_path, {20: None})
    assert saved_steps(tmp_path) == [10, 20]
    assert "999 is empty; moved to quarantine-999" in capsys.readouterr().out
    assert restore_newest(tmp_path, everything(make_state())).step == 20


def test_the_order_of_steps_is_not_a_matter_of_clocks(tmp_path: Path, two_steps: Path) -> None:
    """Copies and wrong clocks give any times; a cut copy (rsync's) is damage like another."""
    run_dir = shutil.copytree(two_steps, tmp_path / "run")
    for step, when in (("10", 4e9), ("20", 0)):
        for path in [*(checkpoint_folder(run_dir) / step).rglob("*")]:
            os.utime(path, (when, when))
        os.utime(checkpoint_folder(run_dir) / step, (when, when))
    assert restore_newest(run_dir, everything(make_state())).step == 20
    files = [p for p in sorted(step_folder(run_dir, 20).rglob("*")) if p.is_file()]
    for path in files[len(files) // 2 :]:
        path.unlink()
    said: list[str] = []
    found = restore_newest(run_dir, everything(make_state()), notify=said.append)
    assert found.step == 10 and len(said) == 1


def test_what_is_not_damaged_is_not_set_aside(
    tmp_path: Path, two_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    monkeypatch.setattr(steps, "FORMAT", 9)
    with pytest.raises(CheckpointError, match="this version reads 9"):
        restore_newest(tmp_path / "run", everything(make_state()))
    assert saved_steps(tmp_path / "run") == [10, 20]


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    assert loss_of({"val_loss": float("nan")}) == float("inf")
    save_steps(tmp_path, {10: 1.0, 20: 2.0}, keep=2)
    flip(step_folder(tmp_path, 20) / "meta" / "metadata")
    assert best_step(tmp_path) == 10  # the damaged one is no reason to refuse


def test_settings_are_checked_before_arrays(tmp_path: Path, two_steps: Path) -> None:
    def refuse(meta: Meta) -> None:
        raise UsageError(f"not step {meta['step']}")

    with pytest.raises(UsageError, match="not step 20"):
        restore_newest(two_steps, everything(make_state()), refuse)
    assert saved_steps(two_steps) == [10, 20]


# ---- Disks


def test_failed_saves_are_tried_again_and_then_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    state, full = make_state(), [True]
    whole_save = ocp.CheckpointManager.save

    def save(self: Any, step: int, **kwargs: Any) -> bool:
        if full[0]:
            (checkpoint_folder(tmp_path) / f"{step}.orbax-checkpoint-tmp").mkdir()
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")
        return whole_save(self, step, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    saver = Saver(tmp_path, notify=said.append)

    def save_step(step: int) -> None:
        saver.save(step, state.params, None, {"val_loss": None})
        saver.settle()

    save_step(1)
    save_step(2)
    assert len(said) == 2 and "step 2 was not saved: no space left on device;" in said[1]
    assert "MB are free" in said[1] and list(checkpoint_folder(tmp_path).iterdir()) == []
    full[0] = False
    save_step(3)
    assert saver.last == 3 and len(said) == 2
    full[0] = True
    save_step(4)
    save_step(5)
    with pytest.raises(DiskError, match="step 6 was not saved"):
        save_step(6)
    assert saved_steps(tmp_path) == [3]
    assert restore_params(tmp_path, 3, target(state.params))


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    params = jax.tree.map(lambda p: p * np.nan, make_state().params)
    with Saver(tmp_path) as saver, pytest.raises(NonFiniteError, match="step 7"):
        saver.save(7, params, None, {"val_loss": None})
    assert saved_steps(tmp_path) == []


def test_too_small_a_disk_is_known_beforehand(tmp_path: Path, monkeypatch: Any) -> None:
    tree = {"w": jax.ShapeDtypeStruct((1000, 250), np.float32)}  # 1 MB
    usage = shutil.disk_usage(tmp_path)._replace(free=3_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path, tree, 3)
    with pytest.raises(DiskError, match=r"4 x 1.0 MB .* 4.0 MB more, but only 3.5 MB are"):
        check_space(tmp_path, tree, 4)
    checkpoint_folder(tmp_path).mkdir()
    (checkpoint_folder(tmp_path) / "quarantine-7").mkdir()
    (checkpoint_folder(tmp_path) / "quarantine-7" / "old").write_bytes(bytes(600_000))
    with pytest.raises(DiskError):  # which nothing will remove
        check_space(tmp_path, tree, 4)
    step_folder(tmp_path, 7).mkdir()
    (step_folder(tmp_path, 7) / "old").write_bytes(bytes(600_000))
    check_space(tmp_path, tree, 4)  # what is there will make room
