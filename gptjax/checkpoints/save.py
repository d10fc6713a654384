"""Saving steps in the background, each whole or not at all; the newest and the best are kept."""

import collections
import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo as Saved

from gptjax.checkpoints.hashes import json_sha256, leaf_digests
from gptjax.checkpoints.restore import Notify
from gptjax.checkpoints.step_files import plain_path, stored_arrays
from gptjax.checkpoints.steps import (
    FORMAT,
    About,
    Meta,
    best_of,
    checkpoint_folder,
    empty_folders,
    loss_of,
    named_like_steps,
    read_meta,
    saved_steps,
    set_aside,
    step_folder,
)
from gptjax.errors import CheckpointError, DiskError, NonFiniteError, first_line
from gptjax.files import folder_bytes
from gptjax.memory import megabytes, tree_bytes
from gptjax.model import Params
from gptjax.sharding import PyTree, all_agree, all_finite

STRIKES = 3  # saves that may fail one after another, as on a full disk, before a run gives up


class NewestAndBest:
    """A preservation policy of orbax: the newest few steps, and the one with the least val_loss.

    Orbax's own `BestN` knows losses only by files of its own in each step. Steps that were saved
    without these would lose the best one as soon as a run is resumed.
    """

    def __init__(self, keep: int, val_losses: dict[int, float]) -> None:
        """Take how many of the newest to keep, and the losses, to which others may be added."""
        self.keep, self.val_losses = keep, val_losses

    def should_preserve(self, checkpoints: Sequence[Saved], *, context: object) -> list[bool]:
        """Return an answer for each checkpoint, as orbax asks for them."""
        saved = sorted(checkpoint.step for checkpoint in checkpoints)
        wanted = {*saved[-self.keep :], best_of(saved, self.val_losses)}
        return [checkpoint.step in wanted for checkpoint in checkpoints]


class Saver:
    """A writer of steps in the background; without `close()` the last one is lost.

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
        """Open a run's checkpoints.

        Args:
            run_dir: the run folder.
            keep: how many of the newest steps to keep, beside the best one.
            notify: is told of each save that failed.
            strikes: how many may fail in a row.
            largest: bytes of the largest array; no more than that is compressed at one time.
        """
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
        for path in empty_folders(run_dir):  # they would make orbax drop every save
            notify(f"warning: {path} is empty; moved to {set_aside(path, 'quarantine')}")
        for step in saved_steps(run_dir):
            with contextlib.suppress(CheckpointError):  # damaged: restoring will say so
                self.val_losses[step] = loss_of(read_meta(run_dir, step))
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=NewestAndBest(self.keep, self.val_losses),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        checkpoint_folder(self.run_dir).mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(
            plain_path(checkpoint_folder(self.run_dir)),
            options=options,
            item_handlers=self.handlers,
        )

    def __enter__(self) -> "Saver":
        """Return the saver itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def save(self, step: int, params: Params, extra: PyTree, about: About) -> None:
        """Begin to save a step; return once the arrays are copied.

        Args:
            step: the number of the step.
            params: the parameters.
            extra: what else training goes on from, or None: a model that others trained has none.
            about: what else is to be known of it.

        Raises:
            NonFiniteError: a parameter is not finite; such a step would be of no use.
            DiskError: this is the last of too many saves in a row that failed.
            CheckpointError: orbax declined, because this step or a newer one is already there.
        """
        self.settle()
        if not all_finite(params):
            raise NonFiniteError(f"step {step} is not saved: a parameter is NaN or infinite")
        self.size = tree_bytes((params, extra))
        leaves = leaf_digests({"params": params} | ({} if extra is None else {"extra": extra}))
        meta: Meta = {"format": FORMAT, "step": step, **about, "leaves": leaves}
        items = {
            "params": ocp_args.StandardSave(params),
            "meta": ocp_args.JsonSave({**meta, "sha256": json_sha256(meta)}),
        }
        if extra is not None:
            items["extra"] = ocp_args.StandardSave(extra)
        self.pending = step, loss_of(about)
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
                f"step {step} was not saved ({self.manager.directory}): it exists already, or a "
                "newer one does; take another --out_dir, or --init_from=resume"
            )

    def _has_room(self) -> bool:
        """Return whether all processes see room for an uncompressed step; True for a single one."""
        if jax.process_count() == 1:
            return True
        # Where one of them fails to write, the others wait for it in orbax, for minutes.
        try:
            free = shutil.disk_usage(self.run_dir).free
        except OSError:
            free = 0
        return all_agree(free >= self.size)

    def settle(self) -> None:
        """Wait until the save under way is on disk; raise DiskError as `save` does."""
        if self.pending is None:
            return
        step, val_loss = self.pending
        try:
            self.manager.wait_until_finished()
            require_whole(self.run_dir, step)
        except Exception as error:
            self._fail(error)
            return
        self.pending, self.failures, self.last = None, 0, step
        self.val_losses[step] = val_loss

    def _fail(self, error: Exception) -> None:
        """Clean up after a failed save and report it; raise DiskError if it was one too many."""
        assert self.pending is not None
        step, self.pending = self.pending[0], None
        self.failures += 1
        alone = jax.process_count() == 1
        if alone:
            with contextlib.suppress(Exception):
                self.manager.close()  # what it believes to have saved is no longer true
        for _ in range(20):  # orbax's threads may still be writing into it
            for path in checkpoint_folder(self.run_dir).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.02)
        if alone and step in saved_steps(self.run_dir):  # there, but it could not be restored
            set_aside(step_folder(self.run_dir, step), "quarantine")
        free = shutil.disk_usage(self.run_dir).free
        text = (
            f"step {step} was not saved: {first_line(error)}; it needs {megabytes(self.size)} and "
            f"{megabytes(free)} are free ({self.run_dir}); the steps saved before are unchanged"
        )
        if self.failures >= self.strikes or not alone:
            raise DiskError(text) from error
        self.manager = self._open()
        self.notify(f"warning: {text}")

    def close(self) -> None:
        """Wait for the save under way and close the folder; raise DiskError as `save` does."""
        try:
            self.settle()
        finally:
            if not self.failures or jax.process_count() == 1:
                with contextlib.suppress(Exception):
                    self.manager.close()


def require_whole(run_dir: Path, step: int) -> None:
    """Check all of a saved step that a restore needs, except the values of its arrays.

    Raises:
        CheckpointError: it does not exist, its meta is damaged, or an array is missing.
        ValueError, OSError: a manifest is missing or damaged.
    """
    if step not in saved_steps(run_dir):
        raise CheckpointError("it does not exist")
    leaves = read_meta(run_dir, step)["leaves"]
    counts = collections.Counter(path.partition("/")[0] for path in leaves)
    for item, count in counts.items():
        stored = stored_arrays(step_folder(run_dir, step) / item)
        if stored != count:
            raise CheckpointError(f"only {stored} of its {count} arrays ({item}) can be found")


def check_space(run_dir: Path, tree: PyTree, copies: int = 1, remedy: str = "make room") -> None:
    """Raise DiskError unless the disk has room for so many checkpoints, less those it has."""
    size = tree_bytes(tree)
    there = sum(map(folder_bytes, named_like_steps(run_dir)))
    needed, free = copies * size - there, shutil.disk_usage(run_dir).free
    if needed > free:
        raise DiskError(
            f"--out_dir={run_dir}: {copies} x {megabytes(size)} of checkpoints need "
            f"{megabytes(needed)} more, but only {megabytes(free)} are free; {remedy}"
        )
