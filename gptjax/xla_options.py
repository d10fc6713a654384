"""Options of XLA for single programs, for where the XLA at hand has them."""

import functools
from collections.abc import Callable
from typing import Any

import jax

Options = dict[str, Any]


def cpu() -> jax.Device | None:
    """Return the host's own device, None where JAX was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@functools.cache
def known(name: str, value: bool | int) -> Options | None:
    """Return an option for `jax.jit`, None where XLA has none of this name."""
    options: Options = {name: value}
    try:
        # By the CPU's XLA, which has the same options: a GPU's takes a second to start.
        with jax.default_device(cpu()):
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def products_by_cublas() -> Options | None:
    """Return what keeps XLA from trying Triton's kernels for matrix products on a GPU.

    A program is compiled sooner, and may run slower. On one H100 the prefill of GPT-2 small takes
    1.8 s to compile instead of 3.7; the step of shakespeare_char 7.2 instead of 13, and 7.9 ms to
    run instead of 7.65.
    """
    on_gpu = jax.default_backend() == "gpu"
    return known("xla_gpu_enable_triton_gemm", False) if on_gpu else None


def untuned() -> Options | None:
    """Return what keeps XLA from trying kernels of any kind on a GPU; cuBLAS chooses its own.

    On one H100 `sample.py` wrote the first text of GPT-2 small after 4.1 to 5.1 s without a compile
    cache, and after 5.2 to 9.7 with trials of cuBLAS's kernels. The prompt is read as fast.
    """
    by_cublas = products_by_cublas()
    return by_cublas and {**by_cublas, **(known("xla_gpu_autotune_level", 0) or {})}


def updates_in_place() -> Options | None:
    """Return the option without which XLA copies a state before it writes over it on a CPU.

    The copy takes 3 % of a small step.
    """
    on_cpu = jax.default_backend() == "cpu"
    return known("xla_cpu_copy_insertion_use_region_analysis", True) if on_cpu else None


class Jitted:
    """A function that is jitted when it is first called: its options depend on the backend."""

    def __init__(
        self, function: Callable[..., Any], options: Callable[[], Options | None], **how: Any
    ) -> None:
        """Take what `jax.jit` takes; `options` returns its compiler_options."""
        self.function, self.options, self.how = function, options, how
        functools.update_wrapper(self, function)

    @functools.cached_property
    def jitted(self) -> Any:
        """Return the jitted function."""
        return jax.jit(self.function, compiler_options=self.options(), **self.how)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function traced and lowered, as `jax.jit(...).lower` does."""
        return self.jitted.lower(*args, **kwargs)
