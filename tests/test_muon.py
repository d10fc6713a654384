"""Muon: optax's where c_attn is one matrix, and three matrices of its own where it is not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from gptjax.config import TrainConfig
from gptjax.kernels import cpu_bf16
from gptjax.sharding import PyTree
from gptjax.training import muon, optimizer

from .helpers import init_params, tiny
from .test_optimizer import paths

CFG = tiny()
PARAMS = init_params(CFG, jax.random.key(0))
MATRIX = "h/attn/c_attn/kernel"


def config(**changes: Any) -> TrainConfig:
    fields = {"model": CFG, "optimizer": "muon", "warmup_iters": 2, "weight_decay": 0.1}
    return TrainConfig(**{**fields, **changes})


def after_steps(tx: optax.GradientTransformation, steps: int = 6) -> tuple[PyTree, PyTree]:
    """Return parameters and state after steps with gradients drawn at random."""

    def step(carry: PyTree, key: jax.Array) -> tuple[PyTree, None]:
        params, state = carry
        grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    carry, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((PARAMS, tx.init(PARAMS)))
    return carry


def optax_muon(config: TrainConfig) -> optax.GradientTransformation:
    """What older runs were trained with, and saved."""
    spec = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    matrices = contrib.muon(
        optimizer.make_schedule(config, config.muon_learning_rate),
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: spec, params),
    )
    parts = optax.partition(
        {"muon": matrices, "adamw": optimizer.adamw(config)},
        lambda params: optimizer.match_paths(optimizer.MATRICES, params, "muon", "adamw"),
    )
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), parts)


def difference_to_optax(**changes: Any) -> float:
    params, state = after_steps(optimizer.make_optimizer(config(**changes)))
    wanted, wanted_state = after_steps(optax_muon(config()))
    ours, theirs = paths((params, state)), paths((wanted, wanted_state))
    assert {path: leaf.shape for path, leaf in ours.items()} == {
        path: leaf.shape for path, leaf in theirs.items()
    }
    return max(float(jnp.abs(ours[path] - theirs[path]).max()) for path in theirs)


def test_as_one_matrix_it_is_optaxs_to_the_paths_of_the_state() -> None:
    assert difference_to_optax(muon_qkv="whole") <= 1e-6


@pytest.mark.parametrize("mistake", [{}, {"muon_qkv": "whole", "muon_momentum_warmup": 100}])
def test_that_gate_turns_red(mistake: dict[str, Any]) -> None:
    assert not difference_to_optax(**mistake) <= 1e-4


def orthogonalise(x: Any, parts: int, dtype: Any = jnp.float32, *einsum: Any) -> np.ndarray:
    coefficients = jnp.asarray(muon.COEFFICIENTS)
    found = muon.orthogonalise(jnp.asarray(x), coefficients, parts, dtype, *einsum)
    return np.asarray(found, np.float32)


def test_q_k_and_v_are_each_taken_alone() -> None:
    x = np.random.default_rng(0).normal(size=(2, 32, 96)).astype(np.float32)
    x[:, :, :32] *= 100  # large gradients of q: as one matrix they would drown those of k and v
    alone = [orthogonalise(part, 1) for part in np.split(x, 3, axis=2)]
    together = orthogonalise(x, 3)
    assert np.abs(together - np.concatenate(alone, axis=2)).max() <= 1e-5
    by_rows = orthogonalise(x.reshape(2, 96, 32), 1).reshape(x.shape)  # the mistake
    assert not np.abs(together - by_rows).max() <= 1e-2
    size = [np.sqrt(np.mean(part**2)) for part in np.split(together, 3, axis=2)]
    whole = [np.sqrt(np.mean(part**2)) for part in np.split(orthogonalise(x, 1), 3, axis=2)]
    assert size == pytest.approx([32**-0.5] * 3, rel=0.2)  # which a learning rate counts on
    assert np.sqrt(np.mean(np.square(whole))) == pytest.approx(32**-0.5, rel=0.3)
    assert whole[1] < whole[0] / 2


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (32, 32)])
def test_an_entry_of_an_update_is_as_large_in_every_shape(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    found = orthogonalise(x, 1)
    assert np.sqrt(np.mean(found**2)) == pytest.approx(shape[0] ** -0.5, rel=0.2)
    half = orthogonalise(x, 1, jnp.bfloat16)
    assert np.linalg.norm(half - found) <= 0.1 * np.linalg.norm(found)  # the small singular values
    mixed = orthogonalise(x, 1, jnp.float32, cpu_bf16.plain_einsum)
    assert 1e-3 <= np.linalg.norm(mixed - found) / np.linalg.norm(found) <= 0.05


def test_momentum_rises_in_a_line() -> None:
    def at(count: int, warmup: int) -> float:
        return float(muon.momentum(config(muon_momentum_warmup=warmup), jnp.asarray(count)))

    assert [at(count, 300) for count in (0, 150, 300, 999)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )
    assert at(0, 0) == 0.95
