"""llm.c's tokenizer file: a header of 256 uint32, then each token behind its length.

Source: write_tokenizer in karpathy/llm.c, train_gpt2.py. llm.c decodes by it and encodes nothing,
so the file has no merges.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.errors import DataError, UsageError
from gptjax.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    stored,
)
from gptjax.tokens import END_OF_TEXT

NAME = "gpt2_tokenizer.bin"  # which llm.c looks for, whatever the model
MAGIC, HEADER = 20240328, 256
LIMIT = "its file of tokens has none that depend on others, or are longer than 255 bytes"
NO_TEXT = b"\0"  # of which llm.c prints nothing; it takes no empty token


class Written(NamedTuple):
    """Whether the file was written, and whether `read` gives the same tokenizer back."""

    written: bool
    whole: bool


def write(path: Path, tokenizer: Tokenizer) -> Written:
    """Write a tokenizer's tokens, unless the format has no place for them.

    llm.c begins a text behind the id that ends one, or else that of an empty prompt.
    """
    tokens = [tokenizer.decode_bytes([i]) or NO_TEXT for i in range(tokenizer.n_vocab)]
    if not tokenizer.joined or max(map(len, tokens)) > 255:
        return Written(False, False)
    end = tokenizer.eos[0] if tokenizer.eos else tokenizer.start_id
    header = np.zeros(HEADER, "<u4")
    header[:4] = MAGIC, 2, len(tokens), end
    path.write_bytes(header.tobytes() + b"".join(bytes([len(t)]) + t for t in tokens))
    try:
        return Written(True, stored(read(path)) == stored(tokenizer))
    except UsageError:
        return Written(True, False)


def read(path: Path) -> Tokenizer:
    """Return the tokenizer whose tokens these are: bytes, characters or GPT-2's.

    Raises:
        DataError: the file is damaged.
        UsageError: its tokens are of some other kind, whose merges it does not hold.
    """
    tokens = read_tokens(path)
    if tokens == [bytes([i]) for i in range(256)]:
        return ByteTokenizer()
    try:
        characters = [token.decode() for token in tokens]
    except UnicodeDecodeError:  # as GPT-2's, many of which are parts of a character
        characters = []
    if characters and all(len(c) == 1 for c in characters) and len(set(characters)) == len(tokens):
        return CharTokenizer("".join(characters))
    if tokens[-1:] == [END_OF_TEXT.encode()]:
        try:
            return GPT2Tokenizer(tokens[:-1], str(path))
        except DataError:  # another BPE
            pass
    raise UsageError(
        f"{path} has {len(tokens)} tokens, not GPT-2's, and does not say how a text becomes tokens",
        "--tokenizer=FOLDER",
        "a run folder that has the model's own",
    )


def read_tokens(path: Path) -> list[bytes]:
    """Return the tokens in order of id; DataError if the file is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    header = np.frombuffer(content[: 4 * HEADER], "<u4") if len(content) >= 4 * HEADER else [0]
    if header[0] != MAGIC:
        raise DataError(f"not a tokenizer of llm.c ({path}): no magic number {MAGIC}")
    version, count = int(header[1]), int(header[2])
    if version not in (1, 2):
        raise DataError(f"llm.c's tokenizer version {version} ({path}): gptjax reads 1 and 2")
    tokens, at = [], 4 * HEADER
    while at < len(content):
        end = at + 1 + content[at]
        tokens.append(content[at + 1 : end])
        at = end
    if at != len(content) or len(tokens) != count or b"" in tokens:
        found = f"{len(tokens)} tokens, expected {count}"
        raise DataError(f"a damaged tokenizer of llm.c ({path}): it holds {found}")
    return tokens
