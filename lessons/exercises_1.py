"""The exercises of lesson 1."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exercises import Exercise

from gptjax import attention, blocks, model
from gptjax.config import GPTConfig
from gptjax.presets import PRESETS


def visible(T: int, S: int) -> np.ndarray:
    """What gptjax lets the last T of S positions see, (T, S): equal scores weigh only that."""
    q_BTHK, k_BSHK, v_BSHK = (
        jnp.zeros((1, T, 1, S)),
        jnp.zeros((1, S, 1, S)),
        jnp.eye(S)[None, :, None],
    )
    weights_BTHS = attention.attend(q_BTHK, k_BSHK, v_BSHK, jnp.arange(S - T, S)[None])
    return np.asarray(weights_BTHS[0, :, 0]) > 0


def is_mask(function: Any) -> bool:
    """Whether the function makes these masks for all its tokens, some and one."""
    return all(
        np.array_equal(np.asarray(function(T, S)).astype(bool), visible(T, S))
        for T, S in ((5, 5), (2, 5), (1, 4))
    )


def is_close(answer: Any, truth: float, relative: float) -> bool:
    """Whether a number is right to this part of it."""
    return math.isclose(float(answer), truth, rel_tol=relative)


def logits_shape(cfg: GPTConfig, batch: int, time: int) -> tuple[int, ...]:
    """Of `model.forward`, without computing it."""
    params = jax.eval_shape(functools.partial(model.init_params, cfg), jax.random.key(0))
    tokens_BT = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    logits, _ = jax.eval_shape(functools.partial(model.forward, cfg), params, tokens_BT)
    return tuple(logits.shape)


def block_params(cfg: GPTConfig) -> int:
    """Parameters of one block."""
    params = jax.eval_shape(functools.partial(model.init_params, cfg), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params["h"])) // cfg.n_layer


GPT2 = GPTConfig(dtype="float32", attention="xla")
XL = PRESETS["gpt2_xl"].model
EXERCISES = {
    "1.1": Exercise(
        is_right=is_mask,
        hint="Query t of the T stands at position S - T + t, and sees the keys up to there.",
        answer=lambda T, S: jnp.arange(S)[None] <= jnp.arange(S - T, S)[:, None],
        mistake=lambda T, S: jnp.tril(jnp.ones((T, S), bool)),
    ),
    "1.2": Exercise(
        is_right=lambda answer: tuple(int(n) for n in answer) == logits_shape(GPT2, 4, 1024),
        hint="The head has a column for each row of wte, the padding included.",
        answer=(4, 1024, 50304),
        mistake=(4, 1024, 50257),
    ),
    "1.3": Exercise(
        is_right=lambda answer: is_close(
            answer, (GPT2.padded_vocab_size - GPT2.vocab_size) / GPT2.padded_vocab_size, 0.01
        ),
        hint="Equal logits share the probability evenly among all columns, and 47 are padding.",
        answer=47 / 50304,
        mistake=0.0,
    ),
    "1.4": Exercise(
        is_right=lambda answer: float(answer) == block_params(XL),
        hint="The matrices have 12 D^2 parameters; each has a bias, and there are two LayerNorms.",
        answer=30_740_800,
        mistake=30_720_000,
    ),
    "1.5": Exercise(
        is_right=lambda answer: is_close(
            answer, blocks.INIT_STD / math.sqrt(2 * XL.n_layer), 0.025
        ),
        hint="Each of the 48 blocks writes into the residual stream twice.",
        answer=0.02 / math.sqrt(2 * 48),
        mistake=0.02 / math.sqrt(48),
    ),
}
