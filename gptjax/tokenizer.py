"""Text to token ids, and back: characters, bytes, GPT-2's BPE, tokenizer.json, or bare ids."""

import base64
import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import DataError, plural
from gptjax.files import replacing
from gptjax.gpt2_files import GPT2Tokenizer
from gptjax.hf_tokenizer import HFTokenizer
from gptjax.tokens import CONFIG, GENERATION, Tokenizer, check_ids, fit, to_utf8


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of the tokens, bytes that are not UTF-8 replaced by U+FFFD."""
    return tokenizer.decode_bytes(ids).decode(errors="replace")


class CharTokenizer(Tokenizer):
    """One token per character of a fixed set."""

    kind = "char"
    cuts = "anywhere"

    def __init__(self, chars: str) -> None:
        """Take the characters by id; DataError if there are none, or one occurs twice."""
        if not chars or len(set(chars)) != len(chars):
            raise DataError(
                "a character vocabulary must not be empty, and no character may occur twice"
            )
        to_utf8(chars)
        self.chars = chars
        self.n_vocab = len(chars)
        self.start_id = max(0, chars.find("\n"))
        self.codes = code_points(chars)
        self.order = np.argsort(self.codes)  # of the ids, by code point
        self.utf8 = [char.encode() for char in chars]

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return ids, (N,) int32."""
        codes = code_points(text)
        found = np.searchsorted(self.codes, codes, sorter=self.order)
        ids = self.order[found.clip(max=len(self.codes) - 1)]
        unknown = np.flatnonzero(self.codes[ids] != codes)
        if unknown.size:
            at = int(unknown[0])
            size = f"{len(self.codes)} {plural(len(self.codes), 'char')}"
            raise DataError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at {at} is not in the vocabulary "
                f"({size}); leave it out, or train with --tokenizer=byte or gpt2"
            )
        return ids.astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 of the tokens."""
        ids = check_ids(ids, self.n_vocab)
        return b"".join(self.utf8[i] for i in ids if i < len(self.utf8))

    def to_json(self) -> dict[str, object]:
        """Return what `load_tokenizer` reads."""
        return {"kind": self.kind, "chars": self.chars}


def code_points(text: str) -> np.ndarray:
    """Return the code point of each character, (N,) uint32; lone surrogates pass too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


class ByteTokenizer(Tokenizer):
    """One token per byte of the text's UTF-8."""

    kind = "byte"
    n_vocab = 256
    start_id = 10  # the newline
    cuts = "anywhere"

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return ids, (N,) int32."""
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 of the tokens."""
        return bytes(i for i in check_ids(ids, self.n_vocab) if i < 256)

    def to_json(self) -> dict[str, object]:
        """Return what `load_tokenizer` reads."""
        return {"kind": self.kind}


class IdsTokenizer(Tokenizer):
    """The ids themselves, written as numbers, for a model whose vocabulary is not known."""

    kind = "ids"
    start_id = 0

    def __init__(self, n_vocab: int) -> None:
        """Take the number of ids; DataError if there are none."""
        if type(n_vocab) is not int or n_vocab < 1:
            raise DataError(f"n_vocab={n_vocab!r}: a vocabulary has one id or more")
        self.n_vocab = n_vocab

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return the numbers in a text, white space between them, (N,) int32."""
        for word in text.split():
            if not re.fullmatch(r"[0-9]{1,9}", word):
                raise DataError(
                    f"{word[:40]!r} is not an id: with --tokenizer=ids a text is numbers, with "
                    "spaces between them"
                )
        return np.array(check_ids(map(int, text.split()), self.n_vocab), np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the numbers, each behind a space, so that texts may be joined."""
        return "".join(f" {i}" for i in check_ids(ids, self.n_vocab)).encode()

    def to_json(self) -> dict[str, object]:
        """Return what `load_tokenizer` reads."""
        return {"kind": self.kind, "n_vocab": self.n_vocab}


