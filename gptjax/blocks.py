"""The components of GPT-2 as functions and modules of x (B, T, D); `model` puts them together.

They drop activations where they are given random keys: one for each place, and each row in it.

B batch, T query time, N tokens in all (B*T), S context time, D width, H heads, K head dim, F = 4D,
P places of dropout.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from gptjax import collectives
from gptjax.attention import ATTENTION, CACHED_ATTENTION, choose_cached_attention
from gptjax.config import GPTConfig
from gptjax.dropout import drop_rows
from gptjax.functions import ACTIVATIONS, layer_norm, on_rows, with_more_rows
from gptjax.kernels import training
from gptjax.kernels.int8 import PRODUCTS, Int8, choose_product
from gptjax.kv_cache import KVCache
from gptjax.precision import einsum_of, is_mixed, stored_dtype

INIT_STD = 0.02


def linear(cfg: GPTConfig, x: Array, features: int, name: str) -> Array:
    """Return x W + b, (..., in) -> (..., features), with parameters of this name.

    The product is two-dimensional: XLA's weight gradients are up to twice as slow for (B, T, in).
    """
    std = INIT_STD / math.sqrt(2 * cfg.n_layer) if name == "c_proj" else INIT_STD
    normal = nn.initializers.normal(std)
    dense = nn.Dense(
        features,
        use_bias=cfg.bias,
        dtype=stored_dtype(cfg),
        kernel_init=normal,
        promote_dtype=promote,
        dot_general=functools.partial(dense_product, cfg),
        name=name,
    )
    return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def promote(*arrays: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """Return x, W and b of nn.Dense in the type to compute in, but int8 weights as they are."""
    x, w, bias = arrays
    if isinstance(w, Int8):
        x, bias = nn.dtypes.promote_dtype(x, bias, dtype=dtype, inexact=inexact)
        return [x, w, bias]
    return nn.dtypes.promote_dtype(x, w, bias, dtype=dtype, inexact=inexact)


def dense_product(
    cfg: GPTConfig, x_ND: Array, w_DF: Array | Int8, dims: Any, precision: Any = None
) -> Array:
    """Return x W for nn.Dense, (N, F)."""
    if isinstance(w_DF, Int8):
        return PRODUCTS[choose_product(cfg.kernels)](x_ND, w_DF).astype(x_ND.dtype)
    if is_mixed(cfg):
        return einsum_of(cfg)("ND,DF->NF", x_ND, w_DF)
    dot = functools.partial(jax.lax.dot_general, precision=precision)
    return with_more_rows(lambda x_ND: dot(x_ND, w_DF, dims), x_ND)


class LayerNorm(nn.Module):
    """Normalisation of each token in float32, then its scale and shift (Ba et al. 2016)."""

    cfg: GPTConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return (..., D) for (..., D), as `precision.stored_dtype` says."""
        D = x.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (D,))
        y_ND = layer_norm(x.reshape(-1, D), scale_D)
        if self.cfg.bias:
            y_ND = y_ND + self.param("bias", nn.initializers.zeros, (D,))[None]
        return y_ND.astype(stored_dtype(self.cfg)).reshape(x.shape)


