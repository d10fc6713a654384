"""Records of steps whose update was skipped, by which they can be run again."""

import hashlib
import json
import math
from pathlib import Path
from typing import NotRequired, SupportsFloat, TypedDict, cast

import jax
import numpy as np

from gptjax.checkpoints.hashes import leaf_paths
from gptjax.errors import DataError
from gptjax.files import read_json, replacing
from gptjax.model import Params

Norms = dict[str, list[float | str]]  # by the parameter's path, of each layer


class BadStep(TypedDict):
    """The record of a skipped step."""

    step: int
    loss: float | str  # in nats per token
    grad_norm: float | str
    loss_scale: NotRequired[float | None]  # in float16; the numbers here are without it
    dropout_key: tuple[int, int]  # the seed, and what is folded into its key
    rows: list[tuple[int, int]]  # (shard, start) of all processes' windows
    windows_sha256: str
    gradient_norms: Norms


def number(value: SupportsFloat) -> float | str:
    """Return a number for JSON, which knows no NaN: that becomes a text."""
    value = float(value)
    return value if math.isfinite(value) else repr(value)


def windows_sha256(windows: np.ndarray) -> str:
    """Return the sha256 of a step's tokens (A, B, T+1), int32."""
    return hashlib.sha256(np.ascontiguousarray(windows).data).hexdigest()


def norm_table(norms: Params) -> Norms:
    """Return the tree of `step.norms_by_layer` as {parameter: norm of each layer}."""
    values = (np.atleast_1d(leaf) for leaf in jax.tree.leaves(norms))
    return {
        path: [number(norm) for norm in leaf]
        for path, leaf in zip(leaf_paths(norms), values, strict=True)
    }


def write_bad_step(
    run_dir: Path,
    *,
    step: int,
    seed: int,
    loss: float,
    grad_norm: float,
    loss_scale: float | None,
    gradient_norms: Params,
    rows: list[tuple[int, int]],
    windows: np.ndarray,
) -> Path:
    """Write bad_steps/STEP.json, which `train.py --replay` reads; return its path.

    Args:
        run_dir: the run folder.
        step: the number of the step.
        seed: of the run; dropout's key is fold_in(key(seed), step).
        loss: of the step, in nats per token.
        grad_norm: the global norm of its gradient.
        loss_scale: what its loss was multiplied by in float16, None where it was not.
        gradient_norms: the tree of `step.norms_by_layer`.
        rows: (shard, start) of all processes' windows.
        windows: their tokens (A, B, T+1).
    """
    path = run_dir / "bad_steps" / f"{step}.json"
    path.parent.mkdir(exist_ok=True)
    record: BadStep = {
        "step": step,
        "loss": number(loss),
        "grad_norm": number(grad_norm),
        "loss_scale": loss_scale,
        "dropout_key": (seed, step),
        "rows": rows,
        "windows_sha256": windows_sha256(windows),
        "gradient_norms": norm_table(gradient_norms),
    }
    with replacing(path) as file:
        file.write(json.dumps(record).encode())
    return path


def read_bad_step(path: Path) -> BadStep:
    """Read what `write_bad_step` wrote; raise DataError if it is something else."""
    record = read_json(path)
    norms = record.setdefault("gradient_norms", record.get("layer_norms"))  # version 0.1's name
    if type(record.get("step")) is not int or not isinstance(norms, dict) or "loss" not in record:
        raise DataError(f"{path} is not a record of a skipped step, such as bad_steps/7.json")
    return cast(BadStep, record)
