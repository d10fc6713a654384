"""Lesson 0 introduces every name of JAX that the other notebooks use, and runs."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from .helpers import ROOT

LESSONS = ROOT / "lessons"
LESSON_0 = LESSONS / "0_jax.ipynb"
OTHERS = [path for path in sorted(LESSONS.glob("[1-9]_*.*")) if path.suffix in (".ipynb", ".md")]
MODULES = {
    "jax": "jax",
    "jax.numpy": "jnp",
    "flax.linen": "nn",
    "optax": "optax",
}  # and how the lessons call them


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells


def names_in(code: str, aliases: dict[str, str]) -> Iterator[str]:
    """Yield the names of JAX and Linen in a cell, `jnp.where`; `aliases` grows by its imports."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                a.asname or a.name: MODULES[a.name] for a in node.names if a.name in MODULES
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            yield from (alias.name for alias in node.names)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            first, *others = ast.unparse(node).split(".")
            if first in aliases and all(name.isidentifier() for name in others):
                name = ".".join([aliases[first], *others])
                if name != "jax.__version__":
                    yield name.replace("jax.numpy.", "jnp.")


def cells_of_text(path: Path) -> list[nbformat.NotebookNode]:
    """The paragraphs of a lesson in Markdown, and its blocks of Python, as cells."""
    parts = re.split(r"^```python\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    make = (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)
    return [make[i % 2](part) for i, part in enumerate(parts)]


def missing(path: Path) -> list[str]:
    """Return the names that neither lesson 0 nor this one introduces before they are used."""
    known = "\n".join(cell.source for cell in cells(LESSON_0))
    unknown: list[str] = []
    aliases: dict[str, str] = {"jax": "jax", "jnp": "jnp"} if path.suffix == ".md" else {}
    told = cells_of_text(path) if path.suffix == ".md" else cells(path)
    for i, cell in enumerate(told):
        if cell.cell_type != "code":
            continue
        here = [c.source for c in told[: i + 2] if c.cell_type == "markdown"]
        text = "\n".join([known, *here])
        for name in names_in(cell.source, aliases):
            if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text):
                unknown.append(name)
    return sorted(set(unknown))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_name_of_jax_is_introduced(path: Path) -> None:
    assert missing(path) == []


def test_a_name_that_is_new_is_found(tmp_path: Path) -> None:
    code = "import jax\nimport jax.numpy as jnp\njax.lax.cummax(jnp.tril(x)).sum()\njnp.i0(x)"
    told = nbformat.v4.new_markdown_cell("`jnp.i0` is a Bessel function.")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code), told])
    nbformat.write(notebook, tmp_path / "9.ipynb")
    assert missing(tmp_path / "9.ipynb") == ["jax.lax.cummax"]


def test_each_section_shows_pytorch_beside_jax() -> None:
    code = [cell.source for cell in cells(LESSON_0) if cell.cell_type == "code"]
    compared = [source for source in code if "same(" in source and "torch" in source]
    assert len(compared) >= 10


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_it_runs_in_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LESSONS))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a reader has
    notebook = importlib.import_module("render").execute(LESSON_0)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    said = "".join(output.get("text", "") for output in outputs)
    compared = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert said.count("in both") == len(re.findall(r"^same\(", compared, re.MULTILINE)) >= 15
    assert said.count("no answer yet") == 6
    assert "TracerBoolConversionError" in said  # what the text says about `if`
    assert "element 7 of 3: 30 and after writing to it: [10 20 30]" in said
