"""What a person sees: a progress bar on a terminal, plain lines anywhere else."""

import contextlib
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gptjax.files import Progress as ReportProgress


def printable(text: str) -> str:
    """The text with control characters escaped, so that it cannot command a terminal."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def bar_signs(encoding: str) -> tuple[str, str]:
    """Return what a bar is drawn with, done and left, on a terminal of this encoding."""
    try:
        "━".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "=", "-"
    return "━", "━"


@contextlib.contextmanager
def show_bytes(console: Console) -> Iterator[ReportProgress]:
    """A function (what, done, total) that shows a download or a tokenisation while it goes on."""
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda what, done, total: progress.update(
            task, description=what, completed=done, total=total or None
        )


@contextlib.contextmanager
def show_count(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that shows on stderr how far a count has come.

    Where there is no terminal, as a line every ten seconds.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{done}/{total} {unit}", file=sys.stderr, flush=True)

    yield report


def print_table(header: list[str], rows: list[list[str]], failed: list[bool]) -> None:
    """A table on stdout, the failed rows in red where there are colours."""
    table = Table(box=None, pad_edge=False)
    for column in header:
        table.add_column(column, overflow="fold")
    for row, bad in zip(rows, failed, strict=True):
        table.add_row(*row, style="red" if bad else None)
    console = Console(highlight=False)
    console.print(table, width=None if console.is_terminal else 80)


class TrainConsole:
    """Shows a run: `update` after each step, `note` for everything else."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        """`quiet`: show nothing, as all but one of several processes do."""
        self.quiet = quiet
        self.console = Console(highlight=False, quiet=quiet)
        self.total = total
        self.first: tuple[int, float] | None = None  # step and time when the first call was done
        self.step_seconds: float | None = None  # on average since then
        self.live: Live | None = None  # begun by the first update

    def note(self, text: str) -> None:
        """Print a line, or several, above the bar."""
        if self.quiet:
            return
        if self.console.is_terminal:
            self.console.print(Text(printable(text)))
        else:
            print(text, flush=True)

    def update(self, step: int, fields: dict[str, str], *, log: bool) -> None:
        """Show `step` steps done with these fields, the important ones first.

        Where there is no terminal, only with `log`.
        """
        if self.quiet:
            return
        eta = {"eta": self.eta(step)}
        if self.console.is_terminal:
            if self.live is None:
                self.live = Live(console=self.console, refresh_per_second=4)
                self.live.start()
            self.live.update(self.bar(step, fields | eta))
        elif log:
            shown = [f"{name} {value}" for name, value in (fields | eta).items()]
            print(" | ".join([f"step {step}/{self.total}", *shown]), flush=True)

    def arrive(self, step: int) -> None:
        """A call that ends with `step` is done; the first of them, which compiled, sets no pace."""
        now = time.monotonic()
        if self.first is None:
            self.first = step, now
        elif step > self.first[0]:
            self.step_seconds = (now - self.first[1]) / (step - self.first[0])

    def eta(self, step: int) -> str:
        """Time left at the pace so far."""
        if self.step_seconds is None:
            return "-"
        seconds = round(self.step_seconds * (self.total - step))
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def bar(self, step: int, fields: dict[str, str]) -> Text:
        """A line that fits the terminal: the bar, then as many fields as there is room for."""
        counter = f"{step}/{self.total} "
        width = self.console.width - len(counter) - 1
        shown: list[str] = []
        for name, value in fields.items():
            if len("  ".join([*shown, f"{name} {value}"])) > width - 6:
                break
            shown.append(f"{name} {value}")
        status = "  ".join(shown)
        room = max(0, min(30, width - len(status) - 1))
        full = room * step // max(1, self.total)
        done, left = bar_signs(self.console.encoding)
        return Text.assemble(
            counter, (done * full, "green"), (left * (room - full), "dim"), " ", status
        )

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None
