"""The exercises of lesson 3.

B rows, S room in the cache, T new tokens, H heads, K head dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exercises import Exercise
from jax import Array
from scale import law

from gptjax import kv_cache, model
from gptjax.config import GPTConfig, TrainConfig
from gptjax.presets import PRESETS
from gptjax.training.metrics import PEAK_FLOPS, flops_per_token
from gptjax.training.optimizer import make_optimizer


def is_close(answer: Any, truth: float, tolerance: float = 0.01) -> bool:
    """Whether a number is right to `tolerance` of it."""
    return math.isclose(float(answer), truth, rel_tol=tolerance)


def state_bytes(answer: Any) -> bool:
    """3.1: weights, gradients and both moments, from the arrays that optax asks for."""
    params = {"kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    moments = jax.eval_shape(make_optimizer(TrainConfig()).init, params)
    held = jax.tree.leaves((params, params, moments))
    return is_close(answer, round(sum(x.size * x.dtype.itemsize for x in held) / 1e6))


def cache_bytes(answer: Any) -> bool:
    """3.2: the cache that gptjax would allocate."""
    xl = GPTConfig(**{**vars(PRESETS["gpt2_xl"].model), "dtype": "bfloat16"})
    cache = jax.eval_shape(lambda: kv_cache.make_cache(xl, 64, 1024))
    return is_close(answer, sum(x.size * x.dtype.itemsize for x in (*cache.k, *cache.v)))


def matvec_intensity(answer: Any) -> bool:
    """3.3: y = W x with W (4096, 4096) in bfloat16."""
    n = 4096
    return is_close(answer, 2 * n * n / (2 * (n * n + 2 * n)))


def medium_mfu(answer: Any) -> bool:
    """3.4: GPT-2 medium at 50,000 tokens/s on an A100."""
    truth = 50_000 * flops_per_token(PRESETS["gpt2_medium"].model) / PEAK_FLOPS["A100"]
    return is_close(answer, truth, 0.02)


def smallest_scale(answer: Any) -> bool:
    """3.5: the first power of two at which numpy's float16 does not round 1e-9 to 0."""
    powers = (2**k for k in range(64))
    return float(answer) == next(scale for scale in powers if np.float16(1e-9 * scale) != 0)


def update(params: Any, scaled_grads: Any, scale: Any, rate: Any) -> Any:
    """One right answer to 3.6."""
    finite = jnp.all(jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(scaled_grads)]))
    return jax.tree.map(
        lambda p, g: jnp.where(finite, p - rate * g / scale, p), params, scaled_grads
    )


def update_without_skipping(params: Any, scaled_grads: Any, scale: Any, rate: Any) -> Any:
    """A wrong answer to 3.6: it skips the numbers that are not finite, and takes the others."""
    return jax.tree.map(
        lambda p, g: jnp.where(jnp.isfinite(g), p - rate * g / scale, p), params, scaled_grads
    )


def updates(answer: Any) -> bool:
    """3.6: a step with finite gradients, one with an infinite one, and one with NaN."""
    params = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
    grads = {"kernel": jnp.ones((2, 3)), "bias": jnp.arange(3.0)}
    compiled = jax.jit(answer)
    for value, steps in ((2.0, 1), (jnp.inf, 0), (jnp.nan, 0)):
        scaled = jax.tree.map(lambda g: 1024 * g, grads)
        scaled["bias"] = scaled["bias"].at[2].set(1024 * value)
        given = compiled(params, scaled, 1024.0, 0.5)
        truth = jax.tree.map(lambda p, g, n=steps: p - n * 0.5 * g, params, grads)
        if not all(jax.tree.leaves(jax.tree.map(np.allclose, given, truth))):
            return False
    return True


def update_cache(cache_BSHK: Array, new_BTHK: Array, length: Any) -> Array:
    """One right answer to 3.7."""
    return jax.lax.dynamic_update_slice(cache_BSHK, new_BTHK, (0, length, 0, 0))


def overwrites(cache_BSHK: Array, new_BTHK: Array, length: Any) -> Array:
    """A wrong answer to 3.7: it writes at the start of the cache."""
    return cache_BSHK.at[:, : new_BTHK.shape[1]].set(new_BTHK)


def updates_cache(answer: Any) -> bool:
    """3.7: a prompt into an empty cache, then single tokens, against gptjax's own."""
    rng = np.random.default_rng(0)
    B, S, H, K = 2, 7, 3, 4
    mine = theirs = jnp.zeros((B, S, H, K))
    compiled, length = jax.jit(answer), 0
    for T in (3, 1, 1, 2):
        new_BTHK = jnp.asarray(rng.standard_normal((B, T, H, K), np.float32))
        mine = compiled(mine, new_BTHK, length)
        theirs = kv_cache.write(theirs, new_BTHK, jnp.full(B, length))
        length += T
        if mine.shape != theirs.shape or not np.array_equal(mine, theirs):
            return False
    return True


