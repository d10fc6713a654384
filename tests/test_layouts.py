"""Layouts: how arrays lie on a mesh changes who computes and holds what, not what comes out."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention, collectives, sharding
from gptjax.checkpoints.hashes import leaf_digests
from gptjax.checkpoints.restore import restore_newest
from gptjax.checkpoints.save import Saver
from gptjax.config import GPTConfig, TrainConfig, parse_mesh
from gptjax.config_file import load_config, to_json
from gptjax.errors import UsageError
from gptjax.training.step import (
    TrainState,
    abstract_state,
    dropout_keys,
    init_state,
    make_eval_step,
    make_loss_and_grad,
    make_train_step,
)

from .helpers import tiny

CFG = tiny(n_head=4)
WINDOWS = np.random.default_rng(0).integers(0, 61, (20, 1, 2, 8, 17)).astype(np.int32)
MESHES = {  # the mesh, and how many devices it takes
    "data:8": 8,
    "zero1:8": 8,
    "fsdp:8": 8,
    "tensor:4": 4,
    "data:2,tensor:4": 8,
    "data:2,fsdp:4": 8,
    "zero1:4,tensor:2": 8,
    "data:2,fsdp:2,tensor:2": 8,
}


def settings(mesh: str = "data", cfg: GPTConfig = CFG, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "max_iters": 100,
        "warmup_iters": 0,
        "learning_rate": 1e-3,
        "seed": 5,
        **changes,
    }
    return TrainConfig(model=cfg, mesh=mesh, batch_size=8, gradient_accumulation_steps=2, **fields)


def make_mesh(mesh: str) -> jax.sharding.Mesh:
    return sharding.make_mesh(jax.devices()[: MESHES.get(mesh, 1)], parse_mesh(mesh))


def train(config: TrainConfig, steps: int = 20) -> tuple[TrainState, list[float]]:
    """Train on WINDOWS; the state, the losses and the losses of an evaluation."""
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config, mesh)
    state, step = init_state(config, abstract), make_train_step(config, abstract)
    losses: list[float] = []
    for windows in WINDOWS[:steps]:
        state, metrics = step(state, sharding.place(windows, mesh, axis=2))
        losses += metrics["loss"].tolist()
    evaluate = make_eval_step(config.model, abstract.params)
    losses += evaluate(state.params, sharding.place(WINDOWS[0, 0, 0], mesh, axis=0)).tolist()
    return state, losses


def difference(a: Any, b: Any) -> float:
    """The largest difference of two trees' numbers; infinite where one is NaN."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    largest = max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)
    return largest if np.isfinite(largest) else np.inf


@functools.lru_cache
def alone(optimizer: str = "adamw", dropout: float = 0.0) -> tuple[TrainState, list[float]]:
    return train(settings(cfg=tiny(n_head=4, dropout=dropout), optimizer=optimizer))


def check_equals_one_device(mesh: str, optimizer: str = "adamw", dropout: float = 0.0) -> None:
    cfg = tiny(n_head=4, dropout=dropout)
    state, losses = train(settings(mesh, cfg, optimizer=optimizer))
    one, expected = alone(optimizer, dropout)
    assert np.max(np.abs(np.subtract(losses, expected))) <= 1e-5
    assert difference(state.params, one.params) <= 1e-4


@pytest.mark.parametrize("mesh", MESHES)
def test_20_steps_equal_those_of_one_device(mesh: str) -> None:
    check_equals_one_device(mesh)


@pytest.mark.parametrize("mesh", ["data:2,fsdp:2,tensor:2"])
def test_muon_s_steps_too(mesh: str) -> None:
    check_equals_one_device(mesh, optimizer="muon")


@pytest.mark.parametrize("mesh", ["data:8", "data:2,fsdp:2,tensor:2"])
def test_dropout_s_masks_too(mesh: str) -> None:
    check_equals_one_device(mesh, dropout=0.2)


@functools.lru_cache
def loss_and_grad(mesh: str, **changes: Any) -> tuple[jax.Array, Any]:
    config = settings(mesh, tiny(n_head=4, dropout=0.1, **changes))
    devices = make_mesh(mesh)
    abstract = abstract_state(config, devices)
    params = init_state(config, abstract).params
    params = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
    compute = jax.jit(make_loss_and_grad(config.model, abstract.params))
    windows = sharding.place(WINDOWS[0, 0], devices, axis=1)
    return compute(params, windows, dropout_keys(config, 3, (2, 8)), None)


@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradient_equal_those_of_one_device(mesh: str) -> None:
    found, expected = loss_and_grad(mesh), loss_and_grad("data")
    assert difference(found[0], expected[0]) <= 1e-6
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    assert difference(found[1], expected[1]) <= 1e-5 * scale


def test_a_kernel_that_xla_cannot_split_gets_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN's attention does on GPUs, here with the reference in its place."""
    shapes = set()

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, **_: Any) -> jax.Array:
        def attend(*arrays: jax.Array) -> jax.Array:
            shapes.add(arrays[0].shape)
            return attention.attend_xla(*arrays)

        return collectives.each_with_its_heads(attend, q, k, v)

    monkeypatch.setitem(attention.ATTENTION, "xla", kernel)
    check_equals_one_device("data:2,tensor:4")
    assert (4, 16, 1, 8) in shapes  # rows of a device, time, one head, its width


def test_gradients_are_added_in_the_dtype_asked_for() -> None:
    """Rounded once on each device and once for each sum, so within 1 % but not equal."""
    for mesh in ("data:8", "fsdp:8"):
        exact, rounded = loss_and_grad(mesh)[1], loss_and_grad(mesh, reduce_dtype="bfloat16")[1]
        scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(exact))
        assert 1e-5 * scale < difference(exact, rounded) <= 1e-2 * scale


