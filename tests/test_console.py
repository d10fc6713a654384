"""What a person sees fits their terminal and cannot command it."""

import functools
import io
import re

import pytest
from rich.console import Console

from gptjax.terminal import console
from gptjax.terminal.console import TrainConsole, printable

FIELDS = {"loss": "1.2345", "val": "1.3456", "lr": "1.00e-03", "tok/s": "12,345", "mfu": "41.5%"}


class Screen:
    """A terminal, or a file, and what was written to it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        width: int = 80,
        terminal: bool = True,
        encoding: str = "utf-8",
        quiet: bool = False,
    ) -> None:
        self.now, self.raw = 0.0, io.BytesIO()
        make = functools.partial(
            Console,
            file=io.TextIOWrapper(self.raw, encoding, write_through=True),
            width=width,
            force_terminal=terminal,
            no_color=True,
            get_time=lambda: self.now,
        )
        monkeypatch.setattr(console, "Console", make)
        self.train = TrainConsole(1000, quiet=quiet)
        self.encoding = encoding

    def lines(self) -> list[str]:
        """What was written, without what moves the cursor."""
        text = self.raw.getvalue().decode(self.encoding)
        return [line.rstrip() for line in re.sub(r"\x1b\[[\d;?]*\w", "", text).splitlines()]

    def bar(self) -> str:
        """The line of step 250."""
        self.train.arrive(250)
        self.train.update(250, FIELDS, log=False)
        self.train.close()
        return self.lines()[-1]


@pytest.mark.parametrize(
    ("width", "count"), [(30, 0), (40, 1), (50, 2), (60, 2), (80, 4), (100, 5), (200, 5)]
)
def test_the_bar_fits_and_keeps_the_important(
    width: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Screen(monkeypatch, width=width).bar()
    texts = [f"{name} {value}" for name, value in FIELDS.items()]
    shown = re.escape("  ".join([*texts[:count], "eta --:--"]))
    assert re.fullmatch(rf"250/1000 ━+╸?\s+{shown}", bar), bar
    assert len(bar) <= width
    assert len(Screen(monkeypatch, width=10).bar()) <= 10


def test_the_bar_of_a_terminal_that_knows_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.match(r"250/1000 -+ +loss 1.2345 ", Screen(monkeypatch, encoding="ascii").bar())


def test_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(monkeypatch)
    screen.train.update(1, FIELDS, log=False)
    screen.train.note("a note\x1b[2J")
    assert "250/1000" in screen.bar()
    noted = [i for i, line in enumerate(screen.lines()) if line.endswith("a note\\x1b[2J")]
    assert noted and noted[-1] < len(screen.lines()) - 1  # above the bar
    assert capsys.readouterr().out == ""
    screen = Screen(monkeypatch, terminal=False)
    screen.train.update(500, FIELDS, log=False)
    screen.train.update(501, FIELDS, log=True)
    screen.train.note("a note")
    screen.train.close()
    line, note = capsys.readouterr().out.splitlines()
    assert line.startswith("step 501/1000 | loss 1.2345 | val 1.3456 | lr ")
    assert line.endswith(" | eta --:--") and note == "a note"
    assert screen.raw.getvalue() == b""


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_nothing(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(monkeypatch, terminal=terminal, quiet=True)
    screen.train.note("a note")
    screen.train.arrive(500)
    screen.train.update(500, FIELDS, log=True)
    screen.train.close()
    assert (screen.raw.getvalue(), capsys.readouterr().out) == (b"", "")


def test_the_time_left_does_not_count_the_compilation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor that the steps of one call arrive together; a resumed run does not begin at 0."""
    screen = Screen(monkeypatch, terminal=False)
    for now, step in ((100.0, 600), (110.0, 700), (160.0, 800)):
        screen.now = now
        screen.train.arrive(step)
        screen.train.update(step - 1, {}, log=True)
        screen.train.update(step, {}, log=True)
    shown = [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["--:--", "--:--", "00:30", "00:30", "01:00", "01:00"]


def test_bytes_and_counts_come_as_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for unit, expected in (
        ("", r"a \[red\] file ━+ 1.5/1.5 kB"),
        ("windows", r"a \[red\] file ━+ 1500/1500 windows"),
    ):
        screen = Screen(monkeypatch)
        with console.show_progress(unit=unit) as report:
            report("a [red] file", 1500, 1500)
        assert any(re.match(expected, line) for line in screen.lines()), screen.lines()
        screen = Screen(monkeypatch, terminal=False)
        with console.show_progress(unit=unit) as report:
            report("a [red] file", 1500, 1500)
        assert screen.raw.getvalue() == b""


def test_control_characters_are_shown_not_obeyed() -> None:
    assert printable("a\x1b[2Jb\r\tc\n") == "a\\x1b[2Jb\\r\tc\n"
    assert printable("é🙂") == "é🙂"
