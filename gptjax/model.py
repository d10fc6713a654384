"""GPT-2 as pure functions over a plain tree of parameters.

The tree is the interface that optimizer, shardings, checkpoints and converter speak of:

    wte/embedding (V, D)         token embedding, and as its transpose the head, if that is tied
    wpe/embedding (S, D)         position embedding
    h/ln_1/{scale,bias} (L, D)   h holds all blocks, stacked on a leading layer axis
    h/attn/c_attn/{kernel (L, D, 3D), bias (L, 3D)}
    h/attn/c_proj/{kernel (L, D, D), bias (L, D)}
    h/ln_2/{scale,bias} (L, D)
    h/mlp/c_fc/{kernel (L, D, F), bias (L, F)}
    h/mlp/c_proj/{kernel (L, F, D), bias (L, D)}
    ln_f/{scale,bias} (D)
    lm_head/embedding (V, D)     its transpose is the head, if that is not tied (tie_head off)

B batch, T query time, N tokens in all (B*T), S context time, D width, H heads, K head dim, F = 4D,
V vocabulary (padded), L layers, P places of dropout in a layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from gptjax import collectives
from gptjax.attention import choose_attention
from gptjax.blocks import INIT_STD, Block, LayerNorm
from gptjax.config import GPTConfig
from gptjax.dropout import drop_rows, keys_of_places
from gptjax.functions import with_more_rows
from gptjax.kernels.int8 import PRODUCTS, Int8, choose_product, dequantize, quantize
from gptjax.kv_cache import KVCache
from gptjax.lookup import LOOK_UP, look_up
from gptjax.precision import choose_dtype, einsum_of, stored_dtype

Params = dict[str, Any]


def resolve(cfg: GPTConfig, *, training: bool = False) -> GPTConfig:
    """Return the config with every "auto" decided for this machine, to train or to be used."""
    dtype = choose_dtype(cfg, training=training)
    attention = choose_attention(cfg, dtype)
    return dataclasses.replace(cfg, dtype=dtype, attention=attention)


# ---- The parameters ------------------------------------------------------------------------------


def init_params(cfg: GPTConfig, key: Array) -> Params:
    """Return fresh float32 parameters, the tree of this module's docstring.

    Kernels and embeddings are N(0, 0.02), projections into the residual stream N(0, 0.02/sqrt(2L)),
    biases and padding rows 0, scales 1. Source: Radford et al. 2019, 2.3, and OpenAI's code.
    """
    # Parameters do not depend on these two, but cudnn attention does on the machine.
    cfg = dataclasses.replace(cfg, attention="xla", dtype="float32")
    wte_key, wpe_key, h_key = jax.random.split(key, 3)
    normal, x_BTD = nn.initializers.normal(INIT_STD), jnp.zeros((1, 1, cfg.n_embd))
    keys_L = jax.random.split(h_key, cfg.n_layer)
    shape_VD, V = (cfg.padded_vocab_size, cfg.n_embd), cfg.vocab_size
    params = {
        "wte": {"embedding": normal(wte_key, shape_VD).at[V:].set(0)},
        "wpe": {"embedding": normal(wpe_key, (cfg.block_size, cfg.n_embd))},
        "h": jax.vmap(lambda key: Block(cfg).init(key, x_BTD)["params"])(keys_L),
        "ln_f": LayerNorm(cfg).init(key, x_BTD)["params"],
    }
    if not cfg.tie_head:
        head_VD = normal(jax.random.fold_in(key, 3), shape_VD)
        params["lm_head"] = {"embedding": head_VD.at[V:].set(0)}
    return params


def param_shapes(cfg: GPTConfig) -> Params:
    """Return the tree that `init_params` makes as shapes and dtypes.

    They are written out: traced from it, they would take 0.1 s of a start, before weights are read.
    """
    L, D = cfg.n_layer, cfg.n_embd

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def layer_norm(*layers: int) -> Params:
        return {"scale": leaf(*layers, D)} | ({"bias": leaf(*layers, D)} if cfg.bias else {})

    def linear(width_in: int, width_out: int) -> Params:
        kernel = {"kernel": leaf(L, width_in, width_out)}
        return kernel | ({"bias": leaf(L, width_out)} if cfg.bias else {})

    def embedding(rows: int) -> Params:
        return {"embedding": leaf(rows, D)}

    shapes = {
        "wte": embedding(cfg.padded_vocab_size),
        "wpe": embedding(cfg.block_size),
        "h": {
            "ln_1": layer_norm(L),
            "attn": {"c_attn": linear(D, 3 * D), "c_proj": linear(D, D)},
            "ln_2": layer_norm(L),
            "mlp": {"c_fc": linear(D, 4 * D), "c_proj": linear(4 * D, D)},
        },
        "ln_f": layer_norm(),
    }
    head = {} if cfg.tie_head else {"lm_head": embedding(cfg.padded_vocab_size)}
    return shapes | head


def count_params(cfg: GPTConfig, without: Container[str] = ()) -> int:
    """Return how many parameters there are; padding rows and entries in `without` do not count."""
    shapes = param_shapes(dataclasses.replace(cfg, vocab_multiple=1))
    counted = [part for name, part in shapes.items() if name not in without]
    return sum(leaf.size for leaf in jax.tree.leaves(counted))


def unstack_layers(params: Params, n_layer: int) -> Params:
    """Return the tree with `h` as a list of L blocks, which spares a decoder slices per token."""
    layers = [jax.tree.map(lambda stacked, i=i: stacked[i], params["h"]) for i in range(n_layer)]
    return {**params, "h": layers}


def prepare_for_decoding(cfg: GPTConfig, params: Params, weights: str = "auto") -> Params:
    """Return the parameters with unstacked layers in the compute dtype, converted once for all.

    With weights="int8" all matrices but the position embedding become `Int8`.
    """
    return prepare(cfg, params, weights)


@functools.partial(jax.jit, static_argnames=("cfg", "weights"))
def prepare(cfg: GPTConfig, params: Params, weights: str) -> Params:
    """Compute `prepare_for_decoding`; all arguments are given, so that they name one program."""
    params = quantize_matrices(params) if weights == "int8" else params
    return jax.tree.map(
        lambda p: p if isinstance(p, Int8) else p.astype(cfg.dtype),
        unstack_layers(params, cfg.n_layer),
        is_leaf=lambda p: isinstance(p, Int8),
    )


# The axis of a matrix along which a scale holds: its inputs.
SCALED = {"kernel": -2, "wte": -1, "lm_head": -1}


def quantize_matrices(params: Params) -> Params:
    """Return the tree with every matrix that a product reads as `Int8`, a scale for each output."""
    return map_matrices(quantize, params)


def round_matrices(params: Params) -> Params:
    """Return the tree in float32, with the matrices that `quantize_matrices` stands for."""
    return map_matrices(lambda p, axis: dequantize(quantize(p, axis), axis), params)


def map_matrices(change: Callable[[Array, int], Any], params: Params) -> Params:
    """Return the tree with each matrix that a product reads changed, knowing its axis of inputs."""

    def change_one(path: Any, p: Array) -> Any:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        axes = [axis for name, axis in SCALED.items() if name in names]
        return change(p, axes[0]) if axes else p

    changed: Params = jax.tree.map_with_path(change_one, params)
    return changed


# ---- The whole -----------------------------------------------------------------------------------


def embed(cfg: GPTConfig, params: Params, tokens_BT: Array, cache: KVCache | None = None) -> Array:
    """Return (B, T, D): token plus position embeddings, from position 0 or the cache's end on."""
    (B, T), wpe_SD = tokens_BT.shape, params["wpe"]["embedding"]
    wte_VD = params["wte"]["embedding"]
    if cache is None:
        assert cfg.block_size >= T, f"{T} tokens in a context of {cfg.block_size}"
        # A slice, because the gradient of a gather is slow.
        wpe_BTD = jnp.broadcast_to(wpe_SD[:T], (B, T, cfg.n_embd))
    else:
        wpe_BTD = wpe_SD[cache.positions(T)]
    if isinstance(wte_VD, Int8):
        wte_BTD = dequantize(Int8(wte_VD.values[tokens_BT], wte_VD.scale[tokens_BT]), -1)
    else:
        wte_BTD = LOOK_UP.get(jax.default_backend(), look_up)(wte_VD, tokens_BT, cfg.dtype)
    # The cast comes after the gather: its gradient, a scatter-add, is slow and coarse in bfloat16.
    return (wte_BTD + wpe_BTD).astype(stored_dtype(cfg))


