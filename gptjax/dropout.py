"""Dropout by masks that are a function of a random key for each row, and of the position in it.

A mask is a hash of counters, computed in the program that uses it: on an H100 the generator of
`jax.random` took longer than all the rest of a small model's attention. Neither the number of
devices nor the other rows have a say in it, nor does it matter in how many parts it is computed.

B rows of a batch, T time, D width, P places in the model where dropout is used.
"""

import jax
import jax.numpy as jnp
from jax import Array

# Odd factors: the golden ratio, and those of a hash of 32 bits with little bias that Chris Wellons
# found by search ("lowbias32", 2018).
GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def keys_of_places(keys_B: Array, places: int) -> Array:
    """Return random keys (P, B) that are independent of each other, from one for each row."""
    at_place = jax.vmap(jax.random.fold_in, (0, None))
    return jax.vmap(at_place, (None, 0))(keys_B, jnp.arange(places))


def keep_mask(
    keys_B: Array, shape: tuple[int, ...], rate: float, positions: Array | None = None
) -> Array:
    """Return which numbers to keep: each with probability 1 - rate (to 2^-32), on its own.

    Args:
        keys_B: a random key for each row.
        shape: (B, ..., T, D); whether to keep [b, ..., t, d] depends on row b's key and on these
            indices alone.
        rate: probability to drop a number, below 1.
        positions: (B or 1, T), what to take for the index t. 0..T-1 if not given.

    Returns:
        Booleans of the shape.
    """
    return mask_of_words(*row_words(keys_B, shape, positions), shape[-1], rate)


def row_words(
    keys_B: Array, shape: tuple[int, ...], positions: Array | None = None
) -> tuple[Array, Array]:
    """Return two words of 32 bits (B, ..., T, 1) for each row [b, ..., t] of a mask.

    The arguments are those of `keep_mask`.
    """
    words = jax.random.key_data(keys_B)
    a, b = (words[:, i].reshape(-1, *[1] * (len(shape) - 1)) for i in (0, 1))
    for axis in range(1, len(shape) - 1):
        index = jax.lax.broadcasted_iota(jnp.uint32, _along(axis, shape), axis)
        if positions is not None and axis == len(shape) - 2:
            index = positions.reshape(-1, *_along(axis, shape)[1:]).astype(jnp.uint32)
        a, b = _fold(a, b, index)
    return a, b


def mask_of_words(a: Array, b: Array, size: int, rate: float) -> Array:
    """Return which numbers to keep, (..., size), in rows that have these words (..., 1).

    The same is in kernels/attention.cu. This is computed for each number, the rest once for a row.
    """
    last = jax.lax.broadcasted_iota(jnp.uint32, (*[1] * (a.ndim - 1), size), a.ndim - 1)
    x = a + last * jnp.uint32(GOLDEN)
    x = (x ^ (x >> 16)) * jnp.uint32(FIRST)
    x = ((x ^ (x >> 15)) + b) * jnp.uint32(SECOND)
    return x >= jnp.uint32(round(rate * 2**32))


def _along(axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape with only this axis."""
    return tuple(size if i == axis else 1 for i, size in enumerate(shape))


def _fold(a: Array, b: Array, index: Array) -> tuple[Array, Array]:
    """Return two words of 32 bits that depend on two others and on an index.

    No two pairs of words give the same pair for the same index: these are three rounds of a Feistel
    cipher.
    """
    a = a + _mix(b + index * jnp.uint32(GOLDEN))
    b = b + _mix(a)
    return a + _mix(b), b


def _mix(x: Array) -> Array:
    """Return the hash of each word, one to one."""
    x = (x ^ (x >> 16)) * jnp.uint32(FIRST)
    x = (x ^ (x >> 15)) * jnp.uint32(SECOND)
    return x ^ (x >> 16)


def drop(x: Array, keep: Array, rate: float) -> Array:
    """Return x, in its type, with 0 where `keep` is not, and the rest larger by 1 / (1 - rate)."""
    return jnp.where(keep, x.astype(jnp.float32) * (1 / (1 - rate)), 0).astype(x.dtype)


def drop_rows(x_BTD: Array, keys_B: Array, rate: float) -> Array:
    """Return activations after dropout, computed as (N, D) like all that surrounds it."""
    keep_ND = keep_mask(keys_B, x_BTD.shape, rate).reshape(-1, x_BTD.shape[-1])
    return drop(x_BTD.reshape(keep_ND.shape), keep_ND, rate).reshape(x_BTD.shape)
