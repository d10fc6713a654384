"""The data type of the computation, chosen by what the devices of this machine compute in."""

import jax

from gptjax.config import DType

AMPERE = (8, 0)  # compute capability from which an NVIDIA GPU multiplies in bfloat16


def compute_capability() -> tuple[int, int] | None:
    """Return the least compute capability of the NVIDIA GPUs here; None if there are none."""
    devices = jax.devices()
    version = devices[0].client.platform_version.lower()
    if jax.default_backend() != "gpu" or "cuda" not in version:
        return None
    major, minor = min(tuple(map(int, d.compute_capability.split("."))) for d in devices)
    return major, minor


def choose_dtype(name: DType) -> DType:
    """Return the data type to compute in on this machine: "auto" decided, another name as it is.

    A T4 or V100 multiplies in float16 only; in bfloat16 XLA would compute in float32 and round.
    """
    if name != "auto":
        return name
    if jax.default_backend() == "cpu":
        return "float32"
    capability = compute_capability()
    return "float16" if capability is not None and capability < AMPERE else "bfloat16"
