"""Say in a workbook which function a cell still needs, in the place of a traceback.

The first cell of each workbook calls `install`. In the notebooks, where everything is written,
errors look as always.
"""

import contextlib
import traceback
from types import TracebackType
from typing import Any

import saving
from IPython import get_ipython

needed: list[str] = []  # functions without a body at which cells have stopped


def install() -> None:
    """Let this notebook's errors be explained, if it is one."""
    if (shell := get_ipython()) is not None:
        shell.set_custom_exc((Exception,), explain)


def explain(
    shell: Any,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType,
    tb_offset: int | None = None,
) -> None:
    """Print why a cell stopped if a function is missing (%tb has the traceback), else the error."""
    if isinstance(error, NotImplementedError) and saving.BLANK.endswith(f'Error("{error}")'):
        name = traceback.extract_tb(error.__traceback__)[-1].name
        if name not in needed:
            needed.append(name)
        print(f"This cell needs `{name}`, which is not written yet. Write it, and run this again.")
        return
    still = [name for name in needed if is_blank(shell.user_ns.get(name))]
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset, exception_only=bool(still))
    if still:
        names = ", ".join(f"`{name}`" for name in still)
        are = "is" if len(still) == 1 else "are"
        print(f"A cell above stopped because {names} {are} not written yet: go on there.")


def is_blank(function: Any) -> bool:
    with contextlib.suppress(OSError, TypeError):  # what has no source was not in the workbook
        return saving.is_blank(function)
    return False
