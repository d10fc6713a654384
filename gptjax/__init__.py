"""gptjax: GPT-2 on JAX, Flax and Optax."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

__version__ = "0.1.0"

if sys.platform == "win32":  # which has neither fcntl nor fork
    sys.exit("error: gptjax needs Linux; on Windows run it inside WSL2 (wsl --install)")

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8


def _tune_malloc(settings: dict[int, int]) -> None:
    """Set parameters of glibc's malloc.h."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl has no mallopt
        return
    for parameter, value in settings.items():
        mallopt(parameter, value)


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks instead of returning them to the kernel.

    XLA allocates its temporaries anew for every step. By default glibc maps and unmaps large
    blocks, so each step page-faults through all of them: a small CPU training step then takes
    1.75 times as long. It must run before jax allocates, hence here.
    """
    keep = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    _tune_malloc(keep)


def return_freed_memory() -> None:
    """Tell glibc to return large blocks after all: for a process that only moves arrays."""
    _tune_malloc({M_MMAP_MAX: 2**16, M_MMAP_THRESHOLD: 2**20, M_TRIM_THRESHOLD: 2**20})


def _computes_on_cpu() -> bool:
    """Whether no GPU or TPU will be used, as far as can be told without starting JAX."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


# One arena for all threads would be a bottleneck on a host of many cores that only feeds a GPU.
if sys.platform == "linux" and _computes_on_cpu():
    _keep_freed_memory()
