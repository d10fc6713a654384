"""Checks that a file can be read as a text, and what to do with one that cannot."""

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
from gptjax.file_kinds import OTHERS, PACKED, kind_of

OPENERS: dict[str, Callable[..., IO[Any]]] = {  # of packed texts, which are read as they are
    "gzip": gzip.open,
    "xz": lzma.open,
    "bzip2": bz2.open,
    "lzma": lzma.open,
}
NO_TEXT = "the name of a file of token ids ends in .bin or .npy"
UNPACK = "unpack it{}, and pass what is in it"
REMEDIES = {  # by kind of file; for all others it is to pass a text
    **dict.fromkeys(
        ("a zip archive (or .npz, .docx, .pt)", "a 7z archive", "a rar archive"), UNPACK.format("")
    ),
    "a zstandard file": UNPACK.format(" (zstd -d)"),
    "an lz4 file": UNPACK.format(" (lz4 -d)"),
    "a file of compress": UNPACK.format(" (uncompress)"),
    "a tar archive": "unpack it (tar xf {0}), and pass the folder with its texts",
    "a Git LFS pointer": "fetch the file that it stands for: git lfs pull",
    **dict.fromkeys(
        ("a Parquet file", "an Arrow file", "an SQLite file", "an HDF5 file"),
        "write its text column to a .txt file, and pass that",
    ),
    "a PDF": "take its text out (pdftotext), and pass that",
    **dict.fromkeys(
        ("a Word or Excel file", "an RTF file"), "save it as plain text in UTF-8, and pass that"
    ),
    "a pickle": "it may run any code, so it is never read",
    "a safetensors file": "pass a text; weights belong to --init_from",
    **{
        f"{code} text": f"iconv -f {code} -t UTF-8 {{0}} > utf8.txt"
        for code in ("UTF-32", "UTF-16")
    },
}
# Without a byte order mark: which of four bytes are always the high, nearly empty ones.
WIDE_TEXTS = {"UTF-32LE": (2, 3), "UTF-32BE": (0, 1), "UTF-16LE": (1, 3), "UTF-16BE": (0, 2)}


def refuse_kind(path: Path, kind: str) -> None:
    """Raise DataError, with a remedy, for a file that is neither a text nor token ids."""
    if kind in OTHERS:
        remedy = REMEDIES.get(kind, "pass a text").format(shlex.quote(str(path)))
        raise DataError(f"{path} is {kind}: {remedy}")
    if kind in PACKED:
        raise DataError(f"{path} is compressed: unpack it ({kind} -d), and pass what is in it")


def check_text(path: Path, head: bytes, packed: str) -> None:
    """Raise DataError, with a remedy, unless a file begins like a text.

    Args:
        path: the file.
        head: the first bytes of its text.
        packed: what the text is packed by, a key of PACKED; "" if it is not.
    """
    kind = kind_of(head)
    wide = "" if kind or ".bin" in path.suffixes else wide_text(head)
    if (
        packed
        and kind != "a tar archive"
        and (kind or wide or (".bin" in path.suffixes and not is_text(head)))
    ):
        inside = f"text in {wide}" if wide else kind if kind in OTHERS else "token ids"
        inside = "a file packed once more" if kind in PACKED else inside
        raise DataError(f"{path} holds {inside}: unpack it ({packed} -d), and pass what is in it")
    refuse_kind(path, kind)
    if wide:
        remedy = f"iconv -f {wide} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
        raise DataError(f"{path} is text in {wide} without a byte order mark: {remedy}")
    if head.count(0) > len(head) / 5:
        raise DataError(f"{path} is not a text: over a fifth of it is NUL bytes; {NO_TEXT}")


def wide_text(head: bytes) -> str:
    """Return the encoding of a text in 16 or 32 bits a character without a byte order mark, or "".

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
    """Return whether these first bytes are UTF-8 without control characters."""
    try:
        text = codecs.utf_8_decode(head, "strict", False)[0]
    except UnicodeDecodeError:
        return False
    return bool(text) and not re.search(r"[\0-\x08\x0e-\x1a]", text)


def advise(path: Path, piece: bytes) -> str:
    """Return what to do with a file in which these bytes are not UTF-8."""
    replaced = codecs.utf_8_decode(piece, "replace", False)[0].count("\ufffd")
    if len(re.findall(rb"[\0-\x08\x0e-\x1a]", piece)) > len(piece) / 50:
        return f"it is not a text; {NO_TEXT}"
    if replaced > len(piece) / 100:
        foreign = sum(byte >= 0x80 for byte in piece) > len(piece) / 3  # not a western alphabet
        encoding = "ENCODING" if foreign else "WINDOWS-1252"
        which = " (GB18030, SHIFT-JIS, WINDOWS-1251, ...)" if foreign else ""
        convert = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
        return f"convert it, with the name of the encoding that it is in{which}: {convert}"
    return "convert it, or pass --decode_errors=replace"
