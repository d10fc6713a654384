"""gptjax: GPT-2 on JAX, Flax and Optax."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

__version__ = "0.1.0"


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks instead of returning them to the kernel.

    XLA allocates its temporaries anew for every step. By default glibc maps and unmaps large
    blocks, so each step page-faults through all of them: a small CPU training step then takes
    1.75 times as long. It must run before jax allocates, hence here.
    """
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # as in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl has no mallopt
        return
    mallopt(m_arena_max, 1)
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def _computes_on_cpu() -> bool:
    """Whether no GPU or TPU will be used, as far as can be told without starting JAX."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


# One arena for all threads would be a bottleneck on a host of many cores that only feeds a GPU.
if sys.platform == "linux" and _computes_on_cpu():
    _keep_freed_memory()
