"""Dropout's masks: as random as they have to be, and a function of the row's key and place alone.

A z-score is a sum of so many random numbers in units of its standard deviation: of all that are
looked at here, one above 5 would come up once in a thousand changes of the hash.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention, model, sharding
from gptjax.config import GPTConfig, TrainConfig
from gptjax.dropout import drop, drop_rows, keep_mask, keys_of_places
from gptjax.training.step import dropout_keys, loss_and_grad

from .helpers import scaled_params, tiny

RATES = (0.1, 0.2, 0.5)
SHAPE = (16, 6, 32, 96)  # B rows, H heads, T queries, S keys


def row_keys(seed: int, rows: int) -> jax.Array:
    """Return keys as the step makes them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def mask(rate: float, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return a mask, which is that of layer 0 at place 0."""
    return np.asarray(keep_mask(keys_of_places(row_keys(seed, shape[0]), 1)[0], shape, rate))


def standard(keep: np.ndarray, rate: float) -> np.ndarray:
    """Return the mask as numbers with mean 0 and variance 1, if it is what it should be."""
    return (keep - (1 - rate)) / np.sqrt(rate * (1 - rate))


def z_score(numbers: np.ndarray) -> float:
    """Return how many of its standard deviations a sum of such numbers is from 0."""
    return abs(float(numbers.sum())) / np.sqrt(numbers.size)


# ---- Random enough -------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
def test_masks_have_the_rate_and_no_structure(rate: float) -> None:
    """The mean; each index of each axis; neighbours at every small distance along every axis."""
    z = standard(mask(rate), rate)
    assert z_score(z) <= 5
    for axis, size in enumerate(SHAPE):
        others = tuple(i for i in range(z.ndim) if i != axis)
        counts = z.sum(axis=others) / np.sqrt(z.size / size)
        assert abs(np.square(counts).sum() - size) <= 5 * np.sqrt(2 * size)
        for distance in (1, 2, 3, 4, 8, 16, 31):
            if distance < size:
                near = np.take(z, range(size - distance), axis)
                assert z_score(near * np.take(z, range(distance, size), axis)) <= 5


@pytest.mark.parametrize("rate", RATES)
def test_blocks_of_four_bits_come_as_often_as_they_should(rate: float) -> None:
    """Chi-square, along the keys and in squares of two queries and two keys."""
    keep = mask(rate)
    along = [keep[..., i::4] for i in range(4)]
    square = [keep[:, :, i::2, j::2] for i, j in itertools.product((0, 1), repeat=2)]
    for bits in (along, square):
        found = np.bincount(sum(bit * 2**i for i, bit in enumerate(bits)).ravel(), minlength=16)
        ones = np.array([int(i).bit_count() for i in range(16)])
        expected = (1 - rate) ** ones * rate ** (4 - ones) * found.sum()
        assert abs((np.square(found - expected) / expected).sum() - 15) <= 5 * np.sqrt(30)


def test_columns_and_rows_are_independent_of_each_other() -> None:
    z = standard(mask(0.5), 0.5).reshape(-1, SHAPE[-1])
    for sides in (z, z[:2000].T):
        products = sides.T @ sides / np.sqrt(len(sides))  # each a z-score
        pairs = products[np.triu_indices(len(products), 1)]
        assert np.abs(pairs).max() <= 6
        assert abs(np.square(pairs).mean() - 1) <= 5 * np.sqrt(2 / len(pairs))


def test_rows_places_and_steps_have_masks_of_their_own() -> None:
    """No two masks of a row, layer, place, pass or step are equal or alike."""
    places = keys_of_places(row_keys(0, 8), 1 + 3 * 6)
    keys = jnp.concatenate([places.reshape(-1), row_keys(0, 8), row_keys(1, 8)])
    z = standard(np.asarray(keep_mask(keys, (len(keys), 8, 128), 0.2)), 0.2).reshape(len(keys), -1)
    products = z @ z.T / np.sqrt(z.shape[1])
    assert np.abs(products[np.triu_indices(len(products), 1)]).max() <= 6
    rows = z.reshape(-1, 128)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_rate_is_met_where_it_is_near_0_or_1() -> None:
    shape = (16, 256, 256)
    for rate in (0.0, 1e-4, 0.999):
        dropped = shape[0] * 256 * 256 - int(mask(rate, shape=shape).sum())
        expected = rate * 16 * 256 * 256
        assert abs(dropped - expected) <= 5 * np.sqrt(expected * (1 - rate))


# ---- A function of the row's key and the index ---------------------------------------------------


def test_a_row_has_its_mask_wherever_it_is_computed() -> None:
    """Alone, in another order, in a part of the queries and keys, and on several devices."""
    keys, shape = row_keys(3, 8), (8, 2, 12, 20)
    whole = keep_mask(keys, shape, 0.3)
    order = np.array([5, 0, 7])
    assert np.array_equal(keep_mask(keys[order], (3, *shape[1:]), 0.3), whole[order])
    positions = jnp.arange(4, 9)[None]
    part = keep_mask(keys, (8, 2, 5, 9), 0.3, positions)
    assert np.array_equal(part, whole[:, :, 4:9, :9])
    spread = sharding.batch_sharding(sharding.make_mesh(), axis=0)
    compute = jax.jit(lambda keys: keep_mask(keys, shape, 0.3), out_shardings=spread)
    assert np.array_equal(compute(keys), whole)


def test_activations_are_dropped_by_row_token_and_column() -> None:
    x_BTD = jax.random.normal(jax.random.key(0), (4, 6, 10)).astype(jnp.bfloat16)
    keys = row_keys(0, 4)
    y_BTD = drop_rows(x_BTD, keys, 0.25)
    assert y_BTD.dtype == x_BTD.dtype
    kept = np.asarray(keep_mask(keys, x_BTD.shape, 0.25))
    exact = np.where(kept, np.asarray(x_BTD, np.float32) / 0.75, 0)
    assert np.array_equal(y_BTD, exact.astype(jnp.bfloat16))


def test_forward_and_backward_drop_the_same() -> None:
    x, keys = jnp.ones((4, 2, 6, 10)), row_keys(0, 4)
    keep = keep_mask(keys, x.shape, 0.4)

    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = drop(x, keep_mask(keys, x.shape, 0.4), 0.4)
        return y.sum(), y

    slope, y = jax.jit(jax.grad(total, has_aux=True))(x)
    assert np.array_equal(y, slope)
    assert np.array_equal(slope, keep * np.float32(1 / (1 - 0.4)))


def test_attention_in_blocks_drops_what_the_reference_drops() -> None:
    """Values and gradients: four blocks of queries, the last one shorter."""
    T = 230
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, T, 2, 8)) * 2
    keys = row_keys(5, 2)

    def probe(attend: Any, *more: jax.Array, **dropout: Any) -> list[jax.Array]:
        square = jax.value_and_grad(
            lambda *qkv: (attend(*qkv, *more, **dropout) ** 2).sum(), argnums=(0, 1, 2)
        )
        return jax.tree.leaves(jax.jit(square)(q, k, v))

    positions = jnp.arange(T)[None]
    one = probe(attention.attend, positions, dropout=0.3, keys_B=keys)
    blocks = probe(attention.attend_xla, dropout=0.3, keys_B=keys)
    plain = probe(attention.attend, positions)
    for a, b, c in zip(one, blocks, plain, strict=True):
        scale = float(jnp.abs(a).max())
        assert float(jnp.abs(a - b).max()) <= 1e-5 * scale
        assert float(jnp.abs(a - c).max()) >= 1e-2 * scale


def test_remat_and_a_rolled_scan_drop_the_same() -> None:
    """Whatever is computed again in the backward pass."""
    tokens = jnp.arange(48).reshape(3, 16)
    found = []
    for changes in ({}, {"remat": True}, {"unroll": 1}, {"unroll": 1, "remat": True}):
        cfg = tiny(dropout=0.3, **changes)
        params = scaled_params(cfg, jax.random.key(0))

        def mean(params: model.Params, cfg: object = cfg) -> jax.Array:
            x, _ = model.hidden_states(cfg, params, tokens, dropout_key=row_keys(0, 3))  # type: ignore[arg-type]
            return jnp.square(x).mean() + x.mean()

        found.append(jax.tree.leaves(jax.jit(jax.grad(mean))(params)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert float(jnp.abs(a - b).max()) <= 1e-5 * float(jnp.abs(a).max()) + 1e-7


def test_attention_weights_are_kept_where_that_is_asked_for() -> None:
    """The rest is dropped by the same masks; then cuDNN may compute the attention."""
    tokens, found = jnp.arange(48).reshape(3, 16), []
    for kept in (False, True):
        cfg = tiny(dropout=0.3, attention_dropout=not kept)
        params = scaled_params(cfg, jax.random.key(0))
        with pytest.MonkeyPatch.context() as patch:
            if kept:  # it never asks for a mask
                patch.setattr(attention, "keep_mask", None)
            else:
                patch.setattr(attention, "drop", lambda weights, keep, rate: weights)
            x, _ = model.hidden_states(cfg, params, tokens, dropout_key=row_keys(0, 3))
        found.append(x)
    assert float(jnp.abs(found[0] - found[1]).max()) <= 1e-6
    assert GPTConfig(attention="cudnn", dropout=0.3, attention_dropout=False).weights_dropout == 0


# ---- In the step ---------------------------------------------------------------------------------


def test_how_a_step_is_cut_into_passes_does_not_change_its_masks() -> None:
    """8 rows in one pass, in two and in four."""
    cfg = tiny(dropout=0.3)
    params = scaled_params(cfg, jax.random.key(0))
    windows = np.random.default_rng(0).integers(0, 61, (8, 17), dtype=np.int32)
    config, compute = TrainConfig(model=cfg), jax.jit(loss_and_grad, static_argnums=0)

    def in_passes(passes: int) -> object:
        windows_ABT = windows.reshape(passes, -1, 17)
        return compute(cfg, params, windows_ABT, dropout_keys(config, 4, windows_ABT.shape[:2]))

    one, two, four = in_passes(1), in_passes(2), in_passes(4)
    for other in (two, four):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert float(jnp.abs(a - b).max()) <= 1e-5 * max(1e-2, float(jnp.abs(a).max()))
