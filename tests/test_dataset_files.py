"""Which files a name, a folder or a glob stands for, and which of them are for validation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.data.datasets import Dataset, load_dataset
from gptjax.errors import DataError, UsageError
from gptjax.files import show_paths

from .test_data import write_bins, write_shard

IDS = list(range(40))


def load(dataset: object, notes: list[str] | None = None, **options: Any) -> Dataset:
    told = [] if notes is None else notes
    defaults: dict[str, Any] = {"tokenizer": "byte", "block_size": 4, "notify": told.append}
    return load_dataset(str(dataset), **(defaults | options))


def write_shards(folder: Path, *names: str) -> Path:
    """Shards whose first token is their place among the names."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(folder / name, [i] * 20)
    return folder


def firsts(loaded: Dataset) -> tuple[list[int], list[int]]:
    """The first token of each array: of training, of validation."""
    return [int(a[0]) for a in loaded.train], [int(a[0]) for a in loaded.val]


def content(loaded: Dataset) -> bytes:
    both = np.concatenate([*loaded.train, *loaded.val])
    return loaded.tokenizer.decode_bytes(both)


# ---- Names of the splits -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "carnival_000",
        "retrieval_0",
        "interval-1",
        "x_eval_0",
        "validator_0",
        "approval",
        "évaluation",
    ],
)
def test_val_within_a_word_is_no_validation(tmp_path: Path, name: str) -> None:
    notes: list[str] = []
    write_shards(tmp_path, f"{name}.bin", "zz_val_0.bin")
    assert firsts(load(tmp_path / "*.bin", notes)) == ([0], [1])
    assert notes == [f"train: {name}.bin; val: zz_val_0.bin"]


@pytest.mark.parametrize(
    "name", ["fw_val_000000", "val_00", "a-val", "a.validation.001", "VAL", "val0001", "a valid 1"]
)
def test_val_as_a_word_is_validation(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, f"{name}.bin", "zz_0.bin", "zz_1.bin")
    assert firsts(load(tmp_path / "*.bin")) == ([1, 2], [0])


def test_the_files_of_both_splits_are_named(tmp_path: Path) -> None:
    notes: list[str] = []
    write_shards(tmp_path, *(f"carnival_{i:03}.bin" for i in range(12)))
    load(tmp_path / "carnival_*.bin", notes)  # the last is for validation, as without any "val"
    assert notes == [
        "train: carnival_000.bin ... carnival_010.bin (11 files); val: carnival_011.bin"
    ]
    twice = [Path("a/x.bin"), Path("b/x.bin")]
    assert show_paths(twice[:1], among=twice) == "a/x.bin" and show_paths(twice[:1]) == "x.bin"


def test_folders_name_a_split_too(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "val", "train/0.bin", "train/1.bin", "val/0.bin")
    for pattern in ("*/0.bin", "*/*.bin", "**/*.bin", "**"):
        train, val = firsts(load(f"{folder}/{pattern}"))
        assert val == [2] and train in ([0], [0, 1])  # the folder above them all says nothing


def test_a_test_split_is_none_of_both(tmp_path: Path) -> None:
    notes: list[str] = []
    write_shards(tmp_path, "wiki.train.bin", "wiki.valid.bin", "wiki.test.bin")
    assert firsts(load(tmp_path / "*.bin", notes)) == ([0], [1])
    assert "wiki.test.bin" in notes[0] and "not used" in notes[0]
    write_shards(tmp_path / "other", "test_0.bin", "test_1.bin")
    assert firsts(load(tmp_path / "other" / "*.bin")) == ([0], [1])


# ---- Globs ---------------------------------------------------------------------------------------


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, "fw_0.bin", "fw_1.bin")
    for name in ("._fw_0.bin", ".fw_2.bin", ".git/fw_3.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no shard")
    for pattern in ("*.bin", "*fw*", "**/*.bin", "**", ""):
        assert firsts(load(f"{tmp_path}/{pattern}")) == ([0], [1])
    with pytest.raises(DataError, match="4 tokens in the train split"):
        load(f"{tmp_path}/.*.bin")  # asked for


