"""What arrays are, to the bit: shape, dtype and sha256 of every leaf of a tree."""

import concurrent.futures
import hashlib
import json
from typing import Any

import jax
import numpy as np

Leaf = dict[str, list[int] | str]  # "shape", "dtype" and "sha256"
Leaves = dict[str, Leaf]  # by path


def json_sha256(value: object) -> str:
    """Return the sha256 of a JSON value, however its keys are ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def leaf_paths(tree: Any) -> list[str]:
    """Return the path of every leaf, such as `params/h/attn/c_attn/kernel`, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def leaf_digests(tree: Any) -> Leaves:
    """Fetch the arrays of a tree; return shape, dtype and sha256 of every leaf by its path."""

    def describe(leaf: Any) -> Leaf:
        array = np.asarray(leaf)
        sha256 = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256.hexdigest()}

    leaves = jax.device_get(jax.tree.leaves(tree))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing lets go of Python's lock
        return dict(zip(leaf_paths(tree), pool.map(describe, leaves), strict=True))


def first_difference(a: Leaves, b: Leaves) -> str | None:
    """Return the path of the first leaf that differs, and what does; None if trees are equal."""
    for path in [*a, *(path for path in b if path not in a)]:
        if path not in a or path not in b:
            return f"{path} is in one of them only"
        for what in ("shape", "dtype", "sha256"):
            if a[path][what] != b[path][what]:
                return f"{what} mismatch in {path}"
    return None
