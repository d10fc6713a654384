"""The windows of a call of JAX, read as a function of (seed, step) and moved to the devices.

K steps per call, A passes per step, B rows of this process or of all, T time.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import sharding
from gptjax.config import TrainConfig
from gptjax.data.batches import Shards, batch_starts, read_windows
from gptjax.training import faults
from gptjax.training.plan import last_step


def step_starts(
    config: TrainConfig, shards: Shards, step: int, share: tuple[int, int] = (0, 1)
) -> list[tuple[int, int]]:
    """Return (shard, start) of the A * B windows of a step, pass by pass.

    Args:
        config: the settings.
        shards: the token arrays that the windows are cut from.
        step: the number of the step.
        share: which part of each pass's rows, and how many parts there are.
    """
    passes = config.gradient_accumulation_steps
    return [
        start
        for i in range(step * passes, (step + 1) * passes)
        for start in batch_starts(
            shards,
            seed=config.seed,
            step=i,
            batch_size=config.batch_size,
            block_size=config.model.block_size,
            process=share[0],
            n_processes=share[1],
        )
    ]


def step_windows(
    config: TrainConfig, shards: Shards, steps: Sequence[int], share: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """Return the windows (K, A, B, T+1), int32, of these steps; `share` as of `step_starts`.

    Raises:
        DataError: an id lies outside the vocabulary.
    """
    cfg = config.model
    starts = [start for step in steps for start in step_starts(config, shards, step, share)]
    windows = read_windows(shards, starts, cfg.block_size, cfg.vocab_size)
    shape = len(steps), config.gradient_accumulation_steps, -1, cfg.block_size + 1
    return windows.reshape(shape)


class BatchFeed:
    """A reader of the windows of calls, which moves them to the devices while the last one runs."""

    def __init__(
        self,
        config: TrainConfig,
        shards: Shards,
        mesh: Mesh,
        per_call: int,
        fault: faults.Fault | None = None,
    ) -> None:
        """Take the settings, the training split, the devices, and how many steps a call takes."""
        self.config, self.shards, self.mesh = config, shards, mesh
        self.per_call, self.fault = per_call, fault
        self.share = sharding.batch_share(mesh)

    def windows(self, step: int) -> jax.Array | None:
        """Return the windows (K, A, B, T+1) of the call that begins with `step`; None at the end.

        Raises:
            DataError: an id lies outside the vocabulary.
        """
        if step >= last_step(self.config):
            return None
        faults.maybe_fail(self.fault, step)
        windows = step_windows(
            self.config, self.shards, range(step, step + self.per_call), self.share
        )
        return sharding.place(windows, self.mesh, axis=2)
