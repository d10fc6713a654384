"""What a file is, its first bytes say: packed texts open, the rest is named with what to do."""

import bz2
import functools
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax import file_kinds
from gptjax.data import text_check
from gptjax.data.datasets import Dataset, load_dataset
from gptjax.errors import DataError

TEXT = "the cat sat on the mat, and the dog ran to the cat\n" * 60
RUSSIAN = "Привет, мир. Как дела?\n" * 60


def load(path: Path, **options: Any) -> Dataset:
    return load_dataset(str(path), block_size=4, tokenizer="byte", **options)


def zipped() -> bytes:
    """A zip archive with a text in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a.txt", TEXT)
    return file.getvalue()


def tarred() -> bytes:
    """A tar archive with a text in it."""
    file, info = io.BytesIO(), tarfile.TarInfo("a.txt")
    info.size = len(TEXT)
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(info, io.BytesIO(TEXT.encode()))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        *(("a.gz", gzip.compress), ("TS.GZ", gzip.compress), ("packed", gzip.compress)),
        *(("a.txt.xz", lzma.compress), ("novel.txt", lzma.compress), ("a.BZ2", bz2.compress)),
        ("a.lzma", functools.partial(lzma.compress, format=lzma.FORMAT_ALONE)),
        *(("plain.gz", bytes), ("novel.bin", bytes)),  # whatever the name says
    ],
)
def test_a_packed_text_is_the_text(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / name).write_bytes(pack(TEXT.encode()))
    loaded = load(tmp_path / name)
    both = np.concatenate([loaded.train[0], loaded.val[0]])
    assert loaded.tokenizer.decode_bytes(both) == TEXT.encode()


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_a_packed_text_that_is_cut_short(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.txt").write_bytes(pack(TEXT.encode())[:-9])
    with pytest.raises(DataError, match=r"cannot read the text .*a.txt"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (zipped(), "is a zip archive"),
        (tarred(), r"is a tar archive: unpack it \(tar xf"),
        (gzip.compress(tarred()), r"is a tar archive: unpack it \(tar xf"),
        (gzip.compress(lzma.compress(TEXT.encode())), "holds a file packed once more"),
        (gzip.compress(TEXT.encode("utf-16")), r"holds UTF-16 text: unpack it \(gzip -d\)"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "zstd -d"),
        (b"PAR1\x15\x04" + bytes(99), "is a Parquet file: write its text column"),
        (b"ARROW1\0\0" + bytes(99), "is an Arrow file"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" * 9, "is a PDF"),
        (b"SQLite format 3\0" + bytes(99), "is an SQLite file"),
        (pickle.dumps({"text": TEXT}), "is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "is an image"),
        *((TEXT.encode(code), f"iconv -f {code.upper()} -t") for code in ("utf-16", "utf-32")),
        *(
            (TEXT.encode(code), f"iconv -f {code.upper().replace('-L', 'L').replace('-B', 'B')} -t")
            for code in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
        ),
        (RUSSIAN.encode("utf-16-le"), "iconv -f UTF-16LE -t"),
        (RUSSIAN.encode("utf-16"), "iconv -f UTF-16 -t"),
        (np.arange(3, 50000, 7, dtype="<u2").tobytes(), "token ids ends in .bin or .npy"),
        ((np.arange(3000, dtype="<u2") % 60).tobytes(), "token ids ends in .bin or .npy"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",  # packed bytes hold the time
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a file.txt").write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        load(tmp_path / "a file.txt")
    assert "--decode_errors" not in str(error.value)


@pytest.mark.parametrize("name", ["a.bin.xz", "a.bin.gz"])
def test_packed_tokens_are_to_be_unpacked(tmp_path: Path, name: str) -> None:
    pack = lzma.compress if name.endswith("xz") else gzip.compress
    (tmp_path / name).write_bytes(pack(np.arange(3000, dtype="<u2").tobytes()))
    with pytest.raises(DataError, match=r"holds token ids: unpack it \((xz|gzip) -d\)"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (TEXT.encode() + "“quoted”".encode("cp1252"), "pass --decode_errors=replace"),
        ("Il a été très étonné à l'école\n".encode("latin-1") * 60, "iconv -f WINDOWS-1252"),
        (RUSSIAN.encode("cp1251"), "iconv -f ENCODING"),
        ("日本語の文章です。\n".encode("shift-jis") * 60, "with the name of the encoding"),
    ],
)
def test_replacing_is_for_what_is_mostly_utf8(tmp_path: Path, content: bytes, advice: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a.txt is not UTF-8 at byte \d+") as error:
        load(tmp_path / "a.txt")
    assert advice in str(error.value)
    assert ("--decode_errors" in str(error.value)) == ("--decode_errors" in advice)


def test_texts_with_marks_are_said_to_have_them(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n' * 30)
    load_dataset(str(tmp_path / "a.jsonl"), block_size=4, notify=notes.append)
    (note,) = notes
    assert note.startswith("a.jsonl ")


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"a",
            b"\xef\xbb\xbfBOM",
            "日本語".encode(),
            b"BZh",
            b"PAR1 is a word",
            b"GGUF, too",
        ),
        *(b"PK, a name", b"]\0\0", b"7z", b"\x1b[31mred", b"(a) {\\r}", b"Rar!"),
    ],
)
def test_texts_are_not_taken_for_something_else(content: bytes) -> None:
    head = content + b" and so on\n" * 60
    assert file_kinds.kind_of(head) == "" == text_check.wide_text(head)
