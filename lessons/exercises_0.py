"""The exercises of lesson 0, "JAX in twenty minutes"."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exercises import Exercise
from jax import Array

rng = np.random.default_rng(0)


def equal(answer: Any, truth: Any) -> bool:
    """Whether an answer has the shape of the truth, and its numbers to six digits."""
    given, expected = np.asarray(answer), np.asarray(truth)
    return given.shape == expected.shape and bool(np.allclose(given, expected, 1e-5, 1e-6))


def shifts(function: Any) -> bool:
    """0.1: for two shapes and two first tokens."""
    for shape, first in (((2, 5), 0), ((3, 4), 7)):
        tokens_BT = rng.integers(1, 100, shape)
        truth = np.insert(tokens_BT[:, :-1], 0, first, axis=1)
        if not equal(function(jnp.asarray(tokens_BT), first), truth):
            return False
    return True


def is_newton(function: Any) -> bool:
    """0.2: for polynomials, whose derivatives are written down here."""
    return all(
        equal(function(lambda x, n=n: x**n - 2, x), x - (x**n - 2) / (n * x ** (n - 1)))
        for n, x in ((2, 1.5), (3, 2.0), (5, 0.7))
    )


def clips(function: Any) -> bool:
    """0.3: inside jit, a vector that is too long, and one that is not."""
    compiled = jax.jit(function)
    x = jnp.array([3.0, 4.0])
    return equal(compiled(x, 1.0), [0.6, 0.8]) and equal(compiled(x, 6.0), x)


def picks(function: Any) -> bool:
    """0.4: rows of different lengths."""
    x_BTD, length_B = jnp.asarray(rng.standard_normal((3, 5, 2))), jnp.array([2, 5, 1])
    return equal(function(x_BTD, length_B), [x_BTD[0, 1], x_BTD[1, 4], x_BTD[2, 0]])


def averages(function: Any) -> bool:
    """0.5: the numbers of a loop, and a scan in what JAX traces."""
    g_T = jnp.asarray(rng.standard_normal(6), jnp.float32)
    for beta in (0.9, 0.5):
        average, truth = 0.0, []
        for g in g_T:
            average = beta * average + (1 - beta) * float(g)
            truth.append(average)
        if not equal(function(g_T, beta), truth):
            return False
    return "scan" in str(jax.make_jaxpr(function)(g_T, 0.9))


def decays(function: Any) -> bool:
    """0.6: kernels at two depths; nothing else, not even a matrix of another name."""
    kernel, other = jnp.arange(4.0).reshape(2, 2), jnp.ones((2, 2))
    tree = {"kernel": kernel, "wte": {"embedding": other}, "c_fc": {"kernel": kernel, "bias": 3.0}}
    truth = {
        "kernel": 0.75 * kernel,
        "wte": {"embedding": other},
        "c_fc": {"kernel": 0.75 * kernel, "bias": 3.0},
    }
    given = function(tree, 0.25)
    return all(jax.tree.leaves(jax.tree.map(equal, given, truth)))  # raises for another tree


def newton_step(f: Callable[[Any], Any], x: float) -> Array:
    """A right answer to 0.2."""
    value, slope = jax.value_and_grad(f)(x)
    return x - value / slope


def clip_to_length(x: Array, limit: Array) -> Array:
    """A right answer to 0.3."""
    length = jnp.sqrt(jnp.square(x).sum())
    return jnp.where(length > limit, x * limit / length, x)


def moving_average(g_T: Array, beta: float) -> Array:
    """A right answer to 0.5."""

    def step(m: Array, g: Array) -> tuple[Array, Array]:
        m = beta * m + (1 - beta) * g
        return m, m

    return jax.lax.scan(step, jnp.zeros(()), g_T)[1]


def decay_kernels(params: Any, rate: float) -> Any:
    """A right answer to 0.6."""
    return jax.tree.map_with_path(
        lambda path, p: p * (1 - rate) if path[-1].key == "kernel" else p, params
    )


EXERCISES = {
    "0.1": Exercise(
        shifts,
        "Column 0 is `first` in each row, and the last token of a row falls out: jnp.roll would "
        "bring it to the front.",
        lambda tokens_BT, first: jnp.roll(tokens_BT, 1, axis=1).at[:, 0].set(first),
        lambda tokens_BT, first: jnp.roll(tokens_BT, 1, axis=1),
    ),
    "0.2": Exercise(
        is_newton,
        "jax.value_and_grad(f)(x) gives f(x) and its derivative there; divide one by the other.",
        newton_step,
        lambda f, x: x - jax.grad(f)(x),
    ),
    "0.3": Exercise(
        clips,
        "What is shorter than the limit stays as it is: jnp.where picks between the two.",
        clip_to_length,
        lambda x, limit: x * limit / jnp.sqrt(jnp.square(x).sum()),
    ),
    "0.4": Exercise(
        picks,
        "Write it for one row, x_TD[length - 1], and let jax.vmap do it for all.",
        jax.vmap(lambda x_TD, length: x_TD[length - 1]),
        lambda x_BTD, length_B: x_BTD[:, -1],
    ),
    "0.5": Exercise(
        averages,
        "The carry of jax.lax.scan is m, and each round puts it out as well; beta weighs the "
        "old m, and 1 - beta the new number.",
        moving_average,
        lambda g_T, beta: moving_average(g_T, 1 - beta),
    ),
    "0.6": Exercise(
        decays,
        "jax.tree.map_with_path gives the path too; path[-1].key is the last name in it.",
        decay_kernels,
        lambda params, rate: jax.tree.map(lambda p: p * (1 - rate), params),
    ),
}
