"""The tokenizer of a model that others trained."""

import json
import re
from pathlib import Path
from typing import Any

from gptjax.conversion.tensors import Source
from gptjax.errors import DataError, UsageError, plural
from gptjax.files import read_json
from gptjax.gpt2_files import (
    GPT2_FILES,
    GPT2_VOCAB,
    load_gpt2_tokenizer,
    read_gpt2_files,
    write_gpt2_files,
)
from gptjax.hf_tokenizer import VOCABULARIES, HFTokenizer
from gptjax.meta_pickle import META, read_meta
from gptjax.tokenizer import (
    READERS,
    ByteTokenizer,
    GPT2Tokenizer,
    IdsTokenizer,
    Tokenizer,
    save_tokenizer,
    stored,
)
from gptjax.tokenizer_files import OWN_TOKENIZER, named_tokenizer, read_folder
from gptjax.tokens import CONFIG, GENERATION, SPECIAL_IDS, fit, published_ids

KINDS = ("auto", "gpt2", "byte", "ids")
PADDING = 1024  # rows that a model may have beyond the tokens of a kind that only a flag names


def find_tokenizer(source: Source, wanted: str, vocab_dir: str) -> Tokenizer:
    """Return the tokenizer that was asked for, or the one that belongs to the model.

    It is told the model's special ids, and its rows: there may be more of them than tokens.

    Args:
        source: the model, beside whose files its tokenizer may lie.
        wanted: auto, gpt2, byte, ids, or a file or folder.
        vocab_dir: as of `load_gpt2_tokenizer`.

    Raises:
        UsageError: no tokenizer is known, so the user must name one.
        DataError: it has more tokens than the model, or cannot be read.
    """
    folder, size = source.files[0].parent, source.cfg.vocab_size
    by_size = {ByteTokenizer.n_vocab: "byte", GPT2_VOCAB: "gpt2"}
    named = "or a FILE_OR_FOLDER that has the model's own"
    if size in by_size:
        how = (f"--tokenizer={by_size[size]}", named)
    else:
        how = ("--tokenizer=ids", f"which reads and prints numbers, {named}")
    model = f"the model ({source.where}) has {size} {plural(size, 'token')}"
    found: Tokenizer | None
    room = size
    if wanted == "auto":
        inside = source.tokenizer and source.tokenizer()
        found = inside or read_folder(folder, size) or read_nanogpt(source)
        room = 1 if inside and not inside.fitted else size  # a file holds its own model's tokens
        if found is None and size == GPT2_VOCAB:
            found = load_gpt2_tokenizer(vocab_dir)
        if found is None:
            raise UsageError(f"{model} and no tokenizer that gptjax reads", *how)
    elif wanted == "gpt2":
        own = size == GPT2_VOCAB and any((folder / name).is_file() for name in GPT2_FILES)
        found, room = (read_gpt2_files(folder) if own else load_gpt2_tokenizer(vocab_dir)), PADDING
    elif wanted == "byte":
        found, room = ByteTokenizer(), PADDING
    elif wanted == "ids":
        found = IdsTokenizer(size)
    else:
        found = named_tokenizer(wanted, KINDS, size)
    said = read_special_ids(folder)
    if found.fitted:  # by the run that it was taken from
        said = said or published_ids(found)
        found = READERS[found.kind](stored(found))  # without what that run's model says
    if found.n_vocab > size and wanted not in ("gpt2", "byte"):
        how = (f"--vocab_size={found.n_vocab}", "which gives each a row, or --tokenizer=ids")
    if not found.n_vocab <= size < found.n_vocab + room:
        raise DataError(f"{model}, its tokenizer ({found.kind}) has {found.n_vocab}", *how)
    fit(found, size, said)
    return found


def read_special_ids(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the special ids in a folder's config.json and generation_config.json, as `fit` does.

    Without a config.json there are none.
    """
    said: dict[str, dict[str, Any]] = {}
    for name in (CONFIG, GENERATION):
        if (folder / CONFIG).is_file() and (folder / name).is_file():
            fields = read_json(folder / name)
            said[name] = {field: fields[field] for field in SPECIAL_IDS if field in fields}
    return said


def read_nanogpt(source: Source) -> Tokenizer | None:
    """Return the characters of the dataset that a nanoGPT checkpoint was trained on, if it is here.

    nanoGPT looks for data/DATASET/meta.pkl from where it runs, which is mostly the folder that has
    its out_dir.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", source.dataset):
        return None
    data = Path("data") / source.dataset / META
    for path in (source.files[0].parent.parent / data, data):
        if path.is_file():
            return read_meta(path)
    return None


def write_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write a tokenizer's files for transformers, or gptjax's own where it has none like it.

    Files that came from such a folder are written byte for byte.
    """
    files = dict(tokenizer.files)
    if isinstance(tokenizer, GPT2Tokenizer):
        if "tokenizer.json" not in files:
            write_gpt2_files(tokenizer, folder)
        fields = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
        files = {"tokenizer_config.json": json.dumps(fields) + "\n", **files}
    elif isinstance(tokenizer, HFTokenizer):
        if not set(files) & set(VOCABULARIES):
            files = {**files, "tokenizer.json": tokenizer.text}
        if CONFIG not in tokenizer.fitted and "tokenizer_config.json" not in files:  # made here
            ends = {
                field.removesuffix("_id"): tokenizer.token(i)
                for field, i in tokenizer.named.items()
            }
            fields = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
            files = {**files, "tokenizer_config.json": json.dumps(fields | ends) + "\n"}
    else:
        save_tokenizer(tokenizer, folder, OWN_TOKENIZER)
    if (said := published_ids(tokenizer).get(GENERATION)) is not None:
        files = {GENERATION: json.dumps(said) + "\n", **files}
    for name, text in files.items():
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
