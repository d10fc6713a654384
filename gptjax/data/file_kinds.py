"""What a file is, by its first bytes and not by its name."""

import bz2
import codecs
import gzip
import lzma
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from gptjax.errors import DataError

HEAD = 2**16  # bytes that are looked at
# Packed texts, which are read as they are.
OPENERS: dict[str, Callable[..., IO[Any]]] = {
    "gzip": gzip.open,
    "xz": lzma.open,
    "bzip2": bz2.open,
    "lzma": lzma.open,
}
PACKED = {
    "gzip": rb"\x1f\x8b\x08",
    "xz": rb"\xfd7zXZ\0",
    "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
    "lzma": rb"\]\0\0[\0-\x80]\0\xff{8}",
}
# Token files with a header; llm.c's begins with a date such as 20240520, little endian or big.
TOKENS = {"npy": rb"\x93NUMPY", "llm.c": rb".[\xd7-\xdb]\x34\x01|\x01\x34[\xd7-\xdb]."}
NO_TEXT = "the name of a file of token ids ends in .bin or .npy"
UNPACK = "unpack it, and pass what is in it"
TO_TEXT = "write its text column to a .txt file, and pass that"
# What is neither: its mark, and what to do with it.
FOREIGN: dict[str, tuple[bytes, str]] = {
    "a Git LFS pointer": (
        rb"version https://git-lfs",
        "fetch the file that it stands for: git lfs pull",
    ),
    "a zip archive (or .npz, .docx, .pt)": (rb"PK(?:\x03\x04|\x05\x06)", UNPACK),
    "a zstandard file": (rb"\x28\xb5\x2f\xfd", "unpack it (zstd -d), and pass what is in it"),
    "an lz4 file": (rb"\x04\x22\x4d\x18", "unpack it (lz4 -d), and pass what is in it"),
    "a 7z archive": (rb"7z\xbc\xaf\x27\x1c", UNPACK),
    "a rar archive": (rb"Rar!\x1a\x07", UNPACK),
    "a file of compress": (
        rb"\x1f\x9d[\x80-\x90]",
        "unpack it (uncompress), and pass what is in it",
    ),
    "a tar archive": (
        rb".{257}ustar",
        "unpack it (tar xf {0}), and pass the folder with its texts",
    ),
    "a Parquet file": (rb"PAR1\x15", TO_TEXT),
    "an Arrow file": (rb"ARROW1\0\0|\xff\xff\xff\xff.{2}\0\0\x10\0\0\0", TO_TEXT),
    "an SQLite file": (rb"SQLite format 3\0", TO_TEXT),
    "an HDF5 file": (rb"\x89HDF\r\n", TO_TEXT),
    "a PDF": (rb"%PDF-\d", "take its text out (pdftotext), and pass that"),
    "a Word or Excel file": (rb"\xd0\xcf\x11\xe0\xa1\xb1", "save it as plain text in UTF-8"),
    "an RTF file": (rb"\{\\rtf", "save it as plain text in UTF-8"),
    "a pickle": (rb"\x80[\x02-\x05][\x95\]}(c]", "it may run any code, so it is never read"),
    "an image": (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a", "pass a text"),
    "a program": (rb"\x7fELF", "pass a text"),
    "GGUF weights": (rb"GGUF[\x01-\x09]\0\0\0", "pass a text"),
    "safetensors weights": (rb".{3}\0{5}\{\"", "pass a text; weights belong to --init_from"),
    "UTF-32 text": (rb"\xff\xfe\0\0|\0\0\xfe\xff", "iconv -f UTF-32 -t UTF-8 {0} > utf8.txt"),
    "UTF-16 text": (rb"\xff\xfe|\xfe\xff", "iconv -f UTF-16 -t UTF-8 {0} > utf8.txt"),
}
# Marks of two or three bytes, with which token ids may begin as well.
SHORT = {"gzip", "a file of compress", "a pickle", "an image", "UTF-16 text"}
# Without a byte order mark: which of four bytes are always the high, nearly empty ones.
WIDE_TEXTS = {"UTF-32LE": (2, 3), "UTF-32BE": (0, 1), "UTF-16LE": (1, 3), "UTF-16BE": (0, 2)}


def read_head(path: Path) -> bytes:
    """The first bytes of a file; DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def kind_of(head: bytes) -> str:
    """A key of PACKED, TOKENS or FOREIGN, or "" where nothing marks it."""
    marks = PACKED | TOKENS | {kind: mark for kind, (mark, _) in FOREIGN.items()}
    return next((kind for kind, mark in marks.items() if re.match(mark, head, re.DOTALL)), "")


def refuse(path: Path, kind: str) -> None:
    """DataError, with what to do, for a file that is neither a text nor token ids."""
    if kind in FOREIGN:
        remedy = FOREIGN[kind][1].format(shlex.quote(str(path)))
        raise DataError(f"{path} is {kind}: {remedy}")
    if kind in PACKED:
        raise DataError(f"{path} is packed: unpack it ({kind} -d), and pass what is in it")


def check_text(path: Path, head: bytes, packed: str) -> None:
    """DataError, with what to do, where the first bytes of a (packed) text are not a text's."""
    kind = kind_of(head)
    wide = "" if kind or ".bin" in path.suffixes else wide_text(head)
    if (
        packed
        and kind != "a tar archive"
        and (kind or wide or (".bin" in path.suffixes and not is_text(head)))
    ):
        inside = f"text in {wide}" if wide else kind if kind in FOREIGN else "token ids"
        inside = "a file packed once more" if kind in PACKED else inside
        raise DataError(f"{path} holds {inside}: unpack it ({packed} -d), and pass what is in it")
    refuse(path, kind)
    if wide:
        remedy = f"iconv -f {wide} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
        raise DataError(f"{path} is text in {wide} without a byte order mark: {remedy}")
    if head.count(0) > len(head) / 5:
        raise DataError(f"{path} is no text, a fifth of it is NUL bytes; {NO_TEXT}")


def wide_text(head: bytes) -> str:
    """The encoding of a text in 16 or 32 bits a character without a byte order mark, or "".

    ASCII in UTF-16 is UTF-8 as well, with a NUL behind each character. The high bytes of most
    alphabets are below 9, and no low ones are.
    """
    if len(head) < 64:
        return ""
    low = [sum(byte < 9 for byte in head[i::4]) / len(head[i::4]) for i in range(4)]
    for encoding, high in WIDE_TEXTS.items():
        others = [low[i] for i in range(4) if i not in high]
        if (
            min(low[i] for i in high) > 0.6
            and min(others) < 0.1
            and (encoding.startswith("UTF-32") or max(others) < 0.1)
        ):
            return encoding
    return ""


def is_text(head: bytes) -> bool:
    """Whether it is UTF-8 without control characters, so far."""
    try:
        text = codecs.utf_8_decode(head, "strict", False)[0]
    except UnicodeDecodeError:
        return False
    return bool(text) and not re.search(r"[\0-\x08\x0e-\x1a]", text)


def advise(path: Path, piece: bytes) -> str:
    """What to do with a file in which these bytes are not UTF-8."""
    replaced = codecs.utf_8_decode(piece, "replace", False)[0].count("\ufffd")
    if len(re.findall(rb"[\0-\x08\x0e-\x1a]", piece)) > len(piece) / 50:
        return f"it is no text; {NO_TEXT}"
    if replaced > len(piece) / 100:
        foreign = sum(byte >= 0x80 for byte in piece) > len(piece) / 3  # not a western alphabet
        encoding = "ENCODING" if foreign else "WINDOWS-1252"
        which = " (GB18030, SHIFT-JIS, WINDOWS-1251, ...)" if foreign else ""
        convert = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
        return f"convert it, with the name of the encoding that it is in{which}: {convert}"
    return "convert it, or pass --decode_errors=replace"
