"""Another number of tokens or positions than a source has, while it is read."""

import dataclasses
import zlib
from typing import NamedTuple

import numpy as np

from gptjax.conversion.tensors import HEAD, Source
from gptjax.settings import require


class Resized(NamedTuple):
    """A source with other sizes, and a sentence about each change."""

    source: Source
    notes: list[str]


def resize(source: Source, vocab_size: int = 0, block_size: int = 0) -> Resized:
    """Return a source with other sizes; 0 keeps its own.

    Rows that are too many are left out. A new row of the embedding, and of an untied head, is drawn
    as the others are distributed: from the normal distribution that has, in each column, their mean
    and standard deviation. The same source always gets the same rows.

    Args:
        source: opened, not yet read.
        vocab_size: rows of the token embedding, without padding.
        block_size: rows of the position embedding, at most as many as there are.

    Raises:
        UsageError: a size is below 1, or there are fewer positions than asked for.
    """
    theirs, notes = source.cfg, []
    rows: dict[str, int] = {}  # of each tensor that changes
    if block_size not in (0, theirs.block_size):
        most = theirs.block_size
        rule = f"must be 1 to {most}: the model ({source.where}) has {most} positions"
        require(0 < block_size < most, "block_size", block_size, rule)
        rows["wpe.weight"] = block_size
        notes.append(
            f"block_size is {block_size}: positions {block_size} to {most - 1} are left out"
        )
    if vocab_size not in (0, theirs.vocab_size):
        require(vocab_size > 0, "vocab_size", vocab_size, "must be at least 1, or 0 for its own")
        rows |= {"wte.weight": vocab_size, HEAD: vocab_size}
        old, what = theirs.vocab_size, "the embedding" if theirs.tie_head else "embedding and head"
        notes.append(
            f"vocab_size is {vocab_size}: rows {vocab_size} to {old - 1} of {what} are left out"
            if vocab_size < old
            else f"vocab_size is {vocab_size}: rows {old} to {vocab_size - 1} of {what} are new, "
            "drawn with the mean and standard deviation of the others in each column"
        )
    if not rows:
        return Resized(source, [])
    cfg = dataclasses.replace(
        theirs,
        vocab_size=vocab_size or theirs.vocab_size,
        block_size=block_size or theirs.block_size,
    )
    old_rows = {"wpe.weight": theirs.block_size, "wte.weight": theirs.vocab_size}
    old_rows[HEAD] = theirs.vocab_size
    tensors = dict(source.tensors)
    for name, count in rows.items():
        shape, dtype = tensors.get(name, ((), ""))
        if shape[:1] == (old_rows[name],):  # any other shape is named as it is, later
            tensors[name] = (count, *shape[1:]), dtype

    def read(name: str) -> np.ndarray:
        tensor = source.read(name)
        count = rows.get(name, len(tensor))
        if count <= len(tensor):
            return tensor[:count]
        like = "wte.weight" if theirs.tie_head else name  # a tied head gets the same rows
        return np.concatenate([tensor, new_rows(tensor, count - len(tensor), like)])

    return Resized(source._replace(cfg=cfg, tensors=tensors, read=read), notes)


def new_rows(rows: np.ndarray, count: int, seed: str) -> np.ndarray:
    """Return rows (count, D), drawn with the mean and standard deviation of each column."""
    rows = rows.astype(np.float32, copy=False)
    generator = np.random.default_rng(zlib.crc32(seed.encode()))
    noise = generator.standard_normal((count, rows.shape[1]), np.float32)
    return rows.mean(axis=0) + rows.std(axis=0) * noise
