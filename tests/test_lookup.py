"""The lookup of token embeddings whose gradient is added in a fixed order: its values, its use."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import lookup
from gptjax.config import TrainConfig, parse_mesh
from gptjax.lookup import sum_by_product, sum_sorted
from gptjax.sharding import make_mesh, place
from gptjax.training.step import abstract_state, init_state, make_loss_and_grad

from .helpers import tiny


def draw(n: int, n_ids: int, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Ids of which few are frequent, as in texts, and their rows."""
    rng, odds = np.random.default_rng(0), 1 / np.arange(1, n_ids + 1)
    ids = rng.permutation(n_ids)[rng.choice(n_ids, n, p=odds / odds.sum())]
    return ids.astype(np.int32), rng.standard_normal((n, width)).astype(np.float32)


def exact(ids: np.ndarray, rows: np.ndarray, n_ids: int) -> np.ndarray:
    sums = np.zeros((n_ids, rows.shape[1]))
    np.add.at(sums, ids, rows.astype(np.float64))
    return sums


@pytest.mark.parametrize(
    ("n", "n_ids", "dtype"),
    [
        (64, 1, "float32"),  # one id fills all blocks
        (64, 3, "bfloat16"),  # ids go on over several
        (67, 9, "float32"),  # the last block is not full
        (5, 40, "bfloat16"),  # nor is the only one, and most ids have no row
        (128, 500, "float32"),
    ],
)
def test_the_sums_are_those_of_float64(n: int, n_ids: int, dtype: str) -> None:
    ids, rows = draw(n, n_ids)
    rows_ND = jnp.asarray(rows, dtype)
    want = exact(ids, np.asarray(rows_ND, np.float32), n_ids)
    for add in (functools.partial(sum_sorted, block=4), sum_by_product):
        sums = jax.jit(add, static_argnums=2)(ids, rows_ND, n_ids)
        assert sums.dtype == jnp.float32
        assert np.max(np.abs(sums - want)) <= 1e-5


def gradients(mesh: str, n_devices: int) -> dict[str, Any]:
    """The gradient of a step of 2 passes, 8 sequences each."""
    config = TrainConfig(model=tiny(n_head=4, n_layer=1), mesh=mesh, batch_size=8)
    devices = make_mesh(jax.devices()[:n_devices], parse_mesh(mesh))
    abstract = abstract_state(config, devices)
    params = init_state(config, abstract).params
    windows = np.random.default_rng(0).integers(0, 61, (2, 8, 17)).astype(np.int32)
    compute = jax.jit(make_loss_and_grad(config.model, abstract.params))
    return compute(params, place(windows, devices, axis=1), None, None)[1]


@pytest.mark.parametrize("small", [0, lookup.SMALL])
def test_the_gradient_is_that_of_the_plain_lookup(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients("data", 1)
    monkeypatch.setitem(lookup.LOOK_UP, "cpu", lookup.look_up_in_order)
    monkeypatch.setattr(lookup, "SMALL", small)
    found = gradients("data:2,fsdp:2,tensor:2", 8)
    for leaf, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(np.asarray(leaf) - np.asarray(want))) <= 1e-6


@pytest.mark.parametrize("n_ids", [61, 2000])
def test_a_gpu_s_program_has_no_scatter_add(n_ids: int) -> None:
    table_VD, ids = jnp.ones((n_ids, 8)), jnp.zeros((2, 16), jnp.int32)

    def total(table_VD: jax.Array) -> jax.Array:
        return lookup.LOOK_UP["gpu"](table_VD, ids, "bfloat16").astype(jnp.bfloat16).sum()

    program = str(jax.make_jaxpr(jax.grad(total))(table_VD))
    assert "scatter-add" not in program
    assert (" sort[" in program) == (n_ids == 2000)
