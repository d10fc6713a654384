"""Saved states: orbax writes parameters, optimizer state and meta as one atomic step.

Orbax restores damaged arrays without a word, so every step's meta holds a digest of each array, and
one of itself; what does not match is never used. The scripts make paths absolute, as orbax wants.
"""

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args

from gptjax.digests import first_difference, json_sha256, leaf_digests
from gptjax.errors import CheckpointError, DiskError, NonFiniteError
from gptjax.sharding import all_agree

Tree = Any
Meta = dict[str, Any]
Notify = Callable[[str], None]
FORMAT = 2
STRIKES = 3  # saves that may fail one after another, as on a full disk, before a run gives up


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


# ---- Saving --------------------------------------------------------------------------------------


class NewestAndBest:
    """Orbax's question which steps to keep: the newest few, and the one with the least val_loss."""

    def __init__(self, keep: int, val_losses: dict[int, float]) -> None:
        self.keep, self.val_losses = keep, val_losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer per checkpoint, as orbax asks for them."""
        saved = sorted(checkpoint.step for checkpoint in checkpoints)
        wanted = {*saved[-self.keep :], best_of(saved, self.val_losses)}
        return [checkpoint.step in wanted for checkpoint in checkpoints]


class Saver:
    """Saves steps in the background; `close()` waits for the last one, leaving without loses it.

    A save that fails leaves nothing behind and is tried again at the next; `strikes` failures in a
    row end the run, and so does the first of a run of several processes, which would wait for each
    other for minutes. `last` is the newest step known to be on disk.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int = 1,
        notify: Notify = print,
        strikes: int = STRIKES,
        largest: int = 0,
    ) -> None:
        """`largest`, the bytes of the largest array: compress no more than that at one time."""
        self.run_dir, self.keep, self.notify, self.strikes = run_dir, keep, notify, strikes
        self.handlers = None
        if largest:
            limit = (largest + 1) / 1e9
            params = ocp.StandardCheckpointHandler(save_concurrent_gb=limit)
            self.handlers = {"params": params, "meta": ocp.JsonCheckpointHandler()}
        self.failures, self.size = 0, 0  # saves that failed in a row; bytes of a step
        self.pending: tuple[int, float] | None = None  # step and val_loss of the save under way
        self.last: int | None = None
        self.val_losses: dict[int, float] = {}
        for path in empty_steps(run_dir):  # they would make orbax drop every save
            notify(f"warning: {path} is empty; moved to {set_aside(path, 'quarantine')}")
        for step in steps(run_dir):
            with contextlib.suppress(CheckpointError):  # damaged: restoring will say so
                self.val_losses[step] = loss_of(read_meta(run_dir, step))
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=NewestAndBest(self.keep, self.val_losses),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        return ocp.CheckpointManager(
            folder(self.run_dir), options=options, item_handlers=self.handlers
        )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(self, step: int, params: Tree, extra: Tree, meta: Meta) -> None:
        """Begin to save a step; returns once the arrays are copied.

        Args:
            step: the number of the step.
            params: the parameters.
            extra: what else training goes on from, or None: a model that others trained has none.
            meta: JSON, with `val_loss`.

        Raises:
            NonFiniteError: a parameter is not finite; such a step would be of no use.
            DiskError: this is the last of too many saves in a row that failed.
            CheckpointError: orbax declined, because this step or a newer one is already there.
        """
        self.settle()
        params_, extra_ = jax.device_get((params, extra))
        for leaf in jax.tree.leaves(params_):
            if not np.isfinite(leaf).all():
                raise NonFiniteError(f"a parameter is not finite after step {step}: not saved")
        assert "sha256" not in meta, "that is the digest of meta itself"
        self.size = tree_bytes((params, extra))
        leaves = leaf_digests({"params": params_} | ({} if extra is None else {"extra": extra_}))
        meta = {"format": FORMAT, "step": step, **meta, "leaves": leaves}
        items = {
            "params": ocp_args.StandardSave(params),
            "meta": ocp_args.JsonSave({**meta, "sha256": json_sha256(meta)}),
        }
        if extra is not None:
            items["extra"] = ocp_args.StandardSave(extra)
        self.pending = step, loss_of(meta)
        if not self._has_room():
            self._fail(OSError("the disk is full"))
            return
        try:
            begun = self.manager.save(step, args=ocp_args.Composite(**items))
        except Exception as error:  # orbax raises what its file systems raise
            self._fail(error)
            return
        if not begun:
            self.pending = None
            raise CheckpointError(
                f"step {step} was not saved ({self.manager.directory}): this or a newer step is "
                "there already; take another --out_dir, or --init_from=resume"
            )

    def _has_room(self) -> bool:
        """Whether all processes see room for a step, uncompressed; one alone may simply try."""
        if jax.process_count() == 1:
            return True
        # Where one of them fails to write, the others wait for it in orbax, for minutes.
        try:
            free = shutil.disk_usage(self.run_dir).free
        except OSError:
            free = 0
        return all_agree(free >= self.size)

    def settle(self) -> None:
        """Wait until the save under way is on disk; DiskError as of `save`."""
        if self.pending is None:
            return
        step, val_loss = self.pending
        try:
            self.manager.wait_until_finished()
            if step not in steps(self.run_dir):
                raise CheckpointError("it is not there")
        except Exception as error:
            self._fail(error)
            return
        self.pending, self.failures, self.last = None, 0, step
        self.val_losses[step] = val_loss

    def _fail(self, error: Exception) -> None:
        """Clean up after a save that failed, and say so; DiskError if it was one too many."""
        assert self.pending is not None
        step, self.pending = self.pending[0], None
        self.failures += 1
        alone = jax.process_count() == 1
        if alone:
            with contextlib.suppress(Exception):
                self.manager.close()  # what it believes to have saved is no longer true
        for path in folder(self.run_dir).glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        free = shutil.disk_usage(self.run_dir).free
        text = (
            f"step {step} was not saved: {first_line(error)}; it needs {megabytes(self.size)}, "
            f"{megabytes(free)} are free ({self.run_dir}), the steps saved before are as they were"
        )
        if self.failures >= self.strikes or not alone:
            raise DiskError(text) from error
        self.manager = self._open()
        self.notify(f"warning: {text}")

    def close(self) -> None:
        """Wait for the save under way and let go of the folder; DiskError as of `save`."""
        try:
            self.settle()
        finally:
            if not self.failures or jax.process_count() == 1:
                with contextlib.suppress(Exception):
                    self.manager.close()


