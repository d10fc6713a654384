"""The file my_gpt.py: functions of a notebook as text, a section for each lesson.

A function brings along what it uses: other functions of the notebook, constants, and the imports.
"""

import ast
import builtins
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

HEADER = '''"""The GPT that the lessons build, as their last cells save it."""

# mypy: disable-error-code="no-untyped-def"
'''
SECTION = "# ---- Lesson {} " + "-" * 85
BLANK = 'raise NotImplementedError("write this")'  # the body of a function in a workbook
MARKERS = re.compile(r"^ *### (BEGIN|END) SOLUTION\n", re.MULTILINE)  # nbgrader's


class Import(NamedTuple):
    """`import module as bound`, or `from module import name as bound`."""

    module: str
    name: str | None
    bound: str


class Saved(NamedTuple):
    """The imports of a my_gpt.py, and what stands in the section of each lesson."""

    imports: set[Import]
    sections: dict[int, str]


Lookup = Callable[[str], Import | str | None]  # a name -> how it is imported, or its source


def gather(names: list[str], look_up: Lookup) -> tuple[set[Import], str]:
    """Imports and source of these functions and of all that they use, each thing once."""
    imports: set[Import] = set()
    constants: dict[str, str] = {}
    functions: dict[str, str] = {}
    seen: set[str] = set()

    def add(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        found = look_up(name)
        if isinstance(found, Import):
            imports.add(found)
        elif found is not None:
            for used in names_in(found):
                add(used)
            (functions if "def " in found else constants)[name] = found

    for name in names:
        add(name)
    parts = "\n".join(constants.values()), "\n\n\n".join(functions.values())
    body = "\n\n\n".join(part for part in parts if part)
    return imports, re.sub(r"\bmy_gpt\.(?=\w)", "", body)  # there they are in the same file


def names_in(source: str) -> list[str]:
    """The globals that a piece of source reads, in their order; its arguments are none."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    own |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    names.sort(key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(node.id for node in names if node.id not in own))


def look_up_global(name: str, value: Any) -> Import | str | None:
    """How a global of a notebook is imported, or its source; None where it need not be saved."""
    function = inspect.unwrap(value) if callable(value) else value
    if name == "my_gpt" or getattr(function, "__module__", "") == "my_gpt":
        return None  # of an earlier lesson
    if isinstance(value, ModuleType):
        return Import(value.__name__, None, name)
    if inspect.isfunction(function) and function.__module__ == "__main__":
        return clean(name, inspect.getsource(function))
    if callable(value) and hasattr(value, "__name__"):
        return Import(value.__module__, value.__name__, name)
    if isinstance(value, float) and getattr(math, name, None) == value:
        return Import("math", name, name)  # pi
    if isinstance(value, int | float | str | tuple | None):
        return f"{name} = {value!r}"
    raise ValueError(f"{name} is a {type(value).__name__}: hand it over as an argument")


def clean(name: str, source: str) -> str:
    """A function's source as it is saved, without the markers."""
    source = MARKERS.sub("", textwrap.dedent(source)).strip()
    if not re.search(rf"^def {name}\(", source, re.MULTILINE):
        raise ValueError(f"{name} has to be written as `def {name}(...)` to be saved")
    return source


def is_blank(function: Callable[..., Any]) -> bool:
    """Whether a function of a workbook still has no body."""
    return BLANK in inspect.getsource(inspect.unwrap(function))


def look_up_in(space: dict[str, Any]) -> Lookup:
    """The look-up in the globals of a notebook."""
    return lambda name: (
        look_up_global(name, space[name]) if name in space and not hasattr(builtins, name) else None
    )


def read(path: Path) -> Saved:
    """What a my_gpt.py holds; nothing if it is not there."""
    if not path.is_file():
        return Saved(set(), {})
    text, imports = path.read_text(), set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            imports |= {Import(a.name, None, a.asname or a.name) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            imports |= {Import(module, a.name, a.asname or a.name) for a in node.names}
    parts = re.split(r"^# ---- Lesson (\d) -+\n", text, flags=re.MULTILINE)[1:]
    bodies = [body.strip() for body in parts[1::2]]
    return Saved(imports, dict(zip(map(int, parts[::2]), bodies, strict=True)))


def write(path: Path, saved: Saved) -> None:
    """Write a my_gpt.py, without imports that nothing uses."""
    statements = [node for body in saved.sections.values() for node in ast.parse(body).body]
    used = {name for node in statements for name in names_in(ast.unparse(node))}
    lines: dict[bool, list[str]] = {True: [], False: []}
    froms: dict[str, list[str]] = {}
    for module, name, bound in sorted(saved.imports, key=str):
        if bound not in used:
            continue
        if name is None:
            alias = "" if module == bound else f" as {bound}"
            lines[is_standard(module)].append(f"import {module}{alias}")
        else:
            froms.setdefault(module, []).append(name if name == bound else f"{name} as {bound}")
    for module, several in sorted(froms.items()):
        lines[is_standard(module)].append(f"from {module} import {', '.join(sorted(several))}")
    blocks = [HEADER + "\n" + "\n".join(lines[True]), "\n".join(lines[False])]
    text = "\n\n".join(block.strip() for block in blocks if block.strip())
    for number, body in sorted(saved.sections.items()):
        text += f"\n\n{SECTION.format(number)[:100]}\n\n\n{body}\n"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def is_standard(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names
