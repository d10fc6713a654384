"""The flags of the command line, read into the fields of a config and printed as --help."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin

from gptjax.config_file import RENAMED
from gptjax.errors import UsageError, did_you_mean
from gptjax.files import expand
from gptjax.settings import change, fields_of, flatten, require
from gptjax.terminal import nanogpt_flags

T = TypeVar("T")


def parse(argv: list[str], default: T, description: str, prog: str | None = None) -> T:
    """Return the default config, changed by flags; see `read` for the arguments and errors."""
    return apply(default, read(argv, default, description, prog))


def read(
    argv: list[str], default: object, description: str, prog: str | None = None
) -> dict[str, Any]:
    """Read flags --name=value or --name value, with - and _ alike.

    The last of a flag counts; of one that takes several values all do.

    Args:
        argv: the words of the command line.
        default: the config whose fields the flags are, with the values that --help shows.
        description: what the program does, for --help.
        prog: how it is called, for --help.

    Returns:
        The value of each flag that was given, of its type, its range not yet checked.

    Raises:
        UsageError: a flag is unknown, has no value or one that is not of its type.
        SystemExit: --help was shown.
    """
    if {"-h", "--help"} & set(argv):
        print_help(default, description, prog)
        raise SystemExit(0)
    fields, given, words = fields_of(default), dict[str, Any](), list(argv)
    while words:
        token = words.pop(0)
        flag, equals, value = token.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not token.startswith("-"):
            problem = nanogpt_flags.config_file_problem(token)
            raise UsageError(
                problem or f"unexpected word {token!r}: flags are --name=value; see --help"
            )
        if name not in fields or not token.startswith("--"):
            raise UsageError(unknown(token, name, fields))
        kind = fields[name].type
        several, values = get_origin(kind) is tuple, [value] if equals else []
        while words and not words[0].startswith("--") and (several or not values):
            values.append(words.pop(0))
        if not values and kind is bool:
            values = ["True"]
        if not values:
            raise UsageError(f"--{name}: its value is missing; write --{name}=VALUE")
        if several:
            each = get_args(kind)[0]
            read = (read_value(name, each, value) for value in values)
            given[name] = (*given.get(name, ()), *read)
        else:
            zero = bool(values[0]) and values[0] == fields[name].metadata["zero"]
            given[name] = 0 if zero else read_value(name, kind, values[0])
    return given


def unknown(token: str, name: str, fields: Iterable[str]) -> str:
    """Return the message for an unknown flag."""
    if name in RENAMED:
        today = RENAMED[name]
        return f"{token}: " + (
            f"is called --{today} now" if today else "no longer exists; leave it out"
        )
    if name in nanogpt_flags.FLAGS:
        return f"{token}: {nanogpt_flags.FLAGS[name]}"
    hint = did_you_mean(name, fields, "--help lists the flags", sign="--")
    return f"unknown flag {token.partition('=')[0]}: {hint}"


def read_value(name: str, kind: Any, text: str) -> Any:
    """Return the value of this type that a text stands for; raise UsageError if there is none."""
    choices = {"True": True, "False": False} if kind is bool else {c: c for c in get_args(kind)}
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    if choices:
        rule = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
        require(text in choices, name, shown, f"must be {rule}")
        return choices[text]
    try:
        return kind(text)
    except ValueError:
        rule = "a whole number" if kind is int else "a number"
        if name in RENAMED:  # and another setting has the name today
            rule += f"; what older versions called --{name} is called --{RENAMED[name]} now"
        raise UsageError(f"--{name}={shown}: must be {rule}") from None


def apply(default: T, given: Mapping[str, object]) -> T:
    """Return the default config with the given values, and the home folder for `~` in paths.

    Raises:
        UsageError: a value is out of range, or a path is empty where there must be one.
    """
    config = change(default, given)
    paths: dict[str, str] = {}
    for name, field in fields_of(default).items():
        if field.metadata["path"]:
            value = getattr(config, name)
            if not value and name in given and field.default:
                raise UsageError(f"--{name}= is empty: give a value, or leave the flag out")
            if value.startswith("~"):
                paths[name] = str(expand(value))
    return change(config, paths)


def print_help(default: Any, description: str, prog: str | None = None) -> None:
    """Print each flag with its help and its default, as wide as the terminal is."""
    parser = argparse.ArgumentParser(
        prog, usage="%(prog)s [--flags]", description=description, add_help=False
    )
    values = flatten(default)
    section: Any = parser
    for name, field in fields_of(default).items():
        if field.metadata["section"]:
            section = parser.add_argument_group(field.metadata["section"])
        choices = ("True", "False") if field.type is bool else get_args(field.type)
        kind = getattr(field.type, "__name__", "").upper()
        if get_origin(field.type) is tuple:
            kind = f"{get_args(field.type)[0].__name__.upper()} ..."
        elif choices:
            kind = f"{{{','.join(choices)}}}"
        shown = show(values[name] or field.metadata["zero"] or values[name])
        text = f"{field.metadata['help']} (default: {shown})".replace("%", "%%")
        section.add_argument(f"--{name}", metavar=kind, help=text)
    print(parser.format_help(), end="", flush=True)  # argparse's own would hide a full disk


def show(value: object) -> str:
    """Return a value as --help shows it, with control characters as their escapes."""
    if isinstance(value, tuple):
        return " ".join(map(repr, value)) or "none"
    if isinstance(value, str):
        return repr(value)[1:-1] if value else "empty"
    return str(value)


def changed(config: Any, default: Any) -> list[str]:
    """Return the flags that change the default to this config."""
    now = flatten(config)
    return [f"--{name}={now[name]}" for name, v in flatten(default).items() if now[name] != v]
