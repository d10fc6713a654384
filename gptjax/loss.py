"""The loss: next-token cross-entropy, of logits and of the whole model.

B batch, T time, N tokens, V vocabulary, G groups of columns; a window holds T+1 tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from gptjax import collectives
from gptjax.blocks import kernel_of
from gptjax.config import GPTConfig
from gptjax.model import Params, head, hidden_states, param_shapes
from gptjax.precision import stored_dtype

LOWEST = float(jnp.finfo(jnp.float32).min)


def window_losses(
    cfg: GPTConfig,
    params: Params,
    windows_BT: Array,
    dropout_key: Array | None = None,
    logits_dtype: DTypeLike = jnp.float32,
) -> Array:
    """Return the cross-entropy of predicting tokens 1..T of each window from its tokens 0..T-1.

    Args:
        cfg: the model, without "auto".
        params: its parameters.
        windows_BT: token ids (B, T+1).
        dropout_key: a random key for each row (B,); turns dropout on.
        logits_dtype: type in which the logits are stored.

    Returns:
        (B, T) in float32, in nats.
    """
    params = collect_all(cfg, params)
    x_ND = final_states(cfg, params, windows_BT, dropout_key)
    logits_NV, targets_BT = head(cfg, params, x_ND, logits_dtype), windows_BT[:, 1:]
    return token_losses(logits_NV, targets_BT.reshape(-1)).reshape(targets_BT.shape)


def collect_all(cfg: GPTConfig, params: Params) -> Params:
    """Return the parameters, those outside of the blocks whole; see `collectives.collect`."""
    whole = param_shapes(cfg)
    return {
        name: part if name == "h" else collectives.collect(part, whole[name], cfg)
        for name, part in params.items()
    }


def final_states(
    cfg: GPTConfig, params: Params, windows_BT: Array, dropout_key: Array | None
) -> Array:
    """Return the final hidden states (N, D) of each window's tokens but its last."""
    x_BTD, _ = hidden_states(cfg, params, windows_BT[:, :-1], dropout_key=dropout_key)
    return x_BTD.reshape(-1, cfg.n_embd)


def loss_fn(
    cfg: GPTConfig, params: Params, windows_BT: Array, dropout_key: Array | None = None
) -> Array:
    """Return the mean of `window_losses`, which training minimises.

    Logits are stored in the compute dtype, but on a CPU, as PyTorch's autocast does: in bfloat16
    that saves 18 % of a GPT-2 step on a GPU. The loss is computed from them in float32.
    """
    targets_N = windows_BT[:, 1:].reshape(-1)
    mean_loss = kernel_of(cfg, "mean_loss", targets_N.size, cfg.padded_vocab_size)
    if mean_loss is None:
        return jnp.mean(window_losses(cfg, params, windows_BT, dropout_key, stored_dtype(cfg)))
    params = collect_all(cfg, params)
    x_ND = final_states(cfg, params, windows_BT, dropout_key)
    head_VD = params["wte" if cfg.tie_head else "lm_head"]["embedding"].astype(cfg.dtype)
    loss: Array = mean_loss(x_ND, head_VD, targets_N, cfg.vocab_size)
    return loss


@jax.custom_vjp
def token_losses(logits_NV: Array, targets_N: Array) -> Array:
    """Return -log softmax(logits)[target] of each token.

    The gradient, softmax(logits) - onehot(target), is written out: that of a gather would be a
    scatter into (N, V), 3 % of a GPT-2 step on a GPU.

    Args:
        logits_NV: of any float type; -inf marks a token that cannot occur.
        targets_N: token ids.

    Returns:
        (N,) in nats, computed in float32.
    """
    return _forward(logits_NV, targets_N)[0]


def _forward(logits_NV: Array, targets_N: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    # Over `tensor` devices have columns of their own: neither groups of them nor a gather across.
    is_split = collectives.axis_size("tensor") > 1
    one_pass = jax.default_backend() == "gpu" and not is_split
    logsumexp = one_pass_logsumexp if one_pass else functools.partial(jax.nn.logsumexp, axis=1)
    total_N = logsumexp(logits_NV.astype(jnp.float32))
    if is_split:
        is_target_NV = jnp.arange(logits_NV.shape[1])[None] == targets_N[:, None]
        target_logit_N = jnp.where(is_target_NV, logits_NV, 0).sum(axis=1)
    else:
        target_logit_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=1)[:, 0]
    return total_N - target_logit_N.astype(jnp.float32), (logits_NV, targets_N, total_N)


def _backward(saved: tuple[Array, Array, Array], gradient_N: Array) -> tuple[Array, None]:
    logits_NV, targets_N, total_N = saved
    softmax_NV = jnp.exp(logits_NV.astype(jnp.float32) - total_N[:, None])
    is_target_NV = jnp.arange(logits_NV.shape[1])[None] == targets_N[:, None]
    return ((softmax_NV - is_target_NV) * gradient_N[:, None]).astype(logits_NV.dtype), None


token_losses.defvjp(_forward, _backward)


def one_pass_logsumexp(x_NV: Array) -> Array:
    """Return log(sum(exp(x))) of each row, (N,), in one pass over x.

    Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax".
    Pairs (maximum, sum of exp(x - maximum)) can be merged in any order. The usual way reads x once
    for the maximum and once more for the sum: that is 2 % of a GPT-2 step on a GPU. Up to 16
    columns are merged at once first, which takes one exp each instead of two. CPUs run it at half
    the speed of the usual way.
    """
    groups = jnp.split(x_NV, math.gcd(x_NV.shape[1], 16), axis=1)
    # Where all are -inf, so would be their maximum, and the differences NaN.
    max_NG = jnp.maximum(functools.reduce(jnp.maximum, groups), LOWEST)
    sum_NG = sum(jnp.exp(group_NG - max_NG) for group_NG in groups)

    def merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (max_a, sum_a), (max_b, sum_b) = a, b
        both = jnp.maximum(max_a, max_b)
        return both, sum_a * jnp.exp(max_a - both) + sum_b * jnp.exp(max_b - both)

    start = jnp.float32(LOWEST), jnp.float32(0)
    max_N, sum_N = jax.lax.reduce((max_NG, sum_NG), start, merge, dimensions=(1,))
    return max_N + jnp.log(sum_N)
