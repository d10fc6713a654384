"""The keys and values of the tokens a decoder has seen, so that no token is computed twice.

B batch, T new tokens, S cache size, H heads, K head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class KVCache(NamedTuple):
    """Goes into `forward` and comes back longer.

    One array per layer, not one for all: so the update of a layer stays in place.
    """

    k: tuple[Array, ...]  # a (B, S, H, K) per layer
    v: tuple[Array, ...]
    length_B: Array  # tokens held, row by row: prompts of a batch differ in length

    @property
    def size(self) -> int:
        """Tokens the cache has room for."""
        return self.k[0].shape[1]


def init_cache(
    n_layer: int, batch: int, size: int, n_head: int, head_dim: int, dtype: jnp.dtype
) -> KVCache:
    """An empty cache of `size` tokens for `batch` rows."""
    shape = (batch, size, n_head, head_dim)
    k = tuple(jnp.zeros(shape, dtype) for _ in range(n_layer))
    v = tuple(jnp.zeros(shape, dtype) for _ in range(n_layer))
    return KVCache(k, v, jnp.zeros(batch, jnp.int32))


def write(cache_BSHK: Array, new_BTHK: Array, start_B: Array) -> Array:
    """Put row b's new entries at start_B[b]; what would fall past the end is the caller's bug.

    (XLA moves a start that is too large back into the array, and so overwrites silently.)
    """
    if cache_BSHK.shape[0] == 1:  # a slice update stays in place where XLA's scatter may copy
        return jax.lax.dynamic_update_slice(cache_BSHK, new_BTHK, (0, start_B[0], 0, 0))

    def write_row(row_SHK: Array, new_THK: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice(row_SHK, new_THK, (start, 0, 0))

    return jax.vmap(write_row)(cache_BSHK, new_BTHK, start_B)
