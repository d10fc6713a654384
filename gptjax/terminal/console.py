"""The output for people: a progress bar on a terminal, plain lines anywhere else."""

import contextlib
import sys
import time
import unicodedata
from collections.abc import Iterator

from rich.console import Console
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
    """Return the text with control characters escaped, so that it cannot command a terminal."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


@contextlib.contextmanager
def show_progress(console: Console | None = None, unit: str = "") -> Iterator[ReportProgress]:
    """Yield a function (what, done, total) that shows the progress of something.

    Args:
        console: where; by default standard error.
        unit: what is counted, if it is not bytes. Where there is no terminal, a count is a line on
            standard error every ten seconds; bytes are not shown.
    """
    console, last = console or Console(stderr=True), time.monotonic()
    count = (MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    amount = count if unit else (DownloadColumn(),)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *amount)
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task("", total=None)

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        progress.update(task, description=what, completed=done, total=total or None)
        if unit and not console.is_terminal and time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{done}/{total} {unit}", file=sys.stderr, flush=True)

    with progress if console.is_terminal else contextlib.nullcontext():
        yield report


def print_table(header: list[str], rows: list[list[str]], failed: list[bool]) -> None:
    """Print a table on standard output, the failed rows in red where there are colours."""
    table = Table(box=None, pad_edge=False)
    for column in header:
        table.add_column(column, overflow="fold")
    for row, bad in zip(rows, failed, strict=True):
        table.add_row(*row, style="red" if bad else None)
    console = Console(highlight=False)
    console.print(table, width=None if console.is_terminal else 80)


class TrainConsole:
    """The display of a run: `update` after each step, `note` for everything else."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        """Prepare the bar, which is not shown yet.

        Args:
            total: the steps of the run.
            quiet: never show anything, as all but one of several processes do.
        """
        self.quiet, self.total = quiet, total
        self.console = Console(highlight=False, quiet=quiet)
        # Only the bar gives way. The pace is that of an hour: an evaluation is not all of it.
        self.progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(30),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            speed_estimate_period=3600,
        )
        self.task = self.progress.add_task("", total=total)

    def note(self, text: str) -> None:
        """Print a line, or several, above the bar."""
        if self.quiet:
            return
        if self.console.is_terminal:
            self.console.print(Text(printable(text)))
        else:
            print(text, flush=True)

    def arrive(self, step: int) -> None:
        """Count the steps up to `step` as done; the first call, which compiled, sets no pace."""
        self.progress.update(self.task, completed=step)

    def update(self, step: int, fields: dict[str, str], *, log: bool) -> None:
        """Show these fields of a step, the important ones first.

        Where there is no terminal, only with `log`.
        """
        terminal = self.console.is_terminal
        if self.quiet or not (terminal or log):
            return
        left = TimeRemainingColumn(compact=True).render(self.progress.tasks[0])
        texts, eta = [f"{name} {value}" for name, value in fields.items()], f"eta {left.plain}"
        if terminal:
            room = self.console.width - len(f"{self.total}/{self.total} ━━━━ ")
            longer = ["  ".join([*texts[:count], eta]) for count in range(len(texts) + 1)]
            fits = [text for text in longer if len(text) <= room]
            self.progress.update(self.task, description=fits[-1] if fits else eta)
            self.progress.start()
        else:
            print(" | ".join([f"step {step}/{self.total}", *texts, eta]), flush=True)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self.progress.live.is_started:
            self.progress.stop()
