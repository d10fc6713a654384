"""gptjax: GPT-2 on JAX, Flax and Optax."""

import ctypes
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


if sys.platform == "linux":
    _keep_freed_memory()
