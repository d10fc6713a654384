"""CUDA C++ inside `jax.jit`: NVRTC compiles the source, XLA's own ptx call launches it.

Neither nvcc nor a C++ extension is needed: NVRTC comes with `jax[cuda13]`. The call's target is an
internal one of XLA (`xla/service/gpu/kernel_call.cc`), so `available` runs a small kernel first,
and whoever asks it takes the plain computation where anything of this fails.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax import Array

TARGET = "__gpu$xla.gpu.ptx"
AMPERE = (8, 0)  # the oldest NVIDIA GPUs that multiply in bfloat16
HOPPER = (9, 0)  # an H100 or H200, where the kernels of gptjax were measured and checked
PROBE = r"""
extern "C" __global__ void probe(const float* x, const float* old, float* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = 2 * x[i] + old[i];
}
"""


class KernelError(Exception):
    """A kernel cannot be compiled or run here; the message says why."""


# ---- From CUDA C++ to PTX ------------------------------------------------------------------------


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """Return NVIDIA's compiler library, from the package nvidia-cuda-nvrtc or from the system.

    Raises:
        KernelError: there is none.
    """
    folders = [folder for path in sys.path for folder in Path(path).glob("nvidia/*/lib")]
    packaged = [str(file) for folder in folders for file in folder.glob("libnvrtc.so.*")]
    for name in [*packaged, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
        try:
            if name in packaged:
                for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)  # NVRTC asks for it by name
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelError("NVIDIA's compiler NVRTC is missing: pip install nvidia-cuda-nvrtc")


def nvrtc_version() -> tuple[int, int]:
    """Return the version of NVRTC; raise KernelError where it is missing."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def compile_ptx(source: str, architecture: str, options: tuple[str, ...] = ()) -> str:
    """Return the PTX of CUDA C++, compiled once in a process, and once in all with JAX's cache.

    A large kernel takes NVRTC seconds, so the PTX is kept where JAX keeps compiled programs.

    Args:
        source: the program; a kernel in it is `extern "C" __global__`.
        architecture: of the GPU, such as compute_90; see `architecture`.
        options: further options of NVRTC, such as -DROWS=8.

    Raises:
        KernelError: NVRTC is missing, or refuses the source.
    """
    lib, program = nvrtc(), ctypes.c_void_p()
    made_of = repr((source, architecture, options, *nvrtc_version()))
    kept = kept_file(f"{hashlib.sha256(made_of.encode()).hexdigest()}.ptx")
    if kept is not None and kept.exists():
        return kept.read_text(encoding="utf-8")
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", *options]
    size = ctypes.c_size_t()
    if lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        raise KernelError("NVRTC does not start")
    try:
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        if lib.nvrtcCompileProgram(program, len(flags), array):
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, log)
            raise KernelError(f"NVRTC refuses a kernel: {log.value.decode(errors='replace')}")
        lib.nvrtcGetPTXSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetPTX(program, text)
        ptx = text.value.decode()
        if kept is not None:
            with contextlib.suppress(OSError):  # such as a full disk: it is compiled again
                files_own = kept.with_suffix(f".{os.getpid()}")  # whole, whoever else writes it
                files_own.write_text(ptx, encoding="utf-8")
                files_own.replace(kept)
        return ptx
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def kept_file(name: str) -> Path | None:
    """Return where to keep a file beside JAX's compiled programs, None if it keeps none."""
    folder: str | None = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder or not Path(folder).is_dir():
        return None
    return Path(folder) / name


def capability() -> tuple[int, int] | None:
    """Return the least compute capability of the NVIDIA GPUs of all processes; None without any.

    So all processes choose the same program.
    """
    devices = jax.devices()
    version = devices[0].client.platform_version.lower()
    if jax.default_backend() != "gpu" or "cuda" not in version:
        return None
    major, minor = min(tuple(map(int, d.compute_capability.split("."))) for d in devices)
    return major, minor


def architecture() -> str:
    """Return what `compile_ptx` is to compile for: compute_90 on an H100, and without a GPU."""
    major, minor = capability() or (9, 0)
    return f"compute_{major}{minor}"