def hidden_states(
    cfg: GPTConfig,
    params: Params,
    tokens_BT: Array,
    *,
    dropout_key: Array | None = None,
    cache: KVCache | None = None,
) -> tuple[Array, KVCache | None]:
    """Return the final hidden states (B, T, D), after ln_f, and the longer cache.

    Args:
        cfg: the model, without "auto" (see `resolve`).
        params: the tree of this module's docstring; with a cache, `unstack_layers` of it.
        tokens_BT: ids below cfg.vocab_size (unchecked: JAX clamps or fills silently).
        dropout_key: a random key for each row (B,), which alone decides what is dropped in this
            row; turns dropout on. Not with a cache.
        cache: keys and values of the tokens before these; T must fit behind them.
    """
    x_BTD = embed(cfg, params, tokens_BT, cache)
    x_BTD = collectives.constrain(x_BTD)
    block, keys_LPB = Block(cfg), None
    if dropout_key is not None and cfg.dropout > 0:
        keys = keys_of_places(dropout_key, 1 + 3 * cfg.n_layer)  # embedding, then three in a block
        x_BTD = drop_rows(x_BTD, keys[0], cfg.dropout)
        keys_LPB = keys[1:].reshape(cfg.n_layer, 3, -1)

    if isinstance(params["h"], list):
        of_layer: Callable[..., Any] = functools.partial(apply, block)
        if isinstance(x_BTD, jax.core.Tracer):  # traced once for all layers: a third of the time
            of_layer = jax.jit(of_layer)
        for i, layer in enumerate(params["h"]):
            keys_PB = None if keys_LPB is None else keys_LPB[i]
            one = None if cache is None else cache.of_layer(i)
            x_BTD, one = of_layer(layer, x_BTD, one, keys_PB)
            cache = None if cache is None else cache.with_layer(i, one)
        if cache is not None:
            cache = cache.advance(tokens_BT.shape[1])
    else:
        assert cache is None, "decoding reads unstacked layers"
        unroll, shape, whole = cfg.unroll or cfg.n_layer, x_BTD.shape, param_shapes(cfg)["h"]

        def step(x_ND: Array, layer: tuple[Params, Array | None]) -> tuple[Array, None]:
            params = collectives.by_heads(collectives.collect(layer[0], whole, cfg))
            x_BTD, _ = apply(block, params, x_ND.reshape(shape), None, layer[1])
            x_ND = x_BTD.reshape(x_ND.shape)  # rows between blocks too: see `on_rows`
            return collectives.constrain(x_ND), None

        if cfg.remat:
            # Unrolled, XLA would see the recomputed block beside the first and merge the two.
            step = jax.checkpoint(step, prevent_cse=unroll > 1)
        elif collectives.axis_size("fsdp") > 1:
            # Collected again for the gradient: else each device would keep all layers whole.
            policy = jax.checkpoint_policies.save_anything_except_these_names(collectives.COLLECTED)
            step = jax.checkpoint(step, prevent_cse=unroll > 1, policy=policy)
        rows_ND, layers = x_BTD.reshape(-1, cfg.n_embd), (params["h"], keys_LPB)
        x_BTD = jax.lax.scan(step, rows_ND, layers, unroll=unroll)[0].reshape(shape)
    return apply(LayerNorm(cfg), params["ln_f"], x_BTD), cache


