"""Causal self-attention, one function per implementation.

B batch, T query time, S context time, H heads, K head dim.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.errors import UsageError


def attend(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    positions_BT: Array,
    *,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Array:
    """The reference: softmax(q k^T / sqrt(K)) v, written out (Vaswani et al. 2017, equation 1).

    Args:
        q_BTHK: queries.
        k_BSHK: keys, the one at index s belonging to position s.
        v_BSHK: values.
        positions_BT: position of each query, which sees the keys at s <= position. (1, T) serves
            all rows alike.
        dropout: probability to drop an attention weight, where `key` is given.
        key: of the dropout mask.

    Returns:
        (B, T, H, K) in q's dtype. Scores and softmax are float32.
    """
    # Scaling q, not the scores, touches T*K numbers instead of T*S.
    q_BTHK = q_BTHK * q_BTHK.shape[-1] ** -0.5
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    index_111S = jnp.arange(k_BSHK.shape[1])[None, None, None]
    visible_B1TS = index_111S <= positions_BT[:, None, :, None]
    weights_BHTS = jax.nn.softmax(jnp.where(visible_B1TS, scores_BHTS, -jnp.inf))
    if key is not None and dropout > 0:
        keep = jax.random.bernoulli(key, 1 - dropout, weights_BHTS.shape)
        weights_BHTS = jnp.where(keep, weights_BHTS / (1 - dropout), 0)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(q_BTHK.dtype), v_BSHK)


def attend_xla(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    *,
    positions_BT: Array | None = None,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Array:
    """The reference on any device; without positions (0..T-1 then) in blocks of queries.

    A block of queries needs no keys behind its end, so 4 blocks do 5/8 of the square's work:
    forward and backward took 22 ms instead of 43 at (8, 256, 6, 64) on 2 CPU cores.
    """
    if positions_BT is not None:
        return attend(q_BTHK, k_BSHK, v_BSHK, positions_BT, dropout=dropout, key=key)
    T = q_BTHK.shape[1]
    block = max(64, -(-T // 4))
    parts = []
    for i, start in enumerate(range(0, T, block)):
        end = min(start + block, T)
        positions_1T = jnp.arange(start, end)[None]
        block_key = None if key is None else jax.random.fold_in(key, i)
        q, k, v = q_BTHK[:, start:end], k_BSHK[:, :end], v_BSHK[:, :end]
        parts.append(attend(q, k, v, positions_1T, dropout=dropout, key=block_key))
    return jnp.concatenate(parts, axis=1)


def attend_cudnn(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    *,
    positions_BT: Array | None = None,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Array:
    """cuDNN's flash attention: never holds the T x S scores; half precision on NVIDIA GPUs only.

    It has no dropout and counts positions from 0, so the cached decoder, whose queries sit
    anywhere in the context, takes the reference.
    """
    if positions_BT is not None:
        return attend(q_BTHK, k_BSHK, v_BSHK, positions_BT)
    assert dropout == 0 or key is None, "GPTConfig refuses cudnn with dropout"
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSHK, v_BSHK, is_causal=True, implementation="cudnn"
    )


ATTENTION = {"xla": attend_xla, "cudnn": attend_cudnn}


def choose_attention(name: str, dtype: str, dropout: float) -> str:
    """Resolve "auto" to a key of ATTENTION for this machine; check any other choice.

    Raises:
        UsageError: cudnn was asked for where it cannot run.
    """
    version = jax.devices()[0].client.platform_version
    on_nvidia = jax.default_backend() == "gpu" and "cuda" in version.lower()
    half = dtype in ("bfloat16", "float16")
    if name == "auto":
        return "cudnn" if on_nvidia and half and dropout == 0 else "xla"
    if name == "cudnn" and not (on_nvidia and half):
        raise UsageError(
            f"--attention=cudnn: needs an NVIDIA GPU and half precision, this is "
            f"{jax.default_backend()} in {dtype}; take --attention=auto"
        )
    return name
