"""What lets a program start sooner: it imports this before all else, then calls `imported`.

Python's collector of garbage stops while modules are imported, where it finds none: that saves 0.2
of 1.0 s. And CUDA starts meanwhile: its driver and the context of the first GPU take 0.3 s, and JAX
would begin when all of its modules are there. It finds the context and goes on in it. Ctrl-C ends
the program at once until then, where Python would show how far the imports had come.
"""

import ctypes
import gc
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable


def looks_for_gpus() -> bool:
    """Return whether JAX will look for NVIDIA's GPUs: it has a plugin, and is not told not to."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    named = not platforms or bool({"cuda", "gpu"} & set(platforms.split(",")))
    return named and importlib.util.find_spec("jax_plugins") is not None


def is_alone() -> bool:
    """Return whether nothing says that another process is to have the first GPU.

    Each of several processes has its own, and `train.py --resume_check` only starts others.
    """
    variables = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    launched = any(os.environ.get(name, "1") not in ("", "0", "1") for name in variables)
    words = [word.replace("_", "-") for word in sys.argv]
    flags = ("--num-processes", "--resume-check", "--help", "-h")
    asked = [word for word in words if word.startswith(flags)]
    return not launched and all(word == "--resume-check=False" for word in asked)


def start_cuda() -> None:
    """Start the driver and the context that JAX will use; what fails here, JAX will say."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def imported() -> None:
    """Let the collector go on, and Ctrl-C raise KeyboardInterrupt.

    The collector leaves out what the modules hold: looking through it takes 0.1 s.
    """
    gc.freeze()
    gc.enable()
    exchange_handler(signal.SIG_DFL, signal.default_int_handler)


def exchange_handler(old: object, new: Callable[..., object] | signal.Handlers) -> None:
    """Give Ctrl-C the new handler where it has the old one; a job in the background ignores it.

    Only the main thread can do that.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is old:
        signal.signal(signal.SIGINT, new)


gc.disable()
exchange_handler(signal.default_int_handler, signal.SIG_DFL)
if looks_for_gpus() and is_alone():
    threading.Thread(target=start_cuda).start()
