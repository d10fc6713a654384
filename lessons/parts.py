"""Grade what a student writes: `check_part("gelu", gelu)` says whether it is right, and where not.

`parts_N.py` has the PARTS of lesson N: for each function gptjax's own as the reference, arguments
to try, and what to say. `save_parts` writes the functions of a lesson into my_gpt.py, which the
next lessons load.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import saving

LESSONS = Path(__file__).resolve().parent
MY_GPT = Path(os.environ.get("GPTJAX_MY_GPT") or LESSONS / "my_gpt.py")  # not committed
SOLVED = LESSONS / "solved" / "my_gpt.py"
NUMBERS = (1, 2, 4)  # of the lessons in which something is written


def as_it_is(result: Any) -> Any:
    return result


class Part(NamedTuple):
    """A function that the student writes."""

    reference: Callable[..., Any]  # gptjax's own, on the same arguments
    cases: Callable[[], list[tuple]]  # small seeded arguments
    tolerance: float  # relative to the largest value; 0 = to the bit
    hint: str  # one sentence for somebody whose result differs
    why: str  # two or three sentences: what the code does, and why so
    mistake: Callable[..., Any]  # a typical wrong one; the tests show that it is found
    look: Callable[[Any], Any] = as_it_is  # what is compared of a result, shapes apart


class Verdict(NamedTuple):
    """What grading found."""

    is_right: bool
    is_written: bool
    said: str


# ---- Grading -------------------------------------------------------------------------------------


def all_parts(*numbers: int) -> dict[str, Part]:
    """The parts of these lessons (of all if none is named), in the order of writing."""
    found: dict[str, Part] = {}
    for number in numbers or NUMBERS:
        if importlib.util.find_spec(f"parts_{number}") is not None:
            found |= importlib.import_module(f"parts_{number}").PARTS
    return found


def check_part(name: str, function: Any, show: bool = False) -> None:
    """Say whether a function is right, and where it is not; `show` prints an explained answer."""
    if show:
        print_answer(name)
    else:
        print(f"{name}: {grade(name, function).said}")


def grade(name: str, function: Any) -> Verdict:
    """Compare a function with the reference, and those that it calls if it is wrong."""
    verdict = judge(name, function)
    if verdict.is_written and not verdict.is_right:
        for part in all_parts():
            if part == name:
                break
            if part in names_in(getattr(function, "__code__", None)):
                called = function.__globals__.get(part)
                if called is not None and not grade(part, called).is_right:
                    said = f"calls {part}, which is not right yet: mend that first"
                    return Verdict(False, True, said)
    return verdict


def names_in(code: CodeType | None) -> set[str]:
    """The names that a function uses, those of functions inside it too."""
    if code is None:
        return set()
    inside = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inside)


@jax.default_matmul_precision("highest")  # a GPU would round the inputs of products otherwise
def judge(name: str, function: Any) -> Verdict:
    """Compare a function with the reference on every case; it never raises."""
    part = all_parts()[name]
    largest = 0.0
    for number, expected in enumerate(expected_results(name), start=1):
        try:
            found = in_one_program(function, part.cases()[number - 1])  # made anew each time
        except NotImplementedError as error:
            return not_written(name, error)
        except Exception as error:  # a student's function may do anything
            said = f"raised {describe(error)}{line_of(error, function)}. {part.hint}"
            return Verdict(False, True, said)
        if found is None:
            return Verdict(False, False, "not written yet: it returns None")
        try:
            problem, difference = compare(found, expected, part)
        except Exception as error:
            problem, difference = f"its result cannot be compared: {describe(error)}", 0.0
        if problem:
            return Verdict(False, True, f"case {number}: {problem}. {part.hint}")
        largest = max(largest, difference)
    allowed = f"{part.tolerance:.0e} allowed" if part.tolerance else "equal to the bit"
    return Verdict(True, True, f"right (largest difference {largest:.1e}, {allowed})")


@functools.cache
def expected_results(name: str) -> list[Any]:
    """What gptjax's own function gives for each case."""
    part = all_parts()[name]
    return [in_one_program(part.reference, case) for case in part.cases()]


def in_one_program(function: Callable[..., Any], arguments: tuple) -> Any:
    """The result of a function: of one compiled program, which is quicker than many small ones.

    What cannot be compiled, or takes no arrays, runs as it is; so do errors, for their messages.
    """
    leaves, tree = jax.tree.flatten(arguments)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def of_arrays(arrays: dict[int, Any]) -> Any:
        return function(*jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)]))

    if arrays:
        with contextlib.suppress(Exception):
            return jax.jit(of_arrays)(arrays)
    return function(*arguments)


def not_written(name: str, error: NotImplementedError) -> Verdict:
    where = traceback.extract_tb(error.__traceback__)[-1].name
    if where == name or where not in all_parts():
        return Verdict(False, False, "not written yet")
    return Verdict(False, True, f"needs {where}, which is not written yet")


