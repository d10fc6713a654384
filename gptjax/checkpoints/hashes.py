"""The identity of arrays, bit for bit: shape, dtype and sha256 of every leaf of a tree."""

import concurrent.futures
import hashlib
import json

import jax
import numpy as np

from gptjax.sharding import PyTree, is_spread, slabs

Leaf = dict[str, list[int] | str]  # "shape", "dtype" and "sha256"
Leaves = dict[str, Leaf]  # by path


def json_sha256(value: object) -> str:
    """Return the sha256 of a JSON value, however its keys are ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def leaf_paths(tree: PyTree) -> list[str]:
    """Return the path of every leaf, such as `params/h/attn/c_attn/kernel`, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def leaf_digests(tree: PyTree) -> Leaves:
    """Return shape, dtype and sha256 of every leaf by its path.

    The sha256 is of the values in C order, wherever they are. Of an array that is spread over
    several processes these gather a slab at a time, so that none ever holds the whole; all of them
    must call this.
    """

    def describe(leaf: jax.Array | np.ndarray) -> Leaf:
        sha256 = hashlib.sha256()
        for slab in slabs(leaf):
            sha256.update(np.ascontiguousarray(slab).reshape(-1).view(np.uint8).data)
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": sha256.hexdigest()}

    leaves = [x if is_spread(x) else jax.device_get(x) for x in jax.tree.leaves(tree)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing lets go of Python's lock
        here = {i: pool.submit(describe, x) for i, x in enumerate(leaves) if not is_spread(x)}
        # The processes gather together, so in the same order.
        found = [describe(x) if is_spread(x) else here[i].result() for i, x in enumerate(leaves)]
    return dict(zip(leaf_paths(tree), found, strict=True))


def first_difference(found: Leaves, wanted: Leaves) -> str | None:
    """Return a text that names the first leaf in which two trees differ; None if they are equal.

    What `wanted` does not say of a leaf may be anything, as its sha256 before there are numbers.
    """
    # Parameters first: an optimizer's paths, which end in theirs, say less.
    for path in sorted(found | wanted, key=lambda path: not path.startswith("params/")):
        if path not in wanted:
            return f"it holds {path}, which is not expected"
        if path not in found:
            return f"it does not hold {path}"
        for what, value in wanted[path].items():
            if found[path][what] != value:
                return f"{path} has {what} {found[path][what]!s:.20}, expected {value!s:.20}"
    return None
