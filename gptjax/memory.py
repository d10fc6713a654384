"""How much memory there is, how much arrays take, and what to do where it is too little."""

import math
import os
import resource
from pathlib import Path

import jax

from gptjax.config import TrainConfig
from gptjax.errors import DataError, OutOfMemoryError, first_line
from gptjax.sharding import PyTree

# What a container may have, as it reads it itself: of version 2 of Linux's control groups, of 1.
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def take_gpu_memory() -> None:
    """Let JAX take up to 92 % of a GPU's memory, not 75 %, unless its variable says how much.

    It takes them at once, unless `take_gpu_memory_as_needed` is called too. Call it before JAX
    looks for devices. The rest is left to the driver and to a screen.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


def take_gpu_memory_as_needed() -> None:
    """Let JAX take a GPU's memory bit by bit, unless its variable says otherwise.

    It would take its share at once, for which an H100 needs 0.7 to 0.9 s. Call it before JAX looks
    for devices.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def physical_memory() -> int:
    """Return the bytes of memory of the machine, whoever uses them now."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(needed: int, what: str) -> None:
    """Raise DataError, whose text begins with `what`, if this process may use fewer bytes."""
    allowed = allowed_memory()
    if needed > allowed:
        raise DataError(
            f"{what} takes {gigabytes(needed)} of memory; this process may use {gigabytes(allowed)}"
        )


def allowed_memory() -> int:
    """Return the bytes that this process may use, within its machine, container and `ulimit -v`."""
    limits = [physical_memory()]
    for path in CGROUP_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdecimal():  # or it says "max"
            limits.append(int(text))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return min(limits)


def tree_bytes(tree: PyTree) -> int:
    """Return the bytes of all arrays in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def megabytes(count: int) -> str:
    """Return a number of bytes as text, such as 12.3 MB."""
    return f"{count / 1e6:,.1f} MB"


def gigabytes(count: int) -> str:
    """Return a number of bytes as text, such as 12.3 GB."""
    return f"{count / 1e9:,.1f} GB"


def check_fits(state: PyTree) -> None:
    """Check that a training state fits into the host's memory.

    Only where JAX computes on the CPU, whose client may wait for ever for arrays that its threads
    could not allocate; other devices say so themselves.

    Raises:
        MemoryError: it does not.
    """
    if jax.default_backend() != "cpu":
        return
    needed, allowed = tree_bytes(state), allowed_memory()
    if needed > allowed:
        raise MemoryError(
            f"parameters and optimizer state take {megabytes(needed)}, but this process may use "
            f"only {megabytes(allowed)}"
        )


def explain(error: BaseException, config: TrainConfig) -> OutOfMemoryError | None:
    """Return an error that says what to do about too little memory; None for any other error.

    Args:
        error: what Python, JAX or XLA raised.
        config: the settings of the run.
    """
    if isinstance(error, OutOfMemoryError):  # it says what to do
        return None
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return None
    cfg = config.model
    return OutOfMemoryError(
        f"out of memory ({first_line(error)[:200]}) with batch_size={config.batch_size}, "
        f"block_size={cfg.block_size}, n_layer={cfg.n_layer}, n_embd={cfg.n_embd}; lower "
        "--batch_size (auto finds what fits) and raise --gradient_accumulation_steps, lower "
        "--block_size, or take --remat; saved steps are unchanged"
    )
