"""A tokenizer of one's own: trained by `gptjax tokenize`, and taken by train.py and by files."""

import json
from pathlib import Path

import numpy as np
import pytest

from gptjax import tokenizer as tok
from gptjax.commands import tokenize
from gptjax.data.datasets import load_dataset
from gptjax.errors import DataError, OutputError, UsageError
from gptjax.tokens import byte_alphabet
from gptjax.training.run_settings import read_settings
from gptjax.training.start import open_run

TEXT = "the cat sat on the mat, née 🙂\nand the dog ran to the cat\n" * 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the command made."""
    place = tmp_path_factory.mktemp("made")
    (place / "story.txt").write_text(TEXT)
    argv = [str(place / "story.txt"), "--vocab_size=280", f"--out_dir={place}/bpe"]
    assert tokenize.main(argv) == 0
    return place / "bpe"


def test_the_folder_is_a_dataset(made: Path) -> None:
    assert {p.name for p in made.iterdir()} == {
        *("train.bin", "val.bin", "tokenizer.json", "meta.json"),
    }
    loaded = load_dataset(str(made), block_size=8)
    n_train = int(len(TEXT) * 0.9)
    assert tok.decode(loaded.tokenizer, loaded.train[0]) == TEXT[:n_train]
    assert tok.decode(loaded.tokenizer, loaded.val[0]) == TEXT[n_train:]
    assert loaded.tokenizer.n_vocab <= 280
    assert len(loaded.train[0]) < 0.5 * len(TEXT)
    again = load_dataset(str(made.parent / "story.txt"), block_size=8, tokenizer=str(made))
    assert np.array_equal(again.train[0], loaded.train[0])
    assert np.array_equal(again.val[0], loaded.val[0])


def test_ids_are_in_gpt2s_order(made: Path) -> None:
    """The 256 bytes come first, a token is the rank of its merge, and <|endoftext|> is the last."""
    fields = json.loads((made / "tokenizer.json").read_text())
    vocab, merges = fields["model"]["vocab"], fields["model"]["merges"]
    assert sorted(vocab, key=lambda token: vocab[token])[:256] == sorted(byte_alphabet(), key=ord)
    assert [vocab["".join(pair)] for pair in merges] == list(range(256, 256 + len(merges)))
    found = tok.load_tokenizer(made)
    assert found.eos == (found.n_vocab - 1,) == (256 + len(merges),)
    special = found.encode("a<|endoftext|>", allow_special=True)
    assert special[-1] == found.eos[0] and len(special) == 2
    assert tok.decode(found, found.encode("ü\0\n\x1b🙂")) == "ü\0\n\x1b🙂"  # seen or not


def test_the_same_text_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    argv = [f"--dataset={made.parent}/story.txt", "--vocab_size=280", f"--out_dir={tmp_path}/x"]
    assert tokenize.main(argv) == 0
    for path in made.iterdir():
        assert (tmp_path / "x" / path.name).read_bytes() == path.read_bytes()


def test_several_texts_are_parted_and_named_for_validation(tmp_path: Path) -> None:
    for name in ("a_train.txt", "b_train.txt", "c_val.txt"):
        (tmp_path / name).write_text(f"{name} says hello hello\n" * 9)
    argv = [f"{tmp_path}/*.txt", "--vocab_size=300", f"--out_dir={tmp_path}/x"]
    assert tokenize.main(argv) == 0
    loaded = load_dataset(f"{tmp_path}/x", block_size=4)
    assert tok.decode(loaded.tokenizer, loaded.train[0]).count("<|endoftext|>") == 1
    assert tok.decode(loaded.tokenizer, loaded.val[0]).startswith("c_val")


def test_validation_tokens_of_the_same_tokenizer_are_taken(made: Path, tmp_path: Path) -> None:
    """Whatever files lie beside its tokenizer.json; those of another one are refused."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    (tmp_path / "hf" / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    text, wanted = str(made.parent / "story.txt"), str(tmp_path / "hf")
    loaded = load_dataset(text, block_size=8, tokenizer=wanted, val_dataset=str(made))
    assert len(loaded.tokenizer.files) == 2 and loaded.val[0].size
    argv = [text, "--vocab_size=270", f"--out_dir={tmp_path}/other"]
    assert tokenize.main(argv) == 0
    with pytest.raises(DataError, match="made with another tokenizer"):
        load_dataset(text, block_size=8, tokenizer=wanted, val_dataset=f"{tmp_path}/other")


def test_what_is_refused(made: Path, tmp_path: Path) -> None:
    text = str(made.parent / "story.txt")
    for argv in ([], [text], [text, "--vocab_size=256"], [str(made), "--vocab_size=300"]):
        with pytest.raises(UsageError):
            tokenize.main([*argv, f"--out_dir={tmp_path}/x"] if argv else argv)
    with pytest.raises(OutputError):
        tokenize.main([text, "--vocab_size=280", f"--out_dir={made}"])
    (tmp_path / "bad.txt").write_bytes(b"ab\xff" * 99)
    with pytest.raises(DataError, match="not UTF-8"):
        tokenize.main([str(tmp_path / "bad.txt"), "--vocab_size=280", f"--out_dir={tmp_path}/x"])
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("restore_process")
def test_a_run_keeps_its_tokenizer(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stored as auto: the run's own counts on resume, when the file may be gone."""
    text = made.parent / "story.txt"
    argv = [f"--dataset={text}", f"--tokenizer={made}/tokenizer.json", f"--out_dir={tmp_path}/run"]
    config, given = read_settings([*argv, "--block_size=8", "--n_layer=1"])[:2]
    opened = open_run(config, tmp_path / "run", given)
    assert opened.dataset.tokenizer.kind == "hf"
    assert opened.stored.tokenizer == "auto"
    assert opened.config.model.vocab_size == opened.dataset.tokenizer.n_vocab
    for wrong, said in (("gtp2", "did you mean gpt2"), (f"{tmp_path}/no", "no such tokenizer")):
        config, given = read_settings([f"--dataset={text}", f"--tokenizer={wrong}"])[:2]
        with pytest.raises(UsageError, match=said):
            open_run(config, tmp_path / "run", given)
