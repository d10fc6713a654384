"""The mesh of devices, and the layout on it of each array of the training state by its path."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import GPTConfig
from gptjax.errors import plural
from gptjax.settings import require

SLAB = 64 * 10**6  # bytes
T = TypeVar("T")  # a tree of arrays, or of their shapes
PyTree = Any  # nested dicts, tuples and lists of anything


# The axes of a mesh, and what devices along each share (see `TrainConfig.mesh`):
#   data    the rows of the batch
#   zero1   the rows, and the optimizer's state (Rajbhandari et al. 2020, ZeRO, stage 1)
#   fsdp    the rows, the optimizer's state and the parameters (the same, stage 3)
#   tensor  each row: heads of attention, columns of the MLP and of the vocabulary (Shoeybi et al.
#           2019, Megatron-LM)
# An axis splits an array at the dimension beside the first regex that matches the array's path. An
# array without a match, or without equal parts, is whole. An optimizer moment's path ends in its
# parameter's. zero1 and fsdp split n_embd, since few numbers divide the number of layers.
WIDTH = (
    (r"c_attn/kernel$", 2),  # its n_embd is split over tensor
    (r"c_proj/kernel$", 2),
    (r"(^|/)h/", 1),
    (r"embedding$", 1),
    (r"ln_f/", 0),
)
LAYOUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "data": (),
    "zero1": tuple((f"^opt_state/.*{path}", dimension) for path, dimension in WIDTH),
    "fsdp": WIDTH,
    "tensor": (
        (r"c_attn/kernel$", 1),  # at its columns, see `collectives.by_heads`, when it is used
        (r"c_fc/kernel$", 2),
        (r"c_fc/bias$", 1),
        (r"c_proj/kernel$", 1),
        (r"(wte|lm_head)/embedding$", 0),
    ),
}


def make_mesh(
    devices: Sequence[jax.Device] | None = None, axes: Mapping[str, int] | None = None
) -> Mesh:
    """Return a mesh over the given devices, or over all of them.

    Args:
        devices: in the order of the mesh, whose last axis changes fastest.
        axes: devices along each axis (see LAYOUTS), 0 = all that are left; None = all along `data`.

    Raises:
        UsageError: their product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: (axes or {"data": 0}).get(name, 1) for name in LAYOUTS}
    known = math.prod(size for size in sizes.values() if size)
    sizes = {name: size or max(1, len(devices) // known) for name, size in sizes.items()}
    text = ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1)
    ok = math.prod(sizes.values()) == len(devices)
    count = f"{len(devices)} {plural(len(devices), 'device')}"
    require(ok, "mesh", text, f"must be {count} in all, as many as there are")
    # An axis of one device is left out, but for `data`: there is always one that splits the batch.
    names = tuple(name for name, size in sizes.items() if size > 1 or name == "data")
    shape = [sizes[name] for name in names]
    return Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def require_equal_parts(mesh: Mesh, cfg: GPTConfig) -> None:
    """Raise UsageError unless the model can be split over the mesh."""
    for axis, setting in {"zero1": "n_embd", "fsdp": "n_embd", "tensor": "n_head"}.items():
        size, value = mesh.shape.get(axis, 1), getattr(cfg, setting)
        rule = f"would split {setting}={value} into unequal parts"
        require(value % size == 0, "mesh", f"{axis}:{size}", rule)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Return the axes of a mesh along which devices have rows of their own."""
    return tuple(name for name in mesh.axis_names if name != "tensor")


def batch_shards(mesh: Mesh) -> int:
    """Return into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Return which part of a batch this process reads, and how many parts there are.

    Processes whose devices share rows along `tensor` read the same part.
    """
    parts = range(batch_shards(mesh))
    rows = [row for row in parts for _ in range(mesh.size // len(parts))]
    local = {device.id for device in mesh.local_devices}
    mine = {row for row, device in zip(rows, mesh.devices.flat, strict=True) if device.id in local}
    return min(mine) // len(mine), len(parts) // len(mine)


def layout(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the layout of an array of the training state, as LAYOUTS says."""
    axes: list[str | None] = [None] * len(shape)
    for axis in reversed(mesh.axis_names):
        found = (dimension for regex, dimension in LAYOUTS[axis] if re.search(regex, path))
        dimension = next(found, len(shape))
        whole = dimension >= len(shape) or axes[dimension] is not None
        if not whole and shape[dimension] % mesh.shape[axis] == 0:
            axes[dimension] = axis
    return P(*axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the layout in which every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Return the layout that splits a batch over the devices along `axis`."""
    return NamedSharding(mesh, P(*[None] * axis, batch_axes(mesh)))


def is_one_cpu(mesh: Mesh) -> bool:
    """Return whether there is one device, a CPU."""
    return mesh.size == 1 and jax.default_backend() == "cpu"


def place(batch: np.ndarray, mesh: Mesh, axis: int) -> Any:
    """Begin to move this process's rows of a batch to its devices, split along `axis`.

    A single CPU's programs take them as they are, where Python needs 0.4 ms to move them: 2 % of a
    small step.
    """
    if is_one_cpu(mesh):
        return batch
    return jax.make_array_from_process_local_data(batch_sharding(mesh, axis), batch)


def tree_shardings(mesh: Mesh, tree: PyTree, prefix: str = "") -> PyTree:
    """Return a NamedSharding for every leaf of a tree of arrays or shapes, by prefix and path."""

    def leaf_sharding(path: jax.tree_util.KeyPath, leaf: jax.Array) -> NamedSharding:
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, layout(name, leaf.shape, mesh))

    return jax.tree.map_with_path(leaf_sharding, tree)


def over_batch(shardings: PyTree) -> PyTree:
    """Return what a tree of shardings says of the axes of the batch, as PartitionSpecs."""
    return jax.tree.map(
        lambda sharding: P(*(None if name == "tensor" else name for name in sharding.spec)),
        shardings,
    )


def abstract_tree(shapes: T, shardings: PyTree) -> T:
    """Return the shapes with their shardings: the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def shardings_of(abstract: PyTree) -> PyTree:
    """Return the tree of the shardings of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def mesh_of(abstract: PyTree) -> Mesh:
    """Return the mesh that the arrays of an abstract tree shall lie on."""
    return _mesh(jax.tree.leaves(abstract)[0].sharding)


def _mesh(sharding: jax.sharding.Sharding) -> Mesh:
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def whole(array: jax.Array) -> jax.Array:
    """Return an array with all of it on each of its devices; its processes do this together.

    Nothing is copied where that is so already.
    """
    if array.is_fully_replicated:
        return array
    return jax.device_put(array, replicated(_mesh(array.sharding)))


def is_spread(array: jax.Array | np.ndarray) -> bool:
    """Return whether no process has all of an array."""
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    )


def slabs(array: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array in slices along its first axis; of one that is not spread, all at once.

    The processes that it is spread over must do so together. A slice has 64 MB, or is the least
    that is possible.
    """
    if not is_spread(array):
        yield np.asarray(array)
        return
    rows, row_bytes = len(array), array.nbytes // len(array)
    fits = (n for n in range(1, rows + 1) if rows % n == 0 and n * row_bytes <= SLAB)
    size = max(fits, default=1)
    assert isinstance(array, jax.Array)
    cut = jax.jit(
        lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size),
        out_shardings=replicated(_mesh(array.sharding)),
    )
    for start in range(0, rows, size):
        yield np.asarray(cut(array, start).addressable_data(0))


def all_finite(tree: PyTree) -> bool:
    """Return whether all numbers of a tree of arrays are finite; all processes must call this."""
    finite = jax.jit(lambda x: jnp.isfinite(x).all())
    return all(
        bool(finite(leaf)) if is_spread(leaf) else bool(np.isfinite(leaf).all())
        for leaf in jax.tree.leaves(tree)
    )


def on_one_device(tree: T) -> T:
    """Return the whole arrays on the first device of this process; see `whole`."""
    return jax.tree.map(lambda array: whole(array).addressable_data(0), tree)


def all_agree(mine: bool) -> bool:
    """Return whether `mine` is true in every process; all of them must call this."""
    if jax.process_count() == 1:
        return mine
    return bool(np.all(multihost_utils.process_allgather(np.array(mine))))
