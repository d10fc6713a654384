"""Text to token ids, and back without losing a byte: characters, bytes, or GPT-2's BPE."""

import base64
import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken

from gptjax.errors import DataError, plural
from gptjax.files import replacing

END_OF_TEXT = "<|endoftext|>"
# Of GPT-2's 50256 byte strings in order of rank, each in base64 and followed by a newline.
GPT2_SHA256 = "9f5c51677dd3f37bbf0ab2017579262cac437eb5f140a8efb53a235dbdb3ce0b"
# GPT-2's pattern: contractions, then runs of letters, digits, other signs, and white space.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken's matcher panics where it would have to take back a million steps.
TOO_MUCH_SPACE = re.compile(r"(?<!\s)\s{900000}")


class Tokenizer(Protocol):
    """The methods of every tokenizer; unknown characters and ids raise DataError."""

    kind: str
    n_vocab: int
    start_id: int  # what an empty prompt starts from
    eot: int | None  # the id that ends a text, where there is one

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return ids, (N,) int32; `<|endoftext|>` is text unless special tokens are allowed."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 of the tokens; a part of a character may stand at either end."""

    def to_json(self) -> dict[str, object]:
        """Return everything that `load_tokenizer` needs."""


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of the tokens, bytes that are not UTF-8 replaced by U+FFFD."""
    return tokenizer.decode_bytes(ids).decode(errors="replace")


def check_ids(ids: Iterable[int], n_vocab: int) -> list[int]:
    """Return the ids as ints; DataError if one is outside the vocabulary."""
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
        if not 0 <= i < n_vocab:
            size = f"{n_vocab} {plural(n_vocab, 'token')}"
            raise DataError(f"id {i} at {position} is not in the vocabulary ({size})")
    return ids


def to_utf8(text: str) -> bytes:
    """Return the text as UTF-8; DataError for half a character, which a broken decoder leaves."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f"character U+{code:04X} at {error.start} is a lone surrogate, which no UTF-8 text "
            "holds; remove it, or read the text with errors='replace'"
        ) from error


class CharTokenizer:
    """One token per character of a fixed set."""

    kind = "char"
    eot: int | None = None

    def __init__(self, chars: str) -> None:
        """Take the characters, in any order; DataError if there are none, or one occurs twice."""
        if not chars or len(set(chars)) != len(chars):
            raise DataError(
                "a character vocabulary must not be empty, and no character may occur twice"
            )
        to_utf8(chars)
        self.chars = "".join(sorted(chars))
        self.n_vocab = len(self.chars)
        self.start_id = max(0, self.chars.find("\n"))
        self.codes = code_points(self.chars)
        self.utf8 = [char.encode() for char in self.chars]

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return ids, (N,) int32."""
        codes = code_points(text)
        ids = np.searchsorted(self.codes, codes).clip(max=self.n_vocab - 1)
        unknown = np.flatnonzero(self.codes[ids] != codes)
        if unknown.size:
            at = int(unknown[0])
            size = f"{self.n_vocab} {plural(self.n_vocab, 'char')}"
            raise DataError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at {at} is not in the vocabulary "
                f"({size}); leave it out, or train with --tokenizer=byte or gpt2"
            )
        return ids.astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 of the tokens."""
        return b"".join(self.utf8[i] for i in check_ids(ids, self.n_vocab))

    def to_json(self) -> dict[str, object]:
        """Return what `load_tokenizer` reads."""
        return {"kind": self.kind, "chars": self.chars}


def code_points(text: str) -> np.ndarray:
    """Return the code point of each character, (N,) uint32; lone surrogates pass too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class ByteTokenizer:
    """One token per byte of the text's UTF-8."""

    kind = "byte"
    n_vocab = 256
    start_id = 10  # the newline
    eot: int | None = None

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return ids, (N,) int32."""
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 of the tokens."""
        return bytes(check_ids(ids, self.n_vocab))

    def to_json(self) -> dict[str, object]:
        """Return what `load_tokenizer` reads."""
        return {"kind": self.kind}


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, run by tiktoken."""

    kind = "gpt2"

    def __init__(self, tokens: Sequence[bytes], source: str) -> None:
        """Take the 50256 byte strings in order of rank; DataError if they are not GPT-2's."""
        digest = hashlib.sha256(b"".join(base64.b64encode(t) + b"\n" for t in tokens)).hexdigest()
        if digest != GPT2_SHA256:
            raise DataError(
                f"not GPT-2's vocabulary ({source}): sha256 {digest}, expected {GPT2_SHA256}; "
                "get the files again"
            )
        self.tokens = tokens
        self.start_id = len(tokens)
        self.eot: int | None = len(tokens)
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
        return self.encoding.decode_bytes(check_ids(ids, self.n_vocab))

    def to_json(self) -> dict[str, object]:
        """Return what `load_tokenizer` reads."""
        return {"kind": self.kind, "tokens": [base64.b64encode(t).decode() for t in self.tokens]}


class StreamDecoder:
    """A decoder of ids as they come, which returns a character once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin a text."""
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
        return self.decoder.decode(self.tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """Return what an unfinished character at the end becomes."""
        return self.decoder.decode(b"", final=True)


# ---- Our own file of a tokenizer -----------------------------------------------------------------


def save_tokenizer(tokenizer: Tokenizer, folder: Path, name: str = "tokenizer.json") -> None:
    """Write the tokenizer's file, whole or not at all."""
    with replacing(folder / name) as file:
        file.write((json.dumps(tokenizer.to_json()) + "\n").encode())


def load_tokenizer(folder: Path, name: str = "tokenizer.json") -> Tokenizer:
    """Read the tokenizer file of a run or data folder; DataError if it is missing or damaged."""
    path = folder / name
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return READERS[fields["kind"]](fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, (OSError, DataError)) else repr(error)
        raise DataError(f"cannot read the tokenizer ({path}): {reason}") from error


READERS: dict[str, Callable[[Any], Tokenizer]] = {  # of the JSON object in the file
    "char": lambda fields: CharTokenizer(fields["chars"]),
    "byte": lambda fields: ByteTokenizer(),
    "gpt2": lambda fields: GPT2Tokenizer(
        [base64.b64decode(token, validate=True) for token in fields["tokens"]], "tokenizer.json"
    ),
}


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the sha256 of everything that `save_tokenizer` writes."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()
