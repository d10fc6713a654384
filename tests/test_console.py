"""What a person sees fits their terminal and cannot command it."""

import io

import pytest
from rich.console import Console

from gptjax.terminal import console
from gptjax.terminal.console import TrainConsole, printable

FIELDS = {"loss": "1.2345", "val": "1.3456", "lr": "1.00e-03", "tok/s": "12,345", "mfu": "41.5%"}


def make_console(width: int, terminal: bool) -> tuple[TrainConsole, io.StringIO]:
    screen = TrainConsole(1000)
    file = io.StringIO()
    screen.console = Console(file=file, width=width, force_terminal=terminal, highlight=False)
    return screen, file


@pytest.mark.parametrize("width", [10, 24, 40, 80, 200])
def test_bar_fits_and_keeps_the_important(width: int) -> None:
    screen, _ = make_console(width, terminal=True)
    bar = screen.bar(250, FIELDS).plain
    assert len(bar) <= max(width, len("250/1000 ") + 1)
    assert bar.startswith("250/1000 ")
    shown = [name for name in FIELDS if f"{name} " in bar]
    assert shown == list(FIELDS)[: len(shown)]
    if width == 80:
        assert "loss 1.2345" in bar and "━" in bar


def test_bar_on_a_terminal_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    screen, file = make_console(80, terminal=True)
    screen.note("a note")
    screen.update(500, FIELDS, log=False)
    screen.close()
    assert "a note" in file.getvalue() and "500/1000" in file.getvalue()
    assert capsys.readouterr().out == ""
    plain, file = make_console(80, terminal=False)
    plain.update(500, FIELDS, log=False)
    plain.update(501, FIELDS, log=True)
    assert capsys.readouterr().out.startswith("step 501/1000 | loss 1.2345 | val 1.3456 |")
    assert file.getvalue() == ""


def test_time_left_does_not_count_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    screen, _ = make_console(80, terminal=False)
    shown = []
    for call in (1, 101, 201):
        screen.arrive(call)
        shown += [screen.eta(call - 1), screen.eta(call)]  # steps of one call arrive together
    assert shown == ["-", "-", "1:30", "1:30", "1:20", "1:20"]


def test_control_characters_are_shown_not_obeyed() -> None:
    assert printable("a\x1b[2Jb\r\tc\n") == "a\\x1b[2Jb\\r\tc\n"
    assert printable("é🙂") == "é🙂"
