"""Imports are as the two tables of ARCHITECTURE.md say: between packages, and of libraries."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import ROOT

SCRIPTS = ("train.py", "sample.py", "convert_gpt2.py")
FILES = [*sorted((ROOT / "gptjax").rglob("*.py")), *(ROOT / name for name in SCRIPTS)]


def table(header: str) -> list[list[str]]:
    """Return the rows of the table of ARCHITECTURE.md whose first line begins with `header`."""
    lines = iter((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines())
    assert any(line.startswith(header) for line in lines), header
    next(lines)  # |---|
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


PACKAGES = {row[0]: set(row[1].split(", ")) - {"-"} for row in table("| package | imports from |")}
LIBRARIES = {row[0]: set(row[1].split(", ")) for row in table("| library | imported by |")}


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of a module"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> Path | None:
    """Return the file of gptjax that a dotted name lies in, None if it is another package's."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py") in FILES:
            return path.with_suffix(".py")
        if path / "__init__.py" in FILES:
            return path / "__init__.py"
    return None


def package_of(path: Path) -> str:
    """Return the row of the first table that a file belongs to."""
    inside = path.relative_to(ROOT).parts
    if len(inside) == 1 or (path.parent == ROOT / "gptjax" and path.name.startswith("__")):
        return "the entry points"
    return "the core" if len(inside) == 2 else inside[1]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_the_packages_that_the_table_gives_it(path: Path) -> None:
    own = package_of(path)
    for name in imported(path):
        module = module_of(name)
        if module is not None and package_of(module) != own:
            allowed = ", ".join(sorted(PACKAGES[own])) or "nothing"
            assert package_of(module) in PACKAGES[own], f"{name}: {own} imports from {allowed}"


def test_the_packages_make_no_circle() -> None:
    tuple(graphlib.TopologicalSorter(PACKAGES).static_order())  # CycleError names the circle


def test_the_files_make_no_circle() -> None:
    arrows = {}
    for path in FILES:
        modules = {module_of(name) for name in imported(path)}
        arrows[name_of(path)] = {name_of(module) for module in modules if module and module != path}
    tuple(graphlib.TopologicalSorter(arrows).static_order())


@pytest.mark.parametrize("library", [*LIBRARIES, "yaml"])
def test_a_library_is_imported_where_the_table_says(library: str) -> None:
    found = {
        name_of(path).removeprefix("gptjax/")
        for path in FILES
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert found == LIBRARIES.get(library, set())


def test_the_trainer_reads_top_to_bottom() -> None:
    """A loop that grows closures, or knows half of the package, has to be taken apart again."""
    path = ROOT / "train.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.Nonlocal) for node in ast.walk(tree))
    train = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert train.end_lineno is not None and train.end_lineno - train.lineno < 120
    assert len({module_of(name) for name in imported(path)} - {None}) <= 15


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_short_enough_to_be_read(path: Path) -> None:
    limit = 250 if path.name in SCRIPTS else 300
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_nothing_runs_code_from_files() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), name_of(path)


def test_import_is_silent_and_without_warnings() -> None:
    code = "import gptjax.data.datasets, gptjax.sampling, gptjax.training.step, gptjax.config"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
