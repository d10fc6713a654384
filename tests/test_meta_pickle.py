"""nanoGPT's meta.pkl: its characters are read, and nothing in it runs."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizer as tok
from gptjax.conversion import convert
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import is_linear, named_tensors
from gptjax.errors import DataError, UsageError
from gptjax.meta_pickle import PlainUnpickler, load_plain, read_meta

from .helpers import need, scaled_params, tiny


def write_meta(path: Path, tokens: list[str], **changes: Any) -> Path:
    meta = {
        "vocab_size": len(tokens),
        "itos": dict(enumerate(tokens)),
        "stoi": {token: i for i, token in enumerate(tokens)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(meta | changes))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    tokens = [*"\n zyxé🙂"]
    meta = {"itos": dict(enumerate(tokens)), "stoi": {t: i for i, t in enumerate(tokens)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    found = read_meta(tmp_path / "meta.pkl")
    assert found.encode("xé\n").tolist() == [4, 5, 0] and tok.decode(found, [6, 2]) == "🙂z"


@given(st.lists(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=99, unique=True))
@settings(deadline=None)
def test_characters_in_any_order(chars: list[str]) -> None:
    made = tok.CharTokenizer("".join(chars))
    assert made.encode("".join(chars)).tolist() == list(range(len(chars)))
    assert tok.decode(made, range(len(chars))) == "".join(chars)
    assert made.start_id == (chars.index("\n") if "\n" in chars else 0)


def test_one_of_its_two_tables_is_enough(tmp_path: Path) -> None:
    for changes in ({"itos": None}, {"stoi": None}, {"itos": [*"ba"]}):
        path = write_meta(tmp_path / "meta.pkl", [*"ba"], **changes)
        assert read_meta(path).to_json()["chars"] == "ba"


def test_tokens_of_several_characters(tmp_path: Path) -> None:
    """A text gives none of them, as in nanoGPT; with special tokens allowed it does."""
    path = write_meta(tmp_path / "meta.pkl", ["<pad>", "b", "a", "\n", " "])
    made = read_meta(path)
    tok.save_tokenizer(made, tmp_path)
    for found in (made, tok.load_tokenizer(tmp_path)):
        assert found.encode("ab a\n").tolist() == [2, 1, 4, 2, 3]
        assert found.encode("a<pad>b", allow_special=True).tolist() == [2, 0, 1]
        assert tok.decode(found, [0, 1, 4, 2]) == "<pad>b a"
        with pytest.raises(DataError):
            found.encode("<pad>")


class Evil:
    """What a pickle may do where it is loaded carelessly."""

    def __init__(self, call: Callable[..., object], *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["whole", "itos", "token", "key"])
def test_nothing_runs(tmp_path: Path, protocol: int, place: str) -> None:
    evil: Any = Evil(os.system, f"touch {tmp_path}/ran")
    value: Any = {
        "whole": evil,
        "itos": {"itos": evil},
        "token": {"itos": {0: evil}},
        "key": {evil: 1},
    }[place]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(DataError, match="cannot read the vocabulary") as error:
        read_meta(tmp_path / "meta.pkl")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil(os.mkdir, f"{tmp_path}/ran")))  # else it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04N.",
        pickle.dumps([1]),
        pickle.dumps({"itos": {0: "a", 2: "b"}}),
        pickle.dumps({"itos": {0: 1}}),
        pickle.dumps({"itos": {0: "a"}, "stoi": {"a": 1}}),
        pickle.dumps({"itos": {0: "a", 1: "a"}}),
        pickle.dumps({"itos": {0: ""}}),
        pickle.dumps({"itos": {0: "\ud800"}}),
        pickle.dumps({"itos": {0: "a"}, "vocab_size": 2}),
        pickle.dumps({"vocab_size": np.int64(3)}),
        pickle.dumps({(1, 2): 3}),
        b"]" + b"\x8c\x01ar\xff\xff\xff\x7f.",  # a memo of two thousand million entries
        b"\x80\x04\x96" + b"\xff" * 7 + b"\x7f.",  # a bytearray that no memory holds
        b"(" * 10**5 + b"]" * 10**5 + b".",
        b"].a" * 10**5,
        b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        b"X" + b"\xff" * 4 + b"a.",
        b"0" * 2**23,
    ],
)
def test_others_are_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(DataError, match="cannot read the vocabulary") as error:
        read_meta(tmp_path / "meta.pkl")
    assert "\n" not in str(error.value)


def test_plain_values_and_no_others() -> None:
    """Each of the two guards holds alone: what may be in the file, and what it may name."""
    plain = {"a": [1, 2.5, None, True, "é", 2**70]}
    assert load_plain(pickle.dumps(plain)) == plain
    for value in ({(1, 2): 3}, b"x", {1, 2}, os.system, Evil(print, "x")):
        with pytest.raises(DataError, match="more than dicts"):
            load_plain(pickle.dumps(value))
    with pytest.raises(DataError, match="system"):
        PlainUnpickler(io.BytesIO(pickle.dumps(os.system))).load()


def write_checkpoint(folder: Path, dataset: str, n_vocab: int) -> Path:
    """A ckpt.pt as nanoGPT writes it."""
    torch = need("torch")
    cfg = tiny(vocab_size=n_vocab, n_embd=8, n_layer=1)
    named = named_tensors(cfg, scaled_params(cfg, jax.random.key(0)))
    model = {
        f"transformer.{name}": torch.tensor(np.array(a.T if is_linear(name) else a))
        for name, a in named
    }
    args = {n: getattr(cfg, n) for n in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    saved = {"model": model, "model_args": {**args, "bias": True, "dropout": 0.0}}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**saved, "config": {"dataset": dataset}}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def test_a_checkpoint_finds_its_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it, in the data folder beside its out_dir, or in the one where the command runs."""
    here, there = tmp_path / "here", tmp_path / "nanoGPT"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write_checkpoint(there / "out", "shakespeare_char", 3)
    places = [
        here / "data" / "shakespeare_char" / "meta.pkl",
        there / "data" / "shakespeare_char" / "meta.pkl",
        there / "out" / "meta.pkl",
    ]
    pickles = SourceConfig(allow_pickle=True)
    for i, (place, chars) in enumerate(zip(places, ("abc", "bca", "cab"), strict=True)):
        write_meta(place, [*chars])
        run, _ = convert.import_run(str(path), tmp_path / f"run{i}", pickles)
        assert run.tokenizer.to_json()["chars"] == chars
    for place in places:
        place.unlink()
    named = SourceConfig(allow_pickle=True, tokenizer=str(write_meta(tmp_path / "x.pkl", [*"xyz"])))
    run, _ = convert.import_run(str(path), tmp_path / "named", named)
    assert run.tokenizer.to_json()["chars"] == "xyz"
    path = write_checkpoint(there / "out", "../../here/data/shakespeare_char", 3)
    write_meta(places[0], [*"abc"])
    with pytest.raises(UsageError, match="--tokenizer=ids"):
        convert.import_run(str(path), tmp_path / "outside", pickles)
