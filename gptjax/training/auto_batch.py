"""The largest batch that fits into the memory of the devices, as compiling the real step tells.

Nothing is run, so nothing can run out of memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gptjax.config import TrainConfig
from gptjax.errors import OutOfMemoryError, UsageError
from gptjax.memory import allowed_memory, gigabytes
from gptjax.sharding import batch_sharding, batch_shards
from gptjax.training import plan
from gptjax.training.step import abstract_state, make_train_step

FREE = 0.08  # of the memory: for windows on their way, evaluations, and gaps between arrays
TRIALS = 5  # at most; compiling takes 5 to 30 s on a GPU
FIRST = 4  # sequences of each device in the first trial
CPU_TOKENS = 4096  # of each device: on a CPU, larger passes are not faster


def largest_batch(config: TrainConfig, mesh: Mesh, rows: int = 0) -> tuple[int, str]:
    """Return a batch_size, over all devices together, and a sentence that says why.

    Args:
        config: the settings, whose model has no "auto" left.
        mesh: the devices of the training state.
        rows: sequences of a step, which the result divides; 0 = any number of them.

    Raises:
        OutOfMemoryError: not even one sequence for each device fits.
        UsageError: the devices do not tell how much memory they have.
    """
    n_devices = batch_shards(mesh)
    most = max(1, CPU_TOKENS // config.model.block_size) * n_devices
    on_cpu = jax.default_backend() == "cpu"
    memory = device_memory()

    def allowed(size: float) -> int:
        return size_below(min(size, most) if on_cpu else size, n_devices, rows)

    def needed(size: int) -> int:
        passes = rows // size if rows else config.gradient_accumulation_steps
        trial = dataclasses.replace(config, batch_size=size, gradient_accumulation_steps=passes)
        return step_bytes(trial, mesh)

    first = most if on_cpu else FIRST * n_devices
    found = try_sizes(needed, int(memory * (1 - FREE)), allowed, first)
    fitting = [size for size, count in found.items() if count <= memory * (1 - FREE)]
    if not fitting:
        least = min(found)
        raise OutOfMemoryError(
            f"--batch_size=auto: a step needs {gigabytes(found[least])} of each device with "
            f"batch_size={least}, but there are {gigabytes(memory)}; take --remat, or lower "
            "--block_size"
        )
    size = max(fitting)
    enough = f"; more than {CPU_TOKENS} tokens a pass are not faster on a CPU" if on_cpu else ""
    return size, (
        f"batch_size is {size}: a step needs {gigabytes(found[size])} of the "
        f"{gigabytes(memory)} of each device{enough}"
    )


def try_sizes(
    needed: Callable[[int], int], limit: int, allowed: Callable[[float], int], first: int
) -> dict[int, int]:
    """Return the bytes that some sizes need; the largest of them that fits is the answer.

    The bytes grow along straight lines that become steeper: at a small batch, the update of the
    parameters may need more than the passes do. So a line through two sizes says too few bytes for
    sizes behind them, which the next trial corrects, and never too few for those between them.

    Args:
        needed: batch_size -> bytes of a device.
        limit: the bytes that there are.
        allowed: a number -> the largest allowed batch_size that is not above it.
        first: the batch_size to begin with.
    """
    found: dict[int, int] = {}
    size = allowed(first)
    for _ in range(TRIALS):
        found[size] = needed(size)
        points = [(0, 0), *sorted(found.items())]
        n_fitting = sum(count <= limit for _, count in points)
        first_end = min(n_fitting, len(points) - 1) - 1
        (a, bytes_a), (b, bytes_b) = points[first_end : first_end + 2]
        guess = a + (limit - bytes_a) * (b - a) / max(bytes_b - bytes_a, 1)
        size = allowed(guess if bytes_b > limit else max(guess, 2 * b))
        if size in found:
            break
    return found


def size_below(size: float, n_devices: int, rows: int) -> int:
    """Return the largest batch_size not above `size`; one sequence for each device is the least.

    It divides `rows`; if they are 0, each device has a multiple of 8, or 1, 2 or 4.
    """
    if rows:
        sizes = range(int(min(size, rows)) // n_devices * n_devices, 0, -n_devices)
        return next((size for size in sizes if rows % size == 0), n_devices)
    each = max(1, int(size) // n_devices)
    return n_devices * (each // 8 * 8 or 1 << each.bit_length() - 1)


def step_bytes(config: TrainConfig, mesh: Mesh) -> int:
    """Return the bytes of a device that a call of the training step needs, by compiling it."""
    abstract = abstract_state(config, mesh)
    sizes = (
        *(plan.steps_per_call(config), config.gradient_accumulation_steps, config.batch_size),
        config.model.block_size + 1,
    )
    windows = jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=batch_sharding(mesh, axis=2))
    step: Any = make_train_step(config, abstract)  # jitted, which its type does not say
    said = step.lower(abstract, windows).compile().memory_analysis()
    held = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    return held + said.temp_size_in_bytes


def device_memory() -> int:
    """Return the bytes that JAX may take of the smallest device of all processes.

    Raises:
        UsageError: a device does not tell.
    """
    if jax.default_backend() == "cpu":
        megabytes = allowed_memory() // jax.local_device_count() // 2**20
    else:
        limits = [
            (device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()
        ]
        megabytes = min(limits) // 2**20
    if jax.process_count() > 1:  # all must choose the same; int32 would not hold bytes
        megabytes = int(np.min(multihost_utils.process_allgather(np.int32(megabytes))))
    if megabytes == 0:
        raise UsageError(
            "--batch_size=auto: the device does not tell how much memory it has; give a number"
        )
    return megabytes * 2**20