def check_space(run_dir: Path, tree: Tree, copies: int = 1, remedy: str = "make room") -> None:
    """DiskError unless so many checkpoints of this tree, less those there are, fit on the disk."""
    size = tree_bytes(tree)
    saved = [path for step in numbered(run_dir) for path in step.rglob("*")]
    there = sum(path.stat().st_size for path in saved if path.is_file())
    needed, free = copies * size - there, shutil.disk_usage(run_dir).free
    if needed > free:
        raise DiskError(
            f"--out_dir={run_dir}: {copies} x {megabytes(size)} of weights and state need "
            f"{megabytes(needed)} more, {megabytes(free)} are free; {remedy}"
        )


def tree_bytes(tree: Tree) -> int:
    """What arrays, or their shapes, take."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:,.1f} MB"


# ---- Restoring -----------------------------------------------------------------------------------


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
        kind = CheckpointError
        if isinstance(error, NotDamaged | PermissionError) or (
            isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        ):
            kind = NotDamaged
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
            f"a run from it with --init_from={run_dir} and another --out_dir"
        )


def restore_items(run_dir: Path, step: int, meta: Meta, targets: dict[str, Tree]) -> Any:
    """Items of a step by name, each array checked against meta; CheckpointError if one differs."""
    found = f"cannot use step {step} ({folder(run_dir)})"
    expected = {
        path: leaf for path, leaf in meta["leaves"].items() if path.split("/")[0] in targets
    }
    try:
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(folder(run_dir), options=options) as manager:
            args = {name: ocp_args.StandardRestore(target) for name, target in targets.items()}
            items = dict(manager.restore(step, args=ocp_args.Composite(**args)).items())
    except MemoryError:
        raise
    except Exception as error:  # orbax raises a dozen types on damaged files
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise CheckpointError(f"{found}: {first_line(error)}") from error
    difference = first_difference(leaf_digests(items), expected)
    if difference:
        raise CheckpointError(f"{found}: {difference}")
    return items


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
    return str(error).strip().partition("\n")[0] or type(error).__name__


def abstract_tree(shapes: Tree, shardings: Tree) -> Tree:
    """Shapes with the places their arrays shall have: the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
