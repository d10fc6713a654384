"""170 damaged files of tokenizers: each is read, or refused in one line, and nothing else."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjax import tokenizer as tok
from gptjax.errors import DataError
from gptjax.tokenizer_files import read_folder

from .test_fuzz import damaged, edited, fuzz, scarce_memory
from .test_hf_tokenizer import KINDS, write_bpe

__all__ = ["scarce_memory"]  # a fixture for every test here

ROWS = 300  # of the model


def folder_of(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(KINDS[kind]().to_str())

    return make


def bpe(folder: Path) -> None:
    token = {"content": "<a>", "special": True}
    write_bpe(folder, added_tokens_decoder={"260": token}, eos_token={"content": "<a>"})
    (folder / "added_tokens.json").write_text('{"<a>": 260}')


def word_piece(folder: Path) -> None:
    (folder / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\n##b\n")


def run(folder: Path) -> None:
    text = KINDS["WordLevel"]().to_str()
    files = {"tokenizer_config.json": '{"eos_token": "</s>"}', "vocab.txt": "a"}
    fields = {"kind": "hf", "tokenizer": text, "files": files}
    model = {"n_ids": 20, "config.json": {"eos_token_id": [1]}, "generation_config.json": {}}
    (folder / "tokenizer.json").write_text(json.dumps({**fields, "model": model}))


def meta(folder: Path) -> None:
    stoi = {char: i for i, char in enumerate("ab\n<é")}
    content = {"stoi": stoi, "itos": {i: char for char, i in stoi.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(content))


# what is damaged -> how many cases, and what makes the folder
CASES: dict[tuple[str, str], tuple[int, Callable[[Path], None]]] = {
    ("tokenizer.json", "WordLevel"): (20, folder_of("WordLevel")),
    ("tokenizer.json", "Unigram"): (15, folder_of("Unigram")),
    ("tokenizer.json", "byte fallback"): (10, folder_of("byte fallback")),
    ("tokenizer.json", "byte-level BPE"): (15, folder_of("byte-level BPE")),
    ("vocab.json", "BPE"): (15, bpe),
    ("merges.txt", "BPE"): (15, bpe),
    ("tokenizer_config.json", "BPE"): (20, bpe),
    ("added_tokens.json", "BPE"): (10, bpe),
    ("vocab.txt", "WordPiece"): (10, word_piece),
    ("tokenizer.json", "run"): (20, run),
    ("meta.pkl", "characters"): (20, meta),
}


def test_there_are_170_cases() -> None:
    assert sum(cases for cases, _ in CASES.values()) == 170


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_damaged_tokenizers(name: str, kind: str, tmp_path: Path) -> None:
    cases, make = CASES[name, kind]
    make(tmp_path)
    file = tmp_path / name
    refused = 0

    def attempt(content: bytes) -> None:
        nonlocal refused
        file.write_bytes(content)
        try:
            found = read_folder(tmp_path, ROWS)
        except DataError:
            refused += 1
            raise
        assert found is not None
        for text in ("", "a", "a b\n", "the </s> é 🙂"):
            try:
                ids = found.encode(text, allow_special=True)
            except DataError:  # characters that are not in the vocabulary
                continue
            assert all(0 <= i < found.n_vocab for i in ids)
            stream = tok.StreamDecoder(found)
            assert stream.feed(ids) + stream.flush() == tok.decode(found, ids)
        tok.fingerprint(found)

    content = file.read_bytes()
    others = edited(content) if file.suffix == ".json" else damaged(content)
    fuzz(cases, content, others, attempt)
