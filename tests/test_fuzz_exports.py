"""Damaged files of the formats that we export end in a refusal of one line, as in test_fuzz.py."""

import shutil
from pathlib import Path

import jax
import pytest
from hypothesis import strategies as st

import convert_gpt2
from gptjax.conversion import gguf, llmc, llmc_vocabulary
from gptjax.tokenizer import CharTokenizer

from .helpers import scaled_params, tiny
from .test_fuzz import Reader, damaged, fuzz, model, scarce_memory, script  # noqa: F401
from .test_gguf import rewrite, trained_bpe

IMPORT = script(convert_gpt2.main, "import", "{}/model.gguf", "--out_dir={}/out")
CHARS = CharTokenizer("\n " + "".join(map(chr, range(97, 121))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small valid files."""
    place = tmp_path_factory.mktemp("whole")
    cfg = tiny(vocab_size=CHARS.n_vocab, vocab_multiple=1, n_embd=8)
    params = jax.device_get(scaled_params(cfg, jax.random.key(0)))
    gguf.write_file(place / "model.gguf", cfg, params, CHARS)
    bpe = trained_bpe(300)
    larger = tiny(vocab_size=300, vocab_multiple=1, n_embd=8)
    some = jax.device_get(scaled_params(larger, jax.random.key(0)))
    gguf.write_file(place / "foreign.gguf", larger, some, bpe)
    rewrite(place / "foreign.gguf", {"gptjax.tokenizer": None})
    llmc.write_file(place / "model.bin", cfg, params)
    llmc_vocabulary.write(place / llmc_vocabulary.NAME, CHARS)
    return place


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(whole, tmp_path / "place")


def in_the_header(content: bytes) -> st.SearchStrategy[bytes]:
    """A GGUF file with one thing wrong before its tensors."""
    end = content.index(b"blk.1.ffn_down.bias") + 100
    return st.one_of(
        damaged(content[:end]).map(lambda head: head + content[end:]), damaged(content)
    )


FILES: dict[str, tuple[int, Reader]] = {
    "model.gguf": (120, model("model.gguf")),
    "foreign.gguf": (120, model("foreign.gguf")),
    llmc_vocabulary.NAME: (60, model("model.bin")),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str, place: Path) -> None:
    cases, read = FILES[name]
    file = place / name

    def attempt(content: bytes) -> None:
        file.write_bytes(content)
        read(place)

    content = file.read_bytes()
    strategy = in_the_header if file.suffix == ".gguf" else damaged
    fuzz(cases, content, strategy(content), attempt)


def test_the_program_says_so(place: Path) -> None:
    file = place / "model.gguf"
    content = file.read_bytes()

    def attempt(content: bytes) -> None:
        shutil.rmtree(place / "out", ignore_errors=True)
        file.write_bytes(content)
        IMPORT(place)

    fuzz(20, content, in_the_header(content), attempt)
