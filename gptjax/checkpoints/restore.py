"""Saved steps: parameters, optimizer state and meta as orbax's items of one atomic step.

Orbax restores damaged arrays without a word, so every step's meta holds a digest of each array, and
one of itself; what does not match is never used. The scripts make paths absolute, as orbax wants.
"""

import contextlib
import errno
import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args

from gptjax.checkpoints.hashes import (
    Leaves,
    first_difference,
    json_sha256,
    leaf_digests,
    leaf_paths,
)
from gptjax.checkpoints.step_files import plain_path, unmerged_items
from gptjax.errors import CheckpointError, OutputError
from gptjax.sharding import all_agree

Tree = Any
Meta = dict[str, Any]
Notify = Callable[[str], None]
FORMAT = 2


def folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir.absolute() / "checkpoints"


def numbered(run_dir: Path) -> list[Path]:
    """What is named like a step; 050 is a stranger's."""
    paths = folder(run_dir).glob("*")
    return [path for path in paths if path.name.isdecimal() and path.name == str(int(path.name))]


def steps(run_dir: Path) -> list[int]:
    """The saved steps of a run, oldest first; empty if there is none."""
    paths = numbered(run_dir)
    return sorted(int(path.name) for path in paths if path.is_dir() and any(path.iterdir()))


def empty_steps(run_dir: Path) -> list[Path]:
    """Folders named like steps that hold nothing: strangers' doing."""
    found = [path for path in numbered(run_dir) if path.is_dir() and not any(path.iterdir())]
    all_agree(True)  # before one process renames them, all have looked
    return found


def require_steps(run_dir: Path) -> list[int]:
    """`steps`, or CheckpointError if there is none."""
    saved = steps(run_dir)
    if not saved:
        raise CheckpointError(f"no checkpoint ({folder(run_dir)}); train.py --out_dir makes one")
    return saved


class Restored(NamedTuple):
    """A step as it was saved, every array checked."""

    step: int
    params: Tree
    extra: Tree
    meta: Meta


class NotDamaged(CheckpointError):
    """A step that cannot be used here although nothing says that it is damaged."""


def read_meta(run_dir: Path, step: int) -> Meta:
    """The JSON that was saved with a step; CheckpointError unless it is whole."""
    try:
        meta = dict(ocp.JsonCheckpointHandler().restore(folder(run_dir) / str(step) / "meta"))
        sha256 = meta.pop("sha256", None)
        if meta.get("format") != FORMAT:
            raise NotDamaged(f"format {meta.get('format')}, this version of gptjax reads {FORMAT}")
        if sha256 != json_sha256(meta):
            raise CheckpointError("sha256 mismatch in meta")
        if meta["step"] != step:
            raise CheckpointError(f"it is step {meta['step']}")
    except Exception as error:  # JSON's, the file system's, ours
        outside = isinstance(error, NotDamaged) or is_of_the_machine(error)
        kind = NotDamaged if outside else CheckpointError
        raise kind(f"cannot use step {step} ({folder(run_dir)}): {first_line(error)}") from error
    return meta


def best_step(run_dir: Path) -> int:
    """The saved step with the least validation loss, or the newest if none was evaluated."""
    saved, losses = require_steps(run_dir), {}
    for step in saved:
        with contextlib.suppress(CheckpointError):  # damaged: another may be whole
            losses[step] = loss_of(read_meta(run_dir, step))
    return best_of([step for step in saved if step in losses] or saved, losses)


def best_of(saved: Sequence[int], val_losses: dict[int, float]) -> int:
    """Of these steps, oldest first, the newest with the least loss."""
    return min(reversed(saved), key=lambda step: val_losses.get(step, math.inf))


def loss_of(meta: Meta) -> float:
    """A step's validation loss, infinite if it was not evaluated or is not finite."""
    loss = meta.get("val_loss")
    return math.inf if loss is None or not math.isfinite(loss) else loss


def restore_params(run_dir: Path, step: int, target: Tree) -> Tree:
    """The parameters alone, shaped, typed and placed like the abstract target.

    Raises:
        CheckpointError: they are damaged, or not of these shapes.
    """
    meta = read_meta(run_dir, step)
    return restore_items(run_dir, step, meta, {"params": target})["params"]


