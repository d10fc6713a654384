"""Causal self-attention, one function per implementation.

B batch, T query time, S context time, H heads, K head dim.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax import collectives
from gptjax.config import Attention, GPTConfig
from gptjax.dropout import drop, keep_mask, row_words
from gptjax.errors import UsageError
from gptjax.kernels import attention as flash
from gptjax.kernels import decode_attention
from gptjax.kernels.cuda import AMPERE, KernelError, capability
from gptjax.kernels.int8 import Int8
from gptjax.kv_cache import KVCache

Einsum = Callable[..., Array]
CUDNN_HEAD = 128  # widest head of cuDNN's attention; its width is a multiple of 8
# Scores of a head in all rows from which on cuDNN reads prompts; to load it takes 0.7 s once. On an
# H100 GPT-2 small reads 4 rows of 1,024 tokens, which have so many, in 2.9 ms instead of 5.6, and
# 64 of them in 32 instead of 75; but one such row in 1.6 instead of 1.9.
PROMPT_SCORES = 2**22


def attend(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    positions_BT: Array,
    *,
    dropout: float = 0.0,
    keys_B: Array | None = None,
    einsum: Einsum = jnp.einsum,
) -> Array:
    """Return causal softmax(q k^T / sqrt(K)) v, the reference of all other implementations.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.

    Args:
        q_BTHK: queries.
        k_BSHK: keys, the one at index s belonging to position s.
        v_BSHK: values.
        positions_BT: position of each query, which sees the keys at s <= position. (1, T) serves
            all rows alike.
        dropout: probability to drop an attention weight, where `keys_B` is given.
        keys_B: random key of each row's dropout mask.
        einsum: what the products are made with.

    Returns:
        (B, T, H, K) in q's dtype. Scores and softmax are float32.
    """
    # Scaling q, not the scores, touches T*K numbers instead of T*S.
    q_BTHK = q_BTHK * q_BTHK.shape[-1] ** -0.5
    scores_BHTS = einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    index_111S = jnp.arange(k_BSHK.shape[1])[None, None, None]
    visible_B1TS = index_111S <= positions_BT[:, None, :, None]
    weights_BHTS = jax.nn.softmax(jnp.where(visible_B1TS, scores_BHTS, -jnp.inf))
    if keys_B is not None and dropout > 0:
        keep_BHTS = keep_mask(keys_B, weights_BHTS.shape, dropout, positions_BT)
        weights_BHTS = drop(weights_BHTS, keep_BHTS, dropout)
    return einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(q_BTHK.dtype), v_BSHK)


def attend_xla(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHK: Array,
    *,
    dropout: float = 0.0,
    keys_B: Array | None = None,
    einsum: Einsum = jnp.einsum,
) -> Array:
    """Return the result of `attend` at positions 0..T-1, computed in blocks of queries.

    It runs on any device.

    A block of queries needs no keys behind its end, so 4 blocks do 5/8 of the square's work:
    forward and backward took 22 ms instead of 43 at (8, 256, 6, 64) on 2 CPU cores. On a GPU small
    blocks save nothing, and XLA tunes the products of each: at (64, 256, 6, 64) one block compiled
    in 8 s instead of 12 on an H100, for 6 layers with dropout.
    """
    T = q_BTHK.shape[1]
    smallest = 64 if jax.default_backend() == "cpu" else 256
    block = max(smallest, -(-T // 4))
    parts = []
    for start in range(0, T, block):
        end = min(start + block, T)
        positions_1T = jnp.arange(start, end)[None]
        q, k, v = q_BTHK[:, start:end], k_BTHK[:, :end], v_BTHK[:, :end]
        parts.append(attend(q, k, v, positions_1T, dropout=dropout, keys_B=keys_B, einsum=einsum))
    return jnp.concatenate(parts, axis=1)


def attend_cudnn(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHK: Array,
    *,
    dropout: float = 0.0,
    keys_B: Array | None = None,
    einsum: Einsum = jnp.einsum,
) -> Array:
    """Return the result of `attend` by cuDNN's flash attention, which never stores T x T scores.

    It runs in half precision on NVIDIA GPUs from compute capability 8.0 on, and has no dropout;
    `einsum` has no effect.
    """
    assert dropout == 0 or keys_B is None, "GPTConfig refuses cudnn with dropout"
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return collectives.each_with_its_heads(attend, q_BTHK, k_BTHK, v_BTHK)


def attend_flash(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHK: Array,
    *,
    dropout: float = 0.0,
    keys_B: Array | None = None,
    einsum: Einsum = jnp.einsum,
) -> Array:
    """Return the result of `attend` by kernels that store neither scores nor masks.

    Their masks are those of `attend`. Without dropout the result is cuDNN's. With it, `attend_xla`
    computes where the kernels cannot, such as other lengths, heads and types; `einsum` is for that.
    """
    if keys_B is None or dropout == 0:
        return attend_cudnn(q_BTHK, k_BTHK, v_BTHK)
    B, T, H, K = q_BTHK.shape
    if flash.refusal(T, K, q_BTHK.dtype):
        return attend_xla(q_BTHK, k_BTHK, v_BTHK, dropout=dropout, keys_B=keys_B, einsum=einsum)
    words_BTH2 = jnp.concatenate(row_words(keys_B, (B, H, T, T)), axis=-1).swapaxes(1, 2)

    def attend(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, words_BTH2: Array) -> Array:
        return flash.attend(q_BTHK, k_BTHK, v_BTHK, words_BTH2.swapaxes(1, 2), dropout)

    return collectives.each_with_its_heads(attend, q_BTHK, k_BTHK, v_BTHK, words_BTH2)


def attend_token_cudnn(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, positions_BT: Array) -> Array:
    """Return the result of `attend` for one token a row, by cuDNN's flash attention.

    A token of GPT-2 small with caches of 512 takes 0.86 ms for 64 rows on an H100 and 0.45 for 8,
    by `attend` 1.00 and 0.55; for one row they are alike.
    """
    # Steps that do not count lie past the end.
    seen_B = jnp.minimum(positions_BT[:, 0] + 1, k_BSHK.shape[1])
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSHK, v_BSHK, key_value_seq_lengths=seen_B, implementation="cudnn"
    )


def attend_int8(q_BTHK: Array, k_BSHK: Int8, v_BSHK: Int8, positions_BT: Array) -> Array:
    """Return the result of `attend` for keys and values in int8, whose scales it applies behind.

    So a product reads one byte a number, where it would read four of the dequantized arrays.
    """
    q_BTHK = q_BTHK * q_BTHK.shape[-1] ** -0.5
    k, v = (x.values.astype(q_BTHK.dtype) for x in (k_BSHK, v_BSHK))
    k_scale_BH1S, v_scale_BH1S = (x.scale.swapaxes(1, 2)[:, :, None] for x in (k_BSHK, v_BSHK))
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k, preferred_element_type=jnp.float32)
    index_111S = jnp.arange(k.shape[1])[None, None, None]
    visible_B1TS = index_111S <= positions_BT[:, None, :, None]
    scores_BHTS = jnp.where(visible_B1TS, scores_BHTS * k_scale_BH1S, -jnp.inf)
    weights_BHTS = (jax.nn.softmax(scores_BHTS) * v_scale_BH1S).astype(q_BTHK.dtype)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, v)


# By GPTConfig.attention, of whole sequences, where T = S and query t has position t.
ATTENTION = {"xla": attend_xla, "cudnn": attend_cudnn, "flash": attend_flash}


# ---- Of new tokens, with a cache -----------------------------------------------------------------

Cached = Callable[[Array, Array, Array, KVCache], tuple[Array, KVCache]]


def after_update(attend: Callable[[Array, Any, Any, Array], Array]) -> Cached:
    """Return a function of new tokens that writes them into the cache, then calls `attend`."""

    def attend_cached(
        q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, cache: KVCache
    ) -> tuple[Array, KVCache]:
        positions_BT = cache.positions(q_BTHK.shape[1])
        k, v, cache = cache.update(k_BTHK, v_BTHK)
        return attend(q_BTHK, k, v, positions_BT), cache

    return attend_cached


def attend_prompt_cudnn(
    q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """Return the result of `attend` for tokens that fill an empty cache, by flash attention."""
    return attend_cudnn(q_BTHK, k_BTHK, v_BTHK), cache.update(k_BTHK, v_BTHK)[2]


def attend_token_flash(
    q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """Return the result of `attend` for one token a row, by a kernel that also writes the cache.

    Where it cannot be compiled, cuDNN computes it, and a line on stderr says why.
    """
    q, k, v = (x[:, 0] for x in (q_BTHK, k_BTHK, v_BTHK))
    try:
        y, k, v = decode_attention.attend(q, k, v, cache.k[0], cache.v[0], cache.length_B)
    except KernelError as error:
        print(f"kernels: cuDNN's attention instead, because {error}", file=sys.stderr)
        return CACHED_ATTENTION["cudnn"](q_BTHK, k_BTHK, v_BTHK, cache)
    return y[:, None], cache._replace(k=(k,), v=(v,))


# By the name that `choose_cached_attention` returns: functions of queries, keys and values of new
# tokens and of the cache of a layer, which return the result and the cache with these tokens in it.
CACHED_ATTENTION: dict[str, Cached] = {
    "xla": after_update(attend),
    "cudnn": after_update(attend_token_cudnn),
    "cudnn_prompt": attend_prompt_cudnn,
    "flash": attend_token_flash,
    "int8": after_update(attend_int8),
}


# ---- Which one to take ---------------------------------------------------------------------------


def choose_attention(cfg: GPTConfig, dtype: str) -> Attention:
    """Return the key of ATTENTION to use on this machine: "auto" decided, another name checked.

    Args:
        cfg: the model.
        dtype: what it computes in.

    Raises:
        UsageError: an implementation was asked for where it cannot run.
    """
    found = capability()

    def refusal(name: Attention) -> str:
        """Return why an implementation cannot run here, "" if it can."""
        if name == "flash":
            return flash.refusal(cfg.block_size, cfg.head_dim, dtype)
        # cuDNN's flash attention has kernels from this generation on.
        half = dtype in ("bfloat16", "float16")
        if name == "xla" or (found is not None and found >= AMPERE and half):
            return ""
        here = f" of {found[0]}.{found[1]}" if found else ""
        return (
            "needs an NVIDIA GPU of compute capability 8.0 or more and half precision, but this is "
            f"{jax.default_backend()}{here} in {dtype}"
        )

    if cfg.attention == "auto":
        fast: Attention = "flash" if cfg.weights_dropout else "cudnn"
        off = fast == "flash" and cfg.kernels == "off"
        return "xla" if off or refusal(fast) else fast
    if why := refusal(cfg.attention):
        raise UsageError(f"--attention={cfg.attention}: {why}; take --attention=auto")
    return cfg.attention


def choose_cached_attention(cfg: GPTConfig, rows: int, T: int, size: int) -> str:
    """Return the key of CACHED_ATTENTION to use for T new tokens a row.

    The kernel for one token takes the place of cuDNN's attention wherever it runs; cuDNN reads
    prompts that are long enough.

    Args:
        cfg: the model, without "auto".
        rows: of the batch.
        T: new tokens.
        size: of the cache. Where it is T, no other tokens are in it, since the new ones must fit.
    """
    assert cfg.attention != "auto", "take model.resolve(cfg)"
    if cfg.cache == "int8":
        return "int8"
    if cfg.kernels == "off" or cfg.attention == "xla":
        return "xla"
    if not decode_attention.refusal(T, cfg.head_dim, cfg.dtype):
        return "flash"
    if cfg.head_dim % 8 or cfg.head_dim > CUDNN_HEAD:
        return "xla"
    if T == 1:
        return "cudnn"
    return "cudnn_prompt" if size == T and rows * T * T >= PROMPT_SCORES else "xla"
