"""The step: accumulation, dispatch and devices change how it is computed, not what comes out."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model, sharding
from gptjax.config import GPTConfig, TrainConfig, parse_mesh
from gptjax.training import faults
from gptjax.training.step import (
    TrainState,
    abstract_state,
    digest,
    init_state,
    loss_and_grad,
    make_eval_step,
    make_train_step,
)

from .helpers import init_params, tiny

RNG = np.random.default_rng(0)
WINDOWS = RNG.integers(0, 61, (16, 8, 17)).astype(np.int32)  # steps, rows, T + 1


def train(
    windows: np.ndarray,
    *,
    cfg: GPTConfig | None = None,
    n_devices: int = 1,
    mesh: str = "data",
    fault: faults.Fault | None = None,
    **settings: Any,
) -> tuple[TrainState, list[float]]:
    """Train on windows (calls, K, A, B, T+1); the final state and all losses."""
    cfg = cfg or tiny()
    fields = {"max_iters": 100, "warmup_iters": 0, "learning_rate": 1e-3, "seed": 5, **settings}
    config = TrainConfig(model=cfg, **fields)
    devices = sharding.make_mesh(jax.devices()[:n_devices], parse_mesh(mesh))
    abstract = abstract_state(config, devices)
    state, step = init_state(config, abstract), make_train_step(config, abstract, fault)
    losses: list[float] = []
    for batch in windows:
        state, metrics = step(state, sharding.place(batch, devices, axis=2))
        losses += metrics["loss"].tolist()
    return state, losses


def assert_same(
    a: tuple[TrainState, list[float]],
    b: tuple[TrainState, list[float]],
    loss_tol: float = 1e-5,
    params_tol: float = 1e-4,
) -> None:
    """Losses and parameters agree within the tolerances; NaN never does."""
    assert np.max(np.abs(np.subtract(a[1], b[1]))) <= loss_tol
    for x, y in zip(jax.tree.leaves(a[0].params), jax.tree.leaves(b[0].params), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() <= params_tol


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_writes_over_the_state_without_copying_it(dtype: str) -> None:
    config, mesh = TrainConfig(model=tiny(dtype=dtype)), sharding.make_mesh(jax.devices()[:1])
    abstract, windows = abstract_state(config, mesh), jax.ShapeDtypeStruct((1, 1, 8, 17), jnp.int32)
    step: Any = make_train_step(config, abstract)
    program = step.lower(abstract, windows).compile().as_text()
    assert "%state_opt_state" in program
    assert not re.findall(r"= f32\S+ copy\(%state_", program)


PLAIN = WINDOWS[:, None, None]


@pytest.fixture(scope="module")
def plain() -> tuple[TrainState, list[float]]:
    return train(PLAIN)


@pytest.mark.parametrize("passes", [2, 4])
def test_accumulation_is_the_big_batch(plain: tuple[TrainState, list[float]], passes: int) -> None:
    split = WINDOWS.reshape(16, 1, passes, 8 // passes, 17)
    assert_same(plain, train(split))


def test_accumulation_gate_turns_red(
    plain: tuple[TrainState, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake: gradients summed, not averaged. (Adam hides it, the clip does not.)"""
    value_and_grad = loss_and_grad

    def summed(cfg: GPTConfig, params: Any, windows: jax.Array, *more: Any) -> Any:
        loss, grads = value_and_grad(cfg, params, windows, *more)
        return loss, jax.tree.map(lambda g: g * windows.shape[0], grads)

    monkeypatch.setattr("gptjax.training.step.loss_and_grad", summed)
    split = WINDOWS.reshape(16, 1, 2, 4, 17)
    with pytest.raises(AssertionError):
        assert_same(train(PLAIN, grad_clip=0.0, eps=1.0), train(split, grad_clip=0.0, eps=1.0))


def test_several_steps_in_one_call(plain: tuple[TrainState, list[float]]) -> None:
    assert_same(plain, train(WINDOWS.reshape(4, 4, 1, 8, 17)), 1e-6, 1e-6)


@pytest.mark.parametrize("n_devices", [2, 8])
def test_devices_share_the_work(plain: tuple[TrainState, list[float]], n_devices: int) -> None:
    state, losses = train(PLAIN, n_devices=n_devices)
    assert len(state.params["wte"]["embedding"].sharding.device_set) == n_devices
    assert_same(plain, (state, losses))


