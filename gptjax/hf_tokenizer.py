"""Tokenizers of any kind, run by Hugging Face's tokenizers library from a tokenizer.json."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from gptjax.errors import DataError, first_line
from gptjax.tokens import END_OF_TEXT, NO_IDS, Tokenizer, byte_alphabet, check_ids, to_utf8

SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *SENTENCEPIECE)
FILES = (  # that are kept
    *VOCABULARIES,
    *("merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.jinja"),
)
LARGEST = 10_000_000  # ids that are believed
BOS_EOS = ("bos_token", "eos_token")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # name the special tokens
# A byte in a vocabulary of characters; only a whole run of them says which character it is.
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class HFTokenizer(Tokenizer):
    """A tokenizer.json, and the files that lay beside it, kept for export byte for byte.

    The library adds nothing: no tokens before or behind a text, no padding, and it cuts nothing
    off. Which bytes a token of a byte-level vocabulary stands for is looked up here, so that
    nothing is lost; other kinds are decoded by the library, which puts spaces between words.
    """

    kind = "hf"

    def __init__(self, text: str, files: Mapping[str, str]) -> None:
        """Take a tokenizer.json's text, and by name those of all files to export.

        Bytes that are no UTF-8 are lone surrogates in them (`surrogateescape`).

        Raises:
            DataError: the library cannot read it, or an id is beyond belief.
        """
        self.text, self.files = text, checked_files(files)
        self.backend = read_library(text)
        vocab = vocabulary(self.backend)
        self.n_vocab = self.n_tokens = max(vocab.values()) + 1
        names = special_tokens(files)
        self.named = {f"{name}_id": vocab.get(names.get(name, "")) for name in BOS_EOS}
        if not any(name in names for name in BOS_EOS):  # a tokenizer.json alone
            self.named = dict.fromkeys(NO_IDS, vocab.get(END_OF_TEXT))
        start, end = (self.named[f"{name}_id"] for name in BOS_EOS)
        self.eos = () if end is None else (end,)
        first = vocab.get(names.get("cls_token", "[CLS]"))  # what begins a text for BERT
        self.start_id = next((i for i in (start, end, first) if i is not None), 0)
        added = self.backend.get_added_tokens_decoder()
        self.joined = isinstance(self.backend.decoder, decoders.ByteLevel)
        self.utf8 = spell(vocab, {i: token.content for i, token in added.items()})
        self.waiting = {i for token, i in vocab.items() if BYTE_TOKEN.fullmatch(token)}
        plain = self.joined and self.backend.normalizer is None
        words = self.backend.pre_tokenizer
        at_spaces = plain and isinstance(words, pre_tokenizers.ByteLevel) and words.use_regex
        at_spaces = at_spaces and not words.add_prefix_space  # which each part would get
        for token in added.values():
            odd = token.lstrip or token.rstrip or re.search(r"\s", token.content)
            at_spaces = at_spaces and not odd
        self.cuts = "spaces" if at_spaces else "nowhere"
        # Without a token for the unknown, BPE leaves out what it does not know, and says nothing.
        self.exact = plain
        self.silent = (
            isinstance(self.backend.model, models.BPE) and not self.backend.model.unk_token
        )
        self.known: set[str] = set()  # characters that it does not leave out

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return ids, (N,) int32."""
        to_utf8(text)
        self.backend.encode_special_tokens = not allow_special
        if self.silent:
            for char in sorted(set(text) - self.known):
                self._require(char, text)
                self.known.add(char)
        return np.array(self._encode(text), np.int32)

    def _encode(self, text: str) -> list[int]:
        with refusing("the tokenizer cannot encode this text"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def _require(self, char: str, text: str) -> None:
        """Raise DataError if a character of a text has no tokens, or not all of its bytes."""
        ids = self._encode(char)
        if self.exact:
            ok = self.decode_bytes(ids).endswith(char.encode())
        else:
            ok = bool(ids) or char.isspace()
        if not ok:
            raise DataError(
                f"character {char!r} (U+{ord(char):04X}) at {text.index(char)} is not in the "
                f"vocabulary ({self.n_tokens} tokens); leave it out"
            )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 of the tokens; the special ones are written out."""
        ids = check_ids(ids, self.n_vocab)
        if self.joined:
            return b"".join(self.utf8.get(i, b"") for i in ids)
        with refusing("the tokenizer cannot decode these ids"):
            return self.backend.decode(ids, skip_special_tokens=False).encode()

    def token(self, i: int | None) -> str | None:
        """Return a token as the vocabulary spells it, None for no id."""
        return None if i is None else self.backend.id_to_token(i)

    def added_to_a_text(self) -> list[str]:
        """Return the tokens that transformers puts around a text unless it is told not to."""
        with refusing("the tokenizer cannot encode a text"):
            return self.backend.encode("", add_special_tokens=True).tokens

    def to_json(self) -> dict[str, object]:
        """Return what `load_tokenizer` reads."""
        same = self.files.get("tokenizer.json") == self.text
        own = {} if same else {"tokenizer": self.text}
        return {"kind": self.kind, **own, "files": self.files}


def checked_files(files: Mapping[str, str]) -> dict[str, str]:
    """Return the files to export, by name; DataError if one is no text, or no tokenizer's."""
    if not set(files) <= set(FILES) or not all(isinstance(f, str) for f in files.values()):
        raise DataError(f"its files are {', '.join(files)}, expected some of {', '.join(FILES)}")
    return dict(files)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever the library raises into a DataError, also its panics, no Exceptions."""
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {first_line(error)}") from error


def read_library(text: str) -> Library:
    """Return the library's tokenizer of this JSON; DataError if it cannot be read."""
    with refusing("not a tokenizer.json that the tokenizers library reads"):
        library = Library.from_str(text)
        library.no_truncation()
        library.no_padding()
        if isinstance(library.model, models.BPE):
            library.model.dropout = None  # which would draw the tokens at random
        return library


def vocabulary(library: Library) -> dict[str, int]:
    """Return the id of each token; DataError if there are none, or an id is not to be used."""
    return check_vocabulary(library.get_vocab(with_added_tokens=True))


def check_vocabulary(vocab: dict[str, int]) -> dict[str, int]:
    """Return the vocabulary; DataError if it is empty, or an id is not to be used."""
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= LARGEST:  # the library would write out all ids between, one by one
        raise DataError(f"a vocabulary of {size} ids; expected 1 to {LARGEST:,}")
    if len(set(vocab.values())) < len(vocab):
        raise DataError("two of its tokens have the same id")
    return vocab


def spell(vocab: Mapping[str, int], added: Mapping[int, str]) -> dict[int, bytes]:
    """Return the bytes of each token of a byte-level vocabulary; added ones are plain text."""
    byte_of = byte_alphabet()
    found = {i: content.encode() for i, content in added.items()}
    for token, i in vocab.items():
        if i not in found:
            known = all(c in byte_of for c in token)
            found[i] = bytes(byte_of[c] for c in token) if known else token.encode()
    return found


def special_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """Return the tokens that the files of a tokenizer name, such as eos_token; DataError."""
    found = {}
    for file in reversed([name for name in SETTINGS if name in files]):
        for name, value in read_object(files[file], file).items():
            value = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(value, str):
                found[name] = value
    return found


def read_object(text: str, name: str) -> dict[str, Any]:
    """Return the JSON object in a text; DataError if there is none."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {name}: {error}") from error
    return found