def kernel_of(cfg: GPTConfig, name: str, rows: int, columns: int) -> Callable[..., Any] | None:
    """Return the function of this name in `training.TRAINING`, None where plain JAX is to compute.

    Args:
        cfg: the model.
        name: of the function.
        rows: of the arrays that it reads.
        columns: of the widest of them.
    """
    if collectives.axis_size("tensor") > 1:  # a kernel needs whole rows
        return None
    return training.choose(name, cfg.kernels, cfg.dtype, rows, columns)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and to the tokens before it."""

    cfg: GPTConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        cache: KVCache | None = None,
        keys_PB: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Return (B, T, D), and the cache of this layer with the tokens in it."""
        cfg, (B, T, D) = self.cfg, x_BTD.shape
        parts: Sequence[Array]
        linear_split = kernel_of(cfg, "linear_split", B * T, 3 * D)
        if linear_split is not None and cache is None:
            weights: Any = self.get_variable("params", "c_attn")
            kernel, bias = weights["kernel"].astype(cfg.dtype), weights.get("bias")
            parts = linear_split(x_BTD.reshape(B * T, D), kernel, bias)
        else:
            qkv = linear(cfg, x_BTD, 3 * D, "c_attn")
            if cache is None and jax.default_backend() == "gpu":
                # Its gradient is put together once then, not for each of the two products that
                # read it: 1 % of a GPT-2 step.
                qkv = jax.lax.optimization_barrier(qkv)
            # 3D columns, or those of each device along `tensor`: see `collectives.by_heads`.
            groups = collectives.axis_size("tensor")
            parts = jnp.split(qkv.reshape(B * T, groups, 3 * D // groups), 3, axis=2)
        q, k, v = (part.reshape(B, T, cfg.n_head, cfg.head_dim) for part in parts)
        if cache is None:
            keys_B = None if keys_PB is None else keys_PB[0]
            y_BTHK = ATTENTION[cfg.attention](
                q, k, v, dropout=cfg.weights_dropout, keys_B=keys_B, einsum=einsum_of(cfg)
            )
        else:
            attend = CACHED_ATTENTION[choose_cached_attention(cfg, B, T, cache.size)]
            y_BTHK, cache = attend(q, k.astype(cfg.dtype), v.astype(cfg.dtype), cache)
        y_BTD = linear(cfg, y_BTHK.reshape(B, T, D), D, "c_proj")
        return y_BTD if keys_PB is None else drop_rows(y_BTD, keys_PB[1], cfg.dropout), cache


class MLP(nn.Module):
    """A network of two layers for each token by itself: widen to 4D, activation, narrow to D."""

    cfg: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: Array, keys_B: Array | None = None) -> Array:
        """Return (B, T, D) for (B, T, D)."""
        cfg, D = self.cfg, x_BTD.shape[-1]
        x_BTF = on_rows(ACTIVATIONS[cfg.activation], linear(cfg, x_BTD, 4 * D, "c_fc"))
        y_BTD = linear(cfg, x_BTF, D, "c_proj")
        return y_BTD if keys_B is None else drop_rows(y_BTD, keys_B, cfg.dropout)


class Block(nn.Module):
    """Attention, then MLP; each reads the normalised residual stream and adds to it."""

    cfg: GPTConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        cache: KVCache | None = None,
        keys_PB: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Return the output (B, T, D), and the cache of this layer with these tokens."""
        attn = CausalSelfAttention(self.cfg, name="attn")
        x_BTD, normal_BTD = self.add_norm("ln_1", x_BTD)
        y_BTD, cache = attn(normal_BTD, cache, keys_PB)
        x_BTD, normal_BTD = self.add_norm("ln_2", x_BTD, y_BTD)
        mlp, keys_B = MLP(self.cfg, name="mlp"), None if keys_PB is None else keys_PB[2]
        return on_rows(jnp.add, x_BTD, mlp(normal_BTD, keys_B)), cache

    def add_norm(self, name: str, x_BTD: Array, y_BTD: Array | None = None) -> tuple[Array, Array]:
        """Return x + y, or x alone, and it after the LayerNorm of this name."""
        D = x_BTD.shape[-1]
        add_norm = kernel_of(self.cfg, "add_norm", x_BTD.size // D, D)
        if add_norm is None:
            x_BTD = x_BTD if y_BTD is None else on_rows(jnp.add, x_BTD, y_BTD)
            return x_BTD, LayerNorm(self.cfg, name=name)(x_BTD)
        weights: Any = self.get_variable("params", name)
        x_ND, y_ND = (None if a is None else a.reshape(-1, D) for a in (x_BTD, y_BTD))
        x_ND, normal_ND = add_norm(x_ND, y_ND, weights["scale"], weights.get("bias"))
        return x_ND.reshape(x_BTD.shape), normal_ND.reshape(x_BTD.shape)
