"""Flash attention with dropout of its weights, on NVIDIA GPUs: a function with a gradient.

`attention.cu` says how. XLA writes the scores of all pairs to memory, and cuDNN's masks would be
the same in each step; here scores and masks stay in registers.

B batch, T time, H heads, K head dim.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from gptjax.kernels import cuda

TILE = 64  # queries and keys, of which T is a multiple
THREADS = 128
HEAD_DIM = 64  # of all sizes of GPT-2


def refusal(T: int, K: int, dtype: DTypeLike) -> str:
    """Return why the kernels do not run here for sequences of T and heads of K, "" if they do."""
    if cuda.capability() != cuda.HOPPER:
        return "it is for an H100 or H200"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it is for bfloat16, but this is {jnp.dtype(dtype)}"
    if T % TILE or K != HEAD_DIM:
        return (
            f"it is for heads of {HEAD_DIM} and lengths that {TILE} divides, but this is {K}, {T}"
        )
    return "" if cuda.available() else cuda.refusal()


@functools.cache
def source() -> str:
    """Return the text of the kernels."""
    files = ("gpu_primitives.cuh", "attention.cu")
    return "".join(Path(__file__).with_name(f).read_text(encoding="utf-8") for f in files)


def options(name: str, T: int, H: int, K: int, rate: float) -> tuple[str, ...]:
    """Return the macros of the source for this kernel of it, as options of NVRTC."""
    sizes = {name.upper(): 1, "LENGTH": T, "HEADS": H, "HEAD": K, "TILE": TILE, "THREADS": THREADS}
    macros = {**sizes, "THRESHOLD": round(rate * 2**32), "KEPT": 1 - rate}
    return tuple(f"-D{name}={value}" for name, value in macros.items())


def launch(
    name: str,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    rate: float,
    *,
    grid: int,
    shared: int,
) -> list[Array]:
    """Return the outputs of a kernel, whose first input is q (B, T, H, K).

    Args:
        name: of the kernel.
        inputs: its first parameters.
        outputs: what its other parameters are.
        rate: probability to drop a weight.
        grid: blocks.
        shared: bytes of shared memory of each.
    """
    _, T, H, K = inputs[0].shape
    ptx = cuda.compile_ptx(source(), cuda.architecture(), options(name, T, H, K, rate))
    return cuda.call(name, ptx, inputs, outputs, grid=grid, block=THREADS, shared=shared)


def tiles_of(q_BTHK: Array) -> tuple[int, int]:
    """Return how many tiles all heads have, and the bytes of one in shared memory, with padding."""
    B, T, H, K = q_BTHK.shape
    return B * H * T // TILE, TILE * (K + 8) * 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, words_BHT2: Array, rate: float) -> Array:
    """Return the result of `gptjax.attention.attend` at positions 0..T-1 with dropout.

    Args:
        q_BTHK: queries, bfloat16.
        k_BTHK: keys, likewise.
        v_BTHK: values, likewise.
        words_BHT2: as of `dropout.row_words`, for each head and query.
        rate: probability to drop a weight, below 1.
    """
    return _forward(q_BTHK, k_BTHK, v_BTHK, words_BHT2, rate)[0]


def _forward(
    q: Array, k: Array, v: Array, words_BHT2: Array, rate: float
) -> tuple[Array, tuple[Array, ...]]:
    count, tile = tiles_of(q)
    like_q = jax.ShapeDtypeStruct(q.shape, q.dtype)
    outputs = [like_q, jax.ShapeDtypeStruct(words_BHT2.shape[:3], jnp.float32)]
    inputs = [q, k, v, words_BHT2]
    # A tile each of queries, keys and values
    y, log_sums_BHT = launch(
        "attention_forward", inputs, outputs, rate, grid=count, shared=3 * tile
    )
    return y, (*inputs, log_sums_BHT, y)


def _backward(rate: float, saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    *inputs, y = saved
    count, tile = tiles_of(y)
    outputs = [jax.ShapeDtypeStruct(y.shape, y.dtype)] * 3
    delta_BHT = jnp.einsum("BTHK,BTHK->BHT", y, dy, preferred_element_type=jnp.float32)
    dq, dk, dv = launch(
        "attention_backward",
        [*inputs, delta_BHT, dy],
        outputs,
        rate,
        grid=2 * count,  # for the queries, and for keys and values
        shared=4 * tile + 16 * TILE,  # two tiles of rows, two of columns, and what is known of them
    )
    return dq, dk, dv, None


attend.defvjp(_forward, _backward)
