"""The prompts of a program: words of its flags, files, and standard input."""

import sys
from collections.abc import Sequence

from gptjax.errors import DataError, UsageError
from gptjax.files import expand
from gptjax.settings import require
from gptjax.tokenizer import Tokenizer, decode


def read_prompts(starts: Sequence[str], file: str) -> list[str]:
    """Return the prompts of --start, where "-" is standard input, or those of --prompts.

    Raises:
        UsageError: one cannot be read, is not UTF-8, or the file has none.
    """
    if not file:
        return [read_text("-") if start == "-" else read_start(start) for start in starts]
    lines = [line.removesuffix("\r") for line in read_text(file).split("\n")]
    prompts = [line for line in lines if line]
    require(bool(prompts), "prompts", file, "has no prompt: every line is empty")
    return prompts


def read_start(start: str) -> str:
    """Return a prompt, which FILE:path reads from a file."""
    if not start.startswith("FILE:"):
        return start
    require(start != "FILE:", "start", start, "name the file after the colon")
    return read_text(start.removeprefix("FILE:"))


def read_text(name: str) -> str:
    """Return the text of a file, or all of standard input for "-"."""
    where = "standard input" if name == "-" else expand(name)
    if name == "-" and sys.stdin is None:
        raise UsageError(f"cannot read the prompt ({where}): it is closed")
    try:
        data = sys.stdin.buffer.read() if name == "-" else expand(name).read_bytes()
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt ({where}) is not UTF-8 at byte {error.start}") from error
    except (OSError, ValueError) as error:  # a ValueError: a NUL or surrogate in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot read the prompt ({where}): {reason}") from error


def encode_prompt(text: str, tokenizer: Tokenizer, allow_special: bool) -> list[int]:
    """Return a prompt's ids; an empty one becomes the tokenizer's start token."""
    ids: list[int] = tokenizer.encode(text, allow_special=allow_special).tolist()
    return ids or [tokenizer.start_id]


def default_start(tokenizer: Tokenizer) -> str:
    """Return a newline, or nothing where the vocabulary has none."""
    try:
        return "\n" if "\n" in decode(tokenizer, tokenizer.encode("\n")) else ""
    except DataError:
        return ""
