"""The saved steps of a run, and the meta that was saved with each of them.

The scripts make paths absolute, as orbax wants them.
"""

import contextlib
import errno
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, cast

import jax
import orbax.checkpoint as ocp

from gptjax.checkpoints.hashes import Leaves, json_sha256
from gptjax.checkpoints.record import Record
from gptjax.errors import CheckpointError, first_line
from gptjax.sharding import all_agree

FORMAT = 2


class About(TypedDict, total=False):
    """The part of a step's meta that the one who saves it gives."""

    val_loss: float | None  # nats per token; None if it was not evaluated
    best_val_loss: float | None  # of the run up to this step
    record: Record  # of a step that was trained
    imported: str  # where a model came from that others trained
    files: dict[str, str]  # and the sha256 of each of its files


class Meta(About):
    """The JSON that is saved with a step."""

    format: int
    step: int
    leaves: Leaves  # of each array


def checkpoint_folder(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints, as an absolute path."""
    return run_dir.absolute() / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of a step, whether it exists or not."""
    return checkpoint_folder(run_dir) / str(step)


def named_like_steps(run_dir: Path) -> list[Path]:
    """Return the paths that are named like steps, such as 50 but not 050."""
    paths = checkpoint_folder(run_dir).glob("*")
    return [path for path in paths if path.name.isdecimal() and path.name == str(int(path.name))]


def saved_steps(run_dir: Path) -> list[int]:
    """Return the saved steps of a run, oldest first."""
    paths = named_like_steps(run_dir)
    return sorted(int(path.name) for path in paths if path.is_dir() and any(path.iterdir()))


def empty_folders(run_dir: Path) -> list[Path]:
    """Return the empty folders that are named like steps, which gptjax never makes."""
    found = [p for p in named_like_steps(run_dir) if p.is_dir() and not any(p.iterdir())]
    all_agree(True)  # before one process renames them, all have looked
    return found


def require_steps(run_dir: Path) -> list[int]:
    """Return the saved steps of a run, oldest first; CheckpointError if there is none."""
    saved = saved_steps(run_dir)
    if not saved:
        where = checkpoint_folder(run_dir)
        raise CheckpointError(f"no checkpoint ({where}); train.py saves one")
    return saved


def set_aside(path: Path, word: str) -> str:
    """Rename a step's folder to WORD-STEP, so that it counts no longer; return the new name."""
    names = [f"{word}-{path.name}", *(f"{word}-{path.name}-{i}" for i in range(2, 1000))]
    name = next(name for name in names if not (path.parent / name).exists())
    if jax.process_index() == 0:
        path.rename(path.parent / name)
    all_agree(True)  # the others wait until it is done
    return name


def quarantined(run_dir: Path) -> list[str]:
    """Return the names of the folders that were set aside as damaged."""
    return sorted(path.name for path in checkpoint_folder(run_dir).glob("quarantine-*"))


# ---- What was written down with a step -----------------------------------------------------------


class DamagedStep(CheckpointError):
    """A step whose files do not hold what was saved; other steps may be used instead."""


# What the system says when files cannot be read for a reason that lies outside of them.
OUTSIDE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOTCONN)


def is_of_the_machine(error: Exception) -> bool:
    """Return whether an error tells of this machine or its mounts, not of the step's files."""
    if isinstance(error, OSError) and error.errno in OUTSIDE:
        return True
    return any(os.strerror(number) in str(error) for number in OUTSIDE)


def read_meta(run_dir: Path, step: int) -> Meta:
    """Return the JSON that was saved with a step.

    Raises:
        DamagedStep: it is not what was saved.
        CheckpointError: it is of another format, or this machine cannot read it now.
    """
    found = f"cannot use step {step} ({checkpoint_folder(run_dir)})"
    try:
        meta = dict(ocp.JsonCheckpointHandler().restore(step_folder(run_dir, step) / "meta"))
    except Exception as error:  # JSON's, the file system's
        kind = CheckpointError if is_of_the_machine(error) else DamagedStep
        raise kind(f"{found}: {first_line(error)}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{found}: its format is {meta.get('format')}, but this version reads {FORMAT}"
        )
    if meta.pop("sha256", None) != json_sha256(meta):
        raise DamagedStep(f"{found}: sha256 mismatch in meta")
    if meta["step"] != step:
        raise DamagedStep(f"{found}: it holds step {meta['step']}")
    return cast(Meta, meta)


def loss_of(about: About) -> float:
    """Return a step's validation loss, infinite if it was not evaluated or is not finite."""
    loss = about.get("val_loss")
    return math.inf if loss is None or not math.isfinite(loss) else loss


def best_of(saved: Sequence[int], val_losses: dict[int, float]) -> int:
    """Return the newest of these steps, oldest first, with the least loss."""
    return min(reversed(saved), key=lambda step: val_losses.get(step, math.inf))


def best_step(run_dir: Path) -> int:
    """Return the saved step with the least validation loss, the newest if none was evaluated."""
    saved, losses = require_steps(run_dir), {}
    for step in saved:
        with contextlib.suppress(CheckpointError):  # damaged: another may be whole
            losses[step] = loss_of(read_meta(run_dir, step))
    return best_of([step for step in saved if step in losses] or saved, losses)
