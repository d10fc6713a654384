"""The record of a run in each checkpoint, and the settings under which it may be resumed."""

import hashlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.config import TrainConfig
from gptjax.config_file import complete
from gptjax.errors import UsageError
from gptjax.settings import architecture, experiment, flatten, names, run, state
from gptjax.tokenizer import Tokenizer, fingerprint

Record = dict[str, Any]

FIXED = names(TrainConfig, architecture, state)
GUARDED = [*names(TrainConfig, experiment), "data", "tokenizer"]
COMPARED = names(TrainConfig, architecture, state, experiment, run)
BATCH = ("batch_size", "gradient_accumulation_steps")  # only their product makes an experiment

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SAMPLED = 256  # blocks of a token file that its fingerprint reads
BLOCK = 2**20  # bytes


def token_fingerprint(tokens: np.ndarray) -> str:
    """Return the sha256 of an array's type and length and of up to 256 of its blocks of 1 MiB.

    The blocks are evenly spread. So a file below 256 MiB counts as a whole, and a larger one does
    not delay the start.
    """
    data = tokens.reshape(-1).view(np.uint8)
    sha256 = hashlib.sha256(f"{tokens.dtype.str} {len(tokens)}".encode())
    count = min(SAMPLED, -(-len(data) // BLOCK))
    for i in range(count):
        start = 0 if count == 1 else i * (len(data) - BLOCK) // (count - 1)
        sha256.update(np.ascontiguousarray(data[start : start + BLOCK]).data)
    return sha256.hexdigest()


def available_cpus() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_record(
    config: TrainConfig,
    shards: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    n_train: int | None = None,
) -> Record:
    """Return the record of a run, as JSON, that is saved with each of its checkpoints.

    Args:
        config: the settings; the model's are those that it is computed by, without any "auto".
        shards: the token arrays of both splits.
        tokenizer: the one they were made with.
        n_train: how many of the shards, the first ones, are trained on.
    """
    settings = flatten(config)
    return {
        "settings": {name: settings[name] for name in COMPARED},
        "data": [token_fingerprint(tokens) for tokens in shards],
        "n_train": n_train,
        "tokenizer": fingerprint(tokenizer),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "cpu_threads": os.environ.get("NPROC") or str(available_cpus()),
        },
    }


def check_record(
    old: Record, new: Record, allow_change: Sequence[str], notify: Callable[[str], None]
) -> None:
    """Refuse to resume a run with the record `old` as one with `new`, or report what changes.

    Raises:
        UsageError: the model or the saved state would change, or the experiment would although
            `allow_change` does not name it.
    """
    split = old.get("n_train") is not None  # older runs did not record it
    before, now = (
        {
            **complete(TrainConfig, record["settings"]),
            "data": [*record["data"], record.get("n_train") if split else None],
            "tokenizer": record["tokenizer"],
        }
        for record in (old, new)
    )
    changed = [name for name in (*COMPARED, "data", "tokenizer") if before[name] != now[name]]
    unknown = [name for name in allow_change if name not in GUARDED]
    if unknown:
        raise UsageError(f"--allow_change={unknown[0]}: must be among {', '.join(sorted(GUARDED))}")

    def show(name: str) -> str:
        if name in ("data", "tokenizer"):
            return "other data" if name == "data" else "another tokenizer"
        return f"{name}={before[name]}, you asked for {now[name]}"

    fixed = [show(name) for name in changed if name in FIXED]
    if fixed:
        raise UsageError(
            f"the checkpoint has {'; '.join(fixed)}; keep the old value, or take another --out_dir"
        )
    sequences = (math.prod(settings[name] for name in BATCH) for settings in (before, now))
    free = {*allow_change, *(BATCH if len({*sequences}) == 1 else ())}
    guarded = [name for name in changed if name in GUARDED and name not in free]
    if guarded:
        flags = [f"--{name}={before[name]}" for name in guarded if name in COMPARED]
        raise UsageError(
            f"the checkpoint has {'; '.join(map(show, guarded))}; keep what it had"
            f"{' by ' * bool(flags)}{' '.join(flags)}, or take --allow_change={','.join(guarded)}"
        )
    for name in changed:
        if name in ("data", "tokenizer"):
            notify(f"resuming with {show(name)} than the checkpoint has")
        else:
            notify(f"resuming with {name}={now[name]}, it was {before[name]}")
    for kind in ("versions", "machine"):
        for name, value in new[kind].items():
            if old[kind].get(name) != value:
                notify(
                    f"resuming with {name} {value}, it was {old[kind].get(name)}: tokens and their "
                    "order are the same, but sums may round differently from now on"
                )
