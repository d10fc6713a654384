"""Arrays that are copied to the device while others are read."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

UNDER_WAY = 2**29  # bytes that are held twice at most, if no array is larger: GPT-2 small's


def copier(pool: ThreadPoolExecutor) -> Callable[[np.ndarray], Future[jax.Array]]:
    """Return a function that begins to copy an array to the device, and returns the Future.

    The next arrays are read meanwhile, also while CUDA starts. Each is held twice until it is
    copied, so the function first waits until this and those under way come to no more than
    UNDER_WAY bytes; a larger array is copied alone.

    Args:
        pool: of one thread, which copies.
    """
    begun: list[tuple[int, Future[jax.Array]]] = []
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]  # of this thread

    def copy(array: np.ndarray) -> jax.Array:
        with jax.default_device(device):
            return jax.block_until_ready(jax.device_put(array))

    def place(array: np.ndarray) -> Future[jax.Array]:
        while begun and array.nbytes + sum(size for size, _ in begun) > UNDER_WAY:
            begun.pop(0)[1].result()
        begun.append((array.nbytes, pool.submit(copy, array)))
        return begun[-1][1]

    return place
