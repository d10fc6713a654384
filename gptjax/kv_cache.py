"""The keys and values of the tokens a decoder has seen, so that no token is computed twice.

B batch, T new tokens, S cache size, H heads, K head dim.

The model calls `of_layer`, `with_layer`, `size`, `positions` and `advance`, attention `positions`
and `update` (its kernel for an H100 takes the arrays instead), the sampler `grow`. Speculative
decoding sets `length_B`, and beam search takes rows of every array. So a cache of another kind is
another NamedTuple with these functions, a `length_B`, and the rows first in each array, and a
function in `attention` that reads what `update` returns, which `choose_cached_attention` takes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import GPTConfig
from gptjax.kernels.int8 import Int8, quantize

Stored = Any  # an Array (B, S, H, K), or an Int8 with a scale for each token and head, (B, S, H)


class KVCache(NamedTuple):
    """A cache that holds position s at index s; it goes into the model and comes back longer.

    One array per layer, not one for all: so the update of a layer stays in place.
    """

    k: tuple[Stored, ...]  # one per layer
    v: tuple[Stored, ...]
    length_B: Array  # tokens held, row by row: prompts of a batch differ in length

    @property
    def size(self) -> int:
        """Return how many tokens each row has room for."""
        return int(jax.tree.leaves(self.k)[0].shape[1])

    def positions(self, T: int) -> Array:
        """Return the positions (B, T) of the next T tokens."""
        return self.length_B[:, None] + jnp.arange(T)[None]

    def of_layer(self, layer: int) -> "KVCache":
        """Return the cache of one layer alone."""
        return KVCache((self.k[layer],), (self.v[layer],), self.length_B)

    def with_layer(self, layer: int, one: "KVCache") -> "KVCache":
        """Return the cache with that of one layer in its place."""
        k, v = (
            (*x[:layer], *new, *x[layer + 1 :]) for x, new in ((self.k, one.k), (self.v, one.v))
        )
        return self._replace(k=k, v=v)

    def update(self, k_BTHK: Array, v_BTHK: Array) -> tuple[Stored, Stored, "KVCache"]:
        """Write the keys and values of the next T tokens into the cache of one layer.

        Args:
            k_BTHK: their keys. T must fit behind the tokens held: XLA moves what would fall past
                the end back into the array, and so overwrites silently.
            v_BTHK: their values.

        Returns:
            All keys and all values of the layer as the cache holds them, for `attention`; and the
            cache. Its length is the old one until all layers are written: see `advance`.
        """
        k, v = store(self.k[0], k_BTHK, self.length_B), store(self.v[0], v_BTHK, self.length_B)
        return k, v, KVCache((k,), (v,), self.length_B)

    def advance(self, count: int | Array) -> "KVCache":
        """Return the cache with `count` more tokens, (B,) or the same for all rows, counted in."""
        return self._replace(length_B=self.length_B + count)

    def grow(self, size: int) -> "KVCache":
        """Return the cache with room for `size` tokens, at least as many as now."""

        def longer(x_BS: Array) -> Array:
            more = [(0, 0)] * x_BS.ndim
            more[1] = (0, size - x_BS.shape[1])
            return jnp.pad(x_BS, more)

        k, v = jax.tree.map(longer, (self.k, self.v))
        return KVCache(k, v, self.length_B)


def make_cache(cfg: GPTConfig, batch: int, size: int) -> KVCache:
    """Return an empty cache of `size` tokens for `batch` rows."""
    shape, dtype = (batch, size, cfg.n_head, cfg.head_dim), jnp.dtype(cfg.dtype)

    def empty() -> Stored:
        if cfg.cache == "int8":
            return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1]))
        return jnp.zeros(shape, dtype)

    k, v = (tuple(empty() for _ in range(cfg.n_layer)) for _ in "kv")
    return KVCache(k, v, jnp.zeros(batch, jnp.int32))


def store(cache_BSHK: Stored, new_BTHK: Array, start_B: Array) -> Stored:
    """Return what a layer holds with row b's new entries at start_B[b]."""
    if isinstance(cache_BSHK, Int8):
        new = quantize(new_BTHK, -1)
        values_BSHK = write(cache_BSHK.values, new.values, start_B)
        return Int8(values_BSHK, write(cache_BSHK.scale, new.scale, start_B))
    return write(cache_BSHK, new_BTHK, start_B)


def write(cache_BSHK: Array, new_BTHK: Array, start_B: Array) -> Array:
    """Return an array (B, S, ...) with row b's new entries at start_B[b]."""
    if cache_BSHK.shape[0] == 1:  # a slice update stays in place where XLA's scatter may copy
        return jax.lax.dynamic_update_slice_in_dim(cache_BSHK, new_BTHK, start_B[0], axis=1)

    def write_row(row_SHK: Array, new_THK: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row_SHK, new_THK, start, axis=0)

    return jax.vmap(write_row)(cache_BSHK, new_BTHK, start_B)
