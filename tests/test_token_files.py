"""Token files of other integers than uint16 are read as what they are, or refused by name."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import batches
from gptjax.data.datasets import Dataset, check_split, load_dataset
from gptjax.errors import DataError
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

from .test_data import gpt2_tokenizer, write_shard

RNG = np.random.default_rng(0)
BYTES = np.frombuffer(b"it was the best of times, it was the worst\n" * 60, np.uint8)
LETTERS = CharTokenizer("\n abcdefghij")
TYPES = ["<u2", ">u2", "<u4", ">i4", "<i8", ">i8"]


def load(
    folder: Path, tokenizer: Tokenizer, notes: list[str] | None = None, block_size: int = 4
) -> Dataset:
    told = [] if notes is None else notes
    return load_dataset(str(folder), block_size=block_size, tokenizer=tokenizer, notify=told.append)


def write(folder: Path, ids: np.ndarray, dtype: str, val: np.ndarray | None = None) -> Path:
    ids.astype(dtype).tofile(folder / "train.bin")
    (ids[:200] if val is None else val).astype(dtype).tofile(folder / "val.bin")
    return folder


# ---- Without a header ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["byte", "char", "gpt2"])
def test_other_integers_are_the_same_tokens(tmp_path: Path, dtype: str, kind: str) -> None:
    cases: dict[str, Callable[[], tuple[Tokenizer, np.ndarray]]] = {
        "byte": lambda: (ByteTokenizer(), BYTES),
        "char": lambda: (LETTERS, RNG.integers(0, 12, 3000)),
        "gpt2": lambda: (gpt2_tokenizer(), RNG.integers(0, 50257, 3000)),
    }
    tokenizer, ids = cases[kind]()
    notes: list[str] = []
    loaded = load(write(tmp_path, ids, dtype, val=ids[:20]), tokenizer, notes)
    assert np.array_equal(loaded.train[0], ids)
    assert np.array_equal(loaded.val[0], ids[:20])  # too few to tell: as the other file
    starts = [(0, 0), (0, 7)]
    windows = batches.read_windows(loaded.train, starts, 5, tokenizer.n_vocab)
    assert windows.dtype == np.int32 and windows.tolist() == [ids[:6].tolist(), ids[7:13].tolist()]
    name = np.dtype(dtype).name.replace("uint32", "int32")
    told = [note for note in notes if name in note and ("big-endian" in note) == (dtype[0] == ">")]
    assert len(told) == (dtype != "<u2"), notes


@pytest.mark.parametrize(
    "ids",
    [
        [7] * 3000,
        [0] * 3000,
        [7, 0] * 3000,
        [7, 0, 9, 0] * 3000,
        [7, 0, 0, 0] * 3000,
        [0, 0, 0, 5] + [0] * 3000,
        list(range(20)) * 50,
        [5, 0, 6, 0, 7, 0, 8, 0],  # too few to tell
    ],
)
def test_uint16_with_many_zeros_stays_uint16(tmp_path: Path, ids: list[int]) -> None:
    notes: list[str] = []
    array = np.array(ids)
    loaded = load(write(tmp_path, array, "<u2", val=array), ByteTokenizer(), notes)
    assert np.array_equal(loaded.train[0], array) and len(notes) == 1


def test_a_letter_a_line_is_no_uint32(tmp_path: Path) -> None:
    """Every second id is 0, the newline: only a count can tell."""
    letters = "".join(f"{letter}\n" for letter in "abcdefghij" * 40)
    (tmp_path / "a.txt").write_text(letters)
    loaded = load(tmp_path / "a.txt", CharTokenizer("\nabcdefghij"))  # the cache has the count
    assert loaded.train[0][:6].tolist() == [1, 0, 2, 0, 3, 0]
    (tmp_path / "bins").mkdir()
    folder = write(tmp_path / "bins", LETTERS.encode(letters), "<u2")
    with pytest.raises(DataError, match=r"train.bin holds int32, or uint16 .*meta\.json"):
        load(folder, LETTERS)
    for counts, first in (((800, 200), [2, 0, 3, 0]), ((400, 100), [2, 3, 4, 5])):
        promised = {"tokens": dict(zip(("train", "val"), counts, strict=True))}
        (folder / "meta.json").write_text(json.dumps(promised))
        assert load(folder, LETTERS).train[0][:4].tolist() == first
    (folder / "meta.json").write_text('{"tokens": {"train": 801}}')
    with pytest.raises(DataError, match="expected 801 tokens, found 800"):
        load(folder, LETTERS)


@pytest.mark.parametrize(
    ("ids", "dtype", "said"),
    [
        (BYTES, "<f4", "holds float32, and token ids are whole numbers"),
        (BYTES, "<f8", "holds float64, and token ids are whole numbers"),
        (BYTES - 9, "u1", "plain text, or has one byte a token"),
        (np.append([-1], BYTES), "<i4", "holds int32 from -1 to 119"),
        (np.append([-100], BYTES), "<i8", "holds int64 from -100 to 119"),
        (np.append([128_000], BYTES), "<u4", "holds int32 from 10 to 128000"),
        (
            np.append(BYTES, [400]),
            "<u2",
            "id 400 at position 2580 is outside",
        ),
    ],
)
def test_what_are_no_ids_is_named(tmp_path: Path, ids: np.ndarray, dtype: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write(tmp_path, ids, dtype), ByteTokenizer())


def test_one_byte_a_token_is_not_taken_for_two_of_gpt2(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="plain text, or has one byte a token"):
        load(write(tmp_path, BYTES - 9, "u1"), gpt2_tokenizer())


def test_a_wide_file_that_was_cut(tmp_path: Path) -> None:
    write(tmp_path, BYTES, "<u4")
    with (tmp_path / "train.bin").open("r+b") as file:
        file.truncate(4 * 2000 - 2)
    with pytest.raises(DataError, match=r"7998 bytes: not a multiple of 4 \(int32\)"):
        load(tmp_path, ByteTokenizer())


def test_a_sample_of_a_large_file_tells(tmp_path: Path) -> None:
    ids = np.tile(BYTES, 600)  # 6 MB
    assert np.array_equal(load(write(tmp_path, ids, "<u4"), ByteTokenizer()).train[0], ids)


def test_a_negative_id_later_in_the_file() -> None:
    tokens = np.arange(40, dtype="<i4")
    tokens[20] = -1
    with pytest.raises(DataError, match="id -1 at position 20"):
        batches.read_windows([tokens], [(0, 18)], 8, 50)
    loaded = Dataset("x", ByteTokenizer(), [tokens], [tokens])
    with pytest.raises(DataError, match="id -1 at position 20"):
        check_split(loaded, "train", 4)


# ---- With one ------------------------------------------------------------------------------------


def write_header(path: Path, ids: np.ndarray, header: tuple[int, int], dtype: str) -> None:
    fields = np.zeros(256, f"{dtype[0]}i4")
    fields[:3] = (*header, len(ids))
    path.write_bytes(fields.tobytes() + ids.astype(dtype).tobytes())


@pytest.mark.parametrize(
    ("header", "dtype"),
    [
        ((20240520, 1), "<u2"),
        ((20240520, 1), "<u4"),  # behind a header that promises uint16
        ((20240520, 1), ">u2"),
        ((20240801, 7), "<u4"),  # llm.c's for Llama 3
    ],
)
def test_shards_of_other_integers(tmp_path: Path, header: tuple[int, int], dtype: str) -> None:
    for name in ("x_train", "x_val"):
        write_header(tmp_path / f"{name}.bin", BYTES, header, dtype)
    assert np.array_equal(load(tmp_path / "x_*.bin", ByteTokenizer()).train[0], BYTES)


def test_a_shard_with_twice_the_promised_tokens(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.bin", list(range(50)), count=25)
    with pytest.raises(DataError, match="expected 25 tokens, found 50"):
        load(tmp_path / "x.bin", ByteTokenizer())


def test_a_model_of_llmc_is_no_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.bin", list(range(50)), magic=20240326, version=3)
    with pytest.raises(DataError, match=r"not a shard of llm.c.* found 20240326 and 3"):
        load(tmp_path / "model.bin", ByteTokenizer())


@pytest.mark.parametrize("dtype", ["u2", "i8", "u8", ">i4"])
def test_numpys_own_files(tmp_path: Path, dtype: str) -> None:
    for name in ("x_train", "x_val"):
        np.save(tmp_path / f"{name}.npy", BYTES.astype(dtype))
    assert np.array_equal(load(tmp_path / "*.npy", ByteTokenizer()).train[0], BYTES)
    assert np.array_equal(load(tmp_path, ByteTokenizer()).val[0], BYTES)
    shutil.copy(tmp_path / "x_train.npy", tmp_path / "saved.bin")  # whatever its name
    loaded = load(tmp_path / "saved.bin", ByteTokenizer())
    assert np.array_equal(np.concatenate([*loaded.train, *loaded.val]), BYTES)


@pytest.mark.parametrize("array", [BYTES.reshape(2, -1), BYTES * 1.0, np.array([None] * 9)])
def test_numpys_files_of_other_things(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=r"x\.npy"):
        load(tmp_path / "x.npy", ByteTokenizer())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(BYTES.tobytes()), r"train.bin is compressed: unpack it \(gzip -d\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
    ],
    ids=["gzip", "git", "zip"],  # gzip's bytes hold the time
)
def test_no_tokens_in_the_name_of_tokens(tmp_path: Path, content: bytes, said: str) -> None:
    write(tmp_path, BYTES, "<u2")
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=said):
        load(tmp_path, ByteTokenizer())


@pytest.mark.parametrize("first", [[40223, 150], [640, 405], [35615, 776], [55551, 56831]])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_ids_may_begin_like_another_kind_of_file(
    first: list[int], dtype: str, tmp_path: Path
) -> None:
    """As the marks of compress, pickle, gzip and JPEG do."""
    ids = np.append(first, np.random.default_rng(0).integers(0, 60000, 3000))
    ids = ids % 60001
    (tmp_path / "a.bin").write_bytes(ids.astype(dtype).tobytes())
    from gptjax.data.token_files import token_kind

    assert token_kind(tmp_path / "a.bin", 60001) == ""
    packed = gzip.compress(ids.astype(dtype).tobytes())
    (tmp_path / "b.bin").write_bytes(packed)
    assert token_kind(tmp_path / "b.bin", 60001) == "gzip"
