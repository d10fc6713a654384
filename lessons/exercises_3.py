"""The exercises of lesson 3."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exercises import Exercise

from gptjax import kv_cache, model
from gptjax.config import GPTConfig, TrainConfig
from gptjax.presets import PRESETS
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


def merge(a: Any, b: Any) -> Any:
    """One right answer to 3.4."""
    (top_a, total_a, mixed_a), (top_b, total_b, mixed_b) = a, b
    top = np.maximum(top_a, top_b)
    shrink_a, shrink_b = np.exp(top_a - top), np.exp(top_b - top)
    total = total_a * shrink_a + total_b * shrink_b
    return top, total, mixed_a * shrink_a[:, None] + mixed_b * shrink_b[:, None]


def merge_without_shrinking(a: Any, b: Any) -> Any:
    """A wrong answer to 3.4: it forgets that the two blocks have different largest scores."""
    return np.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]


def merges(answer: Any) -> bool:
    """3.4: two blocks of scores, merged, against the softmax of all of them."""
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
    """3.5: 20 tokens for each parameter."""
    return is_close(answer, 20 * model.count_params(GPTConfig()), 0.02)


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
        merges,
        "Before you add, bring both blocks to the larger top: multiply by exp(its top - top).",
        merge,
        merge_without_shrinking,
    ),
    "3.5": Exercise(
        optimal_tokens,
        "Hoffmann et al. find about 20 tokens for each parameter.",
        2.49e9,
        300e9,
    ),
}
