"""A tokenizer in the values of a GGUF file: llama.cpp's own, and one of ours beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.conversion.gguf_file import Value
from gptjax.errors import DataError, UsageError
from gptjax.gpt2_files import GPT2_VOCAB, gpt2_merges, gpt2_spelling, gpt2_tokens
from gptjax.hf_tokenizer import HFTokenizer
from gptjax.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    parse_tokenizer,
    stored,
)
from gptjax.tokens import (
    CONFIG,
    END_OF_TEXT,
    byte_alphabet,
    fit,
    is_id,
    published_ids,
)

OWN = "gptjax.tokenizer"  # the JSON of our own file: what is exported is read back equal
KEY = "tokenizer.ggml."
# llama.cpp's numbers of a token's type: of a merge, found only where special tokens are allowed,
# found in every text, of no text.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# Fields of config.json -> what llama.cpp calls them.
IDS = {
    "bos_token_id": f"{KEY}bos_token_id",
    "eos_token_id": f"{KEY}eos_token_id",
    "pad_token_id": f"{KEY}padding_token_id",
}
ADDED = (f"{KEY}add_bos_token", f"{KEY}add_eos_token")
OTHER_FLAG = ("--tokenizer=FILE_OR_FOLDER", "that has the model's own")


class Bpe(NamedTuple):
    """A byte-level BPE as llama.cpp knows it: each token with its type, and the merges."""

    tokens: dict[int, tuple[str, int]]  # by id, in the printable alphabet of GPT-2's files
    merges: list[str]


# ---- Out -----------------------------------------------------------------------------------------


def describe(tokenizer: Tokenizer) -> tuple[dict[str, Value], list[str]]:
    """Return the values that say a vocabulary, and sentences on what llama.cpp makes of it."""
    own: dict[str, Value] = {OWN: json.dumps(stored(tokenizer))}
    bpe, n_vocab = as_bpe(tokenizer), tokenizer.n_vocab
    if bpe is None:
        said = (
            f"llama.cpp has no tokenizer like this model's ({tokenizer.kind}): it can run the "
            "model on token ids only, and gptjax reads the whole vocabulary back"
        )
        return {f"{KEY}model": "none", "gpt2.vocab_size": n_vocab, **own}, [said]
    listed = [bpe.tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(n_vocab)]
    values: dict[str, Value] = {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": "gpt-2",
        f"{KEY}tokens": [token for token, _ in listed],
        f"{KEY}token_type": [kind for _, kind in listed],
        f"{KEY}merges": bpe.merges,
        IDS["bos_token_id"]: tokenizer.start_id,
    }
    notes = []
    if tokenizer.eos:
        values[IDS["eos_token_id"]] = tokenizer.eos[0]
    elif isinstance(tokenizer, ByteTokenizer):
        values[IDS["eos_token_id"]] = 0  # which no text has
    else:
        values[IDS["eos_token_id"]] = tokenizer.start_id
        notes.append(
            "llama.cpp wants a token that ends a text, and this vocabulary has none: it gets "
            f"{tokenizer.decode_bytes([tokenizer.start_id]).decode(errors='replace')!r}, and "
            "llama-cli --ignore-eos goes on behind it"
        )
    pad: Any = published_ids(tokenizer)[CONFIG].get("pad_token_id")
    if is_id(pad, n_vocab):
        values[IDS["pad_token_id"]] = pad
    return {**values, **own}, notes


def as_bpe(tokenizer: Tokenizer) -> Bpe | None:
    """Return a tokenizer as a byte-level BPE with GPT-2's pattern, None if it is nothing like it.

    Bytes, and characters of one byte each, are such a BPE without merges.
    """
    letter = {byte: character for character, byte in byte_alphabet().items()}
    if isinstance(tokenizer, GPT2Tokenizer):
        words = gpt2_spelling(tokenizer)
        tokens = {i: (word, NORMAL) for i, word in enumerate(words)}
        return Bpe({**tokens, len(words) - 1: (END_OF_TEXT, CONTROL)}, gpt2_merges(tokenizer))
    if isinstance(tokenizer, ByteTokenizer):
        return Bpe({i: (letter[i], NORMAL) for i in range(256)}, [])
    if isinstance(tokenizer, CharTokenizer) and tokenizer.chars.isascii():
        return Bpe({i: (letter[ord(c)], NORMAL) for i, c in enumerate(tokenizer.chars)}, [])
    # Where a text may be cut at spaces, GPT-2's pattern does so, and nothing changes the text.
    if not isinstance(tokenizer, HFTokenizer) or tokenizer.cuts != "spaces":
        return None
    fields = json.loads(tokenizer.backend.to_str())
    model, added = fields["model"], fields["added_tokens"]
    odd = [model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    odd += [model.get("ignore_merges"), fields["pre_tokenizer"]["add_prefix_space"]]
    if model["type"] != "BPE" or any(odd) or any(token["single_word"] for token in added):
        return None
    tokens = {i: (token, NORMAL) for token, i in model["vocab"].items()}
    for token in added:
        tokens[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if len({token for token, _ in tokens.values()}) < len(tokens):  # llama.cpp would end there
        return None
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Bpe(tokens, merges)


# ---- In ------------------------------------------------------------------------------------------


def read_vocabulary(fields: Mapping[str, Value], path: Path, rows: int) -> Tokenizer:
    """Return the tokenizer that the values of a file say, for a model of so many rows.

    Raises:
        UsageError: it is of a kind that gptjax does not read, or there is none.
        DataError: it is damaged, or of another model.
    """
    if OWN in fields:
        tokenizer = parse_tokenizer(str(fields[OWN]), f"{OWN} of {path}")
    else:
        tokenizer = read_llamacpp(fields, path)
    if tokenizer.n_vocab != rows:
        text = f"the vocabulary of {path} has {tokenizer.n_vocab} tokens, and the model {rows}"
        raise DataError(text, *OTHER_FLAG)
    return tokenizer


def read_llamacpp(fields: Mapping[str, Value], path: Path) -> Tokenizer:
    """Return the tokenizer that llama.cpp's values say; raise as `read_vocabulary` does."""
    kind, pre = fields.get(f"{KEY}model"), fields.get(f"{KEY}pre")
    tokens, merges = (fields.get(f"{KEY}{name}") for name in ("tokens", "merges"))
    if kind != "gpt2":
        text = f"the vocabulary of {path} is of llama.cpp's kind {kind!r}, and gptjax reads 'gpt2'"
        raise UsageError(text, *OTHER_FLAG)
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise DataError(f"the vocabulary of {path} has no tokens, or no merges", *OTHER_FLAG)
    types: Any = fields.get(f"{KEY}token_type")
    if types is None:
        types = [CONTROL if token == END_OF_TEXT else NORMAL for token in tokens]
    words = [str(token) for token in tokens]
    kinds = set(types) if isinstance(types, list) and len(types) == len(words) else {None}
    if not kinds <= {NORMAL, CONTROL, USER_DEFINED, UNUSED} or len(set(words)) < len(words):
        text = "its tokens are not all different, or their types are none of a BPE"
        raise DataError(f"cannot read the vocabulary ({path}): {text}", *OTHER_FLAG)
    bpe = Bpe(dict(enumerate(zip(words, types, strict=True))), [str(merge) for merge in merges])
    tokenizer = of_bpe(bpe, pre, path)
    said = {name: fields[theirs] for name, theirs in IDS.items() if theirs in fields}
    fit(tokenizer, len(words), {CONFIG: said})
    return tokenizer


