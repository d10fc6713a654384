"""CUDA kernels run on a CPU, by cuda_on_cpu.h: compile one with g++, and launch it."""

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

CPU = Path(__file__).with_name("cuda_on_cpu.h")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: apt install g++")


@functools.cache
def compile_kernel(
    folder: Path, source: str, kernel: str, macros: tuple[tuple[str, float], ...]
) -> ctypes.CDLL:
    """Return a kernel of a CUDA source, without gpu_primitives.cuh, as a library for this CPU."""
    path = folder / f"kernel{len(list(folder.iterdir()))}.so"
    defines = "".join(f"#define {name} {value}\n" for name, value in (*macros, ("KERNEL", kernel)))
    end = CPU.with_name("cuda_on_cpu_end.h")
    text = f'#include "{CPU}"\n{defines}{source}\n#include "{end}"\n'
    # Ubuntu's compiler would check jumps, and take one to another fiber for a mistake.
    flags = ["-O1", "-U_FORTIFY_SOURCE", "-std=c++17", "-w", "-shared", "-fPIC"]
    subprocess.run(
        ["g++", *flags, "-x", "c++", "-", "-o", str(path)], input=text, text=True, check=True
    )
    return ctypes.CDLL(str(path))


def launch(
    library: ctypes.CDLL, arrays: Sequence[np.ndarray], *, grid: int, block: int, shared: int
) -> None:
    """Run it on the memory of arrays, one for each parameter."""
    pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
    left = library.run(pointers, grid, block, shared, ctypes.c_long(10**6), 1)
    assert left == 0, "some threads never ended"
