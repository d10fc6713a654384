"""Does a run that is stopped and taken up again end in the same bits? Found out by doing it."""

import subprocess
import sys
import tempfile
from pathlib import Path

from gptjax.checkpoints.hashes import first_difference
from gptjax.checkpoints.steps import read_meta
from gptjax.errors import CheckpointError, UsageError


def resume_check(script: Path, argv: list[str], max_iters: int) -> str:
    """Train in one process to max_iters, and in two with a stop halfway; compare every array.

    Args:
        script: train.py.
        argv: its flags, without --resume_check.
        max_iters: steps of the whole run, at least 2.

    Returns:
        What was found equal, for people.

    Raises:
        UsageError: there is no step to stop at.
        CheckpointError: an array differs (the first is named), or a run failed.
    """
    if max_iters < 2:
        raise UsageError(f"--max_iters={max_iters}: must be at least 2, to stop between two steps")
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        half = max_iters // 2
        train(script, [*argv, f"--out_dir={one}"])
        train(script, [*argv, f"--out_dir={two}", f"--stop_step={half}"])
        train(script, [*argv, f"--out_dir={two}", "--init_from=resume", "--stop_step=0"])
        leaves = [read_meta(path, max_iters)["leaves"] for path in (two, one)]
    difference = first_difference(*leaves)
    if difference:
        raise CheckpointError(
            f"stopped at step {half} and resumed, the run ends elsewhere: {difference}"
        )
    return (
        f"{max_iters} steps, and {half} + resume + {max_iters - half}: "
        f"all {len(leaves[0])} arrays are equal to the bit"
    )


def train(script: Path, argv: list[str]) -> None:
    """Run train.py to its end in a process of its own; CheckpointError if that fails."""
    done = subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(f"train.py {' '.join(argv)} failed: {done.stderr.strip()[-500:]}")
