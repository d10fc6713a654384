"""The files of a dataset, and those of them that are its validation split."""

import collections
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax.config import TrainConfig
from gptjax.data.text_check import is_text
from gptjax.errors import DataError, UsageError
from gptjax.file_kinds import TOKENS, kind_of, read_head
from gptjax.files import show_paths

VAL_WORDS = {"val", "valid", "validation"}
TEXT_NAME = re.compile(r"\.(txt|text)(\.(gz|xz|bz2))?$", re.IGNORECASE)


def find_files(dataset: str, flag: str, both: bool, notify: Callable[[str], None]) -> list[Path]:
    """Return the files that a path, a glob or a folder's name in data/ stands for, in name order.

    Args:
        dataset: what the flag says.
        flag: its name, for messages.
        both: whether nanoGPT's folder needs train.bin and val.bin.
        notify: is told if other files are used than one may expect.

    Returns:
        Files, none where there are no such ones.

    Raises:
        UsageError: it cannot be a path, or its folder has no files of use.
    """
    try:
        path = Path(dataset).expanduser()
        if not path.exists() and (Path("data") / dataset).is_dir():  # as nanoGPT finds it
            path = Path("data") / dataset
        is_dir, is_file = path.is_dir(), path.is_file()
        is_other = path.exists() and not (is_dir or is_file)
        found = [] if is_dir or is_file or is_other else match(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long; nobody's home
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--{flag}={dataset}: is not a path or glob: {reason}") from error
    if is_other:
        raise UsageError(f"--{flag}={dataset}: is a pipe or device; write it to a file first")
    if is_dir:
        return folder_files(path, flag, both, notify)
    if is_file:
        return with_partner(path) if both else [path]
    return found


def match(pattern: Path) -> list[Path]:
    """Return the files that a glob matches; a folder that exists as written is no pattern."""
    fixed = next((folder for folder in pattern.parents if folder.is_dir()), Path())
    rest = str(pattern.relative_to(fixed))
    if rest.endswith("**"):
        rest += "/*"

    def is_hidden(path: Path) -> bool:
        return any(part[0] == "." for part in path.relative_to(fixed).parts)

    wants_hidden = any(part[0] == "." for part in Path(rest).parts)
    files: list[Path] = []
    for part in (rest, rest.replace("[", "[[]")):  # a bracket may belong to a name
        found = [] if files else sorted(path for path in fixed.glob(part) if path.is_file())
        files += [path for path in found if wants_hidden or not is_hidden(path)]
    return files


def folder_files(folder: Path, flag: str, both: bool, notify: Callable[[str], None]) -> list[Path]:
    """Return nanoGPT's train.bin and val.bin, or all token files, or all texts of a folder."""
    try:
        inside = sorted(path for path in folder.iterdir() if path.name[0] != ".")
        files = {path.name: path for path in inside if path.is_file()}
    except OSError as error:
        raise UsageError(f"--{flag}={folder}: cannot be read: {error.strerror}") from error
    bins = [files[name] for name in ("train.bin", "val.bin") if name in files]
    if len(bins) == 1 and both:
        missing = "val.bin" if bins[0].name == "train.bin" else "train.bin"
        raise UsageError(
            f"--{flag}={folder}: has no {missing}; pass --val_dataset, or {bins[0]} itself to hold "
            "back a part of it (--val_fraction)"
        )
    tokens = [path for path in files.values() if path.suffix in (".bin", ".npy")]
    texts = [path for path in files.values() if TEXT_NAME.search(path.name)]
    if not bins and tokens and texts:
        raise UsageError(
            f"--{flag}={folder}: holds token files ({tokens[0].name}) and texts ({texts[0].name}); "
            f"pass one kind as a glob, such as '{folder}/*{tokens[0].suffix}'"
        )
    if bins or tokens or texts:
        return bins or tokens or texts
    counts = collections.Counter(path.suffix or path.name for path in files.values())
    holds = ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(4))
    hint = f"it holds {holds}; pass a glob for other names" if counts else "it has no files"
    if "prepare.py" in files:
        hint = "run its prepare.py first"
    elif not counts and any(path.is_dir() for path in inside):
        hint = f"for the files in its folders pass '{folder}/**/*.txt', or .bin"
    raise UsageError(
        f"--{flag}={folder}: has no train.bin and no val.bin, no texts (.txt) and no shards "
        f"(.bin, .npy): {hint}"
    )


def with_partner(path: Path) -> list[Path]:
    """Return a token file, and if its name has the word train or val, the file with the other."""
    if are_tokens(path):
        pairs = [("train", word) for word in sorted(VAL_WORDS)]
        for old, new in [*pairs, *((val, train) for train, val in pairs)]:
            name = re.sub(rf"(?<![^\W\d_]){old}(?![^\W\d_])", new, path.name)
            other = path.with_name(name)
            if other != path and other.is_file() and are_tokens(other):
                return [path, other] if old == "train" else [other, path]
    return [path]


def split_by_name(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files to train on, and those with the word val, valid or validation in the name.

    Words end at whatever is no letter; folders count below the one that holds all the files.
    """
    top = os.path.commonpath([path.parent for path in files])
    words = {p: re.findall(r"[^\W\d_]+", str(p.relative_to(top)).lower()) for p in files}
    val = [path for path in files if VAL_WORDS.intersection(words[path])]
    train = [path for path in files if path not in val]
    if val and any("train" in words[path] for path in train):  # then a test split is none of both
        train = [path for path in train if "test" not in words[path]]
    return train, val


def are_tokens(path: Path) -> bool:
    """Return whether a file holds token ids, by its header, or by its name if it is no text."""
    head = read_head(path)
    kind = kind_of(head)
    text = len(head) >= 64 and is_text(head)
    return kind in TOKENS or (path.suffix == ".bin" and not text)


def hold_tokens(files: Sequence[Path]) -> bool:
    """Return whether files hold token ids rather than texts; DataError if only some do."""
    kinds = {path: are_tokens(path) for path in files}
    if len(set(kinds.values())) > 1:
        tokens = next(path for path in files if kinds[path])
        text = next(path for path in files if not kinds[path])
        raise DataError(f"{tokens} holds token ids and {text} does not: pass one kind by a glob")
    return kinds[files[0]]


def choose_splits(
    name: str,
    found: Sequence[Path],
    given: Sequence[Path],
    alone: bool,
    val_fraction: float,
    notify: Callable[[str], None],
) -> tuple[list[Path], list[Path]]:
    """Return the files to train on and those for validation, none if a part is to be held back.

    Args:
        name: of the dataset, for messages.
        found: its files.
        given: the files of a validation set of one's own.
        alone: whether the dataset is one file, named by its path.
        val_fraction: the part to hold back where no file is for validation.
        notify: is told of both splits where there are several files.

    Raises:
        DataError: nothing is left to train on.
        UsageError: a part is to be held back, but whole files are for validation.
    """
    train, val = (list(found), []) if alone else split_by_name(found)
    if given:
        val = split_by_name(given)[1] or list(given)
        mine = {path.resolve() for path in val}
        train = [path for path in train or found if path.resolve() not in mine]
    elif not val and len(train) > 1 and hold_tokens(train):
        train, val = train[:-1], train[-1:]  # as llm.c's data without a shard for validation
    if not train:
        raise DataError(
            f"no file is left to train on ({name}): all {len(found)} are for validation"
        )
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
    return train, val
