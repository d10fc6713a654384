"""GGUF's container: values by key, then the name and shape of each tensor, then the tensors.

Source: docs/gguf.md of ggml-org/ggml; versions 2 and 3 differ in nothing here. The gguf library
reads it too, but believes every count of a damaged file, and its writer knows no empty arrays.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from gptjax.errors import DataError

MAGIC, VERSION, ALIGNMENT, MAX_DIMS = b"GGUF", 3, 32, 4
Value = str | bool | int | float | list[str] | list[int] | list[float]
# A value's type: its number in the file, and numpy's name of it.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = range(4, 10)
NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    UINT32: "<u4",
    INT32: "<i4",
    FLOAT32: "<f4",
    BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class Place(NamedTuple):
    """A tensor's place in the file; the offset is in bytes behind the header."""

    shape: tuple[int, ...]  # numpy's order, the reverse of the file's
    kind: int  # ggml's number of its type
    offset: int


class Header(NamedTuple):
    """All of a file but the tensors' values."""

    fields: dict[str, Value]
    tensors: dict[str, Place]
    begin: int  # where the first tensor is, in bytes
    alignment: int


# ---- In ------------------------------------------------------------------------------------------


class Reader:
    """A file that is read from its beginning, and never past its end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Begin to read."""
        self.file, self.path = file, path
        self.left = path.stat().st_size

    def damaged(self, reason: str) -> DataError:
        """Return the error for a file that cannot be what was written."""
        return DataError(f"{self.path} is a damaged GGUF file: {reason}; get it again")

    def take(self, size: int) -> bytes:
        """Return the next bytes; raise DataError if there are not so many."""
        self.left -= size
        if self.left < 0:
            raise self.damaged("it ends within its header")
        return self.file.read(size)

    def numbers(self, kind: str, count: int) -> list[int] | list[float]:
        """Return numbers of one of numpy's types."""
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def count(self, kind: str = "<u8") -> int:
        """Return a number that counts something."""
        return int(self.numbers(kind, 1)[0])

    def text(self) -> str:
        """Return a text behind its length."""
        try:
            return self.take(self.count()).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("a text in it is not UTF-8") from error

    def value(self) -> Value:
        """Return a value behind its type."""
        kind = self.count("<u4")
        if kind == STRING:
            return self.text()
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], 1)[0]
        if kind != ARRAY:
            raise self.damaged(f"a value has the type {kind}, which is none")
        kind, count = self.count("<u4"), self.count()
        if kind == STRING:
            return [self.text() for _ in range(count)]
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], count)
        raise self.damaged(f"a list has the type {kind}, which is none")


def read_header(path: Path) -> Header:
    """Read everything but the tensors' values.

    Raises:
        DataError: the file is damaged, or of a version that gptjax does not read.
    """
    with path.open("rb") as file:
        reader = Reader(file, path)
        if reader.take(4) != MAGIC:
            raise DataError(f"not a GGUF file ({path}): it does not begin with GGUF")
        version = reader.count("<u4")
        if version & 0xFFFF == 0:
            raise DataError(f"{path} is a big-endian GGUF file; convert the model again for x86")
        if version not in (2, VERSION):
            raise DataError(f"GGUF's version {version} ({path}): gptjax reads 2 and {VERSION}")
        n_tensors, n_fields = reader.count(), reader.count()
        fields: dict[str, Value] = {}
        tensors: dict[str, Place] = {}
        for _ in range(n_fields):
            key = reader.text()
            if key in fields:
                raise reader.damaged(f"{key[:100]!r} is there twice")
            fields[key] = reader.value()
        for _ in range(n_tensors):
            name, n_dims = reader.text(), reader.count("<u4")
            if name in tensors or n_dims > MAX_DIMS:
                raise reader.damaged(f"{name[:100]!r} is there twice, or has {n_dims} dimensions")
            shape = tuple(int(size) for size in reader.numbers("<u8", n_dims))[::-1]
            tensors[name] = Place(shape, reader.count("<u4"), reader.count())
        alignment = fields.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment % 8:
            raise reader.damaged(f"general.alignment={alignment!r}")
        return Header(fields, tensors, padded(file.tell(), alignment), alignment)


def padded(size: int, alignment: int) -> int:
    """Return a number of bytes, rounded up to the alignment."""
    return -(-size // alignment) * alignment


# ---- Out -----------------------------------------------------------------------------------------


def pack_text(text: str) -> bytes:
    """Return a text behind its length."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def pack(value: Value) -> bytes:
    """Return a value behind its type: int is uint32, float float32, a list's numbers int32."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + pack_text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    kind = INT32 if value and isinstance(value[0], int) else STRING
    head = struct.pack("<IIQ", ARRAY, kind, len(value))
    if kind == INT32:
        return head + np.array(value, "<i4").tobytes()
    return head + b"".join(pack_text(str(text)) for text in value)


def write(
    path: Path,
    fields: Mapping[str, Value],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[np.ndarray],
) -> None:
    """Write a file of float32 tensors, each of them held no longer than it takes.

    Args:
        path: the file.
        fields: the values by key, as `pack` takes them.
        shapes: of each tensor by its name, in numpy's order.
        tensors: in the order of the shapes.
    """
    header = [MAGIC + struct.pack("<IQQ", VERSION, len(shapes), len(fields))]
    header += [pack_text(key) + pack(value) for key, value in fields.items()]
    offset = 0
    for name, shape in shapes.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header.append(pack_text(name) + sizes + struct.pack("<IQ", 0, offset))
        offset += padded(4 * math.prod(shape), ALIGNMENT)
    with path.open("wb") as file:
        file.write(b"".join(header))
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.write(np.ascontiguousarray(tensor, "<f4").data)
        file.write(bytes(-file.tell() % ALIGNMENT))