# ---- The call ------------------------------------------------------------------------------------


def call(
    name: str,
    ptx: str,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: int,
    block: int,
    shared: int = 0,
    aliases: Mapping[int, int] | None = None,
) -> list[Array]:
    """Run a kernel on arrays, inside or outside of `jax.jit`, and return its outputs.

    XLA does not split it over devices: on several, call it inside `jax.shard_map`.

    Args:
        name: the kernel's name in the PTX.
        ptx: from `compile_ptx`.
        inputs: what its first parameters point to, as dense arrays in row-major order.
        outputs: shapes and types of what the parameters after them point to.
        grid: number of blocks.
        block: threads in each of them.
        shared: bytes of dynamic shared memory in each of them.
        aliases: input number -> number of the output that takes its memory.
    """
    sizes = {"grid_x": grid, "grid_y": 1, "grid_z": 1, "block_x": block, "block_y": 1, "block_z": 1}
    run = jax.ffi.ffi_call(
        TARGET,
        list(outputs),
        input_output_aliases=dict(aliases or {}),
        custom_call_api_version=4,
        vmap_method="sequential",
    )
    attributes = {
        key: np.int32(value) for key, value in {**sizes, "shared_mem_bytes": shared}.items()
    }
    return list(run(*inputs, name=name, kernel_type="ptx", kernel_data=ptx, **attributes))


# ---- Whether it works here -----------------------------------------------------------------------


def passed_file() -> Path | None:
    """Return the file that says that the probe has passed here, None if nothing is kept.

    Its name is of all that a probe which passed depends on: the GPU, its driver, NVRTC, JAX.

    Raises:
        KernelError: NVRTC is missing.
    """
    device, driver = jax.local_devices()[0], Path("/proc/driver/nvidia/version")
    release = driver.read_text() if driver.exists() else ""
    versions = (jax.__version__, jax.lib.__version__, device.client.platform_version, release)
    here = (TARGET, PROBE, device.device_kind, architecture(), nvrtc_version(), *versions)
    return kept_file(f"{hashlib.sha256(repr(here).encode()).hexdigest()}.kernels")


@functools.cache
def refusal_here() -> str:
    """Return why kernels cannot run in this process, "" if they can; found out once, by a probe.

    It takes a second of a start, so that it passed is kept where JAX keeps compiled programs.
    """
    found = capability()
    if found is None:
        return "there is no NVIDIA GPU"
    if found < AMPERE:
        return f"its compute capability {found[0]}.{found[1]} is below 8.0"
    try:
        passed = passed_file()
        with contextlib.suppress(OSError):  # of a network folder
            if passed is not None and passed.exists():
                return ""
        with jax.ensure_compile_time_eval():  # also while a program is being traced
            # Made by NumPy: XLA would compile a program for each.
            x, old = np.arange(512, dtype=np.float32), np.full(512, 3, np.float32)
            shape, ptx = jax.ShapeDtypeStruct(x.shape, x.dtype), compile_ptx(PROBE, architecture())
            probe = functools.partial(
                call, "probe", ptx, outputs=[shape], grid=4, block=128, aliases={1: 0}
            )
            y = jax.jit(lambda x, old: probe(inputs=[x, old])[0] + 1)(x, old)
            right = np.array_equal(np.asarray(y), 2 * np.arange(512) + 4)
        if right and passed is not None:
            with contextlib.suppress(OSError):
                passed.touch()
        return "" if right else "a probe computed something else than it should"
    except Exception as error:  # whatever it is, the plain computation goes on
        return str(error).strip().partition("\n")[0] or type(error).__name__


elsewhere: list[str] = []  # why other processes of the run have no kernels: see `distributed`


def refusal() -> str:
    """Return why no kernels are to run, "" if they are: because of this process or of another."""
    return refusal_here() or "".join(elsewhere)


@functools.cache
def available() -> bool:
    """Return whether kernels run here; the first call on a GPU that has none says why on stderr."""
    reason = refusal()
    if reason and (capability() or (0, 0)) >= AMPERE:
        print(f"kernels: plain JAX instead, because {reason}", file=sys.stderr)
    return not reason
