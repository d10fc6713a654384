"""GELU against float64, JAX's and PyTorch's, both forms; and how one row is multiplied on a GPU."""

import math
from collections.abc import Callable
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import functions, model
from gptjax.config import GPTConfig
from gptjax.functions import ACTIVATIONS
from gptjax.kv_cache import make_cache

from .helpers import scaled_params, tiny

X = np.concatenate([np.linspace(-13, 8, 2101), [-1e20, 1e20, -1e-30, 0]]).astype(np.float32)


def values(function: Callable[[jax.Array], jax.Array], x: np.ndarray) -> tuple[np.ndarray, ...]:
    """y and dy/dx as float64."""
    found = jax.jit(jax.vmap(jax.value_and_grad(function)))(x)
    return tuple(np.asarray(array, np.float64) for array in found)


def exact(x: float) -> tuple[float, float]:
    """GELU by erf and its derivative, in float64: x P(x), and P(x) + x p(x)."""
    gate, density = math.erfc(-x / math.sqrt(2)) / 2, math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return x * gate, gate + x * density


def check_exact() -> None:
    """`gelu_erf` is right to 7 digits; where it vanishes, on the left, still to 4."""
    expected = np.array([exact(float(x)) for x in X]).T
    for found, wanted in zip(values(functions.gelu_erf, X), expected, strict=True):
        right = np.abs(found - wanted) <= 2e-7 * np.maximum(1, np.abs(wanted))
        assert right.all(), X[~right]
    y, wanted = values(functions.gelu_erf, X)[0], expected[0]
    vanishing = (X < -1) & (X > -12)
    assert (np.abs(y - wanted)[vanishing] <= 1e-4 * np.abs(wanted)[vanishing]).all()


def test_the_settings_are_the_functions() -> None:
    assert get_args(get_type_hints(GPTConfig)["activation"]) == tuple(ACTIVATIONS)


def test_exact_gelu_against_float64() -> None:
    check_exact()


PLANTED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "the tanh form": functions._tanh_gate,
    "(1 + erf) / 2": lambda x: 0.5 * (1 + jax.lax.erf(math.sqrt(0.5) * x)),
    "a variance of 1/2": lambda x: 0.5 * jax.lax.erfc(-x),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_in_the_gate_turns_red(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "_erf_gate", PLANTED[mistake])
    jax.clear_caches()
    with pytest.raises(AssertionError):
        check_exact()
    jax.clear_caches()


@pytest.mark.parametrize(("name", "tolerance"), [("gelu_tanh", 1e-5), ("gelu", 1e-6)])
def test_the_gradient_is_jaxs(name: str, tolerance: float) -> None:
    """JAX's of the tanh form has lost digits where tanh is nearly 1."""
    theirs = values(lambda x: jax.nn.gelu(x, approximate=name == "gelu_tanh"), X[:-4])
    for ours, other in zip(values(ACTIVATIONS[name], X[:-4]), theirs, strict=True):
        right = np.abs(ours - other) <= tolerance * np.maximum(1, np.abs(other))
        assert right.all(), X[:-4][~right]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bfloat16_is_float32_rounded(name: str) -> None:
    x = X[:-4].astype(jnp.bfloat16)
    for half, full in zip(
        values(ACTIVATIONS[name], x), values(ACTIVATIONS[name], x.astype(np.float32)), strict=True
    ):
        right = np.abs(half - full) <= np.maximum(2**-8 * np.abs(full), 1e-37)
        assert right.all(), x[~right]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_pytorchs(name: str) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[dev]'")
    x = torch.tensor(X[:-4], requires_grad=True)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    y = torch.nn.functional.gelu(x, approximate=approximate)
    y.sum().backward()
    ours, slope = values(ACTIVATIONS[name], X[:-4])
    for found, theirs in ((ours, y.detach().numpy()), (slope, x.grad.numpy())):
        right = np.abs(found - theirs) <= 4e-6 * np.maximum(1, np.abs(theirs))
        assert right.all(), X[:-4][~right]


def test_the_two_forms_are_not_the_same() -> None:
    """By 5e-4 at most, as the docstring says: more than a tolerance, less than a look shows."""
    tanh, erf = (values(ACTIVATIONS[name], X)[0] for name in ("gelu_tanh", "gelu"))
    assert 4e-4 < np.abs(tanh - erf).max() < 5e-4


def test_on_rows_the_function_sees_two_dimensions() -> None:
    shapes = []

    def add(x: jax.Array, y: jax.Array) -> jax.Array:
        shapes.append((x.shape, y.shape))
        return x + y

    x = jnp.arange(24.0).reshape(2, 3, 4)
    assert np.array_equal(functions.on_rows(add, x, 2 * x), 3 * x)
    assert shapes == [((6, 4), (6, 4))]


# ---- One row on a GPU ----------------------------------------------------------------------------


def products(rows: int, dtype: str) -> list[int]:
    """Return the rows of the products with weights in a pass of the model over one token a row."""
    cfg = tiny(n_layer=1, dtype=dtype, attention="xla")
    params = model.prepare_for_decoding(cfg, scaled_params(cfg, jax.random.key(0)))
    tokens, cache = jnp.zeros((rows, 1), jnp.int32), make_cache(cfg, rows, 4)
    jaxpr = jax.make_jaxpr(lambda p: model.next_logits(cfg, p, tokens, cache)[0])(params)
    assert jaxpr.out_avals[0].shape == (rows, cfg.padded_vocab_size)
    block = next(eqn.params["jaxpr"].eqns for eqn in jaxpr.eqns if "jaxpr" in eqn.params)
    dots = [eqn for eqn in (*block, *jaxpr.eqns) if eqn.primitive.name == "dot_general"]
    found = [eqn.invars[0].aval.shape[0] for eqn in dots if len(eqn.outvars[0].aval.shape) == 2]
    assert len(found) == 5  # c_attn, c_proj, c_fc, c_proj and the head
    return found


def test_a_gpu_gets_more_rows_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (
        jax.random.normal(jax.random.key(i), (n, 32), jnp.bfloat16) for i, n in ((0, 1), (1, 9))
    )
    plain = x @ w.T
    assert products(1, "bfloat16") == [1] * 5
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert products(1, "bfloat16") == [8] * 5
    assert products(2, "bfloat16") == [2] * 5
    assert products(1, "float32") == [1] * 5
    found = functions.with_more_rows(lambda x: x @ w.T, x)
    assert found.shape == (1, 9) and (found == plain).all()