def added_to_a_text(fields: Mapping[str, Value]) -> tuple[str, ...]:
    """Return a sentence on what llama.cpp adds to a text, if there is anything."""
    added = [key for key in ADDED if fields.get(key) is True]
    if not added:
        return ()
    return (
        f"llama.cpp adds a token to a text for this model ({', '.join(added)}); gptjax adds "
        "nothing: write what a prompt needs, with --allow_special",
    )


def of_bpe(bpe: Bpe, pre: Value | None, path: Path) -> Tokenizer:
    """Return the tokenizer of a BPE: GPT-2's, or one that the tokenizers library runs."""
    used = {word: i for i, (word, kind) in bpe.tokens.items() if kind != UNUSED}
    of_gpt2 = pre in (
        None,
        "default",
        "gpt-2",
    )  # old files, and those of unknown tools, say nothing
    if of_gpt2 and len(used) == GPT2_VOCAB and (tokens := gpt2_tokens(used)):
        return GPT2Tokenizer(tokens, str(path))
    if pre != "gpt-2":
        text = f"the vocabulary of {path} has llama.cpp's pre-tokenizer {pre!r}"
        raise UsageError(f"{text}, and gptjax reads 'gpt-2'", *OTHER_FLAG)
    normal = {word: i for word, i in used.items() if bpe.tokens[i][1] == NORMAL}
    letters = byte_alphabet()
    if strange := [word for word in normal if not set(word) <= letters.keys()]:
        text = f"the token {strange[0][:40]!r} is not spelled in GPT-2's alphabet"
        raise DataError(f"cannot read the vocabulary ({path}): {text}", *OTHER_FLAG)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    text = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": i, "content": word, "special": bpe.tokens[i][1] == CONTROL, **flags}
                for word, i in used.items()
                if word not in normal
            ],
            "pre_tokenizer": {**byte_level, "use_regex": True},
            "decoder": {**byte_level, "use_regex": True},
            "model": {"type": "BPE", "vocab": used, "merges": bpe.merges},
        }
    )
    try:
        return HFTokenizer(text, {})
    except DataError as error:
        raise DataError(f"cannot read the vocabulary ({path}): {error}", *OTHER_FLAG) from error
