"""Datasets: named texts, files of text, nanoGPT's .bin folders, llm.c's shards.

A text is tokenised once, streaming, into files in the cache; token files are memmapped where
they are. `notify(line)` takes lines for the user, `progress(what, done, total)` the bytes of a
download or tokenisation.
"""

import contextlib
import dataclasses
import functools
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from gptjax.config import TrainConfig
from gptjax.data.dataset_files import choose_splits, find_files, hold_tokens
from gptjax.data.text import tokenise
from gptjax.data.token_files import open_tokens
from gptjax.errors import DataError, UsageError, did_you_mean, plural
from gptjax.files import (
    Progress,
    cache_dir,
    download,
    replacing,
    writing_to_cache,
)
from gptjax.gpt2_files import load_gpt2_tokenizer
from gptjax.meta_pickle import META, read_meta
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer
from gptjax.tokenizer_files import named_tokenizer, read_folder

Notify = Callable[[str], None]

# name -> (address, sha256), or (None, None) for what comes with Python
DATASETS: dict[str, tuple[str | None, str | None]] = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "pydocs": (None, None),  # CPython's language reference
}
SCANNED = 200_000_000  # tokens checked at the start, in 0.1 s; every batch is checked again


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Memmapped token arrays for training and validation, with the tokenizer that made them.

    They are uint16, little endian, unless a file of the user's has another integer type.
    """

    name: str
    tokenizer: Tokenizer
    train: list[np.ndarray]
    val: list[np.ndarray]


def load_dataset(
    dataset: str,
    *,
    block_size: int,
    val_dataset: str = "",
    val_fraction: float = TrainConfig.val_fraction,
    tokenizer: str | Tokenizer = "auto",
    tokenizer_dir: str = "",
    decode_errors: str = "strict",
    allow_special: bool = False,
    notify: Notify = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Dataset:
    """Open a dataset by name, path or glob; TrainConfig says what may be given.

    Raises:
        UsageError: there is no such dataset, or the tokenizer does not fit it.
        DataError: the dataset is damaged, too short, or cannot be downloaded.
    """
    name, found = find(dataset, "dataset", not val_dataset, notify, progress)
    given = find(val_dataset, "val_dataset", False, notify, progress)[1] if val_dataset else []
    alone = found == [Path(dataset).expanduser()]
    train, val = choose_splits(name, found, given, alone, val_fraction, notify)
    # Files of token ids are opened where they lie, texts are tokenised; a split may be of either.
    own = train if given else [*train, *val]
    train_has_ids = hold_tokens(own)
    val_has_ids = hold_tokens(val) if given else train_has_ids
    arrays: dict[str, list[np.ndarray]] = {}
    texts = {} if train_has_ids else {"train": train}
    if val and not val_has_ids:
        texts["val"] = val
    made = tokenizer
    if train_has_ids:
        made = tokenizer_beside(train[0].parent, tokenizer, tokenizer_dir)
        opened = open_tokens(own, made, notify)
        arrays = {"train": opened[: len(train)], "val": opened[len(train) :]}
    if texts:
        made, encoded = tokenise(
            name,
            texts,
            0 if val else val_fraction,
            functools.partial(make_tokenizer, made, tokenizer_dir, auto="char"),
            decode_errors=decode_errors,
            allow_special=allow_special,
            notify=notify,
            progress=progress,
        )
        arrays |= encoded
    assert not isinstance(made, str)
    if given and val_has_ids:
        require_same(val[0].parent, made)
        arrays["val"] = open_tokens(val, made, notify)
    if not arrays["val"]:
        (whole,) = arrays["train"]
        cut = int(len(whole) * (1 - val_fraction))
        arrays = {"train": [whole[:cut]], "val": [whole[cut:]]}
        notify(f"{name}: its last {100 * val_fraction:g} % are the validation split")

    loaded = Dataset(name, made, **arrays)
    for split in arrays:
        check_split(loaded, split, block_size)
    return loaded


def find(
    dataset: str, flag: str, both: bool, notify: Notify, progress: Progress
) -> tuple[str, list[Path]]:
    """Return the name and the files of the dataset that a flag names; `both` as in `find_files`."""
    if dataset == "auto" or dataset in DATASETS:
        name, path = fetch(dataset, notify, progress)
        return name, [path]
    files = find_files(dataset, flag, both, notify)
    if files:
        return (files[0].name if files == [Path(dataset).expanduser()] else dataset), files
    known = [*DATASETS, *(path.name for path in Path("data").glob("*"))]
    hint = did_you_mean(dataset, known, f"the names are {', '.join(DATASETS)}")
    raise UsageError(f"--{flag}={dataset}: no such name, file, folder or glob; {hint}")


# ---- Named texts ---------------------------------------------------------------------------------


def fetch(name: str, notify: Notify, progress: Progress) -> tuple[str, Path]:
    """Return the name and file of a named text; "auto" falls back to what needs no network."""
    if name == "auto":
        try:
            return fetch("tinyshakespeare", notify, progress)
        except DataError as error:
            notify(f"{error}; using pydocs, Python's own documentation, instead")
            return fetch("pydocs", notify, progress)
    url, sha256 = DATASETS[name]
    path = cache_dir() / f"{name}.txt"
    if url is None or sha256 is None:
        text = python_documentation().encode()
        if not path.is_file() or path.read_bytes() != text:  # perhaps in a cache for reading only
            with writing_to_cache():
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write(text)
    else:
        try:
            with writing_to_cache():
                download(url, sha256, path, progress=progress)
        except DataError as error:
            raise DataError(f"cannot get {name}: {error}") from error
    return name, path


def python_documentation() -> str:
    """Return CPython's language reference, as pydoc shows it, without indentation and tables.

    A fifth of it would be spaces otherwise, and so would be what a small model writes.
    """
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics[key] for key in sorted(topics)))
    plain = (textwrap.dedent(part).strip() for part in paragraphs)
    return "\n\n".join(part for part in plain if not re.search(r"[|+=*~^-]{4}|\|", part))


# ---- Tokenizers ----------------------------------------------------------------------------------


def make_tokenizer(
    kind: str | Tokenizer, tokenizer_dir: str = "", *, auto: str, chars: str = ""
) -> Tokenizer:
    """Return a tokenizer of this kind, or the one given.

    Args:
        kind: auto, char, byte, gpt2, a file or folder that has a tokenizer, or a tokenizer.
        tokenizer_dir: as of `load_gpt2_tokenizer`.
        auto: the kind that "auto" means here.
        chars: the vocabulary of a char tokenizer.
    """
    if not isinstance(kind, str):
        return kind
    kind = auto if kind == "auto" else kind
    if kind not in MAKERS:
        return named_tokenizer(kind, ("auto", *MAKERS))
    if kind == "char" and not chars:
        raise UsageError(
            "--tokenizer=char: token files need the vocabulary they were made with; put its "
            "tokenizer.json beside them, or pass the text itself as --dataset"
        )
    return MAKERS[kind](chars, tokenizer_dir)


MAKERS: dict[str, Callable[[str, str], Tokenizer]] = {  # (chars, tokenizer_dir) -> tokenizer
    "char": lambda chars, _: CharTokenizer("".join(sorted(chars))),
    "byte": lambda *_: ByteTokenizer(),
    "gpt2": lambda _, tokenizer_dir: load_gpt2_tokenizer(tokenizer_dir),
}


def tokenizer_beside(folder: Path, kind: str | Tokenizer, tokenizer_dir: str) -> Tokenizer:
    """Return the tokenizer asked for, or the one in the folder of token files, or GPT-2's.

    Raises:
        DataError: it cannot be read, or nanoGPT's meta.pkl says that another made the tokens.
    """
    if kind == "auto" and (found := read_beside(folder)):
        return found
    if kind in MAKERS and not (folder / "tokenizer.json").is_file():
        found = None
        with contextlib.suppress(DataError):  # then the user knows better
            found = read_beside(folder)
        if found and kind == "char":
            return found
        if found:
            raise DataError(
                f"--tokenizer={kind}: {folder / META} has the characters of these tokens; leave "
                "the flag out, or pass the text itself as --dataset"
            )
    return make_tokenizer(kind, tokenizer_dir, auto="gpt2")


def read_beside(folder: Path) -> Tokenizer | None:
    """Return the tokenizer that lies with the token files of a folder, None if none does."""
    if (folder / "tokenizer.json").is_file():
        return read_folder(folder)
    return read_meta(folder / META) if (folder / META).is_file() else None


def require_same(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise an error if another tokenizer made the validation tokens in a folder."""
    beside = read_beside(folder)
    if beside is None and tokenizer.kind == "char":
        raise UsageError(
            f"--val_dataset: no tokenizer.json says what made the tokens in {folder}, and the "
            "training data's are characters; pass the text itself"
        )
    if isinstance(beside, HFTokenizer) and isinstance(tokenizer, HFTokenizer):
        same = beside.text == tokenizer.text  # whatever files lie beside it
    else:
        same = beside is None or beside.to_json() == tokenizer.to_json()
    if beside is not None and not same:
        raise DataError(
            f"--val_dataset: the tokens in {folder} were made with another tokenizer "
            f"({beside.kind}) than the training data's ({tokenizer.kind}); pass the text itself"
        )


def check_split(loaded: Dataset, split: str, block_size: int) -> None:
    """Raise DataError if no window fits, or if an id among the first 200 million is too large."""
    shards = getattr(loaded, split)
    longest = max(len(shard) for shard in shards)
    if longest < block_size + 1:
        tokens = plural(longest, "token")
        raise DataError(
            f"{longest} {tokens} in the {split} split ({loaded.name}): --block_size={block_size} "
            f"needs {block_size + 1}; the largest that fits is {max(0, longest - 1)}"
        )
    n_vocab, scanned = loaded.tokenizer.n_vocab, 0
    for shard in shards:
        for start in range(0, min(len(shard), SCANNED - scanned), 2**20):
            chunk = shard[start : start + 2**20]
            if chunk.min() < 0 or chunk.max() >= n_vocab:
                at = start + int(np.argmax((chunk < 0) | (chunk >= n_vocab)))
                raise DataError(
                    f"id {shard[at]} at position {at} is outside the vocabulary of {n_vocab} "
                    f"({split} split of {loaded.name}); the tokens were made with another tokenizer"
                )
        scanned += len(shard)
        if scanned >= SCANNED:
            return
