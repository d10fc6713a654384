"""A tokenizer in the values of a GGUF file: llama.cpp's own, and one of ours beside them."""

import json
from collections.abc import Mapping
from pathlib import Path

from gptjax.conversion.gguf_file import Value
from gptjax.errors import DataError, UsageError
from gptjax.gpt2_files import byte_alphabet, gpt2_merges, gpt2_spelling
from gptjax.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    parse_tokenizer,
    stored,
)

OWN = "gptjax.tokenizer"  # the JSON of our own file: what is exported is read back equal
NORMAL, CONTROL = 1, 3  # llama.cpp's numbers of a token's type


def describe(tokenizer: Tokenizer) -> tuple[dict[str, Value], list[str]]:
    """Return the values that say a vocabulary, and sentences on what llama.cpp makes of it.

    llama.cpp knows byte-level BPEs. Bytes, and characters of one byte each, are such with no merge.
    """
    values: dict[str, Value] = {OWN: json.dumps(stored(tokenizer))}
    letter = {byte: character for character, byte in byte_alphabet().items()}
    notes = []
    if isinstance(tokenizer, GPT2Tokenizer):
        tokens, merges, end = gpt2_spelling(tokenizer), gpt2_merges(tokenizer), tokenizer.start_id
    elif isinstance(tokenizer, ByteTokenizer):
        tokens, merges, end = [letter[byte] for byte in range(256)], [], 0  # no text has this byte
    elif isinstance(tokenizer, CharTokenizer) and tokenizer.chars.isascii():
        tokens, merges, end = [letter[ord(c)] for c in tokenizer.chars], [], tokenizer.start_id
        notes.append(
            "llama.cpp wants a token that ends a text, and this vocabulary has none: it is "
            f"{tokenizer.chars[end]!r}; llama-cli --ignore-eos goes on after it"
        )
    else:
        notes.append(
            f"llama.cpp has no tokenizer like this model's ({tokenizer.kind}): it can run the "
            "model on token ids only, and gptjax reads the whole vocabulary back"
        )
        return {
            "tokenizer.ggml.model": "none",
            "gpt2.vocab_size": tokenizer.n_vocab,
            **values,
        }, notes
    kinds = [NORMAL if token != END_OF_TEXT else CONTROL for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.start_id,
        "tokenizer.ggml.eos_token_id": end,
        **values,
    }, notes


def read_vocabulary(fields: Mapping[str, Value], path: Path) -> Tokenizer:
    """Return the tokenizer that the values of a file say.

    Raises:
        UsageError: it is of a kind that gptjax does not read, or there is none.
        DataError: it is damaged.
    """
    if OWN in fields:
        return parse_tokenizer(str(fields[OWN]), f"{OWN} of {path}")
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if kind != "gpt2" or not isinstance(tokens, list):
        raise UsageError(
            f"the vocabulary of {path} is of llama.cpp's kind {kind!r}, which gptjax does not read",
            "--tokenizer=FOLDER",
            "a run folder that has the model's own",
        )
    byte_of = byte_alphabet()
    try:
        texts = [bytes(byte_of[c] for c in str(token)) for token in tokens if token != END_OF_TEXT]
        return GPT2Tokenizer(texts, str(path))
    except KeyError as error:
        raise DataError(f"a token of {path} is not spelled in GPT-2's alphabet: {error}") from error
