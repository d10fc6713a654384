"""The lookup of token embeddings: the plain one, and one whose gradient repeats on a GPU.

The gradient of the plain one is a scatter-add, and a GPU adds in any order.

N tokens in all, V vocabulary, D width; C blocks of K sorted tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

SMALL = 1024  # ids up to which one product adds the rows: 55 us instead of 83 for 16,384 rows
BLOCK = 8  # sorted rows that are added at once; 4 is about as fast, 16 slower


def look_up(table_VD: Array, ids: Array, dtype: DTypeLike) -> Array:
    """Return the rows of a table, (..., D), the reference of `look_up_in_order`.

    Args:
        table_VD: the table, float32.
        ids: of any shape (...).
        dtype: the type that the rows are cast to next, so that their gradient has no more digits.
    """
    return table_VD[ids]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up_in_order(table_VD: Array, ids: Array, dtype: DTypeLike) -> Array:
    """Return the result of `look_up`, whose gradient is always added in the same order."""
    return table_VD[ids]


def _backward(dtype: DTypeLike, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table_VD, ids = saved
    rows_ND = gradient.reshape(-1, table_VD.shape[1]).astype(dtype)
    add = sum_by_product if len(table_VD) <= SMALL else sum_sorted
    return add(ids.reshape(-1), rows_ND, len(table_VD)), None


look_up_in_order.defvjp(lambda table_VD, ids, dtype: (table_VD[ids], (table_VD, ids)), _backward)

LOOK_UP = {"gpu": look_up_in_order}  # by JAX's backend; others add in one order anyway


def sum_by_product(ids_N: Array, rows_ND: Array, n_ids: int) -> Array:
    """Return the result of `sum_sorted`, by a product with one-hot rows."""
    one_hot_NV = jax.nn.one_hot(ids_N, n_ids, dtype=rows_ND.dtype)
    return jnp.einsum(
        "NV,ND->VD", one_hot_NV, rows_ND, precision="highest", preferred_element_type=jnp.float32
    )


def sum_sorted(ids_N: Array, rows_ND: Array, n_ids: int, block: int = BLOCK) -> Array:
    """Return the sum of the rows of each id, always added in the same order.

    Args:
        ids_N: the id of each row, from 0 up to n_ids.
        rows_ND: the rows, of any float type.
        n_ids: how many ids there are.
        block: how many sorted rows are added at once.

    Returns:
        (n_ids, D) in float32; 0 where an id has no row.
    """
    order_N = jnp.argsort(ids_N, stable=True)
    padding = -len(ids_N) % block
    ids_N = jnp.pad(ids_N[order_N], (0, padding), constant_values=n_ids)  # an id of their own
    ids_CK, order_CK = (x.reshape(-1, block) for x in (ids_N, jnp.pad(order_N, (0, padding))))

    def add(ids: Array, ids_K: Array, order_K: Array) -> Array:
        """Return the sum of those rows of each block that have its id."""
        total = jnp.zeros((len(ids), rows_ND.shape[1]), jnp.float32)
        for k in range(block):
            total += jnp.where((ids == ids_K[:, k])[:, None], rows_ND[order_K[:, k]], 0)
        return total

    # An id may go on in the blocks behind its first, which then begin with it.
    heads_C = ids_CK[:, 0]
    rest_CD = suffix_sums(heads_C, add(heads_C, ids_CK, order_CK), block)

    # Integers have the same least one in any order.
    places_N = jnp.arange(len(ids_N), dtype=jnp.int32)
    first_V = jnp.full(n_ids, len(ids_N), jnp.int32).at[ids_N].min(places_N, mode="drop")
    ids_V, block_V = jnp.arange(n_ids), jnp.minimum(first_V // block, len(ids_CK) - 1)
    next_V = jnp.minimum(block_V + 1, len(ids_CK) - 1)
    goes_on_V = (block_V < next_V) & (heads_C[next_V] == ids_V)
    sums_VD = add(ids_V, ids_CK[block_V], order_CK[block_V])
    return sums_VD + jnp.where(goes_on_V[:, None], rest_CD[next_V], 0)


def suffix_sums(ids_N: Array, rows_ND: Array, block: int) -> Array:
    """Return for each row the sum of it and of those behind it that have its id, (N, D).

    Args:
        ids_N: the ids, sorted.
        rows_ND: the rows, float32.
        block: how many rows are added at once; the sums of blocks are added in the same way.
    """
    n, width = rows_ND.shape
    padding = -n % block
    ids_CK = jnp.pad(ids_N, (0, padding), constant_values=-1).reshape(-1, block)
    rows_CKD = jnp.pad(rows_ND, ((0, padding), (0, 0))).reshape(-1, block, width)
    sums_CKD = jnp.zeros_like(rows_CKD)
    for j in range(block):
        adds_CK = (ids_CK == ids_CK[:, j, None]) & (np.arange(block) <= j)[None]
        sums_CKD += jnp.where(adds_CK[:, :, None], rows_CKD[:, j, None], 0)
    if len(ids_CK) > 1:
        rest_CD = suffix_sums(ids_CK[:, 0], sums_CKD[:, 0], block)
        goes_on_CK = ids_CK[:-1] == ids_CK[1:, 0, None]
        rest_CKD = jnp.where(goes_on_CK[:, :, None], rest_CD[1:, None], 0)
        sums_CKD += jnp.pad(rest_CKD, ((0, 1), (0, 0), (0, 0)))
    return sums_CKD.reshape(-1, width)[:n]
