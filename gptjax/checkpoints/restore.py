"""Restoring a saved step: its parameters, its optimizer state and its meta.

Orbax restores damaged arrays without a word, so every step's meta holds a digest of each array, and
one of itself; what does not match is never used.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args

from gptjax.checkpoints.hashes import Leaves, first_difference, leaf_digests, leaf_paths
from gptjax.checkpoints.step_files import plain_path, unmerged_items
from gptjax.checkpoints.steps import (
    DamagedStep,
    Meta,
    checkpoint_folder,
    is_of_the_machine,
    read_meta,
    require_steps,
    saved_steps,
    set_aside,
    step_folder,
)
from gptjax.errors import CheckpointError, OutputError, first_line
from gptjax.model import Params
from gptjax.sharding import PyTree, all_agree

Notify = Callable[[str], None]


class Restored(NamedTuple):
    """A step as it was saved, every array checked."""

    step: int
    params: Params
    extra: PyTree
    meta: Meta


def restore_params(run_dir: Path, step: int, target: Params) -> Params:
    """Return the parameters alone, shaped, typed and placed like the abstract target.

    Raises:
        CheckpointError: they are damaged, or not of these shapes.
    """
    meta = read_meta(run_dir, step)
    return restore_items(run_dir, step, meta, {"params": target})["params"]


def restore_extra(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Return what training saved beside the parameters, by path: the optimizer's state, whichever.

    Raises:
        CheckpointError: it is damaged.
    """
    meta = read_meta(run_dir, step)
    if not any(path.startswith("extra/") for path in meta["leaves"]):
        return {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        path = plain_path(checkpoint_folder(run_dir)) / str(step) / "extra"
        saved = ocp.StandardCheckpointHandler().metadata(path).tree
    except Exception as error:  # as of restore_items
        raise DamagedStep(f"cannot use step {step} ({run_dir}): {first_line(error)}") from error
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved
    )
    extra = restore_items(run_dir, step, meta, {"extra": target})["extra"]
    return dict(zip(leaf_paths(extra), map(np.asarray, jax.tree.leaves(extra)), strict=True))


def restore_newest(
    run_dir: Path,
    target: tuple[Params, PyTree],
    accept: Callable[[Meta], None] = lambda meta: None,
    *,
    notify: Notify = print,
    only: Sequence[int] | None = None,
    optional: Mapping[str, PyTree] = MappingProxyType({}),
) -> Restored:
    """Return the newest intact step; set damaged ones aside as quarantine-STEP.

    Args:
        run_dir: the run folder.
        target: abstract parameters and what else was saved.
        accept: raises if a step cannot be used with the present settings; called with its meta
            before any array is read.
        notify: is told of each damaged step.
        only: consider these steps only.
        optional: abstract trees by name, which are restored too where a step has them beside the
            rest.

    Raises:
        CheckpointError: none is intact; the reason of each is listed.
    """
    reasons = []
    for step in reversed(require_steps(run_dir) if only is None else only):
        reason = ""
        try:
            meta = read_meta(run_dir, step)
        except DamagedStep as error:
            reason = str(error)
        if all_agree(not reason):
            accept(meta)
            require_extra(run_dir, meta)
            held = {path.split("/")[1] for path in meta["leaves"] if path.startswith("extra/")}
            more = {name: tree for name, tree in optional.items() if name in held}
            wanted = {"params": target[0], "extra": target[1] | more}
            try:
                items = restore_items(run_dir, step, meta, wanted)
            except DamagedStep as error:
                reason = str(error)
            if all_agree(not reason):
                return Restored(step, items["params"], items["extra"], meta)
        reason = reason or f"cannot use step {step}: another process could not read it"
        name = set_aside(step_folder(run_dir, step), "quarantine")
        notify(f"warning: {reason}; moved to {name}")
        reasons.append(reason)
    left = saved_steps(run_dir)
    others = f", or take --resume_step, one of {left}" if left else ""
    raise CheckpointError(
        f"no step is intact: {'; '.join(reasons)}; start a new run with another --out_dir{others}"
    )


def require_extra(run_dir: Path, meta: Meta) -> None:
    """Raise CheckpointError if a step holds parameters only."""
    if not any(path.startswith("extra/") for path in meta["leaves"]):
        raise CheckpointError(
            f"step {meta['step']} has no optimizer state to resume with "
            f"({checkpoint_folder(run_dir)}): start a run from it with "
            f"{quote(f'--init_from={run_dir}')} and another --out_dir"
        )


def restore_items(
    run_dir: Path, step: int, meta: Meta, targets: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Restore the items of a step that the targets name, each array checked against meta.

    Raises:
        DamagedStep: an array is not what was saved.
        CheckpointError: the step was not merged or holds other shapes, or this machine cannot read
            it now.
    """
    found = f"cannot use step {step} ({checkpoint_folder(run_dir)})"
    expected = {
        path: leaf for path, leaf in meta["leaves"].items() if path.split("/")[0] in targets
    }
    if unmerged_items(step_folder(run_dir, step)):
        raise CheckpointError(
            f"{found}: its arrays were never merged, as gptjax 0.1 left them in a folder with *?[ "
            f"in its name; merge them by gptjax doctor {quote(str(run_dir))} --mend"
        )
    wanted: Leaves = {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in zip(leaf_paths(targets), jax.tree.leaves(targets), strict=True)
    }
    if difference := first_difference(expected, wanted):
        raise CheckpointError(
            f"{found}: {difference}; the settings are not those with which it was saved"
        )
    try:
        path = plain_path(checkpoint_folder(run_dir))
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(path, options=options) as manager:
            args = {name: ocp_args.StandardRestore(target) for name, target in targets.items()}
            items = dict(manager.restore(step, args=ocp_args.Composite(**args)).items())
    except (MemoryError, OutputError):
        raise
    except Exception as error:  # orbax raises a dozen types on damaged files
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        kind = CheckpointError if is_of_the_machine(error) else DamagedStep
        raise kind(
            f"{found}: {first_line(error)} (its values could not be checked; the cause may also be "
            "the disk, its mount, or the installed packages)"
        ) from error
    if difference := first_difference(leaf_digests(items), expected):
        raise DamagedStep(f"{found}: {difference}")
    return items
