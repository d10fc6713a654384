"""A check that a run which is stopped and resumed ends with the same bits, made by doing it."""

import subprocess
import sys
import tempfile
from pathlib import Path

from gptjax.checkpoints.hashes import first_difference
from gptjax.checkpoints.steps import read_meta
from gptjax.errors import CheckpointError, UsageError


def resume_check(script: Path, argv: list[str], max_iters: int) -> str:
    """Train once without a stop and once with a stop and a resume halfway; compare every array.

    Args:
        script: train.py.
        argv: its flags, without --resume_check.
        max_iters: steps of the whole run, at least 2.

    Returns:
        A sentence that says what is equal.

    Raises:
        UsageError: there is no step to stop at.
        CheckpointError: an array differs (the first is named), or a run failed.
    """
    if max_iters < 2:
        raise UsageError(f"--max_iters={max_iters}: must be at least 2, to stop between two steps")
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        half = max_iters // 2
        train(script, [*argv, f"--out_dir={one}", "--stop_step=0"])
        train(script, [*argv, f"--out_dir={two}", f"--stop_step={half}"])
        train(script, [*argv, f"--out_dir={two}", "--init_from=resume", "--stop_step=0"])
        leaves = [read_meta(path, max_iters)["leaves"] for path in (two, one)]
    difference = first_difference(*leaves)
    if difference:
        raise CheckpointError(
            f"stopped at step {half} and resumed, the run ends with other values: {difference}"
        )
    return (
        f"{max_iters} steps, and {half} + resume + {max_iters - half}: "
        f"all {len(leaves[0])} arrays are equal bit for bit"
    )


def train(script: Path, argv: list[str]) -> None:
    """Run train.py to its end in a process of its own; raise CheckpointError if that fails."""
    done = subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(f"train.py {' '.join(argv)} failed: {done.stderr.strip()[-500:]}")
