"""A process that hangs is ended with its test, and says where it was."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import STARTED, end_processes, start_process

HANGS = """
import time

def hang():
    print("hangs", flush=True)
    time.sleep(60)

hang()
"""


@pytest.mark.parametrize("read", [True, False], ids=["is read", "nobody reads"])
def test_a_process_that_is_left_says_where_it_hung(tmp_path: Path, read: bool) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    command = [sys.executable, str(tmp_path / "hangs.py")]
    stacks = None if read else tmp_path / "stacks"
    process = start_process(command, stacks, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None and process.stdout.readline() == b"hangs\n"
    if not read:
        process.stdout.close()
    said = "\n".join(end_processes())
    assert "in hang" in said and str(command[-1]) in said
    assert process.poll() is not None and STARTED == []


def test_a_process_that_ended_says_nothing() -> None:
    process = start_process([sys.executable, "-c", "print('done')"], stdout=subprocess.PIPE)
    process.wait()
    assert end_processes() == []
    assert process.stdout is not None and process.stdout.closed


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_process_does_not_inherit_that_a_signal_is_ignored(number: signal.Signals) -> None:
    """Under nohup a run went on after SIGHUP, as it should, and the test that sends one failed."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        code = f"import signal; print(signal.getsignal({int(number)}) == signal.SIG_IGN)"
        process = start_process([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.communicate(timeout=60)[0] == b"False\n"
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
