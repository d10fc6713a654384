"""An output folder appears whole or not at all, and what a killed process left goes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.conversion.new_folder import new_folder
from gptjax.errors import DataError, DiskError, OutputError, UsageError

from .helpers import ROOT, start_process

WRITER = """
import sys, time
from pathlib import Path
from gptjax.conversion.new_folder import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("of it")
    print(flush=True)
    time.sleep(60)
"""


def make(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "file").write_text("whole")


def test_all_of_it_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    with pytest.raises(KeyboardInterrupt), new_folder(path) as folder:
        (folder / "half").write_text("of it")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    make(path)
    assert [file.name for file in path.iterdir()] == ["file"]
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OutputError, match="exists already"):
        make(path)


@pytest.mark.parametrize("name", ["run", "run [v2]", "run.1"])
def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path, name: str) -> None:
    """And not while it lives, whoever else makes the same folder."""
    path = tmp_path / name
    command = [sys.executable, "-c", WRITER, str(path)]
    with start_process(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        left = tmp_path / f".{name}.{process.pid}.tmp"
        assert (left / "half").is_file()
        make(path)
        assert (left / "half").is_file()  # it goes on writing
        process.send_signal(signal.SIGKILL)
    assert (left / "half").is_file()
    (path / "file").unlink()
    make(path)  # an empty folder may be there
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_known_to_be_left_stays(tmp_path: Path) -> None:
    dead = start_process([sys.executable, "-c", ""])
    dead.wait()
    ours, parents = f".run.{os.getpid()}.tmp", f".run.{os.getppid()}.tmp"
    gone = [f".run.{dead.pid}.tmp", ours]  # without a lock, as of an older gptjax
    stay = [parents, ".run.1.tmp", f".run2.{dead.pid}.tmp", ".run.x.tmp", f"run.{dead.pid}.tmp"]
    for name in (*gone, *stay):
        (tmp_path / name).mkdir()
    lock = tmp_path / ".run.1.tmp" / ".lock"
    lock.write_text(f"process {dead.pid} on another-host since 2026-01-01\n")
    (tmp_path / f".run.0{dead.pid}.tmp").write_text("a file")
    make(tmp_path / "run")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*stay, f".run.0{dead.pid}.tmp", "run"}


@pytest.mark.parametrize("relative", [True, False])
def test_what_fails_inside_is_said_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("run") if relative else tmp_path / "run"
    for kind in (DiskError, OutputError, DataError, UsageError):
        with pytest.raises(kind) as error, new_folder(path) as folder:
            raise kind(f"cannot write {folder}/a, nor {folder.name}")
        assert str(error.value) == f"cannot write {path}/a, nor run"
    with pytest.raises(DiskError) as error, new_folder(path) as folder:
        (folder / "no" / "such").write_text("x")
    assert str(error.value).startswith(f"cannot write to --out_dir={path}: ")
    with pytest.raises(DiskError) as error, new_folder(path) as folder:
        path.mkdir()
        (path / "from").write_text("somebody else")
    assert str(error.value).startswith(f"cannot write to --out_dir={path}: ")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
