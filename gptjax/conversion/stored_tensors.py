"""The tensors of a file, not yet read, and what can be made of them without reading."""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gptjax.config import GPTConfig
from gptjax.conversion.tensors import FLOATS, Table, slots
from gptjax.errors import DataError

BUFFER = re.compile(r"h\.\d+\.attn\.(bias|mask|masked_bias)")  # of old programs, beside weights
MASK_TYPES = (*FLOATS, "bool", "uint8")
HIDDEN = -1e3  # or less, in the place of a score: the softmax of it is 0


class Tensor(NamedTuple):
    """A tensor of a file, not yet read, or made of such."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def table_of(tensors: Tensors) -> Table:
    """Return the shapes and types."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def transpose(tensor: Tensor) -> Tensor:
    """Return a matrix's transpose."""
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return the first rows of a matrix."""
    return Tensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[:rows])


def fuse(parts: list[Tensor]) -> Tensor:
    """Return one linear layer for several that read the same: kernels (out, in), or biases."""
    rows, *rest = parts[0].shape
    dtype = next((part.dtype for part in parts if part.dtype not in FLOATS), parts[0].dtype)
    return Tensor(
        (len(parts) * rows, *rest), dtype, lambda: np.concatenate([part.read() for part in parts])
    )


def is_mask(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is the causal mask, or the number that it puts in: no weights.

    A mask must be lower triangular ones, (1, 1, S, S): with another one it is another model.
    """
    if not BUFFER.fullmatch(name) or tensor.dtype not in MASK_TYPES:
        return False
    if name.endswith("masked_bias"):
        return tensor.shape in ((), (1,)) and bool((tensor.read() <= HIDDEN).all())
    S = tensor.shape[-1] if tensor.shape else 0
    if tensor.shape != (1, 1, S, S):
        return False
    return bool(np.array_equal(tensor.read()[0, 0] != 0, np.tri(S, dtype=bool)))


def drop_zero_biases(cfg: GPTConfig, tensors: Tensors, where: object) -> None:
    """Remove, in place, the zeros that our exports store for biases of a model that has none.

    Raises:
        DataError: such a bias is not zero.
    """
    if cfg.bias:
        return
    for slot in slots(dataclasses.replace(cfg, bias=True)):
        name, tensor = slot.name, tensors.get(slot.name)
        if not name.endswith(".bias") or tensor is None:
            continue
        if tensor.shape != slot.shape or tensor.dtype not in FLOATS:  # told by `check_tensors`
            continue
        if np.any(tensors.pop(name).read()):
            raise DataError(f"{name} is not zero, but the model has no biases ({where})")