def restore_newest(
    run_dir: Path,
    target: tuple[Tree, Tree],
    accept: Callable[[Meta], None] = lambda meta: None,
    *,
    notify: Notify = print,
    only: Sequence[int] | None = None,
) -> Restored:
    """The newest step that is whole; damaged ones are set aside as quarantine-STEP.

    Args:
        run_dir: the run folder.
        target: abstract parameters and what else was saved.
        accept: raises if a step cannot be used with the present settings; called with its meta
            before any array is read.
        notify: is told of each damaged step.
        only: consider these steps only.

    Raises:
        CheckpointError: none is whole; lists the reason of each.
    """
    reasons = []
    for step in reversed(require_steps(run_dir) if only is None else only):
        reason = ""
        try:
            meta = read_meta(run_dir, step)
        except NotDamaged:
            raise
        except CheckpointError as error:
            reason = str(error)
        if all_agree(not reason):
            accept(meta)
            require_extra(run_dir, meta)
            try:
                items = restore_items(
                    run_dir, step, meta, {"params": target[0], "extra": target[1]}
                )
            except NotDamaged:
                raise
            except CheckpointError as error:
                reason = str(error)
            if all_agree(not reason):
                return Restored(step, items["params"], items["extra"], meta)
        reason = reason or f"cannot use step {step}: another process could not read it"
        name = set_aside(folder(run_dir) / str(step), "quarantine")
        notify(f"warning: {reason}; moved to {name}")
        reasons.append(reason)
    left = steps(run_dir)
    others = f", or take --resume_step of {left}" if left else ""
    raise CheckpointError(
        f"no step is whole: {'; '.join(reasons)}; start anew with another --out_dir{others}"
    )


def require_extra(run_dir: Path, meta: Meta) -> None:
    """CheckpointError if a step holds parameters only."""
    if not any(path.startswith("extra/") for path in meta["leaves"]):
        raise CheckpointError(
            f"step {meta['step']} has no optimizer state to resume with ({folder(run_dir)}): start "
            f"a run from it with {quote(f'--init_from={run_dir}')} and another --out_dir"
        )


def restore_items(run_dir: Path, step: int, meta: Meta, targets: dict[str, Tree]) -> Any:
    """Restore items of a step by name, each array checked against meta.

    Raises:
        NotDamaged: the step was not merged, holds other shapes, or the machine cannot read it now.
        CheckpointError: it is damaged.
    """
    found = f"cannot use step {step} ({folder(run_dir)})"
    expected = {
        path: leaf for path, leaf in meta["leaves"].items() if path.split("/")[0] in targets
    }
    if unmerged_items(folder(run_dir) / str(step)):
        raise NotDamaged(
            f"{found}: its arrays were never merged, as gptjax 0.1 left them in a folder with *?[ "
            f"in its name; merge them: gptjax doctor {shlex.quote(str(run_dir))} --mend"
        )
    if difference := first_shape_difference(targets, expected):
        raise NotDamaged(f"{found}: {difference}; the settings are not those it was saved with")
    try:
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(plain_path(folder(run_dir)), options=options) as manager:
            args = {name: ocp_args.StandardRestore(target) for name, target in targets.items()}
            items = dict(manager.restore(step, args=ocp_args.Composite(**args)).items())
    except (MemoryError, OutputError):
        raise
    except Exception as error:  # orbax raises a dozen types on damaged files
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        kind = NotDamaged if is_of_the_machine(error) else CheckpointError
        raise kind(
            f"{found}: {first_line(error)} (its numbers could not be compared: the cause may also "
            "be the disk, its mount, or the installed packages)"
        ) from error
    difference = first_difference(leaf_digests(items), expected)
    if difference:
        raise CheckpointError(f"{found}: {difference}")
    return items


def first_shape_difference(targets: dict[str, Tree], expected: Leaves) -> str | None:
    """Return where the wanted arrays differ from the saved ones in path, shape or dtype."""
    paths, leaves = leaf_paths(targets), jax.tree.leaves(targets)
    wanted = {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in zip(paths, leaves, strict=True)
    }
    # Parameters first: an optimizer's paths, which end in theirs, say less.
    for path in sorted(expected | wanted, key=lambda path: not path.startswith("params/")):
        if path not in wanted:
            return f"it holds {path}, which is not wanted"
        if path not in expected:
            return f"it does not hold {path}"
        for what in ("shape", "dtype"):
            if expected[path][what] != wanted[path][what]:
                there, here = expected[path][what], wanted[path][what]
                return f"{path} has {what} {there}, wanted is {here}"
    return None


# What the system says when files cannot be read for a reason that lies outside of them.
OUTSIDE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOTCONN)


def is_of_the_machine(error: Exception) -> bool:
    """Return whether an error tells of this machine or its mounts, not of the step's files."""
    if isinstance(error, OSError) and error.errno in OUTSIDE:
        return True
    return any(os.strerror(number) in str(error) for number in OUTSIDE)


def set_aside(path: Path, word: str) -> str:
    """Rename a step's folder to WORD-STEP, so that it counts no longer; the new name."""
    names = [f"{word}-{path.name}", *(f"{word}-{path.name}-{i}" for i in range(2, 1000))]
    name = next(name for name in names if not (path.parent / name).exists())
    if jax.process_index() == 0:
        path.rename(path.parent / name)
    all_agree(True)  # the others wait until it is done
    return name


def quarantined(run_dir: Path) -> list[str]:
    """Names of what was set aside as damaged."""
    return sorted(path.name for path in folder(run_dir).glob("quarantine-*"))


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    if "No space left on device" in str(error):
        return "no space left on device"
    line = str(error).strip().partition("\n")[0]
    return line.partition(" [tensorstore_spec")[0] or type(error).__name__  # which is 2 kB


def abstract_tree(shapes: Tree, shardings: Tree) -> Tree:
    """Shapes with the places their arrays shall have: the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
