"""Files of token ids, memmapped: nanoGPT's .bin without a header, llm.c's shards, numpy's .npy."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gptjax.data.text_check import refuse_kind
from gptjax.errors import DataError, plural
from gptjax.file_kinds import SHORT, kind_of, read_head
from gptjax.files import read_json, show_paths
from gptjax.tokenizer import Tokenizer

HEADER = 256  # of a shard, in int32: magic number, version, count of tokens, zeros
SHARDS = {(20240520, 1): "u2", (20240801, 7): "i4"}  # for GPT-2's tokens, and for Llama 3's
NORM = "<u2"  # nanoGPT's and llm.c's, and what gptjax writes
# What else a file without a header may hold, the wider first: eight bytes are also twice four.
INTEGERS = ("<i8", ">i8", "<i4", ">i4")
FLOATS = ("<f8", ">f8", "<f4", ">f4")
BLOCKS, BLOCK = 32, 2**16  # the sample that tells them apart: so many blocks, of so many bytes
LEAST = 32  # ids that it takes to tell at all
LARGE = 2**20  # more than any vocabulary has


def open_tokens(
    paths: Sequence[Path], tokenizer: Tokenizer, notify: Callable[[str], None]
) -> list[np.ndarray]:
    """Return memory maps of token files, which must be of one kind.

    Args:
        paths: the files.
        tokenizer: that made the ids.
        notify: is told of files without a header that hold anything but plain uint16.

    Raises:
        DataError: a file is damaged, of another kind than the others, or holds no token ids.
    """
    kinds = {path: token_kind(path, tokenizer.n_vocab) for path in paths}
    for path, kind in kinds.items():
        refuse_kind(path, kind)
        if kind != "llm.c" and "llm.c" in kinds.values():
            raise DataError(f"{path}: is not a shard of llm.c, but other files of its dataset are")
    types = choose_types([path for path in paths if kinds[path] == ""], tokenizer)
    for dtype in dict.fromkeys(types.values()):
        those = [path for path in types if types[path] == dtype and promised_tokens(path) is None]
        if dtype != NORM and those:
            notify(
                f"{show_paths(those)}: read as {describe(dtype)}, judging by the bytes; if that is "
                f"wrong, write the number of tokens to a meta.json beside: {promise(those[0])}"
            )
    readers: dict[str, Callable[[Path], np.ndarray]] = {
        "llm.c": lambda path: open_shard(path, tokenizer.n_vocab),
        "npy": open_npy,
        "": lambda path: map_tokens(path, types[path]),
    }
    return [readers[kinds[path]](path) for path in paths]


def token_kind(path: Path, n_vocab: int) -> str:
    """Return what `kind_of` does, but "" for ids that only happen to begin with a short mark."""
    head = read_head(path)
    kind = kind_of(head)
    whole = head[: len(head) // 4 * 4]
    as_ids = any(in_range(np.frombuffer(whole, dtype), n_vocab).all() for dtype in (NORM, "<u4"))
    return "" if kind in SHORT and as_ids else kind


def describe(dtype: str) -> str:
    """Return a dtype in words: `int32` for "<i4", `big-endian int32` for ">i4"."""
    return f"{'big-endian ' if dtype[0] == '>' else ''}{np.dtype(dtype).name}"


def promise(path: Path) -> str:
    """Return the text of a meta.json that tells the number of tokens in this file."""
    return f'{{"tokens": {{"{path.stem}": NUMBER}}}}'


def map_tokens(path: Path, dtype: str = NORM, offset: int = 0) -> np.ndarray:
    """Return a memory map of a file's tokens; raise DataError if it ends within a token."""
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if (size - offset) % width:
        name = np.dtype(dtype).name
        raise DataError(
            f"{path} has {size} {plural(size, 'byte')}: not a multiple of {width} ({name}); copy "
            "it again"
        )
    if size <= offset:  # which numpy cannot map
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r", offset=offset)


def open_shard(path: Path, n_vocab: int) -> np.ndarray:
    """Return a memory map of a shard's tokens, in the byte order and width of its header."""
    header = read_head(path)[: 4 * HEADER].ljust(4 * HEADER, b"\0")
    size = path.stat().st_size - 4 * HEADER
    for order in "<>":
        magic, version, count = (int(x) for x in np.frombuffer(header, f"{order}i4")[:3])
        kind = SHARDS.get((magic, version))
        if kind is None:
            continue
        if np.dtype(kind).itemsize * count == size:
            return map_tokens(path, order + kind, 4 * HEADER)
        if size == 4 * count > 0:  # someone kept int32 behind a header that promises uint16
            wide = map_tokens(path, f"{order}i4", 4 * HEADER)
            if in_range(wide[:BLOCK], n_vocab).all():
                return wide
        found = size // np.dtype(kind).itemsize
        raise DataError(
            f"{path}: expected {count:,} {plural(count, 'token')}, found {found:,}; copy it again"
        )
    magic, version = np.frombuffer(header, "<i4")[:2]
    known = " or ".join(f"{magic} and {version}" for magic, version in SHARDS)
    raise DataError(
        f"{path}: is not a shard of llm.c, whose magic number and version are {known}; found "
        f"{magic} and {version}"
    )


