"""Saved states: orbax writes parameters, optimizer state and meta as one atomic step.

The scripts make paths absolute, which orbax wants.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args
from orbax.checkpoint import checkpoint_managers

from gptjax.errors import CheckpointError

Tree = Any
FORMAT = 1


def folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir.absolute() / "checkpoints"


def open_manager(run_dir: Path, keep: int = 1) -> ocp.CheckpointManager:
    """For `save` and `restore`; keeps the newest `keep` steps and the one with the least val_loss.

    Saving goes on in the background: `close()` waits for it, and leaving without loses the step.
    """
    policies = [
        checkpoint_managers.LatestN(keep),
        checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["val_loss"],
            reverse=True,  # the last in this order is kept
            n=1,
            keep_checkpoints_without_metrics=False,
        ),
    ]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(folder(run_dir), options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    params: Tree,
    opt_state: Tree,
    meta: dict[str, Any],
) -> None:
    """Begin to save a step; returns once the arrays are copied. meta is JSON, with `val_loss`.

    Raises:
        CheckpointError: orbax declined, because this step or a newer one is already there.
    """
    manager.wait_until_finished()  # so that the failure of the save before surfaces here
    items = ocp_args.Composite(
        params=ocp_args.StandardSave(params),
        opt_state=ocp_args.StandardSave(opt_state),
        meta=ocp_args.JsonSave({"format": FORMAT, "step": step, **meta}),
    )
    val_loss = meta.get("val_loss")
    metrics = None if val_loss is None else {"val_loss": val_loss}
    if not manager.save(step, args=items, metrics=metrics):
        raise CheckpointError(
            f"step {step} was not saved ({manager.directory}): this or a newer step is there "
            "already; take another --out_dir, or --init_from=resume"
        )


def steps(run_dir: Path) -> list[int]:
    """The saved steps of a run, oldest first; empty if there is none."""
    names = [path.name for path in folder(run_dir).glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def best_step(run_dir: Path) -> int:
    """The saved step with the least validation loss, or the newest if none was evaluated."""

    def val_loss(step: int) -> float:
        loss = restore_meta(run_dir, step).get("val_loss")
        return float("inf") if loss is None else loss

    return min(reversed(require_steps(run_dir)), key=val_loss)


def require_steps(run_dir: Path) -> list[int]:
    """`steps`, or CheckpointError if there is none."""
    saved = steps(run_dir)
    if not saved:
        raise CheckpointError(f"no checkpoint ({folder(run_dir)}); train.py --out_dir makes one")
    return saved


def restore_meta(run_dir: Path, step: int) -> dict[str, Any]:
    """The JSON that was saved with a step."""
    return restore_items(run_dir, step, meta=ocp_args.JsonRestore())["meta"]


def restore_params(run_dir: Path, step: int, abstract_params: Tree) -> Tree:
    """The parameters alone, shaped, typed and placed like the abstract tree."""
    target = ocp_args.StandardRestore(abstract_params)
    return restore_items(run_dir, step, params=target)["params"]


def restore_state(
    run_dir: Path, step: int, abstract_params: Tree, abstract_opt_state: Tree
) -> tuple[Tree, Tree, dict[str, Any]]:
    """Parameters, optimizer state and meta of a step, exactly as they were saved."""
    items = restore_items(
        run_dir,
        step,
        params=ocp_args.StandardRestore(abstract_params),
        opt_state=ocp_args.StandardRestore(abstract_opt_state),
        meta=ocp_args.JsonRestore(),
    )
    return items["params"], items["opt_state"], items["meta"]


def restore_items(run_dir: Path, step: int, **items: Any) -> Any:
    """Items of a step by name; CheckpointError, whatever it is that fails inside orbax."""
    try:
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(folder(run_dir), options=options) as manager:
            return manager.restore(step, args=ocp_args.Composite(**items))
    except Exception as error:  # orbax raises a dozen types on damaged files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"cannot read step {step} ({folder(run_dir)}): {reason}") from error


def abstract_tree(shapes: Tree, shardings: Tree) -> Tree:
    """Shapes with the places their arrays shall have: the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