@pytest.mark.parametrize("pattern", ["d/*/fw_*.bin", "d/**/fw_*.bin", "*/?/*.bin", "d/[ab]/*"])
def test_globs_over_folders(tmp_path: Path, pattern: str) -> None:
    write_shards(tmp_path, "d/a/fw_0.bin", "d/a/fw_1.bin", "d/b/fw_0.bin")
    (tmp_path / "d" / "a" / "sub").mkdir()
    assert firsts(load(tmp_path / pattern)) == ([0, 1], [2])


@pytest.mark.parametrize("folder", ["run [v2]", "a*b", "what?", "[x]", "{a,b}"])
def test_folders_of_odd_names_are_as_written(tmp_path: Path, folder: str) -> None:
    write_shards(tmp_path / folder, "fw[1]_0.bin", "fw[1]_1.bin")
    for pattern in ("*.bin", "fw[1]_*.bin", "fw?1?_*", ""):
        assert firsts(load(f"{tmp_path / folder}/{pattern}")) == ([0], [1])


# ---- nanoGPT's folders ---------------------------------------------------------------------------


def test_a_name_is_a_folder_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bins(tmp_path / "data", [0], [0])
    write_bins(tmp_path / "data" / "mine", [1] * 20, [2] * 20)
    (tmp_path / "data" / "theirs").mkdir()
    (tmp_path / "data" / "theirs" / "input.txt").write_text("to be or not " * 9)
    assert firsts(load("mine")) == ([1], [2])
    assert content(load("theirs")) == b"to be or not " * 9
    assert firsts(load("theirs", val_dataset="mine")) == ([ord("t")], [2])
    write_bins(tmp_path / "mine", [3] * 20, [4] * 20)  # what is there as written comes first
    assert firsts(load("mine")) == ([3], [4])
    with pytest.raises(UsageError, match="did you mean theirs"):
        load("their")


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "x_train.bin", "x_val.bin"])
def test_a_token_file_brings_its_neighbour(tmp_path: Path, name: str) -> None:
    write_bins(tmp_path, [1] * 20, [2] * 20)
    for i, other in enumerate(("x_train", "x_val", "y_val")):
        write_shard(tmp_path / f"{other}.bin", [i + 1] * 20)
    assert firsts(load(tmp_path / name)) == ([1], [2])


def test_a_token_file_without_neighbour(tmp_path: Path) -> None:
    np.array(IDS, "<u2").tofile(tmp_path / "train.bin")
    loaded = load(tmp_path / "train.bin", block_size=2)
    assert (loaded.train[0].tolist(), loaded.val[0].tolist()) == (IDS[:36], IDS[36:])
    with pytest.raises(UsageError, match=r"has no val.bin; pass --val_dataset, or .*train\.bin"):
        load(tmp_path)
    write_shard(tmp_path / "own.bin", IDS)
    assert firsts(load(tmp_path, val_dataset=f"{tmp_path}/own.bin")) == ([0], [0])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], r"has no train.bin and no val.bin.* it has no files"),
        (["a.parquet", "b.parquet", "c.md"], r"it holds 2 \.parquet, 1 \.md"),
        (["prepare.py", "readme.md"], r"run its prepare\.py first"),
        (["sub/a.txt"], r"for the files in its folders pass '.*/\*\*/\*\.txt'"),
        (["a.txt", "a.bin"], r"holds token files \(a\.bin\) and texts \(a\.txt\)"),
    ],
)
def test_folders_without_a_dataset(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("abc " * 20)
    with pytest.raises(UsageError, match=said):
        load(tmp_path)


@pytest.mark.parametrize(
    ("ids", "text"), [("a.bin", "b.txt"), ("val.bin", "train.txt"), ("train.bin", "val.txt")]
)
def test_one_glob_is_of_one_kind(tmp_path: Path, ids: str, text: str) -> None:
    """Also where the two kinds would be two splits."""
    write_shards(tmp_path, ids)
    (tmp_path / text).write_text("abc " * 20)
    with pytest.raises(DataError, match=rf"{ids} holds token ids and .*{text} does not"):
        load(tmp_path / "*")
