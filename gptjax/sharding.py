"""Where arrays live: the mesh of devices, and the layout on it of each array by its path."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")  # a tree of arrays, or of their shapes
PyTree = Any  # nested dicts, tuples and lists of anything


def data(path: str, shape: tuple[int, ...], n_devices: int) -> P:
    """Return the layout in which every device holds all of an array, and a slice of the batch."""
    return P()


# By TrainConfig.strategy: (path, shape, devices) -> the layout of an array of the training state.
# An optimizer moment's path ends in its parameter's, so a rule for the one holds for the other.
STRATEGIES = {"data": data}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with the one axis `data` over the given devices, or over all of them."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the layout in which every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Return the layout that splits a batch over the devices along `axis`."""
    return NamedSharding(mesh, P(*[None] * axis, "data"))


def place(batch: np.ndarray, mesh: Mesh, axis: int) -> jax.Array:
    """Begin to move this process's rows of a batch to its devices, split along `axis`."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh, axis), batch)


def tree_shardings(mesh: Mesh, strategy: str, tree: PyTree) -> PyTree:
    """Return a NamedSharding for every leaf of a tree of arrays or shapes, by its path."""

    def leaf_sharding(path: jax.tree_util.KeyPath, leaf: jax.Array) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, STRATEGIES[strategy](name, leaf.shape, mesh.size))

    return jax.tree.map_with_path(leaf_sharding, tree)


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
    sharding = jax.tree.leaves(abstract)[0].sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def whole(array: jax.Array) -> jax.Array:
    """Return an array with all of it on each of its devices; its processes do this together.

    Nothing is copied where that is so already.
    """
    if array.is_fully_replicated:
        return array
    assert isinstance(array.sharding, NamedSharding) and isinstance(array.sharding.mesh, Mesh)
    return jax.device_put(array, replicated(array.sharding.mesh))


def on_one_device(tree: T) -> T:
    """Return the whole arrays on the first device of this process; see `whole`."""
    return jax.tree.map(lambda array: whole(array).addressable_data(0), tree)


def fetch(tree: PyTree) -> PyTree:
    """Return the whole arrays on the host; the processes that they are spread over do so together.

    One after another, so that no device holds more than one whole array beside its own parts.
    """

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return leaf if leaf.is_fully_replicated else np.asarray(whole(leaf))

    return jax.device_get(jax.tree.map(gather, tree))


def all_agree(mine: bool) -> bool:
    """Return whether `mine` is true in every process; all of them must call this."""
    if jax.process_count() == 1:
        return mine
    return bool(np.all(multihost_utils.process_allgather(np.array(mine))))
