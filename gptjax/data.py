"""Where tokens come from: named texts, files, nanoGPT's .bin folders, llm.c's shards.

A text is tokenised once, streaming, into uint16 files in the cache; everything else is memmapped
where it lies. `notify(line)` receives what a person should know, `progress(what, done, total)` the
bytes of a download or tokenisation.
"""

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from gptjax.errors import DataError, UsageError
from gptjax.files import Progress, cache_dir, download, file_sha256, read_json, replacing
from gptjax.text import (
    TextFile,
    encode_text,
    is_complete,
    require_uint16,
    take,
    write_tokens,
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
TRAIN_FRACTION = 0.9  # of the characters of a text; the rest is the validation split
SCANNED = 200_000_000  # tokens checked at the start, in 0.1 s; every batch is checked again
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256  # llm.c's header, in int32


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Token arrays (uint16, memmapped), train and validation, with the tokenizer that made them."""

    name: str
    tokenizer: Tokenizer
    train: list[np.ndarray]
    val: list[np.ndarray]


def load_dataset(
    dataset: str,
    *,
    block_size: int,
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
    try:
        path = Path(dataset).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
        found = [] if is_dir or is_file else sorted(path.parent.glob(path.name))
    except (OSError, ValueError, RuntimeError) as error:  # too long; no pattern; nobody's home
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--dataset={dataset}: no path or glob: {reason}") from error
    shards = [file for file in found if file.is_file()]
    read_text = functools.partial(
        load_text,
        kind=tokenizer,
        tokenizer_dir=tokenizer_dir,
        decode_errors=decode_errors,
        allow_special=allow_special,
        notify=notify,
        progress=progress,
    )
    if dataset == "auto" or dataset in DATASETS:
        loaded = read_text(*fetch(dataset, notify, progress))
    elif is_dir:
        loaded = load_folder(path, tokenizer, tokenizer_dir)
    elif is_file:
        loaded = read_text(path.name, path)
    elif shards:
        made = make_tokenizer(tokenizer, tokenizer_dir, auto="gpt2")
        loaded = load_shards(dataset, shards, made)
    else:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the names are {', '.join(DATASETS)}"
        raise UsageError(f"--dataset={dataset}: no such name, file, folder or glob; {hint}")
    for split in ("train", "val"):
        check_split(loaded, split, block_size)
    return loaded


# ---- Named texts, and any text


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
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write("\n".join(topics[key] for key in sorted(topics)).encode())
    else:
        try:
            download(url, sha256, path, progress=progress)
        except DataError as error:
            raise DataError(f"{name} is not to be had ({error})") from error
    return name, path


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


def load_text(
    name: str,
    path: Path,
    *,
    kind: str | Tokenizer,
    tokenizer_dir: str,
    decode_errors: str,
    allow_special: bool,
    notify: Notify,
    progress: Progress,
) -> Dataset:
    """Tokenise a text into the cache, or find it there."""
    text = TextFile(path, decode_errors)
    what, size = f"tokenising {name}", path.stat().st_size
    text.survey(lambda: progress(f"reading {name}", text.done, size))
    if text.replaced:
        notify(f"{path}: {text.replaced} bytes that are not UTF-8 were replaced by U+FFFD")
    n_train = int(text.length * TRAIN_FRACTION)
    if n_train in (0, text.length):
        raise DataError(f"{text.length} characters ({path}): too few for a train and a val split")
    tokenizer = make_tokenizer(kind, tokenizer_dir, auto="char", chars="".join(text.chars))
    require_uint16(tokenizer.n_vocab)

    made_from = (file_sha256(path), fingerprint(tokenizer), decode_errors, allow_special)
    identity = repr((1, TRAIN_FRACTION, *made_from))  # 1: the format's version
    folder = cache_dir() / "tokens" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if not is_complete(folder):
        parts = (take(text, 0, n_train), take(text, n_train, text.length))
        splits = {
            name: encode_text(tokenizer, part, allow_special=allow_special)
            for name, part in zip(("train", "val"), parts, strict=True)
        }
        write_tokens(folder, splits, tokenizer, lambda: progress(what, text.done, size))
    loaded = load_folder(folder, "auto", "")
    return dataclasses.replace(loaded, name=name)


# ---- Token files ---------------------------------------------------------------------------------


def load_folder(folder: Path, kind: str | Tokenizer, tokenizer_dir: str) -> Dataset:
    """Open train.bin and val.bin (nanoGPT's layout: uint16, little endian)."""
    missing = [f"{s}.bin" for s in ("train", "val") if not (folder / f"{s}.bin").is_file()]
    if missing:
        raise UsageError(f"--dataset={folder}: has no {' and no '.join(missing)}")
    if kind == "auto" and (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    elif kind == "auto" and (folder / "meta.pkl").is_file():
        raise DataError(
            f"{folder / 'meta.pkl'} is a pickle, which may run any code, so it is never read; pass "
            "the text itself as --dataset, or --tokenizer=gpt2 if that made the tokens"
        )
    else:
        tokenizer = make_tokenizer(kind, tokenizer_dir, auto="gpt2")
    counts = {}
    if (folder / "meta.json").is_file():
        counts = read_json(folder / "meta.json").get("tokens", {})
        if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
            raise DataError(
                f"tokens={counts!r} ({folder / 'meta.json'}): expected a count by split"
            )
    splits = {s: [open_tokens(folder / f"{s}.bin", counts.get(s))] for s in ("train", "val")}
    return Dataset(str(folder), tokenizer, **splits)


def open_tokens(path: Path, expected: int | None = None, offset: int = 0) -> np.ndarray:
    """Memmap a file of uint16; DataError if its size is odd or not the expected token count."""
    size = path.stat().st_size
    if size % 2:
        raise DataError(f"{path} has {size} bytes: not a multiple of 2 (uint16); copy it again")
    found = (size - offset) // 2
    if expected is not None and found != expected:
        raise DataError(f"{path}: expected {expected:,} tokens, found {found:,}; copy it again")
    if found <= 0:  # which numpy cannot map
        return np.zeros(0, "<u2")
    return np.memmap(path, "<u2", "r", offset=offset)


def load_shards(name: str, paths: list[Path], tokenizer: Tokenizer) -> Dataset:
    """Open llm.c shards: those with `val` in their name are validation, or else the last one."""
    val = [path for path in paths if "val" in path.name] or paths[-1:]
    train = [path for path in paths if path not in val]
    if not train:
        raise DataError(
            f"no shard is left to train on ({name}): {len(paths)} found, all validation"
        )
    return Dataset(name, tokenizer, [open_shard(p) for p in train], [open_shard(p) for p in val])


def open_shard(path: Path) -> np.ndarray:
    """Memmap the tokens behind a shard's header."""
    with path.open("rb") as file:
        header = np.frombuffer(file.read(4 * SHARD_HEADER).ljust(4 * SHARD_HEADER, b"\0"), "<i4")
    if tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise DataError(
            f"{path}: not a shard of llm.c (magic {SHARD_MAGIC}, version {SHARD_VERSION}); "
            "for nanoGPT's train.bin and val.bin pass their folder"
        )
    return open_tokens(path, int(header[2]), offset=4 * SHARD_HEADER)


def check_split(loaded: Dataset, split: str, block_size: int) -> None:
    """DataError if no window fits, or if an id among the first 200 million is too large."""
    shards = getattr(loaded, split)
    longest = max(len(shard) for shard in shards)
    if longest < block_size + 1:
        raise DataError(
            f"{longest} tokens in the {split} split ({loaded.name}): --block_size={block_size} "
            f"needs {block_size + 1}; the longest usable is {max(0, longest - 1)}"
        )
    n_vocab, scanned = loaded.tokenizer.n_vocab, 0
    for shard in shards:
        for start in range(0, min(len(shard), SCANNED - scanned), 2**20):
            chunk = shard[start : start + 2**20]
            if chunk.max() >= n_vocab:
                at = start + int(np.argmax(chunk >= n_vocab))
                raise DataError(
                    f"id {shard[at]} at position {at} >= vocab_size {n_vocab} ({split} split of "
                    f"{loaded.name}); the tokens were made with another tokenizer"
                )
        scanned += len(shard)
        if scanned >= SCANNED:
            return
