"""The data types of the computation, chosen by what the devices of this machine compute in."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import DType, GPTConfig
from gptjax.kernels import cpu_bf16
from gptjax.kernels.cuda import AMPERE, capability

CPUINFO = Path("/proc/cpuinfo")
# Values of XLA's flag xla_cpu_max_isa that leave it these instructions.
WITH_BFLOAT16 = ("AVX512_BF16", "AMX", "AMX_FP16")


@functools.cache
def cpu_computes_bfloat16() -> bool:
    """Return whether the CPU multiplies in bfloat16, by AVX512_BF16 or AMX, and XLA may use it."""
    limit = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if limit and limit[-1].upper() not in WITH_BFLOAT16:
        return False
    try:
        return re.search(r"\b(avx512_bf16|amx_bf16)\b", CPUINFO.read_text()) is not None
    except OSError:  # no Linux
        return False


def choose_dtype(cfg: GPTConfig, *, training: bool) -> DType:
    """Return the data type to compute in on this machine: "auto" decided, another name as it is.

    A T4 or V100 multiplies in float16 only; in bfloat16 XLA would compute in float32 and round.
    """
    if cfg.dtype != "auto":
        return cfg.dtype
    if jax.default_backend() == "cpu":
        fast = training and cfg.kernels == "auto" and cpu_computes_bfloat16()
        return "bfloat16" if fast else "float32"
    found = capability()
    return "float16" if found is not None and found < AMPERE else "bfloat16"


# ---- bfloat16 on a CPU: the operands of matrix products have it, and nothing else ----------------


def is_mixed(cfg: GPTConfig) -> bool:
    """Return whether products have bfloat16 operands, and all else is float32.

    So it is on CPUs, whose other instructions know no bfloat16.
    """
    return cfg.dtype == "bfloat16" and jax.default_backend() == "cpu"


def stored_dtype(cfg: GPTConfig) -> DType:
    """Return the data type of what lies between matrix products."""
    return "float32" if is_mixed(cfg) else cfg.dtype


def einsum_of(cfg: GPTConfig) -> Callable[..., Array]:
    """Return `jnp.einsum`, or what stands for it in the products of a model."""
    if not is_mixed(cfg):
        return jnp.einsum
    return cpu_bf16.EINSUM[cfg.kernels if cpu_computes_bfloat16() else "off"]


def describe(cfg: GPTConfig) -> str:
    """Return in words what a model computes in."""
    return "float32, products of bfloat16" if is_mixed(cfg) else cfg.dtype
