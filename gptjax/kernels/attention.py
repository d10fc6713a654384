"""Flash attention with dropout of its weights, on NVIDIA GPUs: a function with a gradient.

`attention.cu` says how. XLA writes the scores of all pairs to memory, and cuDNN's masks would be
the same in each step; here scores and masks stay in registers.

B batch, T time, H heads, K head dim.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.kernels import cuda

TILE = 64  # queries and keys, of which T is a multiple
THREADS = 128
HEAD_DIM = 64  # of all sizes of GPT-2
CAPABILITY = (9, 0)  # where it was measured and checked


def takes(T: int, K: int) -> bool:
    """Return whether the kernels run here, for sequences of T and heads of K."""
    fits = T % TILE == 0 and K == HEAD_DIM
    return fits and cuda.capability() == CAPABILITY and cuda.available()


@functools.cache
def source() -> str:
    """Return the text of the kernels."""
    files = ("gpu_primitives.cuh", "attention.cu")
    return "".join(Path(__file__).with_name(f).read_text(encoding="utf-8") for f in files)


def run(name: str, inputs: list[Array], n_gradients: int, rate: float) -> list[Array]:
    """Return the outputs of a kernel: results like q, then the logarithms of the forward pass.

    Args:
        name: attention_forward or attention_backward.
        inputs: its first parameters, q first.
        n_gradients: 0 for the forward pass.
        rate: probability to drop a weight.
    """
    q_BTHK = inputs[0]
    B, T, H, K = q_BTHK.shape
    ptx = cuda.compile_ptx(source(), cuda.architecture(), options(name, T, H, K, rate))
    like_q = jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype)
    log_sums = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    outputs = [like_q] * n_gradients or [like_q, log_sums]
    tiles = B * H * T // TILE * (2 if n_gradients else 1)
    shared = shared_memory(K, backward=n_gradients > 0)
    return cuda.call(name, ptx, inputs, outputs, grid=tiles, block=THREADS, shared=shared)


def options(name: str, T: int, H: int, K: int, rate: float) -> tuple[str, ...]:
    """Return the macros of the source for this kernel of it, as options of NVRTC."""
    sizes = {name.upper(): 1, "LENGTH": T, "HEADS": H, "HEAD": K}
    macros = {**sizes, "THRESHOLD": round(rate * 2**32), "KEPT": 1 - rate}
    return tuple(f"-D{name}={value}" for name, value in macros.items())


def shared_memory(K: int, *, backward: bool) -> int:
    """Return the bytes that a block takes: tiles, and what is known of 64 queries."""
    tile = TILE * (K + 8) * 2
    return 4 * tile + TILE * 16 if backward else 3 * tile


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
    y, log_sums_BHT = run("attention_forward", [q, k, v, words_BHT2], 0, rate)
    return y, (q, k, v, words_BHT2, log_sums_BHT, y)


def _backward(rate: float, saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    *inputs, y = saved
    delta_BHT = jnp.einsum("BTHK,BTHK->BHT", y, dy, preferred_element_type=jnp.float32)
    dq, dk, dv = run("attention_backward", [*inputs, delta_BHT, dy], 3, rate)
    return dq, dk, dv, None


attend.defvjp(_forward, _backward)