def same_keys(config: TrainConfig, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    keys_AB = dropout_keys(config, step, shape)
    assert keys_AB is not None
    return jnp.broadcast_to(keys_AB[:, :1], shape)


PLANTED: dict[str, tuple[str, Any, str]] = {
    "a device's own gradient": ("training.step.mean_over_batch", lambda *args: args[2], "data:8"),
    "columns in GPT-2's order": ("collectives.by_heads", lambda layer: layer, "data:2,tensor:4"),
    "the same dropout for all": (
        "training.step.dropout_keys",
        same_keys,
        "data:8",
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_layouts_gate_turns_red(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone("adamw", 0.2)
    name, wrong, mesh = PLANTED[mistake]
    monkeypatch.setattr(f"gptjax.{name}", wrong)
    with pytest.raises(AssertionError):
        check_equals_one_device(mesh, dropout=0.2)


# ---- What a device holds, and what it sends ------------------------------------------------------


def bytes_of_a_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mesh", "params", "moments"),
    [("data:8", 1, 1), ("zero1:8", 1, 1 / 8), ("fsdp:8", 1 / 8, 1 / 8), ("tensor:4", 1 / 4, 1 / 4)],
)
def test_a_device_holds_its_part(mesh: str, params: float, moments: float) -> None:
    """Within 5 %; tensor leaves LayerNorms, most biases and wpe whole, so within a quarter."""
    config = settings(mesh, tiny(n_head=4, n_embd=64))
    state = init_state(config, abstract_state(config, make_mesh(mesh)))
    tolerance = 0.25 if mesh.startswith("tensor") else 0.05
    for part, share in ((state.params, params), (state.opt_state, moments)):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(part))
        assert bytes_of_a_device(part) == pytest.approx(share * whole, rel=tolerance)


def test_gradients_are_added_once_a_step() -> None:
    """After all passes, not in the loop over them: no collective of a matrix lies in a loop."""
    config = settings("data:8")
    abstract = abstract_state(config, make_mesh("data:8"))
    shape = jax.ShapeDtypeStruct((1, 2, 8, 17), np.int32)
    step: Any = make_train_step(config, abstract)
    text = step.lower(abstract, shape).as_text()
    at_loop = text.index("stablehlo.while")
    loop = text[at_loop : text.index("stablehlo.return", text.index(" do {", at_loop))]
    assert "all_reduce" in text and "all_reduce" not in loop


# ---- Meshes that make no sense -------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "model", "data:0", "data:x", "data:2,data:4", "data,fsdp", "zero1:2,fsdp:4", "data:"],
)
def test_a_mesh_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--mesh={text}: ")):
        TrainConfig(mesh=text)


def test_a_mesh_must_fit_the_devices_and_the_model() -> None:
    with pytest.raises(UsageError, match="--mesh=data:3: must be 8 devices"):
        sharding.make_mesh(axes=parse_mesh("data:3"))
    for text, setting in (("tensor:8", "n_head=4"), ("fsdp", "n_embd=20")):
        mesh = sharding.make_mesh(axes=parse_mesh(text))
        with pytest.raises(UsageError, match=f"--mesh={text.split(':')[0]}:8: .*{setting}"):
            sharding.require_equal_parts(mesh, tiny(n_head=4, n_embd=20))
    assert sharding.make_mesh(axes=parse_mesh("tensor:2,fsdp")).shape == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
    }


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_every_layout_goes_on_from_every_other(tmp_path: Path) -> None:
    """Saved by one, restored by the next, also on another number of devices, bit for bit."""
    path = [*MESHES, "data"]
    state, _ = train(settings(path[0]), steps=2)
    digests = leaf_digests(state)
    for i, mesh in enumerate(path):
        abstract = abstract_state(settings(mesh), make_mesh(mesh))
        run_dir = tmp_path / str(i)
        extra = {"opt_state": state.opt_state, "guard": state.guard}
        with Saver(run_dir) as saver:
            about: Any = {"val_loss": None, "best_val_loss": None, "record": {}}
            saver.save(2, state.params, extra, about)
        wanted = abstract.params, {"opt_state": abstract.opt_state, "guard": abstract.guard}
        restored = restore_newest(run_dir, wanted)
        placed = sharding.shardings_of(abstract.params)
        assert sharding.shardings_of(restored.params) == placed
        state = TrainState(state.step, restored.params, **restored.extra)
        assert leaf_digests(state) == digests


def test_slabs_are_the_array_in_c_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As several processes gather them: none asks for more than a slab."""
    mesh = make_mesh("data:2,fsdp:4")
    array = jnp.arange(12 * 8 * 3.0).reshape(12, 8, 3)
    spread = jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp")))
    monkeypatch.setattr(sharding, "is_spread", lambda array: True)
    monkeypatch.setattr(sharding, "SLAB", 500)  # bytes: five rows of 96, so four, a divisor of 12
    found = list(sharding.slabs(spread))
    assert [len(slab) for slab in found] == [4, 4, 4]
    assert np.array_equal(np.concatenate(found), array)


def test_a_run_from_before_the_mesh_splits_the_batch(tmp_path: Path) -> None:
    """Its config.json has a strategy, which had one value."""
    stored = json.loads(to_json(TrainConfig()))
    del stored["mesh"]
    (tmp_path / "config.json").write_text(json.dumps({**stored, "strategy": "data"}))
    assert load_config(tmp_path / "config.json").mesh == "data"
