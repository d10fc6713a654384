"""What the flags of an import ask of a source, and what memory does."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gptjax.config import Activation
from gptjax.conversion.tensors import Source
from gptjax.errors import DataError, UsageError
from gptjax.files import file_sha256
from gptjax.memory import require_memory
from gptjax.settings import require


def with_activation(source: Source, activation: Literal["auto", Activation]) -> Source:
    """Return the source with the activation asked for; UsageError if its file says another."""
    if activation == "auto":
        return source
    require(
        not source.says_activation or activation == source.cfg.activation,
        "activation",
        activation,
        f"config.json ({source.where}) means {source.cfg.activation}; leave the flag out, or "
        "set activation_function there",
    )
    cfg = dataclasses.replace(source.cfg, activation=activation)
    return source._replace(cfg=cfg, assumed="")


def check_sha256(files: Sequence[Path], expected: str) -> None:
    """Check that a weight file has the expected sha256, unless that is empty.

    Raises:
        UsageError: there are several files.
        DataError: the hash is another.
    """
    if not expected:
        return
    if len(files) != 1:
        raise UsageError(f"--sha256={expected}: the weights are in {len(files)} files, not one")
    found = file_sha256(files[0])
    if found != expected.lower():
        raise DataError(f"{files[0]} has sha256 {found}, expected {expected}")


def check_memory(source: Source) -> None:
    """Raise DataError if the model cannot fit, before anything is allocated for it."""
    parameters = sum(math.prod(shape) for shape, _ in source.tensors.values())
    require_memory(
        4 * parameters, f"{source.where} has {parameters:,} parameters in float32, which"
    )