def open_npy(path: Path) -> np.ndarray:
    """Return a memory map of an array that numpy saved: whole numbers in one dimension."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}: token ids are whole numbers in "
            "one dimension; save them as array.reshape(-1).astype(np.uint16)"
        )
    if array.dtype.itemsize == 8:  # no type holds both signs of 64 bits
        return array.view(f"{array.dtype.str[0]}i8")
    return array


# ---- Without a header, the bytes must tell -------------------------------------------------------


def choose_types(paths: Sequence[Path], tokenizer: Tokenizer) -> dict[Path, str]:
    """Return the dtype of each file; one that is too small to tell gets that of the others."""
    samples = {path: read_sample(path) for path in paths}
    promised = {path: promised_tokens(path) for path in paths}
    types = {
        path: guess_type(path, samples[path], tokenizer)
        if count is None
        else promised_type(path, samples[path], tokenizer.n_vocab, count)
        for path, count in promised.items()
    }
    for other in set(types.values()) - {NORM}:
        for path in paths:
            small = types[path] == NORM and promised[path] is None
            if small and in_range(samples[path].view(other), tokenizer.n_vocab).all():
                types[path] = other
    return types


def read_sample(path: Path) -> np.ndarray:
    """Return the bytes of blocks spread over the file, a multiple of eight."""
    size = path.stat().st_size // 8 * 8
    if size == 0:
        return np.zeros(0, np.uint8)
    data = np.memmap(path, np.uint8, "r")
    if size <= BLOCKS * BLOCK:
        return data[:size]
    starts = [i * (size - BLOCK) // (BLOCKS - 1) // 8 * 8 for i in range(BLOCKS)]
    return np.concatenate([data[start : start + BLOCK] for start in starts])


def promised_tokens(path: Path) -> int | None:
    """Return the number of tokens that a meta.json beside the file states, None without one."""
    meta = path.parent / "meta.json"
    if not meta.is_file():
        return None
    counts = read_json(meta).get("tokens", {})
    if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
        raise DataError(f"tokens={counts!r} ({meta}): expected a count by split")
    return counts.get(path.stem)


def promised_type(path: Path, sample: np.ndarray, n_vocab: int, count: int) -> str:
    """Return the dtype in which a file has so many tokens; raise DataError if there is none."""
    size = path.stat().st_size
    types = [t for t in (NORM, ">u2", *INTEGERS) if np.dtype(t).itemsize * count == size]
    fitting = [t for t in types if in_range(sample.view(t), n_vocab).all()]
    if fitting or NORM in types:  # an id outside the vocabulary will be named with its place
        return [*fitting, NORM][0]
    raise DataError(
        f"{path}: expected {count:,} {plural(count, 'token')}, found {size // 2:,}; copy it again"
    )


def in_range(values: np.ndarray, n_vocab: int) -> np.ndarray:
    """Return which of the values are ids: whole numbers from 0 up to the vocabulary."""
    with np.errstate(invalid="ignore"):
        return (values >= 0) & (values < n_vocab) & (values == np.floor(values))


def enough(values: np.ndarray, kinds: int) -> bool:
    """Return whether there are 32 nonzero values, `kinds` of them different, or more."""
    values = values[values != 0]
    return len(values) >= LEAST and len(np.unique(values)) >= kinds


def guess_type(path: Path, sample: np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the dtype of the ids in a file without a header.

    Uint16, unless all wider numbers are ids of the vocabulary (as uint16, every second id at least
    would be 0), or unless uint16 gives ids outside of it and its other byte order gives none.

    Raises:
        DataError: they are no integers, or beyond the vocabulary, or could be of two types.
    """
    n_vocab = tokenizer.n_vocab
    for dtype in FLOATS:
        values = sample.view(dtype)
        if in_range(values, n_vocab).all() and enough(values, 2):
            raise DataError(
                f"{path} holds {describe(dtype)}, and token ids are whole numbers: write it again "
                "with .astype(np.uint16)"
            )
    for dtype in INTEGERS:
        values = sample.view(dtype)
        if not in_range(values, n_vocab).all():
            continue
        has_zero = bool((values == 0).any())
        if not has_zero and enough(values, 2) and tokenizer.decode_bytes([0]).isspace():
            raise DataError(
                f"{path} holds {describe(dtype)}, or uint16 with white space (id 0) behind every "
                f"token: write the number of tokens to a meta.json beside it: {promise(path)}"
            )
        if enough(values, 2 if has_zero or dtype[1:] == "i8" else 4):
            return dtype
    ascii_only = len(sample) >= 1024 and sample.max() < 128 and (sample == 0).mean() < 0.1
    if ascii_only and len(np.unique(sample)) >= 8:
        raise DataError(
            f"{path} is plain text, or has one byte a token: pass the text itself, or write the "
            "ids again with .astype(np.uint16)"
        )
    if in_range(sample.view(NORM), n_vocab).all():
        return NORM
    swapped = sample.view(">u2")
    if in_range(swapped, n_vocab).all() and enough(swapped, 4):
        return ">u2"
    for dtype in INTEGERS:
        values = sample.view(dtype)
        ids = values[in_range(values, n_vocab)]
        some = len(ids) > len(values) / 2 and enough(ids, 4)
        if some and values.min() > -LARGE and values.max() < LARGE:
            raise DataError(
                f"{path} holds {describe(dtype)} from {values.min()} to {values.max()}, and the "
                f"vocabulary has {n_vocab} {plural(n_vocab, 'token')}: they were made with another "
                "tokenizer"
            )
    return NORM
