"""The lessons run from a clean kernel, and their exercises know right from wrong."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from . import XLA_FLAGS
from .helpers import ROOT

LESSONS = ROOT / "lessons"
NOTEBOOKS = sorted(LESSONS.glob("*.ipynb"))
TEXTS = sorted([*NOTEBOOKS, LESSONS / "3_scaling.md"])


@pytest.fixture(autouse=True)
def in_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader's kernel has it."""
    monkeypatch.chdir(LESSONS)
    monkeypatch.syspath_prepend(str(LESSONS))


def text_of(path: Path) -> str:
    """What a reader sees before anything is run."""
    if path.suffix == ".md":
        return path.read_text()
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_there_are_four_behind_the_one_on_jax() -> None:
    assert [path.name[0] for path in TEXTS if path.name[0] != "0"] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_exercises_accept_what_is_right_and_refuse_what_is_not(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exercises = importlib.import_module(f"exercises_{path.name[0]}").EXERCISES
    check = importlib.import_module("exercises").check
    asked = re.findall(r'check\("([\d.]+)"', text_of(path))
    assert sorted(asked) == sorted(exercises) and len(asked) >= 3

    def said(number: str, answer: Any) -> str:
        check(number, answer)
        return capsys.readouterr().out

    for number, exercise in exercises.items():
        assert said(number, None) == f"exercise {number}: no answer yet\n"
        assert said(number, exercise.answer) == f"exercise {number}: right\n"
        assert said(number, exercise.mistake) == f"exercise {number}: not yet. {exercise.hint}\n"


@pytest.mark.slow
@pytest.mark.timeout(720)  # what the lessons may take together
def test_notebooks_run_from_a_clean_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")  # one device and XLA's defaults, as a reader has
    monkeypatch.setenv("GPTJAX_LESSONS", "quick")  # short trainings
    monkeypatch.setenv("GPTJAX_MY_GPT", str(tmp_path / "my_gpt.py"))  # not the reader's
    render = importlib.import_module("render")
    graded = re.compile(rf"^({'|'.join(importlib.import_module('parts').all_parts())}): (.*)")
    for path in NOTEBOOKS:  # in this order, since each saves its functions for the next
        notebook = render.execute(path)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        warnings = [output.text for output in outputs if output.get("name") == "stderr"]
        assert warnings == [], path.name
        lines = "".join(output.get("text", "") for output in outputs).splitlines()
        said = [found for line in lines if (found := graded.match(line))]
        assert all(found[2].startswith("right") for found in said), [found[0] for found in said]
        page = tmp_path / f"{path.stem}.md"
        render.write_page(notebook, page)
        assert page.stat().st_size > 10_000
    solved = LESSONS / "solved" / "my_gpt.py"
    assert (tmp_path / "my_gpt.py").read_text() == solved.read_text()


def test_tables_of_lesson_3_are_what_was_measured() -> None:
    done = subprocess.run(
        [sys.executable, "scaling.py", "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_measurements_of_lesson_3_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # that they run, not how fast
    done = subprocess.run(
        [sys.executable, "scaling.py", "--quick"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