def test_an_array_that_devices_share_is_put_together_for_sampling() -> None:
    state, _ = train(PLAIN[:1], n_devices=8, mesh="fsdp")
    assert not any(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    params = sharding.on_one_device(state.params)
    for found, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        assert len(found.sharding.device_set) == 1
        assert np.array_equal(found, leaf)


def test_an_untied_head_is_trained_and_split() -> None:
    cfg = tiny(tie_head=False)
    alone = train(PLAIN[:4], cfg=cfg, optimizer="muon")
    fresh = init_params(cfg, jax.random.key(5))["lm_head"]["embedding"]
    assert float(jnp.abs(alone[0].params["lm_head"]["embedding"] - fresh).max()) > 1e-3
    spread = train(PLAIN[:4], cfg=cfg, optimizer="muon", n_devices=8, mesh="fsdp:4,tensor:2")
    assert spread[0].params["lm_head"]["embedding"].addressable_shards[0].data.shape == (32, 8)
    assert_same(alone, spread)


def test_same_devices_same_bits() -> None:
    first, second = (train(PLAIN[:4], n_devices=8)[0] for _ in range(2))
    assert digest(first) == digest(second)
    other = train(PLAIN[1:5], n_devices=8)[0]
    assert digest(first) != digest(other)


def test_dropout_depends_on_seed_and_step_alone() -> None:
    cfg = tiny(dropout=0.2)
    one, several = train(PLAIN, cfg=cfg), train(WINDOWS.reshape(4, 4, 1, 8, 17), cfg=cfg)
    assert_same(one, several, 1e-6, 1e-6)
    assert abs(one[1][-1] - train(PLAIN)[1][-1]) > 1e-4


def test_step_counts_and_norm_is_before_the_clip() -> None:
    cfg = tiny()
    config = TrainConfig(model=cfg, grad_clip=1e-3)
    abstract = abstract_state(config, sharding.make_mesh(jax.devices()[:1]))
    state = init_state(config, abstract)
    _, grads = jax.jit(loss_and_grad, static_argnums=0)(cfg, state.params, PLAIN[0, 0], None)
    norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
    step = make_train_step(config, abstract)
    state, metrics = step(state, PLAIN[0])
    assert int(state.step) == 1
    assert metrics["grad_norm"].tolist() == pytest.approx([norm], rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_overfits_one_batch(name: str) -> None:
    batch = np.broadcast_to(PLAIN[0], (300, *PLAIN[0].shape))
    rates = {"learning_rate": 5e-3, "muon_learning_rate": 0.02}
    settings: dict[str, Any] = {"max_iters": 300, "weight_decay": 0.0, "optimizer": name, **rates}
    _, losses = train(batch, **settings)
    assert losses[0] > 3.5
    assert losses[-1] <= 0.05


def test_zero_projections_make_blocks_that_change_nothing_at_first() -> None:
    cfg = tiny()
    config = TrainConfig(model=cfg, zero_projections=True)
    mesh = sharding.make_mesh(jax.devices()[:1])
    params = init_state(config, abstract_state(config, mesh)).params
    tokens = jnp.asarray(WINDOWS[0, :, :-1])
    without = {**params, "h": jax.tree.map(jnp.zeros_like, params["h"])}
    found, wanted = (model.forward(cfg, p, tokens)[0][..., :61] for p in (params, without))
    assert np.abs(np.asarray(found - wanted)).max() <= 1e-6
    assert float(jnp.abs(params["h"]["mlp"]["c_fc"]["kernel"]).max()) > 0
    fresh, last = (train(PLAIN, optimizer="muon", zero_projections=True)[1][i] for i in (0, -1))
    assert last < fresh


def test_evaluation_is_the_mean_loss_without_dropout() -> None:
    cfg = tiny(dropout=0.5)
    mesh = sharding.make_mesh(jax.devices()[:2])
    params = init_params(cfg, jax.random.key(0))
    abstract = abstract_state(TrainConfig(model=cfg), mesh).params
    found = make_eval_step(cfg, abstract)(params, sharding.place(WINDOWS[0], mesh, axis=0))
    plain = dataclasses.replace(cfg, dropout=0.0)
    logits = model.forward(plain, params, jnp.asarray(WINDOWS[0, :, :-1]))[0]
    picked = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), WINDOWS[0, :, 1:, None], axis=-1
    )
    assert np.abs(np.asarray(found) + picked[..., 0].mean(axis=1)).max() <= 1e-5


def test_bfloat16_computes_on_float32_parameters() -> None:
    state, losses = train(PLAIN, cfg=tiny(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses[-1] < losses[0]
