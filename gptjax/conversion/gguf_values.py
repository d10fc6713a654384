"""The values of GGUF's tensors: plain numbers, or quantised ones, which the gguf library knows."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.conversion import gguf_file
from gptjax.conversion.gguf_file import Header, Place
from gptjax.errors import DataError, UsageError, plural

# ggml's number of a type that is not quantised -> numpy's type.
PLAIN = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    30: np.dtype(ml_dtypes.bfloat16),
    28: np.dtype("<f8"),
    **{24 + i: np.dtype(f"<i{2**i}") for i in range(4)},
}


def library() -> Any:
    """Return the gguf library, which knows the quantised types."""
    try:
        import gguf
    except ImportError as error:
        text = "quantised weights need the gguf library; pip install 'gptjax[gguf]'"
        raise UsageError(text) from error
    return gguf


def byte_shape(tensor: Place, path: Path) -> tuple[int, ...]:
    """Return the shape of a tensor's bytes, in which a row of values is a row too.

    Raises:
        DataError: its type is unknown, cannot be read, or has blocks longer than a row.
    """
    *rows, width = tensor.shape or (1,)
    if tensor.kind in PLAIN:
        return (*rows, width * PLAIN[tensor.kind].itemsize)
    gguf = library()
    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"cannot use this model ({path}): the gguf library cannot read tensors of ggml's type "
            f"{tensor.kind}; take another quantisation of the model"
        ) from error
    if width % block:
        raise DataError(f"{path} is damaged: rows of {width} values in blocks of {block}")
    return (*rows, width // block * size)


def dtype_name(tensor: Place) -> str:
    """Return the type of the values that `read_tensor` returns."""
    return PLAIN.get(tensor.kind, np.dtype(np.float32)).name


def check_extents(header: Header, path: Path) -> None:
    """Raise DataError unless the tensors follow each other and fill the file."""
    expected = 0
    for name, tensor in header.tensors.items():
        if tensor.offset != expected:
            text = f"{name[:100]} begins at {tensor.offset}, expected {expected}"
            raise DataError(f"{path} is a damaged GGUF file: {text}; get it again")
        end = expected + math.prod(byte_shape(tensor, path))
        expected = gguf_file.padded(end, header.alignment)
    size = path.stat().st_size - header.begin
    if header.tensors and not end <= size <= expected:
        text = f"{size:,} bytes behind its header, expected {end:,}"
        raise DataError(f"{path} is a damaged GGUF file: {text}; get it again")


def read_bytes(path: Path, begin: int, tensor: Place) -> np.ndarray:
    """Return a tensor's bytes, in the shape of `byte_shape`."""
    shape = byte_shape(tensor, path)
    offset = begin + tensor.offset
    return np.fromfile(path, np.uint8, math.prod(shape), offset=offset).reshape(shape)


def read_tensor(path: Path, begin: int, tensor: Place) -> np.ndarray:
    """Return a tensor as it was stored, or in float32 if it was quantised."""
    array = read_bytes(path, begin, tensor)
    if tensor.kind in PLAIN:
        array = array.view(PLAIN[tensor.kind]).reshape(tensor.shape)
    else:
        gguf = library()
        with np.errstate(all="ignore"):  # what is not finite is refused where it is read
            array = gguf.quants.dequantize(array, gguf.GGMLQuantizationType(tensor.kind))
    return array


def is_copy(header: Header, path: Path, name: str, of: str) -> bool:
    """Return whether two tensors of a file have the same type, shape and bytes."""
    one, other = header.tensors[name], header.tensors[of]
    if one._replace(offset=0) != other._replace(offset=0):
        return False
    return np.array_equal(
        read_bytes(path, header.begin, one), read_bytes(path, header.begin, other)
    )


def quantised(header: Header) -> tuple[str, ...]:
    """Return a sentence that names the quantised types in a file, if there are any."""
    kinds = Counter(t.kind for t in header.tensors.values() if t.kind not in PLAIN)
    if not kinds:
        return ()
    names = library().GGMLQuantizationType
    each = ", ".join(f"{count} in {names(kind).name}" for kind, count in kinds.most_common())
    count = kinds.total()
    some = f"{count} of {len(header.tensors)} tensors {plural(count, 'is', 'are')} quantised"
    return (f"{some} ({each}): the weights are near those that were trained, not equal to them",)
