"""GPT-2 as pure functions over a plain tree of parameters.

The tree is the interface that optimizer, shardings, checkpoints and converter speak of:

    wte/embedding (V, D)         token embedding, and as its transpose the head
    wpe/embedding (S, D)         position embedding
    h/ln_1/{scale,bias} (L, D)   h holds all blocks, stacked on a leading layer axis
    h/attn/c_attn/{kernel (L, D, 3D), bias (L, 3D)}
    h/attn/c_proj/{kernel (L, D, D), bias (L, D)}
    h/ln_2/{scale,bias} (L, D)
    h/mlp/c_fc/{kernel (L, D, F), bias (L, F)}
    h/mlp/c_proj/{kernel (L, F, D), bias (L, D)}
    ln_f/{scale,bias} (D)

B batch, T query time, N = B*T, S context time, D width, H heads, K head dim, F = 4D, V vocabulary
(padded), L layers. Activations are two-dimensional, (N, D), wherever a matrix product reads them:
XLA is up to twice as slow on (B, T, D), on CPU and GPU alike.
"""

import dataclasses
import functools
import math
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from gptjax.attention import ATTENTION, choose_attention
from gptjax.config import GPTConfig
from gptjax.functions import ACTIVATIONS, layer_norm
from gptjax.kv_cache import KVCache, init_cache, write

Params = dict[str, Any]
INIT_STD = 0.02  # GPT-2's; the projections into the residual stream get 0.02 / sqrt(2L)


