"""Batches as a pure function of (seed, step), so that there is no iterator's state to save.

A split is a list of token arrays (shards). Each epoch cuts it into windows of T+1 tokens, at a new
offset, and visits them all once in a new order.
"""

import functools
from collections.abc import Sequence

import numpy as np

from gptjax.errors import DataError, UsageError

Shards = Sequence[np.ndarray]


def windows_per_shard(shards: Shards, block_size: int) -> list[int]:
    """Return how many windows an epoch takes from each shard.

    One fewer than would fit, so that there is room for the offset; but at least one.
    """
    lengths = [len(shard) for shard in shards]
    return [max(1, (n - 1) // block_size - 1) if n > block_size else 0 for n in lengths]


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(n_windows: int, block_size: int, seed: int, epoch: int) -> tuple[np.ndarray, int]:
    """Return the permutation of an epoch's windows, and its offset in [0, T)."""
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return rng.permutation(n_windows), int(rng.integers(block_size))


def batch_starts(
    shards: Shards,
    *,
    seed: int,
    step: int,
    batch_size: int,
    block_size: int,
    process: int = 0,
    n_processes: int = 1,
) -> list[tuple[int, int]]:
    """Return (shard, start) of the rows from step * batch_size on of the endless stream of windows.

    With several processes each gets its own contiguous slice of the rows.

    Raises:
        UsageError: batch_size is not divisible by n_processes.
    """
    if batch_size % n_processes:
        raise UsageError(f"--batch_size={batch_size}: must be divisible by {n_processes} processes")
    share = batch_size // n_processes
    counts = windows_per_shard(shards, block_size)
    first = step * batch_size + process * share
    starts = []
    for row in range(first, first + share):
        epoch, i = divmod(row, sum(counts))
        order, offset = epoch_order(sum(counts), block_size, seed, epoch)
        shard, window = locate(int(order[i]), counts)
        slack = len(shards[shard]) - 1 - counts[shard] * block_size
        starts.append((shard, window * block_size + min(offset, slack)))
    return starts


def sample_batch(shards: Shards, *, block_size: int, n_vocab: int, **of: int) -> np.ndarray:
    """Return the windows (batch_size / n_processes, block_size + 1) at `batch_starts`, in int32.

    Raises:
        UsageError: batch_size is not divisible by n_processes.
        DataError: an id is not below n_vocab (JAX would clamp it silently).
    """
    return read_windows(
        shards, batch_starts(shards, block_size=block_size, **of), block_size, n_vocab
    )


def locate(window: int, counts: Sequence[int]) -> tuple[int, int]:
    """Return which shard holds a window, and which of that shard's windows it is."""
    for shard, count in enumerate(counts):
        if window < count:
            return shard, window
        window -= count
    raise IndexError(window)


def eval_windows(shards: Shards, block_size: int, n_windows: int = 0) -> list[tuple[int, int]]:
    """Return (shard, start) of windows spread evenly over the split, always the same ones.

    n_windows = 0 means all that fit side by side, from the start of each shard.
    """
    every = [
        (i, start)
        for i, shard in enumerate(shards)
        for start in range(0, len(shard) - block_size, block_size)
    ]
    if n_windows == 0 or n_windows >= len(every):
        return every
    return [every[i * len(every) // n_windows] for i in range(n_windows)]


def read_windows(
    shards: Shards, starts: Sequence[tuple[int, int]], block_size: int, n_vocab: int
) -> np.ndarray:
    """Return windows (N, block_size + 1), int32; raise DataError for an id not below n_vocab."""
    windows = np.stack([shards[i][start : start + block_size + 1] for i, start in starts])
    if windows.min() < 0 or windows.max() >= n_vocab:
        row, column = np.argwhere((windows < 0) | (windows >= n_vocab))[0]
        raise DataError(
            f"id {windows[row, column]} at position {starts[row][1] + column} is outside the "
            f"vocabulary of {n_vocab}; the tokens were made with another tokenizer"
        )
    return windows.astype(np.int32)