class StreamDecoder:
    """A decoder of ids as they come, which returns a character once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = ()) -> None:
        """Begin a text, perhaps behind the ids of another one, which is not returned."""
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ids = [] if tokenizer.joined else [int(i) for i in before]
        self.begin, self.shown = 0, len(self.ids)

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
        if self.tokenizer.joined:
            return self.decoder.decode(self.tokenizer.decode_bytes(ids))
        self.ids.extend(int(i) for i in ids)
        return self._new_text(final=False)

    def flush(self) -> str:
        """Return what an unfinished character at the end becomes."""
        if self.tokenizer.joined:
            return self.decoder.decode(b"", final=True)
        return self._new_text(final=True)

    def _new_text(self, *, final: bool) -> str:
        """Return what the ids that are not shown yet add to those right before them.

        How a token is written may depend on its neighbours: there is a space between words and
        none before the first, and bytes may wait for others of their character.
        """
        known = decode(self.tokenizer, self.ids[self.begin : self.shown])
        whole = decode(self.tokenizer, self.ids[self.begin :])
        if not final and (whole.endswith("\ufffd") or self.tokenizer.waiting & {*self.ids[-1:]}):
            return ""
        if decode(self.tokenizer, self.ids[self.shown :]):
            self.begin = self.shown  # without a text before it a token is written as the first one
        self.shown = len(self.ids)
        return whole[len(known) :]


# ---- Our own file of a tokenizer -----------------------------------------------------------------


def save_tokenizer(tokenizer: Tokenizer, folder: Path, name: str = "tokenizer.json") -> None:
    """Write the tokenizer's file, whole or not at all; a tokenizer.json alone stays as it is."""
    text = json.dumps(stored(tokenizer)) + "\n"
    if isinstance(tokenizer, HFTokenizer) and not tokenizer.fitted:
        alone = tokenizer.files == {"tokenizer.json": tokenizer.text}
        text = tokenizer.text if alone else text
    with replacing(folder / name) as file:
        file.write(text.encode())


def stored(tokenizer: Tokenizer) -> dict[str, object]:
    """Return what the file of a tokenizer holds: itself, its files, what its model says of it."""
    files = {"files": dict(tokenizer.files)} if tokenizer.files else {}
    model = {"model": dict(tokenizer.fitted)} if tokenizer.fitted else {}
    return tokenizer.to_json() | files | model


def load_tokenizer(folder: Path, name: str = "tokenizer.json") -> Tokenizer:
    """Read the tokenizer file of a run or data folder; DataError if it is missing or damaged.

    It is our own, or one of the tokenizers library.
    """
    path = folder / name
    try:
        text = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the tokenizer ({path}): {error}") from error
    return parse_tokenizer(text, str(path))


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """Return the tokenizer in the JSON text of such a file; DataError if it is damaged."""
    try:
        fields = json.loads(text)
        if "kind" not in fields:
            return HFTokenizer(text, {"tokenizer.json": text})
        tokenizer = READERS[fields["kind"]](fields)
        said = fields.get("model", {})
        n_ids = said.get("n_ids", tokenizer.n_vocab)
        if type(n_ids) is not int or n_ids < tokenizer.n_vocab:
            raise DataError(f"n_ids={n_ids!r}: the vocabulary has {tokenizer.n_vocab} tokens")
        fit(tokenizer, n_ids, {file: said[file] for file in (CONFIG, GENERATION) if file in said})
        return tokenizer
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, DataError) else repr(error)
        raise DataError(f"cannot read the tokenizer ({where}): {reason}") from error


READERS: dict[str, Callable[[Any], Tokenizer]] = {  # of the JSON object in the file
    "char": lambda fields: CharTokenizer(fields["chars"]),
    "byte": lambda fields: ByteTokenizer(),
    "gpt2": lambda fields: GPT2Tokenizer(
        [base64.b64decode(token, validate=True) for token in fields["tokens"]],
        "tokenizer.json",
        fields.get("files"),
    ),
    "ids": lambda fields: IdsTokenizer(fields["n_vocab"]),
    "hf": lambda fields: HFTokenizer(
        fields.get("tokenizer") or fields["files"]["tokenizer.json"], fields["files"]
    ),
}


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the sha256 of what `save_tokenizer` writes, of GPT-2's tokenizer without the files.

    They say the same again, so its tokens are the same with and without them.
    """
    fields = stored(tokenizer)
    if tokenizer.kind == "gpt2":
        fields.pop("files", None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
