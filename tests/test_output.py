"""Nobody may take what is printed: a full disk, a closed pipe, an old terminal. Runs go on."""

import contextlib
import errno
import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.checkpoints.run_folder import load_run
from gptjax.checkpoints.steps import saved_steps
from gptjax.terminal import cli, output

from .helpers import ROOT, start_process


class Refusing(io.StringIO):
    """A stream that takes nothing while `error` is set."""

    error: int | None = None

    def write(self, text: str) -> int:
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


def test_what_a_stream_does_not_take_goes_to_a_file(tmp_path: Path) -> None:
    stream, path = Refusing(), tmp_path / "unprinted.txt"
    forgiving = output.ForgivingStream(stream, path)
    print("one", file=forgiving)
    stream.error = errno.ENOSPC
    print("two\nthree", file=forgiving)
    print("four", file=forgiving)
    stream.error = None
    print("five", file=forgiving)
    assert stream.getvalue() == "one\nfive\n"
    said, *lines = path.read_text().splitlines()
    assert "No space left on device" in said and lines == ["two", "three", "four"]


def test_a_stream_that_is_gone_is_not_asked_again(tmp_path: Path) -> None:
    stream, path = Refusing(), tmp_path / "unprinted.txt"
    forgiving = output.ForgivingStream(stream, path)
    stream.error = errno.EPIPE
    print("one", file=forgiving)
    stream.error = None
    print("two", file=forgiving)
    assert stream.getvalue() == "" and path.read_text().splitlines()[1:] == ["one", "two"]


def test_nothing_is_raised_where_the_file_cannot_be_written_either(tmp_path: Path) -> None:
    stream = Refusing()
    stream.error = errno.ENOSPC
    with contextlib.redirect_stdout(stream), output.forgiving_output(tmp_path):  # a folder
        print("lost")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_cannot_be_encoded_is_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    output.prepare_streams()
    print("━ \U0001f642 \udcff é", flush=True)
    written = raw.getvalue().decode(encoding)
    assert written.startswith("\\u2501 \\U0001f642 \\udcff ")
    assert written.endswith("\\xe9\n" if encoding == "ascii" else "é\n")


def test_libraries_are_heard_once_and_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(argv: list[str]) -> int:
        for name in ("absl", "orbax", "asyncio"):
            for _ in range(2):
                logging.getLogger(name).warning("%s: a merge was skipped\nand more", name)
                logging.getLogger(name).info("chatter")
        logging.getLogger("absl").warning("Given directory is read only=/x")
        return 0

    assert cli.run(main, []) == 0
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logging.getLogger("absl").warning("%d arguments that do not fit", "some")  # raises nothing
    found = capsys.readouterr().err.splitlines()
    assert found == [
        f"warning: {name}: {name}: a merge was skipped" for name in ("absl", "orbax", "asyncio")
    ]


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = {signal.SIGHUP}
    monkeypatch.setattr(
        cli.signal, "getsignal", lambda n: signal.SIG_IGN if n in ignored else signal.SIG_DFL
    )
    found = cli.stop_signals()
    assert signal.SIGHUP not in found
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU} <= set(found)


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As of a job that a script has put in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cli.delay_interrupt() as received:
            signal.raise_signal(signal.SIGINT)
            assert received == [] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_note_that_nobody_takes_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Refusing()
    stream.error = errno.ENOSPC
    monkeypatch.setattr(sys, "stderr", stream)
    output.note("a note")


TINY = (
    *("--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=8"),
    *("--warmup_iters=0", "--eval_iters=2", "--eval_interval=0", "--sample_tokens=9"),
    "--log_interval=1",
)


def train(
    environment: dict[str, str],
    folder: Path,
    out: Path,
    stacks: Path,
    *argv: str,
    stdout: int | io.BufferedWriter,
) -> subprocess.Popen[bytes]:
    flags = (*TINY, f"--dataset={folder}/corpus.txt", f"--out_dir={out}", *argv)
    return start_process(
        [sys.executable, str(ROOT / "train.py"), *flags],
        stacks=stacks,
        env=environment,
        stdout=stdout,
        stderr=subprocess.STDOUT,
    )


def test_a_run_whose_reader_leaves_and_whose_session_ends_is_saved(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Into a folder whose name is a pattern, in ASCII, to a reader of one line; then SIGHUP."""
    out = tmp_path / "proj [v2]" / "run[a]*"
    environment = {**environment, "PYTHONIOENCODING": "ascii"}
    endless, stacks = "--max_iters=1000000", tmp_path / "stacks"
    process = train(environment, folder, out, stacks, endless, stdout=subprocess.PIPE)
    assert process.stdout is not None and b"parameters" in process.stdout.readline()
    process.stdout.close()
    unprinted = out / "unprinted.txt"
    for _ in range(600):
        if unprinted.is_file() and "step 5/" in unprinted.read_text():
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            break
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:  # this test was once seen to hang: pytest shows it then
        print(unprinted.read_text()[-3000:] if unprinted.is_file() else "nothing unprinted")
    saved = saved_steps(out)
    assert len(saved) == 1 and saved[0] >= 5
    assert f"saved step {saved[0]} after SIGHUP" in unprinted.read_text()
    assert load_run(out).step == saved[0]  # every array is there, and of its hash


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_run_ends_well_although_its_log_is_full(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    with Path("/dev/full").open("wb") as full:
        short = ("--max_iters=3", "--learning_rate=1e-5")  # below the preset's min_lr: a note
        out, stacks = tmp_path / "out", tmp_path / "stacks"
        process = train(environment, folder, out, stacks, *short, stdout=full)
        assert process.wait(120) == 0
    assert "next: python sample.py" in (out / "unprinted.txt").read_text()
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir() if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert set(modes.values()) == {0o666 & ~mask}, modes
