"""Standard output and error when they are closed, full, without a reader, or not UTF-8."""

import contextlib
import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from gptjax.files import append_line

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENOTCONN)  # nobody will ever read again


def prepare_streams() -> None:
    """Make streams escape what they cannot encode, and replace closed ones by /dev/null.

    Text that is no UTF-8 on standard input becomes lone surrogates, which tokenizers refuse.
    """
    if sys.stdout is None or sys.stderr is None:
        # Or the next file that is opened gets its number, and what C code prints.
        while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
            pass
        os.close(descriptor)
        sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
        sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def note(text: str) -> None:
    """Print a line on standard error, and ignore that it may be closed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def let_go(stream: TextIO) -> None:
    """Send what a stream still holds, and all to come, to /dev/null."""
    with contextlib.suppress(OSError, ValueError):  # a ValueError: it has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush_or_let_go(stream: TextIO) -> None:
    """Flush a stream, or let it go if that fails."""
    try:
        stream.flush()
    except (OSError, ValueError):
        let_go(stream)


class ForgivingStream:
    """A stream that never raises: what the one below it does not take goes to a file."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        """Take the stream below, and the file for what it does not take."""
        self.stream, self.path = stream, path
        self.waiting = ""  # until the end of a line, or a flush
        self.gone = False  # for ever
        self.reason = ""  # why the stream took nothing, the last time

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        self.waiting += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        text, self.waiting = self.waiting, ""
        if self.gone:
            self._keep(text)
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError) as error:  # a ValueError: the stream was closed
            if str(error) != self.reason:
                self.reason = str(error)
                self._keep(f"[from here on, what could not be printed: {error}]")
            self._keep(text)
            if isinstance(error, ValueError) or error.errno in GONE:
                self.gone = True
                let_go(self.stream)

    def _keep(self, text: str) -> None:
        with contextlib.suppress(OSError):
            if text.strip("\n"):
                append_line(self.path, text.strip("\n"))

    def __getattr__(self, name: str) -> Any:
        """Return what the stream below has under this name."""
        return getattr(self.stream, name)


@contextlib.contextmanager
def forgiving_output(path: Path) -> Iterator[None]:
    """Make printing in this block never raise; what cannot be printed goes to this file."""
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ForgivingStream(stdout, path), ForgivingStream(stderr, path)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = stdout, stderr


# ---- What libraries warn of ----------------------------------------------------------------------


def one_line(text: str) -> str:
    """Return a text as one line, its control characters escaped."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


# What orbax says of each restore, as if it were a warning.
EXPECTED = re.compile(r"CheckpointManagerOptions\.read_only=True|Given directory is read only")


class BriefWarnings(logging.Handler):
    """A handler that prints the first line of each warning of a library, once."""

    def __init__(self) -> None:
        """Begin with no warning printed."""
        super().__init__(logging.WARNING)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, unless it was printed before or is expected."""
        try:
            line = one_line(record.getMessage().strip().partition("\n")[0])[:300]
        except Exception:  # arguments that do not fit the message
            self.handleError(record)
            return
        if line in self.said or EXPECTED.match(line):
            return
        self.said.add(line)
        note(f"warning: {record.name}: {line}")


def show_warnings_briefly() -> None:
    """Show one line of each warning of the checkpoint library, instead of pages and tracebacks."""
    handler = BriefWarnings()
    for name in ("absl", "orbax", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)

    def hook(args: threading.ExceptHookArgs) -> None:
        logging.getLogger("orbax").warning("a thread ended: %r", args.exc_value)

    threading.excepthook = hook