def describe(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"


def line_of(error: Exception, function: Any) -> str:
    """The line of the student's that an error came from, in words, "" if it is not known."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [f.line for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f", in the line `{lines[-1]}`" if lines and lines[-1] else ""


def compare(found: Any, expected: Any, part: Part) -> tuple[str, float]:
    """What is wrong with a result, "" if nothing, and the largest relative difference."""
    paths, expected_leaves = named_leaves(expected)
    found_paths, found_leaves = named_leaves(found)
    if paths == ["the result"] and found_paths != paths:
        return f"the result is a {type(found).__name__}, expected an array", 0.0
    if found_paths != paths:
        missing = [path for path in paths if path not in found_paths]
        extra = [path for path in found_paths if path not in paths]
        said = [f"{', '.join(missing[:3])} missing"] if missing else []
        said += [f"{', '.join(extra[:3])} not expected"] if extra else []
        return f"the result has other entries: {'; '.join(said) or 'in another order'}", 0.0
    for path, ours, theirs in zip(paths, found_leaves, expected_leaves, strict=True):
        if np.shape(ours) != np.shape(theirs):
            return f"{path} has shape {np.shape(ours)}, expected {np.shape(theirs)}", 0.0
    largest = 0.0
    if part.look is not as_it_is:
        paths, expected_leaves = named_leaves(part.look(expected))
        _, found_leaves = named_leaves(part.look(found))
    for path, ours, theirs in zip(paths, found_leaves, expected_leaves, strict=True):
        problem, difference = first_difference(path, ours, theirs, part.tolerance)
        if problem:
            return problem, difference
        largest = max(largest, difference)
    return "", largest


def named_leaves(tree: Any) -> tuple[list[str], list[Any]]:
    """The arrays of a result, and what to call each of them."""
    leaves = jax.tree.leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if isinstance(tree, tuple | list):
        names = [f"result {name}" for name in names]
    return [name or "the result" for name in names], [leaf for _, leaf in leaves]


def first_difference(path: str, found: Any, expected: Any, tolerance: float) -> tuple[str, float]:
    """Where two arrays of one shape first differ by more than allowed, "" if nowhere."""
    if isinstance(expected, str):
        return ("" if found == expected else f"{path} is {found!r}, expected {expected!r}"), 0.0
    ours, theirs = (np.asarray(x).astype(np.float64) for x in (found, expected))
    with np.errstate(invalid="ignore"):
        off = np.where(ours == theirs, 0.0, np.abs(ours - theirs))
    finite = np.abs(theirs[np.isfinite(theirs)])
    scale = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    too_far = ~(off <= tolerance * scale)  # NaN too
    if not too_far.any():
        return "", float(off.max(initial=0.0)) / scale
    index = tuple(int(i) for i in np.argwhere(too_far)[0])
    place = f"{path}[{', '.join(map(str, index))}]" if index else path
    said = f"{place} is {ours[index]:.6g}, expected {theirs[index]:.6g}"
    worst = float(off[too_far & np.isfinite(off)].max(initial=0.0)) / scale
    if off.size > 1 and worst > 0:
        said += (
            f" ({np.mean(too_far):.0%} of {off.size} numbers are off, the largest by {worst:.1e}"
        )
        said += " of the largest value)"
    return said, float("inf")


def print_answer(name: str) -> None:
    """Print a right answer and why it is so."""
    solved = load_module(SOLVED, "solved_my_gpt")
    print(f"{inspect.getsource(getattr(solved, name))}\n{all_parts()[name].why}")


# ---- my_gpt.py -----------------------------------------------------------------------------------


def save_parts(number: int, functions: dict[str, Any], path: Path = MY_GPT) -> None:
    """Write the functions of lesson `number` into my_gpt.py, beside those of other lessons.

    What else they use of the notebook (imports, constants, functions of your own) comes along, and
    the lessons before it from the solved copy where they are not in the file.
    """
    space: dict[str, Any] = {}
    for function in functions.values():
        space |= inspect.unwrap(function).__globals__
    try:
        imports, body = saving.gather(list(functions), saving.look_up_in({**space, **functions}))
    except (ValueError, OSError) as error:
        print(f"not saved: {error}")
        return
    mine, solved = saving.read(path), saving.read(SOLVED)
    earlier = {n: text for n, text in solved.sections.items() if n < number}
    sections = {**earlier, **mine.sections, number: body}
    saving.write(path, saving.Saved(imports | mine.imports | solved.imports, sections))
    print(f"{path.name} has the {len(functions)} functions of lesson {number}")
    if blank := [name for name, function in functions.items() if saving.is_blank(function)]:
        print(f"{len(blank)} of them are not written yet: {', '.join(blank)}")
    for taken in sorted(set(earlier) - set(mine.sections)):
        print(f"lesson {taken} was not in it, and is taken from the solved copy")


def load_my_gpt(*numbers: int) -> ModuleType:
    """Your my_gpt.py if all its parts of these lessons (1 if none) are right, else a solved one."""
    if not MY_GPT.is_file():
        print("no my_gpt.py here yet: taking the solved one, solved/my_gpt.py")
        return load_module(SOLVED, "my_gpt")
    try:
        mine = load_module(MY_GPT, "my_gpt")
        wrong = next(
            (found for found in grades(mine, *(numbers or (1,))) if not found[1].is_right), None
        )
    except Exception as error:
        print(f"my_gpt.py cannot be used ({describe(error)}): taking solved/my_gpt.py")
        return load_module(SOLVED, "my_gpt")
    if wrong is not None:
        print(f"my_gpt.py: {wrong[0]}: {wrong[1].said}\ntaking solved/my_gpt.py instead")
        return load_module(SOLVED, "my_gpt")
    print("your model is my_gpt.py, and every part of it is right")
    return mine


def grades(module: ModuleType, *numbers: int) -> Iterator[tuple[str, Verdict]]:
    """Grade the functions of a my_gpt.py, in the order of the lessons."""
    for name in all_parts(*numbers):
        function = getattr(module, name, None)
        yield name, grade(name, function) if function else Verdict(False, False, "not written yet")


def load_module(path: Path, name: str) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
