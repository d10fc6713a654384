"""The kernels of the training step, in bfloat16 on NVIDIA GPUs: functions with gradients.

Each computes what plain JAX computes elsewhere, in fewer passes over memory; its docstring says
what it must equal. The kernels themselves are in training.cu.

N tokens (rows), D width, V vocabulary (padded), P parts of a sum.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from gptjax.kernels import cuda

# Where these were measured to be faster, on an H100 with GPT-2 124M at batch 64, and nowhere else.
ROWS = 65536  # or more
# Of what a kernel reads. They would run with others that are a multiple of 8: a row of logits of up
# to 113 KB, so that a multiprocessor holds two; a width of up to 1280, in a warp's registers.
COLUMNS = {"mean_loss": 50304, "add_norm": 768, "linear_split": 2304}
PROCESSORS = 132  # of an H100: grids are a multiple of it


def choose(
    name: str, kernels: str, dtype: DTypeLike, rows: int, columns: int
) -> Callable[..., Any] | None:
    """Return the function of this name in TRAINING where it is faster and can run, else None.

    Args:
        name: a key of TRAINING.
        kernels: as of GPTConfig: auto or off.
        dtype: of the computation.
        rows: how many there are.
        columns: of the widest array that the kernel reads.
    """
    measured = rows >= ROWS and columns == COLUMNS[name]
    if kernels == "off" or not measured or jnp.dtype(dtype) != jnp.bfloat16:
        return None
    return TRAINING[name] if cuda.capability() == cuda.HOPPER and cuda.available() else None


@functools.cache
def source() -> str:
    """Return the text of training.cu."""
    return Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")


def run(
    name: str,
    inputs: Sequence[Array],
    outputs: Sequence[tuple[tuple[int, ...], DTypeLike]],
    *,
    grid: int,
    block: int,
    shared: int = 0,
    aliases: dict[int, int] | None = None,
    **macros: int,
) -> list[Array]:
    """Return the outputs of a kernel of training.cu, compiled with these macros.

    Args:
        name: of the kernel.
        inputs: its first parameters.
        outputs: shape and type of each parameter after them.
        grid: blocks.
        block: threads of each, the macro THREADS.
        shared: bytes of dynamic shared memory of each.
        aliases: input -> output that takes its memory.
        macros: the shapes, and which of its forms is meant.
    """
    options = [f"-D{macro}={n}" for macro, n in {name.upper(): 1, **macros}.items()]
    options.append(f"-DTHREADS={block}")
    ptx = cuda.compile_ptx(source(), cuda.architecture(), tuple(options))
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs]
    how = {"grid": grid, "block": block, "shared": shared}
    return cuda.call(name, ptx, inputs, shapes, aliases=aliases, **how)


# ---- The head's product and the mean loss --------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mean_loss(x_ND: Array, head_VD: Array, targets_N: Array, tokens: int) -> Array:
    """Return the mean of `loss.token_losses` of `model.head`'s logits, float32 ().

    One pass over the logits gives the losses and the gradient, which takes their memory.

    Args:
        x_ND: final hidden states.
        head_VD: in the type of x.
        targets_N: token ids.
        tokens: how many of the V columns are tokens.
    """
    return _mean_loss_forward(x_ND, head_VD, targets_N, tokens)[0]


def _mean_loss_forward(
    x_ND: Array, head_VD: Array, targets_N: Array, tokens: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    N, V = len(x_ND), len(head_VD)
    logits_NV = jnp.einsum("ND,VD->NV", x_ND, head_VD)
    gradient_NV, losses_N = run(
        "cross_entropy",
        [logits_NV, targets_N.astype(jnp.int32)],
        [((N, V), logits_NV.dtype), ((N,), jnp.float32)],
        grid=N,
        block=768,
        shared=2 * V,
        aliases={0: 0},
        N=N,
        V=V,
        TOKENS=tokens,
    )
    return losses_N.mean(), (gradient_NV, x_ND, head_VD)


def _mean_loss_backward(
    tokens: int, saved: tuple[Array, Array, Array], scale: Array
) -> tuple[Array, Array, None]:
    gradient_NV, x_ND, head_VD = saved
    dx_ND = jnp.einsum("NV,VD->ND", gradient_NV, head_VD)
    dhead_VD = jnp.einsum("NV,ND->VD", gradient_NV, x_ND)
    # Without a loss scale it is the constant 1, and XLA leaves these products out.
    return (dx_ND * scale).astype(x_ND.dtype), (dhead_VD * scale).astype(head_VD.dtype), None


mean_loss.defvjp(_mean_loss_forward, _mean_loss_backward)


# ---- Residual stream and LayerNorm ---------------------------------------------------------------


@jax.custom_vjp
def add_norm(
    x_ND: Array, y_ND: Array | None, scale_D: Array, bias_D: Array | None
) -> tuple[Array, Array]:
    """Return x + y, and its rows after `functions.layer_norm` plus the bias, both in x's type.

    In the backward pass the gradients of both meet in one pass, which sums up for scale and bias.

    Args:
        x_ND: the residual stream.
        y_ND: what is added to it; None for nothing.
        scale_D: of any float type, as the bias; both are read as float32.
        bias_D: None for none.
    """
    return _add_norm_forward(x_ND, y_ND, scale_D, bias_D)[0]


def _add_norm_forward(
    x_ND: Array, y_ND: Array | None, scale_D: Array, bias_D: Array | None
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    (N, D), rows = x_ND.shape, (x_ND.shape, x_ND.dtype)
    # One array, made by a kernel: XLA would copy a layer's scale by a call that no graph holds.
    vectors = [scale_D, jnp.zeros_like(scale_D) if bias_D is None else bias_D]
    vectors_2D = jnp.stack(vectors).astype(jnp.float32)  # a sampler's are of the compute dtype
    adds = y_ND is not None
    *sum_ND, normal_ND, moments_N2 = run(
        "norm_forward",
        [x_ND, *([] if y_ND is None else [y_ND]), vectors_2D],
        [*[rows] * adds, rows, ((N, 2), jnp.float32)],
        grid=16 * PROCESSORS,
        block=128,
        N=N,
        D=D,
        ADD=int(adds),
    )
    stream_ND = sum_ND[0] if adds else x_ND
    # Whether y and bias were given: a bool would become an array.
    given = [None if array is None else () for array in (y_ND, bias_D)]
    return (stream_ND, normal_ND), (stream_ND, vectors_2D, moments_N2, given)


def _add_norm_backward(
    saved: tuple[Any, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array | None, Array, Array | None]:
    x_ND, vectors_2D, moments_N2, (y, bias) = saved
    (N, D), parts = x_ND.shape, 3 * PROCESSORS
    residual_ND, gradient_ND = gradients
    columns = D if bias is None else 2 * D
    dx_ND, sums_PD = run(
        "norm_backward",
        [x_ND, vectors_2D, moments_N2, gradient_ND, residual_ND],
        [((N, D), x_ND.dtype), ((parts, columns), jnp.float32)],
        grid=parts,
        block=128,
        shared=4 * columns,
        N=N,
        D=D,
        BIAS=int(bias is not None),
    )
    sum_D = sums_PD.sum(axis=0)
    dy_ND, dbias_D = (None if y is None else dx_ND), (None if bias is None else sum_D[D:])
    return dx_ND, dy_ND, sum_D[:D], dbias_D


add_norm.defvjp(_add_norm_forward, _add_norm_backward)


# ---- Queries, keys and values --------------------------------------------------------------------


@jax.custom_vjp
def linear_split(x_ND: Array, kernel: Array, bias: Array | None) -> tuple[Array, Array, Array]:
    """Return x W + b as three arrays (N, D): queries, keys and values.

    Their gradients are put side by side once, for both products that read them, and summed up for
    the bias in the same pass.

    Args:
        x_ND: rows.
        kernel: (D, 3D), in the type of x.
        bias: (3D,), float32; None for none.
    """
    return _linear_split_forward(x_ND, kernel, bias)[0]


def _linear_split_forward(
    x_ND: Array, kernel: Array, bias: Array | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, tuple[()] | None]]:
    if bias is None:  # three products: nothing is to be split, which is 1.3 % of a step
        q_ND, k_ND, v_ND = (x_ND @ part for part in jnp.split(kernel, 3, axis=1))
    else:
        q_ND, k_ND, v_ND = jnp.split(x_ND @ kernel + bias[None].astype(x_ND.dtype), 3, axis=1)
    return (q_ND, k_ND, v_ND), (x_ND, kernel, None if bias is None else ())


def _linear_split_backward(
    saved: tuple[Array, Array, tuple[()] | None], gradients: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array | None]:
    x_ND, kernel, bias = saved
    (N, D), parts = x_ND.shape, 4 * PROCESSORS
    if bias is None:  # then XLA is as fast
        dqkv, dbias = jax.lax.optimization_barrier(jnp.concatenate(gradients, axis=1)), None
    else:
        dqkv, sums = run(
            "join",
            gradients,
            [((N, 3 * D), x_ND.dtype), ((parts, 3 * D), jnp.float32)],
            grid=parts,
            block=3 * D // 8,
            N=N,
            D=3 * D,
        )
        dbias = sums.sum(axis=0)
    return dqkv @ kernel.T, x_ND.T @ dqkv, dbias


linear_split.defvjp(_linear_split_forward, _linear_split_backward)


TRAINING: dict[str, Callable[..., Any]] = {
    "mean_loss": mean_loss,
    "add_norm": add_norm,
    "linear_split": linear_split,
}
