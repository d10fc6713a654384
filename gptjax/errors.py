"""The errors that gptjax raises on purpose, each with its exit code, and words of messages."""

import difflib
from collections.abc import Iterable


class Refusal(Exception):
    """An error that ends a program with this exit code, and is shown to the user as one line."""

    exit_code: int


class InputError(Refusal, ValueError):
    """An error about what the user gave, which cannot be used for a `reason`.

    Where a `flag` of convert_gpt2.py lets it pass, the message says so, with a `note` on the flag.
    """

    def __init__(self, reason: str, flag: str = "", note: str = "") -> None:
        """Make the message from the reason and, if there is one, the flag."""
        super().__init__(f"{reason}; pass {flag} ({note})" if flag else reason)
        self.reason, self.flag, self.note = reason, flag, note


class UsageError(InputError):
    """A flag or setting is wrong: out of range, misspelt, or at odds with another one."""

    exit_code = 2


class DataError(InputError):
    """Input data is damaged, too short, or not what it was said to be."""

    exit_code = 65


class OutputError(Refusal, OSError):
    """The place to write to is not writable."""

    exit_code = 73


class PeerError(Refusal, RuntimeError):
    """Another process of the same run is gone."""

    exit_code = 70


class OutOfMemoryError(Refusal, MemoryError):
    """The device or the machine has less memory than this needs."""

    exit_code = 71


class DiskError(Refusal, OSError):
    """The disk failed, or is full."""

    exit_code = 74


class CheckpointError(Refusal, RuntimeError):
    """There is no saved state that could be used."""

    exit_code = 75


DAMAGED_WEIGHTS = "the model's logits are NaN or infinite: its weights are damaged"


class NonFiniteError(Refusal, FloatingPointError):
    """Numbers became NaN or infinite."""

    exit_code = 76


def plural(count: int, one: str, many: str = "") -> str:
    """Return the noun that follows a number: 1 token, 2 tokens; or `many`, if it is given."""
    return one if count == 1 else many or f"{one}s"


def did_you_mean(word: str, known: Iterable[str], otherwise: str, sign: str = "") -> str:
    """Return a question for the known word that is most like this one, or else `otherwise`.

    Args:
        word: what was typed.
        known: the words to choose from.
        otherwise: the answer if none of them is like it.
        sign: what precedes the known word, such as "--".
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {sign}{near[0]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has none."""
    if "No space left on device" in str(error):
        return "no space left on device"
    line = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]  # is 2 kB
    return line.rstrip() or type(error).__name__
