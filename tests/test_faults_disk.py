"""Too little memory, and disks that are full or cannot be written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import PLAIN, ROOT, TINY, Environment, SmallDisk, digest, run

slow = pytest.mark.slow


@slow
def test_too_little_memory_is_explained(environment: Environment, start: tuple[str, ...]) -> None:
    command = ["prlimit", "--as=8000000000", sys.executable, str(ROOT / "train.py"), *start]
    done = subprocess.run(
        [*command, "--n_embd=16384", "--n_layer=4", "--force"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 71, done.stderr[-2000:]
    assert "n_embd=16384; lower --batch_size" in done.stderr.splitlines()[-1]


@slow
def test_a_full_disk(small_disk: SmallDisk, folder: Path) -> None:
    """Saves fail, are tried again, and end the run; what was saved goes on once there is room."""
    train = (
        f"{sys.executable} {ROOT}/train.py {' '.join([*TINY, *PLAIN])} "
        f"--dataset={folder}/corpus.txt --n_layer=2 --n_embd=256 --n_head=2 --out_dir=/mnt/out"
    )
    # A step takes 19 MB: the disk holds one.
    refused = small_disk(24, train)
    assert refused.returncode == 74, refused.stderr
    assert re.search(r"4 x .* need .* more, .* are free", refused.stderr)
    script = (
        f"{train} --force; echo ended $?; ls /mnt/out/checkpoints; mount -o remount,size=300m /mnt "
        f"&& {sys.executable} {ROOT}/train.py --out_dir=/mnt/out --init_from=resume"
    )
    done = small_disk(24, script)
    assert "step 20 was not saved" in done.stdout and "MB are free" in done.stdout, done.stdout
    assert "step 40 was not saved" in done.stderr and "ended 74" in done.stdout, done.stderr
    # What orbax's threads wrote after the end, the next start removes.
    left = r"ended 74\n10\n(40\.orbax-checkpoint-tmp\n)?resum"
    assert re.search(left, done.stdout), done.stdout
    assert "resuming at step 10" in done.stdout and done.returncode == 0, done.stderr
    whole = small_disk(300, train)
    assert digest(done.stdout) == digest(whole.stdout)


@slow
def test_a_disk_that_cannot_be_written(small_disk: SmallDisk, folder: Path) -> None:
    train = f"{sys.executable} {ROOT}/train.py --dataset={folder}/corpus.txt --out_dir=/mnt/out"
    done = small_disk(8, f"mount -o remount,ro /mnt && {train}")
    assert done.returncode == 73 and "cannot write to --out_dir=/mnt/out" in done.stderr


@slow
def test_a_file_is_no_folder(environment: Environment, tmp_path: Path) -> None:
    """Said before anything is read or compiled (F09)."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        refused = run(environment, "train.py", f"--out_dir={path}", expect=73)
        assert f"cannot write to --out_dir={path}" in refused.stderr and refused.stdout == ""