def resolve(cfg: GPTConfig) -> GPTConfig:
    """The same config with every "auto" decided for this machine."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = cfg.dtype if cfg.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    attention: Any = choose_attention(cfg.attention, dtype, cfg.dropout)
    return dataclasses.replace(cfg, dtype=dtype, attention=attention)


# ---- The components ------------------------------------------------------------------------------


def linear(cfg: GPTConfig, features: int, name: str, std: float = INIT_STD) -> nn.Dense:
    """(N, in) -> (N, features)."""
    return nn.Dense(
        features,
        use_bias=cfg.bias,
        dtype=cfg.dtype,
        kernel_init=nn.initializers.normal(std),
        name=name,
    )


class LayerNorm(nn.Module):
    """Rows normalised in float32, then scaled and shifted."""

    cfg: GPTConfig

    @nn.compact
    def __call__(self, x_ND: Array) -> Array:
        D = x_ND.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (D,))
        y_ND = layer_norm(x_ND, scale_D)
        if self.cfg.bias:
            y_ND = y_ND + self.param("bias", nn.initializers.zeros, (D,))[None]
        return y_ND.astype(self.cfg.dtype)


class CausalSelfAttention(nn.Module):
    """Each token gathers values from the tokens before it, and from itself."""

    cfg: GPTConfig
    train: bool

    @nn.compact
    def __call__(self, x_ND: Array, shape: tuple[int, int], cache: Any = None) -> Any:
        cfg, (B, T) = self.cfg, shape
        qkv = linear(cfg, 3 * cfg.n_embd, "c_attn")(x_ND)
        if cache is None and jax.default_backend() == "gpu":
            # Its gradient is put together once then, not for each of the two products that read it:
            # 1 % of a GPT-2 step.
            qkv = jax.lax.optimization_barrier(qkv)
        q, k, v = (
            part.reshape(B, T, cfg.n_head, cfg.head_dim) for part in jnp.split(qkv, 3, axis=1)
        )
        positions_BT = None
        if cache is not None:
            k_cache, v_cache, start_B = cache
            positions_BT = start_B[:, None] + jnp.arange(T)[None]
            k, v = cache = write(k_cache, k, start_B), write(v_cache, v, start_B)
        key = self.make_rng("dropout") if self.train and cfg.dropout > 0 else None
        attend = ATTENTION[cfg.attention]
        y_BTHK = attend(q, k, v, positions_BT=positions_BT, dropout=cfg.dropout, key=key)
        y_ND = y_BTHK.reshape(B * T, cfg.n_embd)
        out_ND = linear(cfg, cfg.n_embd, "c_proj", INIT_STD / math.sqrt(2 * cfg.n_layer))(y_ND)
        return nn.Dropout(cfg.dropout, deterministic=not self.train)(out_ND), cache


class MLP(nn.Module):
    """Each token thinks by itself: widen to 4D, GELU, narrow again."""

    cfg: GPTConfig
    train: bool

    @nn.compact
    def __call__(self, x_ND: Array) -> Array:
        cfg = self.cfg
        x_NF = ACTIVATIONS[cfg.activation](linear(cfg, 4 * cfg.n_embd, "c_fc")(x_ND))
        x_ND = linear(cfg, cfg.n_embd, "c_proj", INIT_STD / math.sqrt(2 * cfg.n_layer))(x_NF)
        return nn.Dropout(cfg.dropout, deterministic=not self.train)(x_ND)


class Block(nn.Module):
    """Attention, then MLP; each reads the normalised residual stream and adds to it."""

    cfg: GPTConfig
    train: bool = False

    @nn.compact
    def __call__(self, x_ND: Array, shape: tuple[int, int], cache: Any = None) -> Any:
        attn = CausalSelfAttention(self.cfg, self.train, name="attn")
        y_ND, cache = attn(LayerNorm(self.cfg, name="ln_1")(x_ND), shape, cache)
        x_ND = x_ND + y_ND
        x_ND = x_ND + MLP(self.cfg, self.train, name="mlp")(LayerNorm(self.cfg, name="ln_2")(x_ND))
        return x_ND, cache


# ---- The whole -----------------------------------------------------------------------------------


def init_params(cfg: GPTConfig, key: Array) -> Params:
    """Fresh float32 parameters: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2L)), biases 0.

    Padding rows of wte are zero. Source: Radford et al. 2019, section 2.3, and OpenAI's code.
    """
    # Parameters do not depend on these two, but cudnn attention does on the machine.
    cfg = dataclasses.replace(cfg, attention="xla", dtype="float32")
    wte_key, wpe_key, h_key = jax.random.split(key, 3)
    row_ND = jnp.zeros((1, cfg.n_embd))
    block = Block(cfg)
    normal = nn.initializers.normal(INIT_STD)
    wte_VD = normal(wte_key, (cfg.padded_vocab_size, cfg.n_embd))
    return {
        "wte": {"embedding": wte_VD.at[cfg.vocab_size :].set(0)},
        "wpe": {"embedding": normal(wpe_key, (cfg.block_size, cfg.n_embd))},
        "h": jax.vmap(lambda k: block.init(k, row_ND, (1, 1))["params"])(
            jax.random.split(h_key, cfg.n_layer)
        ),
        "ln_f": LayerNorm(cfg).init(key, row_ND)["params"],
    }


@functools.lru_cache(maxsize=32)
def param_shapes(cfg: GPTConfig) -> Params:
    """Return the tree of parameters as shapes and types, with nothing computed."""
    return jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))


def count_params(cfg: GPTConfig, without: Container[str] = ()) -> int:
    """Return how many parameters the model has, padding rows left out: 124,439,808 for GPT-2 small.

    Args:
        cfg: the model.
        without: entries of the tree, such as wpe, that are left out too.
    """
    shapes = param_shapes(dataclasses.replace(cfg, vocab_multiple=1))
    counted = [part for name, part in shapes.items() if name not in without]
    return sum(leaf.size for leaf in jax.tree.leaves(counted))


def unstack_layers(params: Params, n_layer: int) -> Params:
    """The same tree with `h` a list of L blocks, as the decoder wants it.

    A decoder reads every weight once per token; slices of stacked arrays would be copied each time.
    """
    layers = [jax.tree.map(lambda stacked, i=i: stacked[i], params["h"]) for i in range(n_layer)]
    return {**params, "h": layers}


@functools.partial(jax.jit, static_argnames="cfg")
def prepare_for_decoding(cfg: GPTConfig, params: Params) -> Params:
    """Layers unstacked and weights in the compute dtype, so that no token pays for either."""
    return jax.tree.map(lambda p: p.astype(cfg.dtype), unstack_layers(params, cfg.n_layer))


def embed(cfg: GPTConfig, params: Params, tokens_BT: Array, start_B: Array | None) -> Array:
    """Token embeddings plus those of the positions from start_B (or 0) on: (N, D)."""
    B, T = tokens_BT.shape
    wpe_SD = params["wpe"]["embedding"]
    if start_B is None:
        assert cfg.block_size >= T, f"{T} tokens in a context of {cfg.block_size}"
        # A slice, because the gradient of a gather is slow.
        wpe_BTD = jnp.broadcast_to(wpe_SD[:T], (B, T, cfg.n_embd))
    else:
        wpe_BTD = wpe_SD[start_B[:, None] + jnp.arange(T)[None]]
    # The cast comes after the gather: its gradient, a scatter-add, is slow and coarse in bfloat16.
    x_BTD = (params["wte"]["embedding"][tokens_BT] + wpe_BTD).astype(cfg.dtype)
    return x_BTD.reshape(B * T, cfg.n_embd)


def hidden_states(
    cfg: GPTConfig,
    params: Params,
    tokens_BT: Array,
    *,
    dropout_key: Array | None = None,
    cache: KVCache | None = None,
) -> tuple[Array, KVCache | None]:
    """Tokens to the final hidden states (after ln_f).

    Args:
        cfg: the model, without "auto" (see `resolve`).
        params: the tree of this module's docstring, or `unstack_layers` of it.
        tokens_BT: ids below cfg.vocab_size (unchecked: JAX clamps or fills silently).
        dropout_key: turns dropout on.
        cache: keys and values of the tokens before these; T must fit behind them. Row b's first
            new token has position cache.length_B[b].

    Returns:
        (N, D) in the compute dtype, and the cache with these tokens added (None without one).
    """
    shape = tokens_BT.shape
    x_ND: Any = embed(cfg, params, tokens_BT, None if cache is None else cache.length_B)
    block = Block(cfg, train=dropout_key is not None)
    keys_L = None
    if dropout_key is not None:
        dropout_key, embed_key = jax.random.split(dropout_key)
        x_ND = nn.Dropout(cfg.dropout, deterministic=False).apply(
            {}, x_ND, rngs={"dropout": embed_key}
        )
        keys_L = jax.random.split(dropout_key, cfg.n_layer)

    if isinstance(params["h"], list):
        caches = []
        for i, layer in enumerate(params["h"]):
            layer_cache: Any = None if cache is None else (cache.k[i], cache.v[i], cache.length_B)
            rngs = {"dropout": keys_L[i]} if keys_L is not None else {}
            x_ND, layer_cache = block.apply({"params": layer}, x_ND, shape, layer_cache, rngs=rngs)
            caches.append(layer_cache)
        if cache is not None:
            ks, vs = zip(*caches, strict=True)
            cache = KVCache(ks, vs, cache.length_B + shape[1])
    else:
        assert cache is None, "decoding reads unstacked layers"
        unroll = cfg.unroll or cfg.n_layer

        def apply_block(x_ND: Array, layer: Any) -> Any:
            layer_params, key = layer
            rngs = {"dropout": key} if key is not None else {}
            return block.apply({"params": layer_params}, x_ND, shape, rngs=rngs)

        if cfg.remat:
            # Unrolled, XLA would see the recomputed block beside the first and merge the two.
            apply_block = jax.checkpoint(apply_block, prevent_cse=unroll > 1)
        x_ND, _ = jax.lax.scan(apply_block, x_ND, (params["h"], keys_L), unroll=unroll)
    x_ND = LayerNorm(cfg).apply({"params": params["ln_f"]}, x_ND)
    return x_ND, cache


def head(cfg: GPTConfig, params: Params, x_ND: Array, dtype: Any = jnp.float32) -> Array:
    """Hidden states to logits (N, V) of the given dtype, by the transposed token embedding.

    The columns of padding rows are -inf, so that no loss and no sampler ever sees them.
    """
    wte_VD = params["wte"]["embedding"].astype(cfg.dtype)
    logits_NV = jnp.einsum("ND,VD->NV", x_ND, wte_VD, preferred_element_type=dtype)
    if cfg.padded_vocab_size > cfg.vocab_size:
        is_token_V = jnp.arange(cfg.padded_vocab_size) < cfg.vocab_size
        logits_NV = jnp.where(is_token_V[None], logits_NV, -jnp.inf)
    return logits_NV


def forward(
    cfg: GPTConfig, params: Params, tokens_BT: Array, **kwargs: Any
) -> tuple[Array, KVCache | None]:
    """Tokens to float32 logits (B, T, V), and the cache; keywords as for `hidden_states`."""
    x_ND, cache = hidden_states(cfg, params, tokens_BT, **kwargs)
    return head(cfg, params, x_ND).reshape(*tokens_BT.shape, -1), cache


def make_cache(cfg: GPTConfig, batch: int, size: int) -> KVCache:
    """An empty cache that fits this model."""
    dtype = jnp.dtype(cfg.dtype)
    return init_cache(cfg.n_layer, batch, size, cfg.n_head, cfg.head_dim, dtype)
