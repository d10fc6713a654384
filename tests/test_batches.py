"""A batch is a function of (seed, step); epochs visit everything once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import batches
from gptjax.errors import DataError, UsageError

N_VOCAB = 60_000


def tokens(n: int, start: int = 0) -> np.ndarray:
    """Each token is its own position, so a window shows where it is from."""
    return np.arange(start, start + n, dtype=np.uint16)


def rows(shards: list[np.ndarray], count: int, batch_size: int = 1, **kwargs: int) -> np.ndarray:
    """The first `count` rows of the stream."""
    fields = {"seed": 7, "block_size": 8, "n_vocab": N_VOCAB, **kwargs}
    steps = range(count // batch_size)
    return np.concatenate(
        [batches.sample_batch(shards, step=i, batch_size=batch_size, **fields) for i in steps]
    )


@given(st.integers(9, 400), st.integers(0, 3), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_an_epoch_is_disjoint_and_complete(n: int, epoch: int, seed: int) -> None:
    shards = [tokens(n), tokens(77, start=1000)]
    count = sum(batches.windows_per_shard(shards, 8))
    stream = rows(shards, count * (epoch + 1), seed=seed)[-count:]
    assert stream.shape == (count, 9)
    assert (np.diff(stream, axis=1) == 1).all()  # windows are contiguous
    starts = np.sort(stream[:, 0])
    assert (np.diff(starts) >= 8).all()  # no token is predicted twice
    assert count >= (n - 1) // 8 + (77 - 1) // 8 - 2  # all but the room for the offset


def test_epochs_differ_in_order_and_in_borders() -> None:
    shards = [tokens(500)]
    count = sum(batches.windows_per_shard(shards, 8))
    first, second = np.split(rows(shards, 2 * count)[:, 0], 2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first % 8, second % 8)


def test_shortest_corpora() -> None:
    assert rows([tokens(9)], 3).tolist() == [list(range(9))] * 3  # T + 1 tokens
    assert {row[0] for row in rows([tokens(10)], 40).tolist()} == {0, 1}  # T + 2
    assert batches.windows_per_shard([tokens(8)], 8) == [0]


@pytest.mark.parametrize("n_processes", [2, 4])
def test_processes_share_the_batch(n_processes: int) -> None:
    shards = [tokens(500)]
    fields = {"seed": 1, "step": 5, "batch_size": 8, "block_size": 8, "n_vocab": N_VOCAB}
    whole = batches.sample_batch(shards, **fields)
    parts = [
        batches.sample_batch(shards, **fields, process=i, n_processes=n_processes)
        for i in range(n_processes)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_stream_does_not_depend_on_the_batch_size() -> None:
    shards = [tokens(300)]
    assert np.array_equal(rows(shards, 96, batch_size=4), rows(shards, 96, batch_size=2))
    assert not np.array_equal(rows(shards, 96), rows(shards, 96, seed=8))


def test_indivisible_batch_is_refused() -> None:
    fields = {"seed": 1, "step": 0, "batch_size": 3, "block_size": 8, "n_vocab": N_VOCAB}
    with pytest.raises(UsageError, match="--batch_size=3: must be divisible by 2"):
        batches.sample_batch([tokens(99)], **fields, n_processes=2)


def test_no_batch_holds_an_id_outside_the_vocabulary() -> None:
    corpus = tokens(99)
    with pytest.raises(DataError, match=r"id \d+ at position \d+ is outside the vocabulary of 50"):
        rows([corpus], 11, n_vocab=50)


def test_evaluation_windows_are_fixed_and_spread() -> None:
    shards = [tokens(801), tokens(81, start=1000)]
    every = batches.eval_windows(shards, 8)
    assert len(every) == 100 + 10
    assert batches.eval_windows(shards, 8, 10) == every[::11]
    assert batches.eval_windows(shards, 8, 1000) == every
    windows = batches.read_windows(shards, every, 8, N_VOCAB)
    assert np.array_equal(windows[:100, :8].ravel(), np.arange(800))
    assert windows[-1].tolist() == list(range(1072, 1081))