def apply(module: nn.Module, params: Params, *inputs: object) -> Any:
    """Return a module's output for these parameters and inputs."""
    return module.apply({"params": params}, *inputs)


def head(cfg: GPTConfig, params: Params, x: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """Return logits (..., V) of hidden states (..., D), by the tied or untied head.

    The columns of padding rows are -inf, so that no loss and no sampler ever sees them.
    """
    name, x_ND = "wte" if cfg.tie_head else "lm_head", x.reshape(-1, x.shape[-1])
    head_VD = params[name]["embedding"]
    if isinstance(head_VD, Int8):
        logits_NV = PRODUCTS[choose_product(cfg.kernels)](x_ND, head_VD, 1).astype(dtype)
    else:
        head_VD = head_VD.astype(stored_dtype(cfg))
        product = functools.partial(einsum_of(cfg), "ND,VD->NV", preferred_element_type=dtype)
        logits_NV = with_more_rows(lambda x_ND: product(x_ND, head_VD), x_ND)
    if cfg.padded_vocab_size > cfg.vocab_size:
        is_token_V = jnp.arange(cfg.padded_vocab_size) < cfg.vocab_size
        logits_NV = jnp.where(is_token_V[None], logits_NV, -jnp.inf)
    return logits_NV.reshape(*x.shape[:-1], cfg.padded_vocab_size)


def forward(
    cfg: GPTConfig, params: Params, tokens_BT: Array, *, cache: KVCache | None = None
) -> tuple[Array, KVCache | None]:
    """Return float32 logits (B, T, V) of every token, and the cache; see `hidden_states`."""
    x_BTD, cache = hidden_states(cfg, params, tokens_BT, cache=cache)
    return head(cfg, params, x_BTD), cache


def next_logits(
    cfg: GPTConfig, params: Params, tokens_BT: Array, cache: KVCache, length_B: Array | None = None
) -> tuple[Array, KVCache]:
    """Return float32 logits (B, V) of the token that follows each row, and the longer cache.

    tokens_BT follow those of the cache: prompts, or the one token of each row drawn last. The first
    length_B[b] of row b count, at least one; the rest is padding. Without length_B all count.
    """
    B, T = tokens_BT.shape
    x_BTD, longer = hidden_states(cfg, params, tokens_BT, cache=cache)
    assert longer is not None
    if length_B is None:
        return head(cfg, params, x_BTD[:, -1]), longer
    # What the padding wrote lies behind the length: no query sees it before new tokens replace it.
    return head(cfg, params, x_BTD[jnp.arange(B), length_B - 1]), longer.advance(length_B - T)
