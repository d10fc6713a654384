"""What a file that should hold weights is, by its first bytes."""

import json
import zipfile
from pathlib import Path
from typing import Literal

from gptjax.errors import DataError

HEADER_LIMIT = 10**8  # bytes, as of safetensors itself
LFS = "a pointer of Git LFS, not the file that it stands for; fetch that with git lfs pull"
AGAIN = "download it again"
# The first bytes of files that people have in the place of weights, and what to do.
STRANGERS = (
    (b"version https://git-lfs", LFS),
    (b"GGUF", "GGUF, which gptjax writes but does not read; take the model's safetensors"),
    *((magic, "GGML, which gptjax does not read") for magic in (b"lmgg", b"fmgg", b"tjgg")),
    (b"\x89HDF\r\n", "HDF5 (TensorFlow or Keras), which gptjax does not read"),
    *(
        (magic, f"compressed by {name}; unpack it")
        for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"))
    ),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it"),
)
# Files by their names, whose first bytes say little.
SUFFIXES = {
    ".gguf": "GGUF, llama.cpp's",
    ".h5": "TensorFlow's or Keras's",
    ".msgpack": "Flax's",
    ".onnx": "ONNX",
    ".ot": "rust-bert's",
    ".tflite": "TensorFlow Lite's",
}


def kind(path: Path) -> Literal["safetensors", "pickle", ""]:
    """Which of the formats without a fixed name a file seems to be in."""
    head = first_bytes(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "pickle"
    return "safetensors" if head[8:9] == b"{" and head[5:8] == bytes(3) else ""


def first_bytes(path: Path) -> bytes:
    """The first 512 bytes; DataError if they cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def stranger(path: Path) -> str:
    """What is there in the place of weights, for a sentence "it is ..."; "" if nobody can tell."""
    head = first_bytes(path)
    text = head.lstrip().lower()
    for magic, what in STRANGERS:
        if head.startswith(magic):
            return what
    if not head:
        return f"empty; {AGAIN}"
    if not any(head):
        return f"512 zero bytes and more, as of a download that broke off; {AGAIN}"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return f"a web page, such as a server sends instead of a file; {AGAIN}"
    if head.startswith(b"PK"):
        return strange_zip(path)
    if path.suffix == ".safetensors" and kind(path) == "safetensors":
        return cut_short(path)
    if path.suffix in SUFFIXES:
        return f"{SUFFIXES[path.suffix]}, which gptjax does not read"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return f"text ({head[:40].decode().strip()!r}), not weights"
    return ""


def strange_zip(path: Path) -> str:
    """As of `stranger`: PyTorch's files are zip files with a pickle in them."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return f"cut short or damaged: a zip file without its end; {AGAIN}"
    if any(name.endswith("data.pkl") for name in names):
        return ""
    return f"a zip archive of other files ({', '.join(names[:3])}); unpack it"


def cut_short(path: Path) -> str:
    """As of `stranger`: whether a safetensors file is shorter than its own header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        expected = 8 + int.from_bytes(file.read(8), "little")
        if expected <= min(size, HEADER_LIMIT):
            try:
                tensors = json.loads(file.read(expected - 8))
                entries = [entry for name, entry in tensors.items() if name != "__metadata__"]
                expected += max((entry["data_offsets"][1] for entry in entries), default=0)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return ""
    return f"cut short: {size:,} of {expected:,} bytes; {AGAIN}" if size < expected else ""
