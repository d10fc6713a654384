"""The checks of a run folder by `gptjax doctor`."""

import fcntl
import shutil
import tempfile
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

from gptjax.checkpoints import step_files
from gptjax.checkpoints.save import require_whole
from gptjax.checkpoints.steps import checkpoint_folder, quarantined, saved_steps, step_folder
from gptjax.config import TrainConfig
from gptjax.config_file import load_config
from gptjax.errors import first_line, plural
from gptjax.files import folder_bytes

GPT2_CHECKPOINT = 124_439_808 * 12  # bytes: each parameter and adamw's two moments, in float32


class Finding(NamedTuple):
    """The finding of a check; the remedy is empty if the status is ok."""

    status: Literal["ok", "warn", "FAIL"]
    found: str
    remedy: str = ""


def check_folder(run_dir: Path) -> Finding:
    """Check that the run folder can be written to, and say which steps it holds."""
    if not run_dir.is_dir():
        return Finding("FAIL", f"{run_dir} is not a folder", f"mkdir -p {quote(str(run_dir))}")
    if reason := why_not_writable(run_dir):
        remedy = f"chmod u+rwx {quote(str(run_dir))}"
        return Finding("FAIL", f"cannot write to {run_dir}: {reason}", remedy)
    saved = ", ".join(map(str, saved_steps(run_dir))) or "none yet"
    return Finding("ok", f"{run_dir} can be written to; steps: {saved}")


def check_disk(folder: Path) -> Finding:
    """Compare the free disk with the size of a run's checkpoints, or of one of GPT-2 if none."""
    free = shutil.disk_usage(folder).free
    needed, what = GPT2_CHECKPOINT, "a checkpoint of GPT-2 124M takes"
    if saved := saved_steps(folder):
        settings = folder / "config.json"
        config = load_config(settings) if settings.is_file() else TrainConfig()
        count = config.keep_checkpoints + 2  # the best one, and the one being written
        needed = count * folder_bytes(step_folder(folder, saved[-1]))
        what = f"{count} checkpoints take"
    text = f"{free / 1e9:.2f} GB free, {what} {needed / 1e9:.2f} GB"
    remedy = f"du -sh {quote(str(folder))}/*"
    return Finding("ok", text) if free >= needed else Finding("warn", text, remedy)


def check_steps(run_dir: Path) -> Finding:
    """Check that every saved step can be restored, without reading its arrays."""
    if waiting := [path.name for path in unmerged_steps(run_dir)]:
        text = f"nothing can be read from steps that were never merged: {', '.join(waiting)}"
        return Finding("FAIL", text, f"gptjax doctor {quote(str(run_dir))} --mend")
    saved = saved_steps(run_dir)
    for step in saved:
        try:
            require_whole(run_dir, step)
        except Exception as error:  # of orbax, of tensorstore, or ours
            remedy = "train.py --init_from=resume sets it aside and takes an older one"
            return Finding("FAIL", f"step {step}: {first_line(error)}", remedy)
    return Finding("ok", f"{len(saved)} {plural(len(saved), 'step')} saved, with all their arrays")


def unmerged_steps(run_dir: Path) -> list[Path]:
    """Return the steps whose arrays orbax never merged, among them those set aside as damaged."""
    names = [*map(str, saved_steps(run_dir)), *quarantined(run_dir)]
    paths = [checkpoint_folder(run_dir) / name for name in names]
    return [path for path in paths if step_files.unmerged_items(path)]


def mend(run_dir: Path) -> list[str]:
    """Merge the unmerged steps and give them back their names; return a line for each action."""
    lines = []
    for path in unmerged_steps(run_dir):
        step_files.merge_items(path)
        lines.append(f"merged {path}")
        number = path.name.removeprefix("quarantine-")
        if number != path.name and number.isdecimal() and not (path.parent / number).exists():
            path.rename(path.parent / number)
            lines.append(f"renamed {path} to {number}")
    return lines


def check_lock(run_dir: Path) -> Finding:
    """Check that no other process is training in the run folder."""
    path = run_dir / ".lock"
    if path.exists():
        with path.open(errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = " ".join(file.read(200).split()) or "another process"
                return Finding(
                    "warn", f"{path} is held by {holder}", "wait for it, or take another --out_dir"
                )
    return Finding("ok", "no other process is training in it")


RUN = (check_folder, check_steps, check_disk, check_lock)


def why_not_writable(folder: Path) -> str:
    """Return why no file can be created in the folder, "" if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
