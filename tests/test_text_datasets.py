"""Texts as a dataset, a validation split of one's own, and runs that were started without them."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.checkpoints.record import check_record, make_record
from gptjax.config import TrainConfig
from gptjax.config_file import load_config
from gptjax.errors import DataError, UsageError
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, decode, save_tokenizer

from .test_data import gpt2_tokenizer, write_bins, write_shard
from .test_dataset_files import IDS, content, firsts, load, write_shards

# ---- Texts ---------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of three texts, one packed, one empty, and of what is none."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("the second one, " * 20)
    (folder / "a.txt").write_text("the first one, é " * 20)
    (folder / "c.txt").write_text("")
    (folder / "d.TXT.gz").write_bytes(gzip.compress(b"the third one, " * 20))
    (folder / "readme.md").write_text("no part of it")
    (folder / ".e.txt").write_text("hidden")
    return folder


WHOLE = "the first one, é " * 20, "the second one, " * 20, "the third one, " * 20


@pytest.mark.parametrize("kind", ["auto", "byte"])
@pytest.mark.parametrize("pattern", ["", "*.[tT]*"])
def test_texts_are_one_text_in_name_order(texts: Path, kind: str, pattern: str) -> None:
    notes: list[str] = []
    loaded = load(f"{texts}/{pattern}", notes, tokenizer=kind)
    assert loaded.tokenizer.kind == ("char" if kind == "auto" else kind)
    assert content(loaded).decode() == "".join(WHOLE)
    assert notes == ["train: a.txt ... d.TXT.gz (4 files); val: the last 10 % of it"]
    n_train = int(len("".join(WHOLE)) * 0.9)
    assert decode(loaded.tokenizer, loaded.train[0]) == "".join(WHOLE)[:n_train]


def test_documents_end_where_the_tokenizer_has_an_end(texts: Path) -> None:
    loaded = load(texts, tokenizer=gpt2_tokenizer())
    both = np.concatenate([loaded.train[0], loaded.val[0]]).tolist()
    documents = decode(loaded.tokenizer, both).split("<|endoftext|>")
    assert documents == list(WHOLE)  # no boundary for the empty one, nor at either end
    assert both.count(50256) == 2


def test_texts_with_a_validation_file(tmp_path: Path) -> None:
    (tmp_path / "x-train.txt").write_text("abc " * 30)
    (tmp_path / "x-valid.txt").write_text("xyz " * 30)
    loaded = load(tmp_path, tokenizer="char")
    assert decode(loaded.tokenizer, loaded.train[0]) == "abc " * 30
    assert decode(loaded.tokenizer, loaded.val[0]) == "xyz " * 30
    alone = load(tmp_path / "x-valid.txt")  # said by its name: not a word about a split
    assert content(alone) == b"xyz " * 30
    with pytest.raises(DataError, match="no file is left to train on"):
        load(tmp_path / "*valid.txt")


def test_a_text_that_changes_is_tokenised_anew(texts: Path) -> None:
    load(texts)
    (texts / "b.txt").write_text("another one, " * 20)
    assert b"another one" in content(load(texts))
    (texts / "b.txt").rename(texts / "z.txt")
    assert content(load(texts)).endswith(b"another one, ")


# ---- A validation split of one's own -------------------------------------------------------------


def test_a_part_of_ones_choice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    for fraction in (0.5, 0.25, 0.1, 0.5):  # the cache knows them apart
        loaded = load(tmp_path / "a.txt", val_fraction=fraction)
        assert len(loaded.val[0]) == 100 * fraction and len(content(loaded)) == 100
    write_shard(tmp_path / "one.bin", IDS)
    notes: list[str] = []
    loaded = load(tmp_path / "one.bin", notes, val_fraction=0.25)
    assert (loaded.train[0].tolist(), loaded.val[0].tolist()) == (IDS[:30], IDS[30:])
    (note,) = notes
    assert note.startswith("one.bin: ") and "25 %" in note


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_parts_that_are_none(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"--val_fraction=.*: must be above 0 and below 1"):
        TrainConfig(val_fraction=fraction)


def test_any_validation_set_goes_with_any_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("training text " * 9)
    (tmp_path / "b.txt").write_text("another text, " * 9)
    write_shards(tmp_path, "fw_train_0.bin", "fw_train_1.bin", "fw_val_0.bin")
    bins = write_bins(tmp_path / "bins", [7] * 20, [8] * 20)
    cases = {
        ("a.txt", "b.txt"): (["t"], ["a"]),
        ("a.txt", "bins"): (["t"], [8]),
        ("fw_*.bin", "b.txt"): ([0, 1], ["a"]),
        ("fw_*.bin", "bins/val.bin"): ([0, 1], [8]),
        ("bins", "fw_*.bin"): ([7], [2]),
        ("bins/train.bin", "bins/train.bin"): None,
        ("fw_*.bin", "fw_train_0.bin"): ([1], [0]),
        ("bins/val.bin", "bins/train.bin"): ([8], [7]),
    }
    for (train, val), expected in cases.items():
        options: dict[str, Any] = {"val_dataset": f"{tmp_path}/{val}"}
        if expected is None:
            with pytest.raises(DataError, match="no file is left to train on"):
                load(tmp_path / train, **options)
            continue
        wanted = tuple([ord(x) if isinstance(x, str) else x for x in side] for side in expected)
        assert firsts(load(tmp_path / train, **options)) == wanted, (train, val)
    notes: list[str] = []
    load(tmp_path / "fw_*.bin", notes, val_dataset=f"{bins}/val.bin")
    assert notes == ["train: fw_train_0.bin, fw_train_1.bin; val: val.bin; not used: fw_val_0.bin"]


def test_the_vocabulary_covers_both_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 20)
    (tmp_path / "b.txt").write_text("bcd" * 20)
    loaded = load(tmp_path / "a.txt", tokenizer="char", val_dataset=f"{tmp_path}/b.txt")
    assert loaded.tokenizer.to_json()["chars"] == "abcd"
    assert (len(loaded.train[0]), len(loaded.val[0])) == (60, 60)


def test_validation_tokens_of_another_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 20)
    bins = write_bins(tmp_path / "bins", [1] * 20, [1] * 20)
    options: dict[str, Any] = {"tokenizer": "char", "val_dataset": str(bins)}
    with pytest.raises(UsageError, match=r"no tokenizer\.json says what made the tokens"):
        load(tmp_path / "a.txt", **options)
    save_tokenizer(CharTokenizer("abcd"), bins)
    with pytest.raises(DataError, match="made with another tokenizer"):
        load(tmp_path / "a.txt", **options)
    save_tokenizer(CharTokenizer("abc"), bins)
    assert firsts(load(tmp_path / "a.txt", **options)) == ([0], [1])


def test_a_part_where_whole_files_are_the_split(tmp_path: Path) -> None:
    write_bins(tmp_path, [1] * 20, [2] * 20)
    cases: list[dict[str, Any]] = [{}, {"val_dataset": f"{tmp_path}/val.bin"}]
    for options in cases:
        with pytest.raises(
            UsageError,
            match=r"--val_fraction=0.2: .*val.bin",
        ):
            load(tmp_path, val_fraction=0.2, **options)
    with pytest.raises(UsageError, match="--val_dataset=nowhere: no such name"):
        load(tmp_path, val_dataset="nowhere")


# ---- Resuming ------------------------------------------------------------------------------------


def test_older_settings_and_records_go_on(tmp_path: Path) -> None:
    config = TrainConfig(dataset="a.txt")
    fields = dataclasses.asdict(config)
    del fields["val_dataset"], fields["val_fraction"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_config(tmp_path / "config.json") == config
    tokens, said = np.arange(9, dtype=np.uint16), list[str]()
    shards = [tokens, tokens + 1, tokens + 2]
    make = lambda given, n: make_record(given, shards, ByteTokenizer(), n)  # noqa: E731
    old, new = make(config, 2), make(dataclasses.replace(config, val_dataset="b.txt"), 2)
    check_record(old, new, [], said.append)
    with pytest.raises(UsageError, match="other data"):  # the same files, but trained on others
        check_record(old, make(config, 1), [], said.append)
    del old["n_train"]
    check_record(old, new, [], said.append)
    assert said == []
