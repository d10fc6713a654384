"""The kind of a file, by its first bytes and not by its name."""

import re
from pathlib import Path

from gptjax.errors import DataError

HEAD = 2**16  # bytes that are looked at
PACKED = {  # by the program that packs
    "gzip": rb"\x1f\x8b\x08",
    "xz": rb"\xfd7zXZ\0",
    "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
    "lzma": rb"\]\0\0[\0-\x80]\0\xff{8}",
}
# Token files with a header; llm.c's begins with a date such as 20240520, little endian or big.
TOKENS = {"npy": rb"\x93NUMPY", "llm.c": rb".[\xd7-\xdb]\x34\x01|\x01\x34[\xd7-\xdb]."}
OTHERS = {
    "a Git LFS pointer": rb"version https://git-lfs",
    "a zip archive (or .npz, .docx, .pt)": rb"PK(?:\x03\x04|\x05\x06)",
    "a zstandard file": rb"\x28\xb5\x2f\xfd",
    "an lz4 file": rb"\x04\x22\x4d\x18",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a rar archive": rb"Rar!\x1a\x07",
    "a file of compress": rb"\x1f\x9d[\x80-\x90]",
    "a tar archive": rb".{257}ustar",
    "a Parquet file": rb"PAR1\x15",
    "an Arrow file": rb"ARROW1\0\0|\xff\xff\xff\xff.{2}\0\0\x10\0\0\0",
    "an SQLite file": rb"SQLite format 3\0",
    "an HDF5 file": rb"\x89HDF\r\n",
    "a PDF": rb"%PDF-\d",
    "a Word or Excel file": rb"\xd0\xcf\x11\xe0\xa1\xb1",
    "an RTF file": rb"\{\\rtf",
    "a pickle": rb"\x80[\x02-\x05][\x95\]}(c]",
    "an image": rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a",
    "a program": rb"\x7fELF",
    "a GGUF file": rb"GGUF[\x01-\x09]\0\0\0",
    "a GGML file": rb"(?:lmgg|fmgg|tjgg).{2}\0\0",
    "a safetensors file": rb".{3}\0{5}\{\"",
    "UTF-32 text": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16 text": rb"\xff\xfe|\xfe\xff",
}
MARKS = PACKED | TOKENS | OTHERS
# Marks of two or three bytes, with which token ids may begin as well.
SHORT = {"gzip", "a file of compress", "a pickle", "an image", "UTF-16 text"}


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file, `HEAD` at most; DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def kind_of(head: bytes) -> str:
    """Return the key of MARKS that these first bytes match, "" where nothing marks them."""
    return next((kind for kind, mark in MARKS.items() if re.match(mark, head, re.DOTALL)), "")
