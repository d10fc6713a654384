"""The lessons' exercises: `check("1.2", answer)` in a notebook says whether an answer is right."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Exercise(NamedTuple):
    """A question of a notebook. `exercises_N.py` has the EXERCISES of lesson N by their number."""

    is_right: Callable[[Any], bool]  # computes the truth with gptjax; holds no copy of it
    hint: str  # what a reader is told whose answer is wrong
    answer: Any  # a right one
    mistake: Any  # a wrong one that a reader might well give


def check(number: str, answer: Any) -> None:
    """Say whether the answer to an exercise, such as "1.2", is right; None is no answer yet."""
    exercise = importlib.import_module(f"exercises_{number[0]}").EXERCISES[number]
    if answer is None:
        print(f"exercise {number}: no answer yet")
        return
    try:
        right = bool(exercise.is_right(answer))
    except Exception as error:  # a function of the reader's may do anything
        print(f"exercise {number}: your code raised {type(error).__name__}: {error}")
        return
    print(f"exercise {number}: {'right' if right else f'not yet. {exercise.hint}'}")
