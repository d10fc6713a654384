"""Products with int8 weights: the plain one, and one that CPUs compute in int8 throughout.

N rows, D inputs, F outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Int8(NamedTuple):
    """An array as int8 numbers and a float32 scale for each of its channels."""

    values: Array
    scale: Array  # the shape of `values` without the axis along which a scale holds


def quantize(x: Array, axis: int) -> Int8:
    """Return an array rounded to 255 steps, up to the largest number along `axis`.

    Source: the absmax quantization of Dettmers et al. 2022, "LLM.int8()", equation 1.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=axis), jnp.finfo(jnp.float32).tiny * 127) / 127
    return Int8(jnp.round(x / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale)


def dequantize(x: Int8, axis: int) -> Array:
    """Return the float32 array that the numbers stand for."""
    return x.values.astype(jnp.float32) * jnp.expand_dims(x.scale, axis)


def product(x_ND: Array, w: Int8, axis: int = 0) -> Array:
    """Return x w, (N, F) float32, the reference: int8 is exact in each type to compute in.

    Args:
        x_ND: of any type.
        w: (D, F), or (F, D) with axis=1; a scale for each output.
        axis: that of the inputs. A transposed copy would cost far more than the product.
    """
    dims = (((1,), (axis,)), ((), ()))
    values = w.values.astype(x_ND.dtype)
    y_NF = jax.lax.dot_general(x_ND, values, dims, preferred_element_type=jnp.float32)
    return y_NF * w.scale[None]


def product_in_parts(x_ND: Array, w: Int8, axis: int = 0) -> Array:
    """Return the product by int8 products of the high and the low half of each row's numbers.

    A row of x is rounded to 1/64516 of its largest number. XLA makes a float32 copy of w for any
    other product, and passes int8 times int8 to a library. Time for 12 matrices of 768 x 3072 with
    1, 4 and 16 rows on 2 CPU cores: 2.2, 3.1 and 3.9 ms; in float32 4.2, 14.6 and 24.9 ms.
    """
    N = len(x_ND)
    high = quantize(x_ND, axis=1)
    rest_ND = x_ND.astype(jnp.float32) / high.scale[:, None] - high.values
    low_ND = jnp.round(254 * rest_ND).astype(jnp.int8)
    both_ND = jnp.concatenate([high.values, low_ND])
    dims = (((1,), (axis,)), ((), ()))
    y_NF = jax.lax.dot_general(both_ND, w.values, dims, preferred_element_type=jnp.int32)
    y_NF = y_NF[:N].astype(jnp.float32) + y_NF[N:].astype(jnp.float32) / 254
    return y_NF * high.scale[:, None] * w.scale[None]


PRODUCTS = {"plain": product, "parts": product_in_parts}


def choose_product(kernels: str) -> str:
    """Return the key of PRODUCTS to use on this machine, by GPTConfig.kernels."""
    return "parts" if kernels == "auto" and jax.default_backend() == "cpu" else "plain"
