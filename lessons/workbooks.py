"""Make the workbooks and the solved my_gpt.py from the notebooks: `python lessons/workbooks.py`.

The notebooks are the source, and solved. In a workbook the lines between nbgrader's markers
`### BEGIN SOLUTION` and `### END SOLUTION` are left for the student to write.
"""

import ast
import copy
import re
from pathlib import Path

import nbformat
import parts
import saving

LESSONS = Path(__file__).resolve().parent
WORKBOOKS = LESSONS / "workbooks"
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.MULTILINE | re.DOTALL)
START = """# This workbook lies in lessons/workbooks, and what it imports in lessons.
import os
import sys

if os.path.basename(os.getcwd()) == "workbooks":
    os.chdir("..")
    sys.path.insert(0, os.getcwd())
import unwritten

unwritten.install()  # says which function a cell still needs"""


def sources() -> list[Path]:
    """The notebooks in which something is written."""
    return [
        path for path in sorted(LESSONS.glob("*.ipynb")) if "### BEGIN SOLUTION" in path.read_text()
    ]


def blank(source: str) -> str:
    """The source of a cell, its solutions taken out."""
    return SOLUTION.sub(rf"\1{saving.BLANK}", source)


def make_workbook(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as a student gets it."""
    workbook = copy.deepcopy(notebook)
    for cell in workbook.cells:
        if cell.cell_type == "code":
            cell.source = blank(cell.source)
    first = next(i for i, cell in enumerate(workbook.cells) if cell.cell_type == "code")
    workbook.cells.insert(first, nbformat.v4.new_code_cell(START, id="workbook"))
    return workbook


def look_up_in_notebook(notebook: nbformat.NotebookNode) -> saving.Lookup:
    """How a name that a notebook defines is imported, or its source, without running anything."""
    found: dict[str, saving.Import | str] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        lines = cell.source.splitlines()
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Import):
                for a in node.names:
                    found[a.asname or a.name] = saving.Import(a.name, None, a.asname or a.name)
            elif isinstance(node, ast.ImportFrom):
                for a in node.names:
                    bound = a.asname or a.name
                    found[bound] = saving.Import(node.module or "", a.name, bound)
            elif isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                source = "\n".join(lines[first - 1 : node.end_lineno])
                found.setdefault(node.name, saving.clean(node.name, source))
            elif isinstance(node, ast.Assign):
                found |= constants(node)
    return lambda name: found.get(name)


def constants(node: ast.Assign) -> dict[str, str]:
    """The names that an assignment gives a number, a text or a tuple of them, and how."""
    try:
        value = ast.literal_eval(node.value)
    except ValueError:
        return {}
    target = node.targets[0]
    if isinstance(target, ast.Name):
        return {target.id: f"{target.id} = {value!r}"}
    if isinstance(target, ast.Tuple) and all(isinstance(name, ast.Name) for name in target.elts):
        names = [name.id for name in target.elts if isinstance(name, ast.Name)]
        return {name: f"{name} = {one!r}" for name, one in zip(names, value, strict=True)}
    return {}


def make_solved(notebooks: dict[int, nbformat.NotebookNode]) -> saving.Saved:
    """What the notebooks save in my_gpt.py."""
    imports: set[saving.Import] = set()
    sections = {}
    for number, notebook in notebooks.items():
        names = list(parts.all_parts(number))
        used, sections[number] = saving.gather(names, look_up_in_notebook(notebook))
        imports |= used
    return saving.Saved(imports, sections)


def to_text(notebook: nbformat.NotebookNode) -> str:
    return nbformat.writes(notebook, indent=1) + "\n"


def write_all(workbooks: Path = WORKBOOKS, solved: Path = parts.SOLVED) -> None:
    """Write the workbooks into a folder, and the solved my_gpt.py."""
    notebooks = {path: nbformat.read(path, as_version=4) for path in sources()}
    workbooks.mkdir(exist_ok=True)
    for path, notebook in notebooks.items():
        (workbooks / path.name).write_text(to_text(make_workbook(notebook)))
    by_number = {int(path.name[0]): notebook for path, notebook in notebooks.items()}
    saving.write(solved, make_solved(by_number))


if __name__ == "__main__":
    write_all()
