"""What is saved comes back to the bit, and the right steps are kept."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import checkpoint, optimizer, training
from gptjax.config import TrainConfig
from gptjax.errors import CheckpointError

from .conftest import init_params, tiny

CFG = tiny()


def make_state(name: str = "adamw") -> training.TrainState:
    config = TrainConfig(model=CFG, optimizer=name)  # type: ignore[arg-type]
    return training.init_state(CFG, optimizer.make_optimizer(config), jax.random.key(0))


def save_steps(run_dir: Path, losses: dict[int, float | None], keep: int = 2) -> None:
    state = make_state()
    manager = checkpoint.open_manager(run_dir, keep)
    for step, val_loss in losses.items():
        params = jax.tree.map(lambda p, step=step: p + step, state.params)
        checkpoint.save(manager, step, params, state.opt_state, {"val_loss": val_loss})
    manager.close()


def target(tree: Any) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return checkpoint.abstract_tree(tree, jax.tree.map(lambda _: here, tree))


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_state_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    state = make_state(name)
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, 5, state.params, state.opt_state, {"val_loss": 1.25, "note": "é"})
    manager.close()
    params, opt_state, meta = checkpoint.restore_state(
        tmp_path, 5, target(state.params), target(state.opt_state)
    )
    assert jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state)
    restored = training.TrainState(state.step, params, opt_state)
    assert training.digest(restored) == training.digest(state)
    assert meta == {"format": 1, "step": 5, "val_loss": 1.25, "note": "é"}


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5, 60: 2.5}
    save_steps(tmp_path, losses)
    assert checkpoint.steps(tmp_path) == [20, 50, 60]
    assert checkpoint.best_step(tmp_path) == 20
    params = checkpoint.restore_params(tmp_path, 20, target(make_state().params))
    wte = init_params(CFG, jax.random.key(0))["wte"]["embedding"]
    assert np.array_equal(params["wte"]["embedding"], wte + 20)


def test_without_evaluation_the_newest_is_best(tmp_path: Path) -> None:
    save_steps(tmp_path, {10: None, 20: None})
    assert checkpoint.best_step(tmp_path) == 20


def test_a_save_that_orbax_drops_is_an_error(tmp_path: Path) -> None:
    save_steps(tmp_path, {20: None})
    with pytest.raises(CheckpointError, match="step 10 was not saved"):
        save_steps(tmp_path, {10: None})


def test_nothing_saved(tmp_path: Path) -> None:
    assert checkpoint.steps(tmp_path) == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.require_steps(tmp_path)


def test_damage_is_one_line(tmp_path: Path) -> None:
    save_steps(tmp_path, {20: None})
    (checkpoint.folder(tmp_path) / "20" / "params" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read step 20") as error:
        checkpoint.restore_params(tmp_path, 20, target(make_state().params))
    assert "\n" not in str(error.value)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, {20: None})
    other = init_params(tiny(n_embd=64), jax.random.key(0))
    with pytest.raises(CheckpointError, match="cannot read step 20"):
        checkpoint.restore_params(tmp_path, 20, target(other))
