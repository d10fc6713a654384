"""Start CUDA in a thread while Python imports JAX: a program imports this before all else.

CUDA's driver and the context of the first GPU take 0.3 s, and JAX would start them when all of its
modules are there. It finds the context and goes on in it. Nothing is done where JAX has no plugin
for GPUs, where JAX_PLATFORMS leaves them out, or without a driver; what fails here, JAX will say.
"""

import ctypes
import importlib.util
import os
import threading


def wanted() -> bool:
    """Return whether JAX will look for NVIDIA's GPUs."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    named = not platforms or bool({"cuda", "gpu"} & set(platforms.split(",")))
    return named and importlib.util.find_spec("jax_plugins") is not None


def start() -> None:
    """Start the driver, and the context that all of a process share on its first GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


if wanted():
    threading.Thread(target=start).start()
