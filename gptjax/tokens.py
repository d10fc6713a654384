"""The ground of all tokenizers: what each of them has, and what its model says of it."""

from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, Protocol

import numpy as np

from gptjax.errors import DataError, plural

TOKENIZER_DIR = (  # the help of that flag
    "Folder with GPT-2's vocab.bpe and encoder.json, or merges.txt and vocab.json, so that gpt2 "
    "needs no network."
)
END_OF_TEXT = "<|endoftext|>"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # fields of config.json
CONFIG, GENERATION = "config.json", "generation_config.json"  # the files that have such fields
NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}


class Tokenizer(Protocol):
    """What every tokenizer has; unknown characters and ids raise DataError."""

    kind: str
    n_vocab: int  # ids of the model; those behind the tokens' own stand for no text
    start_id: int  # what an empty prompt starts from
    eos: tuple[int, ...] = ()  # the ids that end a text; the first of them goes between texts
    # Where a text may be cut with no change of its ids: between any two characters, before a space
    # or newline, or nowhere.
    cuts: Literal["anywhere", "spaces", "nowhere"] = "spaces"
    joined: bool = True  # whether the bytes of a text are those of its tokens, one behind the other
    waiting: Set[int] = frozenset()  # if not: ids whose text may depend on those behind them
    named: Mapping[str, Any] = NO_IDS  # bos_token_id and eos_token_id, unless the model says others
    fitted: Mapping[str, Any] = {}  # what the model says, where it differs, as `fit` takes it
    files: Mapping[str, str] = {}  # of Hugging Face, by name, to export as they came

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Return ids, (N,) int32; special tokens in it are text unless they are allowed."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 of the tokens; a part of a character may stand at either end."""

    def to_json(self) -> dict[str, object]:
        """Return everything that `load_tokenizer` needs, without what `fit` added."""


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


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each printable character of GPT-2's files stands for.

    A printable Latin-1 character stands for itself; the others get the characters from U+0100 on.
    """
    byte_of = {chr(b): b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    others = (b for b in range(256) if chr(b) not in byte_of)
    return byte_of | {chr(256 + n): b for n, b in enumerate(others)}


# ---- What a model says of its tokenizer ----------------------------------------------------------


def fit(tokenizer: Tokenizer, n_vocab: int, said: Mapping[str, Mapping[str, Any]]) -> None:
    """Let a tokenizer serve a model that may have more ids, and special ids of its own.

    What differs from the tokenizer's own is kept in `fitted`, for its file. As transformers
    generates text, generation_config.json comes before config.json. Ids outside the vocabulary,
    such as the 50256 that a small model's config.json may have by default, start and end nothing.

    Args:
        tokenizer: a new one, with at most so many tokens.
        n_vocab: ids of the model.
        said: the fields SPECIAL_IDS, as far as they are there, of each of the files CONFIG and
            GENERATION that there is; {} where nothing is known.
    """
    fitted: dict[str, Any] = {}
    if n_vocab != tokenizer.n_vocab:
        fitted["n_ids"] = tokenizer.n_vocab = n_vocab
    config, own = said.get(CONFIG, {}), tokenizer.named
    for file, fields in said.items():
        before = own if file == CONFIG else {**own, **config}
        if any(fields[name] != before.get(name) for name in fields) or (
            file == CONFIG and tokenizer.kind == "hf"
        ):
            fitted[file] = dict(fields)
    tokenizer.fitted = fitted
    both = {**own, **config, **said.get(GENERATION, {})}
    if any(both[name] != own.get(name) for name in both):
        start, end = both["bos_token_id"], both["eos_token_id"]
        ends = end if isinstance(end, list) else [end]
        tokenizer.eos = tuple(dict.fromkeys(i for i in ends if is_id(i, n_vocab)))
        if is_id(start, n_vocab):
            tokenizer.start_id = start


def is_id(value: object, n_vocab: int) -> bool:
    """Return whether a value of a file, which may be anything, is an id of this vocabulary."""
    return type(value) is int and 0 <= value < n_vocab


def published_ids(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Return the special ids for each of the files CONFIG and GENERATION, as they were."""
    return {CONFIG: dict(tokenizer.named)} | {
        file: fields for file, fields in tokenizer.fitted.items() if file in (CONFIG, GENERATION)
    }
