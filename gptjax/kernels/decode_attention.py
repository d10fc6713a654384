"""Attention of one new token a row to its cache, with the write of it, on NVIDIA GPUs.

`decode_attention.cu` says how. cuDNN reads a cache that was written before; here one kernel writes
what is new and reads what each row holds.

B batch, S cache size, H heads, K head dim.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from gptjax.kernels import cuda

HEAD_DIM = 64  # of all sizes of GPT-2
AHEAD = 4  # places; with 2 and 8 of them, or the next ones asked for sooner, it took as long
FOUND = 40  # bytes of what a thread has found


def refusal(T: int, K: int, dtype: DTypeLike) -> str:
    """Return why the kernel does not run here for T new tokens and heads of K, "" if it does."""
    if cuda.capability() != cuda.HOPPER:
        return "it is for an H100 or H200"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it is for bfloat16, but this is {jnp.dtype(dtype)}"
    if T > 1 or K != HEAD_DIM:
        return f"it is for one token a row and heads of {HEAD_DIM}, but this is {T}, {K}"
    return "" if cuda.available() else cuda.refusal()


@functools.cache
def source() -> str:
    """Return the text of the kernel."""
    files = ("gpu_primitives.cuh", "decode_attention.cu")
    return "".join(Path(__file__).with_name(f).read_text(encoding="utf-8") for f in files)


def plan(B: int, H: int) -> tuple[int, int]:
    """Return how many heads a block has, and its threads.

    Two heads are 256 bytes side by side, but few blocks leave some of a GPU's 132 processors idle.
    """
    return 2 if H % 2 == 0 and B * H >= 512 else 1, 256 if B * H >= 256 else 512


def options(S: int, H: int, K: int, together: int, threads: int) -> tuple[str, ...]:
    """Return the macros of the source as options of NVRTC."""
    sizes = {"PLACES": S, "HEADS": H, "HEAD": K, "TOGETHER": together, "THREADS": threads}
    return tuple(f"-D{name}={value}" for name, value in {**sizes, "AHEAD": AHEAD}.items())


def launch(
    inputs: Sequence[Array], outputs: Sequence[jax.ShapeDtypeStruct], together: int, threads: int
) -> list[Array]:
    """Return the outputs of the kernel: the caches, which are its last two inputs, and a result."""
    B, S, H, K = inputs[-1].shape
    ptx = cuda.compile_ptx(source(), cuda.architecture(), options(S, H, K, together, threads))
    return cuda.call(
        "decode_attention",
        ptx,
        inputs,
        outputs,
        grid=B * H // together,
        block=threads,
        shared=threads // 32 * (together * K // 8) * FOUND,
        aliases={4: 0, 5: 1},
    )


def attend(
    q_BHK: Array, k_BHK: Array, v_BHK: Array, k_BSHK: Array, v_BSHK: Array, length_B: Array
) -> tuple[Array, Array, Array]:
    """Return the result (B, H, K) of `gptjax.attention.attend`, and the caches with the new tokens.

    Args:
        q_BHK: queries of the newest tokens, bfloat16.
        k_BHK: their keys.
        v_BHK: their values.
        k_BSHK: keys of the tokens before.
        v_BSHK: values of those.
        length_B: how many those are. Where they fill the cache, the newest takes the last place.
    """
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSHK, v_BSHK, q_BHK)]
    k, v, y = launch(
        [q_BHK, k_BHK, v_BHK, length_B, k_BSHK, v_BSHK], outputs, *plan(*q_BHK.shape[:2])
    )
    return y, k, v