def merge(a: Any, b: Any) -> Any:
    """One right answer to 3.8."""
    (top_a, total_a, mixed_a), (top_b, total_b, mixed_b) = a, b
    top = np.maximum(top_a, top_b)
    shrink_a, shrink_b = np.exp(top_a - top), np.exp(top_b - top)
    total = total_a * shrink_a + total_b * shrink_b
    return top, total, mixed_a * shrink_a[:, None] + mixed_b * shrink_b[:, None]


def merge_without_shrinking(a: Any, b: Any) -> Any:
    """A wrong answer to 3.8: it forgets that the two blocks have different largest scores."""
    return np.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]


def merges(answer: Any) -> bool:
    """3.8: two blocks of scores, merged, against the softmax of all of them."""
    rng = np.random.default_rng(0)
    scores_TS, v_SK = 30 * rng.normal(size=(3, 8)), rng.normal(size=(8, 5))

    def block(part: slice) -> Any:
        top_T = scores_TS[:, part].max(axis=1)
        weights = np.exp(scores_TS[:, part] - top_T[:, None])
        return top_T, weights.sum(axis=1), weights @ v_SK[part]

    top_T, total_T, mixed_TK = (
        np.asarray(part) for part in answer(block(slice(5)), block(slice(5, 8)))
    )
    truth = np.asarray(jax.nn.softmax(jnp.asarray(scores_TS))) @ v_SK
    right = np.allclose(mixed_TK / total_T.reshape(-1, 1), truth, atol=1e-5)
    return bool(right and np.allclose(top_T, scores_TS.max(axis=1)))


def optimal_tokens(answer: Any) -> bool:
    """3.9: 20 tokens for each parameter."""
    return is_close(answer, 20 * model.count_params(GPTConfig()), 0.02)


def six_hours(answer: Any) -> bool:
    """3.10: one H100, 6 hours, 40 % MFU, 20 tokens a parameter."""
    n, _ = law.at_budget(None, 6 * 3600 * 0.4 * PEAK_FLOPS["H100"])
    return is_close(answer, n, 0.02)


EXERCISES = {
    "3.1": Exercise(
        state_bytes,
        "Count four float32 arrays of the parameters' size: AdamW has two of its own.",
        16,
        8,
    ),
    "3.2": Exercise(
        cache_bytes,
        "Keys and values: 2 * layers * width * tokens * rows numbers, of two bytes each.",
        2 * 48 * 1600 * 1024 * 64 * 2,
        48 * 1600 * 1024 * 64 * 2,
    ),
    "3.3": Exercise(
        matvec_intensity,
        "A weight of two bytes is read once, for one multiplication and one addition.",
        1.0,
        4096,
    ),
    "3.4": Exercise(
        medium_mfu,
        "Tokens a second times FLOPs a token, 6 N + 12 L D T, divided by the peak.",
        50_000 * (6 * 355e6 + 12 * 24 * 1024 * 1024) / 312e12,
        50_000 * 6 * 355e6 / 312e12,
    ),
    "3.5": Exercise(
        smallest_scale,
        "Try np.float16(1e-9 * 2**k): what is above 2^-25 is rounded up to 2^-24.",
        32,
        64,
    ),
    "3.6": Exercise(
        updates,
        "One number that is not finite anywhere stops the whole step: make a single True or False "
        "of all gradients, and let jnp.where pick between new and old.",
        update,
        update_without_skipping,
    ),
    "3.7": Exercise(
        updates_cache,
        "jax.lax.dynamic_update_slice(array, part, start) writes at a start that is computed.",
        update_cache,
        overwrites,
    ),
    "3.8": Exercise(
        merges,
        "Before you add, bring both blocks to the larger top: multiply by exp(its top - top).",
        merge,
        merge_without_shrinking,
    ),
    "3.9": Exercise(
        optimal_tokens,
        "Hoffmann et al. find about 20 tokens for each parameter.",
        2.49e9,
        300e9,
    ),
    "3.10": Exercise(
        six_hours,
        "C = seconds * MFU * peak = 6 * N * 20 N: solve for N.",
        math.sqrt(6 * 3600 * 0.4 * 989e12 / 120),
        math.sqrt(6 * 3600 * 989e12 / 120),
    ),
}
