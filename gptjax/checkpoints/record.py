"""What a run records of itself at each checkpoint, and under which settings it may go on."""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.config import GPTConfig, TrainConfig
from gptjax.config_file import complete
from gptjax.errors import UsageError
from gptjax.settings import architecture, experiment, flatten, names, run, state
from gptjax.tokenizer import Tokenizer, fingerprint

Record = dict[str, Any]

FIXED = names(TrainConfig, architecture, state)
GUARDED = [*names(TrainConfig, experiment), "data", "tokenizer"]
COMPARED = names(TrainConfig, architecture, state, experiment, run)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SAMPLED = 256  # blocks of a token file that its fingerprint reads
BLOCK = 2**20  # bytes


def token_fingerprint(tokens: np.ndarray) -> str:
    """Of a token array: type, length and up to 256 blocks of 1 MiB, evenly spread.

    So everything of a file below 256 MiB counts, and a larger one is no burden to start with.
    """
    data = tokens.reshape(-1).view(np.uint8)
    sha256 = hashlib.sha256(f"{tokens.dtype.str} {len(tokens)}".encode())
    count = min(SAMPLED, -(-len(data) // BLOCK))
    for i in range(count):
        start = 0 if count == 1 else i * (len(data) - BLOCK) // (count - 1)
        sha256.update(np.ascontiguousarray(data[start : start + BLOCK]).data)
    return sha256.hexdigest()


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_record(
    config: TrainConfig,
    cfg: GPTConfig,
    shards: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    n_train: int | None = None,
) -> Record:
    """What belongs to every checkpoint of this run, as JSON.

    Args:
        config: the settings as given.
        cfg: the model as it is computed, without any "auto".
        shards: the token arrays of both splits.
        tokenizer: the one they were made with.
        n_train: how many of the shards, the first ones, are trained on.
    """
    settings = flatten(dataclasses.replace(config, model=cfg))
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
    """Refuse to go on under `new` with a run saved under `old`, or tell what changes.

    Raises:
        UsageError: the model or the state would be another, or the experiment without leave.
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
            return f"another {name}"
        return f"{name}={before[name]}, you asked for {now[name]}"

    fixed = [show(name) for name in changed if name in FIXED]
    if fixed:
        raise UsageError(
            f"the checkpoint has {'; '.join(fixed)}; leave it as it was, or take another --out_dir"
        )
    guarded = [name for name in changed if name in GUARDED and name not in allow_change]
    if guarded:
        raise UsageError(
            f"the checkpoint has {'; '.join(map(show, guarded))}; leave it as it was, or take "
            f"--allow_change={','.join(guarded)}"
        )
    for name in changed:
        if name in ("data", "tokenizer"):
            notify(f"resuming with {show(name)}")
        else:
            notify(f"resuming with {name}={now[name]}, it was {before[name]}")
    for kind in ("versions", "machine"):
        for name, value in new[kind].items():
            if old[kind].get(name) != value:
                notify(
                    f"resuming with {name} {value}, it was {old[kind].get(name)}: the same tokens "
                    "in the same order, but sums may round differently from now on"
                )
