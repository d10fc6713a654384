"""Every published tensor has one place in the tree, and a wrong one never gets there."""

import dataclasses
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from gptjax import model
from gptjax.conversion import copies
from gptjax.conversion.copies import copier
from gptjax.conversion.tensors import HEAD, Source, named_tensors, read_params, slots
from gptjax.errors import DataError

from .helpers import same_structure, scaled_params, tiny

CFG = tiny(vocab_multiple=16)  # 61 tokens in 64 rows


def make_source(
    arrays: dict[str, np.ndarray], cfg: Any = CFG, reads: Counter[str] | None = None
) -> Source:
    """A source that holds these arrays and counts how often each is read."""
    table = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}

    def read(name: str) -> np.ndarray:
        if reads is not None:
            reads[name] += 1
        return arrays[name]

    return Source(cfg, table, read, "here", ())


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return dict(named_tensors(CFG, scaled_params(CFG, jax.random.key(1))))


def assert_equal(a: model.Params, b: model.Params) -> None:
    assert same_structure(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == np.float32
        assert np.array_equal(x, y)


@pytest.mark.parametrize("bias", [True, False])
def test_the_table_is_the_models_tree(bias: bool) -> None:
    cfg = tiny(bias=bias)
    shapes: dict[str, Any] = {}
    for slot in slots(cfg):
        stack = () if slot.layer is None else (cfg.n_layer,)
        shapes[slot.path] = (*stack, *slot.shape)
    tree = jax.eval_shape(lambda: model.init_params(cfg, jax.random.key(0)))
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    expected["wte/embedding"] = (cfg.vocab_size, cfg.n_embd)  # a file has no padding
    assert shapes == expected


def test_round_trip_reads_each_tensor_once(arrays: dict[str, np.ndarray]) -> None:
    reads: Counter[str] = Counter()
    found = read_params(make_source(arrays, reads=reads))
    assert_equal(found, jax.device_get(scaled_params(CFG, jax.random.key(1))))
    assert reads == dict.fromkeys(arrays, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_become_float32(arrays: dict[str, np.ndarray], dtype: Any) -> None:
    other = {name: array.astype(dtype) for name, array in arrays.items()}
    expected = {name: array.astype(np.float32) for name, array in other.items()}
    assert_equal(read_params(make_source(other)), read_params(make_source(expected)))


def test_a_model_without_biases_is_written_with_zeros() -> None:
    cfg = dataclasses.replace(CFG, bias=False)
    written = dict(named_tensors(cfg, scaled_params(cfg, jax.random.key(1))))
    assert set(written) == {slot.name for slot in slots(CFG)}
    assert not any(np.any(array) for name, array in written.items() if name.endswith(".bias"))


def replaced(name: str, change: Any) -> Any:
    def damage(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = change(arrays[name])

    return damage


def poke(value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    return change


DAMAGE = {
    "missing": (lambda arrays: arrays.pop("h.1.ln_2.bias"), "h.1.ln_2.bias is missing"),
    "extra": (
        lambda arrays: arrays.update({"h.2.ln_1.weight": np.ones(4, np.float32)}),
        "h.2.ln_1.weight is not GPT-2's",
    ),
    "misshapen": (replaced("wpe.weight", lambda a: a[:-1]), "wpe.weight has shape"),
    "transposed": (
        replaced("h.0.mlp.c_fc.weight", lambda a: a.T),
        "h.0.mlp.c_fc.weight has shape",
    ),
    "integers": (replaced("wte.weight", lambda a: a.astype(np.int64)), "wte.weight is int64"),
    "NaN": (replaced("h.1.attn.c_attn.bias", poke(np.nan)), "h.1.attn.c_attn.bias holds NaN"),
    "infinity": (replaced("ln_f.weight", poke(np.inf)), "ln_f.weight holds NaN or infinity"),
    "too large for float32": (
        replaced("ln_f.bias", lambda a: poke(1e300)(a.astype(np.float64))),
        "ln_f.bias holds NaN or infinity",
    ),
    "another head": (
        lambda arrays: arrays.update({HEAD: poke(3)(arrays["wte.weight"])}),
        "lm_head.weight differs from wte.weight",
    ),
    "misshapen head": (
        lambda arrays: arrays.update({HEAD: arrays["wte.weight"][:-1]}),
        "lm_head.weight has shape",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(arrays: dict[str, np.ndarray], damage: str) -> None:
    change, message = DAMAGE[damage]
    change(arrays)
    with pytest.raises(DataError, match="cannot use this checkpoint \\(here\\)") as error:
        read_params(make_source(arrays))
    assert message in str(error.value)


def test_all_problems_are_listed_at_once(arrays: dict[str, np.ndarray]) -> None:
    listed = ("missing", "extra", "misshapen", "integers", "infinity")
    for damage in listed:
        DAMAGE[damage][0](arrays)
    with pytest.raises(DataError) as error:
        read_params(make_source(arrays))
    assert "5 problems" in str(error.value)
    assert all(DAMAGE[damage][1] in str(error.value) for damage in listed)


def test_an_equal_head_is_dropped(arrays: dict[str, np.ndarray]) -> None:
    with_head = {**arrays, HEAD: arrays["wte.weight"].copy()}
    assert_equal(read_params(make_source(with_head)), read_params(make_source(arrays)))


def test_an_equal_head_in_float64_is_dropped(arrays: dict[str, np.ndarray]) -> None:
    wide = {name: array.astype(np.float64) + 1e-12 for name, array in arrays.items()}
    read_params(make_source({**wide, HEAD: wide["wte.weight"].copy()}))


@pytest.mark.parametrize(("limit", "several"), [(0, False), (2**20, True)])
def test_arrays_are_copied_while_others_are_read(
    limit: int, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time where they are large, and many small ones."""
    under_way, seen, put = [0], [0], jax.device_put

    def slow(array: np.ndarray) -> jax.Array:
        under_way[0] += 1
        seen[0] = max(seen[0], under_way[0])
        time.sleep(0.01)
        under_way[0] -= 1
        return put(array)

    params = scaled_params(CFG, jax.random.key(0))
    source = make_source(dict(named_tensors(CFG, params)))
    monkeypatch.setattr(jax, "device_put", slow)
    monkeypatch.setattr(copies, "UNDER_WAY", limit)
    with ThreadPoolExecutor(8) as pool:
        found = jax.tree.map(Future.result, read_params(source, copier(pool)))
    assert (seen[0] > 1) == several
    assert same_structure(found, params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, params)))


def test_a_copy_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(array: np.ndarray) -> jax.Array:
        raise MemoryError("the device is full")

    monkeypatch.setattr(jax, "device_put", full)
    monkeypatch.setattr(copies, "UNDER_WAY", 0)
    with ThreadPoolExecutor(1) as pool:
        place = copier(pool)
        place(np.zeros(1))
        with pytest.raises(MemoryError, match="full"):
            place(np.zeros(1))


def test_copies_go_where_the_caller_wants_them() -> None:
    device = jax.devices()[1]
    with jax.default_device(device), ThreadPoolExecutor(1) as pool:
        copy = copier(pool)(np.ones(3)).result()
    assert copy.devices() == {device}
