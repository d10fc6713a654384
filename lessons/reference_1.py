"""The functions of lesson 1 by gptjax, arguments to try them on, and typical mistakes.

B batch, T tokens, D width, H heads, K head width, V vocabulary.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from gptjax import attention, blocks, model
from gptjax.config import GPTConfig

B, T, H, K, D = 2, 5, 3, 4, 12
CFG = GPTConfig(
    n_layer=2,
    n_head=H,
    n_embd=D,
    block_size=8,
    vocab_size=17,
    dtype="float32",
    attention="xla",
)

init = jax.jit(model.init_params, static_argnums=0)

# ---- Arguments -----------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@functools.lru_cache
def noisy_params(cfg: GPTConfig = CFG) -> model.Params:
    """Parameters with which every part counts: fresh ones have no biases and no scales."""
    rng = np.random.default_rng(1)

    def draw(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = float(jax.tree_util.keystr(path[-1:], simple=True) == "scale")
        return mean + 0.2 * rng.standard_normal(leaf.shape, np.float32)

    params = jax.tree.map_with_path(draw, model.param_shapes(cfg))
    return jax.tree.map(jnp.asarray, model.unstack_layers(params, cfg.n_layer))


def attn_params() -> Any:
    return noisy_params()["h"][0]["attn"]


def tokens_BT() -> Array:
    return jnp.asarray(np.random.default_rng(2).integers(0, CFG.vocab_size, (B, T)))


def visible_TS(positions_T: Array) -> Array:
    """A mask for queries at these positions."""
    return jnp.arange(len(positions_T))[None] <= positions_T[:, None]


# ---- References ----------------------------------------------------------------------------------


def softmax(x: Array) -> Array:
    return jax.nn.softmax(x, axis=-1)


def attention_weights(q_TK: Array, k_TK: Array, mask_TT: Array) -> Array:
    """By `attend`, over values that are the unit vectors."""
    positions_1T = mask_TT.sum(axis=1)[None] - 1
    one_TK = jnp.eye(len(k_TK))
    widths = ((0, 0), (0, one_TK.shape[1] - q_TK.shape[1]))
    scale = math.sqrt(one_TK.shape[1] / q_TK.shape[1])  # `attend` divides by the padded width
    q_TK, k_TK = jnp.pad(q_TK * scale, widths), jnp.pad(k_TK, widths)
    q_BTHK, k_BTHK, one_BTHK = (x[None, :, None] for x in (q_TK, k_TK, one_TK))
    return attention.attend(q_BTHK, k_BTHK, one_BTHK, positions_1T)[0, :, 0]


def causal_mask(T: int) -> Array:
    zeros_TK = jnp.zeros((T, T))
    return attention_weights(zeros_TK, zeros_TK, visible_TS(jnp.arange(T))) > 0


def attention_head(q_TK: Array, k_TK: Array, v_TK: Array) -> Array:
    return attend_heads(*(x[None, :, None] for x in (q_TK, k_TK, v_TK)))[0, :, 0]


def attend_heads(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array) -> Array:
    return attention.attend(q_BTHK, k_BTHK, v_BTHK, jnp.arange(q_BTHK.shape[1])[None])


def linear(p: model.Params, x: Array) -> Array:
    return model.apply(nn.Dense(p["kernel"].shape[1]), p, x)


def self_attention(p: model.Params, x_BTD: Array, n_head: int) -> Array:
    cfg = GPTConfig(n_head=n_head, n_embd=x_BTD.shape[-1], dtype="float32", attention="xla")
    return model.apply(blocks.CausalSelfAttention(cfg), p, x_BTD)[0]


def mlp(p: model.Params, x_BTD: Array) -> Array:
    return model.apply(blocks.MLP(CFG), p, x_BTD)


def layer_norm(p: model.Params, x: Array) -> Array:
    return model.apply(blocks.LayerNorm(CFG), p, x)


def block(p: model.Params, x_BTD: Array, n_head: int) -> Array:
    return model.apply(blocks.Block(CFG), p, x_BTD)[0]


def init_params(
    key: Array, n_layer: int, n_embd: int, block_size: int, vocab_size: int
) -> model.Params:
    cfg = GPTConfig(
        n_layer=n_layer, n_head=1, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size
    )
    return model.unstack_layers(init(cfg, key), n_layer)


def statistics(params: model.Params) -> Any:
    """How each array is distributed, and whether two pairs of arrays are drawn independently."""

    def of_leaf(leaf: Any) -> dict[str, float]:
        x = np.asarray(leaf, np.float64)
        std = float(x.std())
        rows = x.reshape(len(x), -1).any(axis=1)
        return {
            "standard deviation": std,
            "1 + mean / standard deviation": 1 + float(x.mean()) / (std or 1),
            "share of rows that are not 0": float(rows.mean()),
        }

    def alike(a: Any, b: Any) -> float:
        a, b = np.ravel(a), np.ravel(b)
        n = min(len(a), len(b))
        return 1 + abs(float(np.corrcoef(a[:n], b[:n])[0, 1]))

    first, second = (params["h"][i]["attn"] for i in (0, 1))
    return {
        **jax.tree.map(of_leaf, params),
        "1 + correlation of two blocks": alike(
            first["c_attn"]["kernel"], second["c_attn"]["kernel"]
        ),
        "1 + correlation of wpe and c_proj": alike(
            params["wpe"]["embedding"], first["c_proj"]["kernel"]
        ),
    }


def count_params(n_layer: int, n_embd: int, block_size: int, vocab_size: int) -> int:
    return model.count_params(
        GPTConfig(
            n_layer=n_layer, n_head=1, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size
        )
    )


# ---- Typical mistakes ----------------------------------------------------------------------------


def keys_first(p: model.Params, x_BTD: Array, n_head: int) -> Array:
    def swap(x: Array) -> Array:
        q, k, v = jnp.split(x, 3, axis=-1)
        return jnp.concatenate([k, q, v], axis=-1)

    swapped = jax.tree.map(swap, p["c_attn"])
    return self_attention({**p, "c_attn": swapped}, x_BTD, n_head)


def attend_over_heads(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array) -> Array:
    return jax.vmap(jax.vmap(attention_head))(q_BTHK, k_BTHK, v_BTHK)


def sample_variance(p: model.Params, x: Array) -> Array:
    x = x - x.mean(axis=-1, keepdims=True)
    return x / (x.std(axis=-1, ddof=1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def norm_behind(p: model.Params, x_BTD: Array, n_head: int) -> Array:
    x_BTD = layer_norm(p["ln_1"], x_BTD + self_attention(p["attn"], x_BTD, n_head))
    return layer_norm(p["ln_2"], x_BTD + mlp(p["mlp"], x_BTD))


def hidden_states(params: model.Params, tokens_BT: Array, n_head: int) -> Array:
    return model.hidden_states(CFG, params, tokens_BT)[0]


def without_ln_f(params: model.Params, tokens_BT: Array, n_head: int) -> Array:
    x_BTD = model.embed(CFG, params, tokens_BT)
    for p in params["h"]:
        x_BTD = block(p, x_BTD, n_head)
    return x_BTD


def forward(params: model.Params, tokens_BT: Array, n_head: int, vocab_size: int) -> Array:
    return model.forward(CFG, params, tokens_BT)[0]


def unscaled(key: Array, n_layer: int, n_embd: int, block_size: int, vocab_size: int) -> Any:
    """All kernels N(0, 0.02)."""
    params = init_params(key, n_layer, n_embd, block_size, vocab_size)
    for p in params["h"]:
        for part in ("attn", "mlp"):
            p[part]["c_proj"]["kernel"] *= math.sqrt(2 * n_layer)
    return params
