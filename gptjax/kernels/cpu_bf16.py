"""Matrix products on a CPU with operands in bfloat16 and sums in float32, and their gradients.

XLA's kernels for them, by the instructions AVX512_BF16 and AMX, do up to three times as many
products a second as those for float32. They are reached only where the left side lies in memory
with the dimension that is summed over last: other forms are slower, or not implemented at all.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

# ---- The reference, which runs on any device -----------------------------------------------------


def plain_einsum(
    spec: str, a: Array, b: Array, preferred_element_type: DTypeLike = jnp.float32
) -> Array:
    """Return `jnp.einsum` of two arrays rounded to bfloat16, with sums and result in float32.

    In the backward pass the gradient of the result is rounded too, and nothing else.

    Args:
        spec: letters of a, b and the result, such as "BTHK,BSHK->BHTS".
        a: any float type.
        b: any float type.
        preferred_element_type: has no effect; it is there so that this stands for `jnp.einsum`.
    """
    return _round_gradient(jnp.einsum(spec, _round(a), _round(b)))


def _to_bfloat16(x: Array) -> Array:
    # Not by a cast and a cast back, which XLA takes out.
    return lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


@jax.custom_jvp
def _round(x: Array) -> Array:
    return _to_bfloat16(x)


_round.defjvps(lambda dx, _, x: dx.astype(jnp.float32))


@jax.custom_vjp
def _round_gradient(x: Array) -> Array:
    return x


_round_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (_to_bfloat16(gradient),))


# ---- The same by the fast kernels ----------------------------------------------------------------


def fast_einsum(
    spec: str, a: Array, b: Array, preferred_element_type: DTypeLike = jnp.float32
) -> Array:
    """Return the result of `plain_einsum`, on a CPU that computes in bfloat16.

    Args:
        spec: as there: one letter is summed over, one is in a alone, one in b alone, and all others
            are in both and in the result.
        a: any float type.
        b: any float type.
        preferred_element_type: has no effect, as there.
    """
    return _einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(spec: str, a: Array, b: Array) -> Array:
    return _forward(spec, a, b)[0]


def _forward(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    in_a, in_b, out, batch, row, summed, _column = _letters(spec)
    left, right = batch + row + summed, batch + "".join(x for x in in_b if x not in batch)
    a, b = _arrange(a, in_a, left), _arrange(b, in_b, right)
    return _dot(a, left, b, right, batch, summed, out), (a, b)


def _backward(spec: str, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    (a, b), (in_a, in_b, out, batch, row, summed, column) = saved, _letters(spec)
    left, right = batch + row + summed, batch + "".join(x for x in in_b if x not in batch)
    result = batch + row + column
    gradient = _arrange(gradient, out, result)
    da = _dot(gradient, result, b, right, batch, column, in_a)
    # Of the two that are summed over the rows, the smaller one becomes the left side.
    if a.size <= gradient.size:
        turned = batch + summed + row
        db = _dot(_arrange(a, left, turned), turned, gradient, result, batch, row, in_b)
    else:
        turned = batch + column + row
        db = _dot(_arrange(gradient, result, turned), turned, a, left, batch, row, in_b)
    return da, db


_einsum.defvjp(_forward, _backward)


def _letters(spec: str) -> tuple[str, ...]:
    """Return those of a, b and the result; then of the batch, a's rows, the sum, b's columns."""
    in_a, in_b, out = spec.replace("->", ",").split(",")
    batch = "".join(letter for letter in in_a if letter in in_b and letter in out)
    row, summed, column = ({*in_a} - {*in_b}), ({*in_a} - {*out}), ({*in_b} - {*in_a})
    return in_a, in_b, out, batch, *row, *summed, *column


def _arrange(x: Array, letters: str, order: str) -> Array:
    """Return x in bfloat16 with its letters in this order, also in memory."""
    x = jnp.transpose(x.astype(jnp.bfloat16), [letters.index(letter) for letter in order])
    # Without the barrier XLA makes cast and transposition a part of the product again.
    return lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def _dot(a: Array, in_a: str, b: Array, in_b: str, batch: str, summed: str, order: str) -> Array:
    """Return the sums over a letter of a b; the letters of the batch come first in a and in b."""
    rows, sums = tuple(range(len(batch))), ((in_a.index(summed),), (in_b.index(summed),))
    y = lax.dot_general(a, b, (sums, (rows, rows)), preferred_element_type=jnp.float32)
    out = (in_a + in_b[len(batch) :]).replace(summed, "")
    if out == order:
        return y
    # Without the barrier XLA exchanges a and b where that spares the transposition.
    return jnp.transpose(lax.optimization_barrier(y), [out.index(letter) for letter in order])


EINSUM = {"auto": fast_einsum, "off": plain_einsum}  # by GPTConfig.kernels
