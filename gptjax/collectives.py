"""The steps that devices take together in the forward and backward pass.

Over the axes of the batch (see `sharding.LAYOUTS`) the training step is written for one device, by
`jax.shard_map`: the functions here collect what other devices hold, and add gradients. The axis
`tensor` stays XLA's, which splits what `constrain` and `by_heads` tell it to. Where a function is
traced for no mesh, or for one device, they change nothing.

H heads, K head dim, D width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.config import GPTConfig
from gptjax.sharding import PyTree, batch_axes

T = TypeVar("T")
COLLECTED = "collected"  # the checkpoint_name of parameters that were put together


def per_device(
    function: Callable[..., T], mesh: Mesh, in_specs: PyTree, out_specs: PyTree
) -> Callable[..., T]:
    """Return a function of whole arrays that computes `function` on each device's part of them.

    The specs speak of the batch's axes. One device computes `function` itself.
    """
    if mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(batch_axes(mesh)),
        check_vma=False,
    )


def axis_size(axis: str) -> int:
    """Return how many devices there are along an axis of the mesh traced for; 1 without it."""
    return int(jax.sharding.get_abstract_mesh().shape.get(axis, 1))


# ---- Over the batch's axes -----------------------------------------------------------------------


def collect(params: PyTree, whole: PyTree, cfg: GPTConfig) -> PyTree:
    """Return the whole of parameters whose parts lie on the devices along `fsdp`.

    Their gradients are added where they are computed, and each device keeps its part. The matrices
    of a layer are sent in the compute dtype.

    Args:
        params: a part of the tree of parameters, or one layer of its blocks.
        whole: the shapes when put together, as of `model.param_shapes`; with the axis of layers.
        cfg: the model.
    """
    if axis_size("fsdp") == 1:
        return params

    def put_together(part: Array, whole: jax.ShapeDtypeStruct) -> Array:
        is_layer = part.ndim < len(whole.shape)
        shape = whole.shape[is_layer:]
        if part.shape == shape:
            return part
        dimension = next(i for i, size in enumerate(part.shape) if size < shape[i])
        dtype = cfg.dtype if is_layer and part.ndim == 2 else "float32"
        return checkpoint_name(_collect(part, dimension, dtype, cfg.reduce_dtype), COLLECTED)

    return jax.tree.map(put_together, params, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _collect(part: Array, dimension: int, dtype: str, reduce_dtype: str) -> Array:
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=dimension, tiled=True)


def _collect_backward(dimension: int, dtype: str, reduce_dtype: str, _: Any, g: Array) -> Any:
    g = g.astype(reduce_dtype)
    g = jax.lax.psum_scatter(g, "fsdp", scatter_dimension=dimension, tiled=True)
    return (g.astype(jnp.float32),)


_collect.defvjp(lambda part, *how: (_collect(part, *how), None), _collect_backward)


def mean_over_batch(
    cfg: GPTConfig, mesh: Mesh, gradients: PyTree, params_specs: PyTree, specs: PyTree
) -> PyTree:
    """Return the mean of the devices' gradients in float32, each device its part of it.

    Args:
        cfg: the model; devices add in its reduce_dtype.
        mesh: the devices.
        gradients: of this device's rows. Those of parameters that `collect` put together have been
            added over `fsdp`.
        params_specs: the layouts of the parameters.
        specs: the layouts of the result.
    """
    axes = [axis for axis in batch_axes(mesh) if mesh.shape[axis] > 1]
    count = math.prod(mesh.shape[axis] for axis in axes)

    def add(gradient: Array, params_spec: P, spec: P) -> Array:
        gradient = (gradient / count).astype(cfg.reduce_dtype)
        left = [axis for axis in axes if axis not in params_spec]
        for axis in set(left) & set(spec):
            gradient = jax.lax.psum_scatter(
                gradient, axis, scatter_dimension=spec.index(axis), tiled=True
            )
        left = [axis for axis in left if axis not in spec]
        return (jax.lax.psum(gradient, left) if left else gradient).astype(jnp.float32)

    return jax.tree.map(add, gradients, params_specs, specs)


# ---- Over `tensor` -------------------------------------------------------------------------------


def constrain(x: Array, *spec: str | None) -> Array:
    """Return x, split over `tensor` as the spec says and whole without one."""
    if axis_size("tensor") == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*spec))


def each_with_its_heads(function: Callable[..., Array], *arrays_BTHK: Array) -> Array:
    """Return `function(*arrays_BTHK)`, each device along `tensor` computing its heads.

    For kernels that XLA cannot split.
    """
    if axis_size("tensor") == 1:
        return function(*arrays_BTHK)
    heads = P(None, None, "tensor")
    return jax.shard_map(
        function, in_specs=heads, out_specs=heads, axis_names={"tensor"}, check_vma=False
    )(*arrays_BTHK)


def by_heads(layer: PyTree) -> PyTree:
    """Return a layer with c_attn's columns ordered by device: its q, its k, its v, then the next's.

    In GPT-2's order, all of q first, equal parts of the 3D columns would not hold the q, k and v of
    the same heads.
    """
    n = axis_size("tensor")
    if n == 1:
        return layer

    def order(x: Array) -> Array:
        parts = x.reshape(*x.shape[:-1], 3, n, -1).swapaxes(-3, -2)
        return constrain(parts.reshape(x.shape), *[None] * (x.ndim - 1), "tensor")

    attn = {**layer["attn"], "c_attn": jax.tree.map(order, layer["attn"]["c_attn"])}
    return {**layer, "attn": attn}
