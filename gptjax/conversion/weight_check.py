"""The kind of a file that should hold weights, by its first bytes."""

import zipfile
from pathlib import Path
from typing import Literal

from gptjax.file_kinds import PACKED, kind_of, read_head

AGAIN = "download it again"
REMEDIES = {  # by kind of file
    **dict.fromkeys(
        ("a zstandard file", "an lz4 file", "a 7z archive", "a rar archive"), "unpack it"
    ),
    "a tar archive": "unpack it",
    "a Git LFS pointer": "fetch the file that it stands for: git lfs pull",
    "a GGUF file": "give it by its own name",
    "a GGML file": "gptjax does not read it",
    "an HDF5 file": "gptjax does not read TensorFlow's or Keras's weights",
}
# Files by their names, whose first bytes say little.
SUFFIXES = {
    ".h5": "TensorFlow's or Keras's",
    ".msgpack": "Flax's",
    ".onnx": "ONNX",
    ".ot": "rust-bert's",
    ".tflite": "TensorFlow Lite's",
}


def weight_format(head: bytes) -> Literal["safetensors", "pickle", ""]:
    """Return which of the formats without a fixed name a file seems to be in, by its first bytes.

    This accepts more than `kind_of`, so that a damaged file is told by its own reader.
    """
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return "safetensors"  # whose first byte, of the header's length, may be that of a pickle
    return "pickle" if head.startswith((b"PK\x03\x04", b"\x80")) else ""


def why_no_weights(path: Path) -> str:
    """Return what is there in the place of weights, for a sentence "it is ...".

    "" means that nothing is known against the file, not that it holds weights.
    """
    head = read_head(path)[:512]
    kind = "" if weight_format(head) else kind_of(head)  # a header's length may look like a mark
    text = head.lstrip().lower()
    if not head:
        return f"empty; {AGAIN}"
    if not any(head):
        return f"512 zero bytes and more, as of a download that broke off; {AGAIN}"
    if kind in REMEDIES:
        return f"{kind}; {REMEDIES[kind]}"
    if kind in PACKED:
        return f"compressed by {kind}; unpack it"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return f"a web page, such as a server sends instead of a file; {AGAIN}"
    if head.startswith(b"PK"):
        return why_no_torch_zip(path)
    if path.suffix in SUFFIXES:
        return f"{SUFFIXES[path.suffix]}, which gptjax does not read"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return f"text ({head[:40].decode().strip()!r}), not weights"
    return ""


def why_no_torch_zip(path: Path) -> str:
    """Return as `why_no_weights` does of a zip file; PyTorch's have a pickle in them."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return f"cut short or damaged: a zip file without its end; {AGAIN}"
    if any(name.endswith("data.pkl") for name in names):
        return ""
    return f"a zip archive of other files ({', '.join(names[:3])}); unpack it"
