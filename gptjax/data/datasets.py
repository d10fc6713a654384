"""Where tokens come from: named texts, files, nanoGPT's .bin folders, llm.c's shards.

A text is tokenised once, streaming, into uint16 files in the cache; token files are memmapped where
they lie. `notify(line)` receives what a person should know, `progress(what, done, total)` the
bytes of a download or tokenisation.
"""

import dataclasses
import functools
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
    show_paths,
    writing_to_cache,
)
from gptjax.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    fingerprint,
    load_gpt2_tokenizer,
    load_tokenizer,
)

Notify = Callable[[str], None]

# name -> (address, sha256), or (None, None) for what comes with Python
DATASETS: dict[str, tuple[str | None, str | None]] = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "pydocs": (None, None),  # CPython's language reference, as pydoc shows it
}
SCANNED = 200_000_000  # tokens checked at the start, in 0.1 s; every batch is checked again


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Token arrays (memmapped), train and validation, with the tokenizer that made them.

    They are uint16, little endian, unless a file of the user's holds wider integers or others.
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
        UsageError: there is no such dataset, or the tokenizer does not go with it.
        DataError: what is there is damaged, too short, or not to be had.
    """
    name, found = find(dataset, "dataset", not val_dataset, notify, progress)
    given = find(val_dataset, "val_dataset", False, notify, progress)[1] if val_dataset else []
    train, val = choose_splits(name, found, given, alone=found == [Path(dataset).expanduser()])
    show = functools.partial(show_paths, among=[*found, *given])
    if val and val_fraction != TrainConfig.val_fraction:
        raise UsageError(
            f"--val_fraction={val_fraction}: whole files are the validation split ({show(val)}); "
            f"leave it at {TrainConfig.val_fraction}"
        )
    if len(found) > 1 or given:
        rest = show(val) if val else f"the last {100 * val_fraction:g} % of it"
        left = [path for path in found if path not in (*train, *val)]
        notify(f"train: {show(train)}; val: {rest}" + (f"; not used: {show(left)}" if left else ""))

    arrays: dict[str, list[np.ndarray]] = {}
    made, texts = tokenizer, {"train": train, "val": val}
    if hold_tokens(train):
        made = tokenizer_beside(train[0].parent, tokenizer, tokenizer_dir)
        opened = open_tokens([*train, *([] if given else val)], made, notify)
        arrays = {"train": opened[: len(train)], "val": opened[len(train) :]}
        del texts["train"]
    if not val or hold_tokens(val):
        del texts["val"]
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
    if given and "val" not in texts:
        require_same(val[0].parent, made)
        arrays["val"] = open_tokens(val, made, notify)
    if not val and "train" not in texts:
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
    """The name and the files of what a flag says; `both` as for `find_files`."""
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
    """The name and file of a named text; "auto" falls back to what needs no network."""
    if name == "auto":
        try:
            return fetch("tinyshakespeare", notify, progress)
        except DataError as error:
            notify(f"{error}; taking pydocs, Python's own documentation, instead")
            return fetch("pydocs", notify, progress)
    url, sha256 = DATASETS[name]
    path = cache_dir() / f"{name}.txt"
    if url is None or sha256 is None:
        text = "\n".join(topics[key] for key in sorted(topics)).encode()
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
            raise DataError(f"{name} is not to be had ({error})") from error
    return name, path


# ---- Tokenizers ----------------------------------------------------------------------------------


def make_tokenizer(
    kind: str | Tokenizer, tokenizer_dir: str = "", *, auto: str, chars: str = ""
) -> Tokenizer:
    """A tokenizer of this kind, or the one given; "auto" is `auto`, char needs the characters."""
    if not isinstance(kind, str):
        return kind
    kind = auto if kind == "auto" else kind
    if kind == "char" and not chars:
        raise UsageError(
            "--tokenizer=char: token files need the vocabulary they were made with; put its "
            "tokenizer.json beside them, or pass the text itself as --dataset"
        )
    makers: dict[str, Callable[[], Tokenizer]] = {
        "char": lambda: CharTokenizer(chars),
        "byte": ByteTokenizer,
        "gpt2": lambda: load_gpt2_tokenizer(tokenizer_dir),
    }
    return makers[kind]()


def tokenizer_beside(folder: Path, kind: str | Tokenizer, tokenizer_dir: str) -> Tokenizer:
    """The tokenizer that is asked for, or the one in the folder of token files, or else GPT-2's."""
    if kind == "auto" and (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    if kind == "auto" and (folder / "meta.pkl").is_file():
        raise DataError(
            f"{folder / 'meta.pkl'} is a pickle, which may run any code, so it is never read; pass "
            "the text itself as --dataset, or --tokenizer=gpt2 if that made the tokens"
        )
    return make_tokenizer(kind, tokenizer_dir, auto="gpt2")


def require_same(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse the validation tokens in a folder where another tokenizer has made them."""
    beside = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    if beside is None and tokenizer.kind == "char":
        raise UsageError(
            f"--val_dataset: no tokenizer.json says what made the tokens in {folder}, and the "
            "training data's are characters; pass the text itself"
        )
    if beside is not None and fingerprint(beside) != fingerprint(tokenizer):
        raise DataError(
            f"--val_dataset: the tokens in {folder} were made with another tokenizer "
            f"({beside.kind}) than the training data's ({tokenizer.kind}); pass the text itself"
        )


def check_split(loaded: Dataset, split: str, block_size: int) -> None:
    """DataError if no window fits, or if an id among the first 200 million is too large."""
    shards = getattr(loaded, split)
    longest = max(len(shard) for shard in shards)
    if longest < block_size + 1:
        tokens = plural(longest, "token")
        raise DataError(
            f"{longest} {tokens} in the {split} split ({loaded.name}): --block_size={block_size} "
            f"needs {block_size + 1}; the longest usable is {max(0, longest - 1)}"
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
