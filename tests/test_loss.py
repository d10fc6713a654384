"""The loss and its written-out gradient against their definition in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import loss


def reference(logits_NV: Any, targets_N: np.ndarray, weights_N: np.ndarray) -> tuple[Any, Any]:
    """Losses, and the gradient of their weighted sum, in float64."""
    x = np.asarray(logits_NV, np.float64)
    rows = np.arange(len(x))
    e = np.exp(x - x.max(axis=1, keepdims=True))
    losses = np.log(e.sum(axis=1)) + x.max(axis=1) - x[rows, targets_N]
    gradient = e / e.sum(axis=1, keepdims=True)
    gradient[rows, targets_N] -= 1
    return losses, gradient * weights_N[:, None]


def check(vocab_size: int, padded: int, dtype: str) -> None:
    rng = np.random.default_rng(vocab_size)
    logits_NV = 20 * rng.standard_normal((7, padded))
    logits_NV[0] += 1000  # exp of it overflows
    logits_NV[1] -= 1000
    logits_NV[:, vocab_size:] = -np.inf
    x_NV = jnp.asarray(logits_NV, dtype)
    targets_N, weights_N = rng.integers(0, vocab_size, 7), rng.standard_normal(7)
    expected, gradient = reference(x_NV.astype(jnp.float32), targets_N, weights_N)
    found, vjp = jax.vjp(jax.jit(lambda x_NV: loss.token_losses(x_NV, targets_N)), x_NV)
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() <= 2e-4  # 1000 has a spacing of 6e-5
    (found,) = vjp(jnp.asarray(weights_N, jnp.float32))
    assert found.dtype == x_NV.dtype
    assert np.abs(np.asarray(found, np.float64) - gradient).max() <= (
        1e-2 if dtype == "bfloat16" else 2e-4
    )


CASES = [(61, 61, "float32"), (300, 384, "float32"), (300, 384, "bfloat16")]


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU takes."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient(case: tuple[int, int, str]) -> None:
    check(*case)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_in_one_pass(case: tuple[int, int, str], one_pass: None) -> None:
    check(*case)


@pytest.mark.parametrize("columns", [1, 13, 64, 1000])
def test_one_pass_is_logsumexp(columns: int) -> None:
    x_NV = 50 * jax.random.normal(jax.random.key(columns), (9, columns))
    x_NV = x_NV.at[0].set(-jnp.inf).at[1, 1:].set(-jnp.inf)
    found, expected = loss.one_pass_logsumexp(x_NV), jax.nn.logsumexp(x_NV, axis=1)
    assert found[0] == expected[0] == -jnp.inf
    assert np.abs(found[1:] - expected[1:]).max() <= 1e-5 * np.abs(expected[1:]).max()


def test_gates_turn_red(one_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistakes: sums merged without bringing them to one maximum; a forgotten target."""
    reduce = jax.lax.reduce

    def merge_plainly(operands: Any, start: Any, merge: Any, dimensions: Any) -> Any:
        def plainly(a: Any, b: Any) -> Any:
            return jnp.maximum(a[0], b[0]), a[1] + b[1]

        return reduce(operands, start, plainly, dimensions)

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(jax.lax, "reduce", merge_plainly)
        check(*CASES[1])
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(jnp, "arange", lambda n: jnp.full(n, -1))  # no column is a target
        check(*CASES[1])
