"""The command line: flags into the fields of a config, and back into a line to type."""

import dataclasses
import difflib
from collections.abc import Container
from typing import Any, TypeVar, get_args, get_origin

import tyro

from gptjax.config import flatten, require
from gptjax.errors import UsageError
from gptjax.files import expand
from gptjax.programs import command as command
from gptjax.terminal import nanogpt_flags

T = TypeVar("T")


def parse(
    config_class: type[T], argv: list[str], default: T, description: str, prog: str | None = None
) -> T:
    """Flags --name=value or --name value, with - and _ alike, over a default.

    Raises:
        UsageError: a flag is unknown or its value is not of its type or range.
        SystemExit: --help was shown.
    """
    if {"-h", "--help"} & set(argv):
        shown = {name: escape(value) for name, value in flatten(default).items()}
        tyro.cli(
            config_class,
            args=["--help"],
            default=change(default, shown),
            description=description,
            prog=prog,
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )
    found = read_flags(argv, kinds(default))
    return expand_paths(change(default, found), found)


def read_flags(argv: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """The settings that flags give; the last of a flag counts, of one that takes several all do.

    Args:
        argv: the words of the command line.
        known: the type of each setting.

    Raises:
        UsageError: a flag is unknown, has no value or one that is not of its type.
    """
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        token = words.pop(0)
        flag, equals, value = token.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not token.startswith("-"):
            problem = nanogpt_flags.config_file_problem(token)
            raise UsageError(
                problem or f"unexpected word {token!r}: flags are --name=value; see --help"
            )
        if name not in known or not token.startswith("--"):
            if name in nanogpt_flags.FLAGS:
                raise UsageError(f"{token}: {nanogpt_flags.FLAGS[name]}")
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            raise UsageError(f"unknown flag {flag}: {hint}")
        kind, several = known[name], get_origin(known[name]) is tuple
        values = [value] if equals else []
        while words and not words[0].startswith("--") and (several or not values):
            values.append(words.pop(0))
        if not values and kind is bool:
            values = ["True"]
        if not values:
            raise UsageError(f"--{name}: its value is missing; write --{name}=VALUE")
        if several:
            given[name] = (*given.get(name, ()), *values)
        else:
            given[name] = read_value(name, kind, values[0])
    return given


def read_value(name: str, kind: Any, text: str) -> Any:
    """A value of this type from its text."""
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
        raise UsageError(f"--{name}={shown}: must be {rule}") from None


def escape(value: Any) -> Any:
    """A text, or several, with control characters as their escapes; any other value as it is."""
    if isinstance(value, tuple):
        return tuple(map(escape, value))
    return repr(value)[1:-1] if isinstance(value, str) and not value.isprintable() else value


def kinds(config: Any) -> dict[str, Any]:
    """The types of the settings by name, those of the configs inside included."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= kinds(value) if dataclasses.is_dataclass(value) else {field.name: field.type}
    return found


def change(config: T, given: dict[str, Any]) -> T:
    """The config with these settings, those of the configs inside included."""
    inside = {
        name: change(value, given)
        for name, value in vars(config).items()
        if dataclasses.is_dataclass(value)
    }
    own = {name: value for name, value in given.items() if name in vars(config)}
    return dataclasses.replace(config, **inside, **own)  # type: ignore[type-var]


# Flags that may hold the path of a file or folder.
PATHS = {"out_dir", "dataset", "init_from", "tokenizer_dir", "compile_cache", "replay"}
PATHS |= {"val_dataset", "tokenizer", "against", "data"}


def expand_paths(config: T, given: Container[str]) -> T:
    """Return the config with the user's home folder for `~` in its paths.

    Raises:
        UsageError: an empty path was given where there must be one.
    """
    changes: dict[str, str] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if field.name not in PATHS or not isinstance(value, str):
            continue
        if not value and field.name in given and field.default:
            raise UsageError(f"--{field.name}= is empty: give a value, or leave the flag out")
        if value.startswith("~"):
            changes[field.name] = str(expand(value))
    return dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


def given(argv: list[str]) -> dict[str, str]:
    """Return what each flag says, the last of a kind, before anything is checked."""
    found: dict[str, str] = {}
    for i, token in enumerate(argv):
        name, equals, value = token.partition("=")
        if name.startswith("--"):
            following = "".join(argv[i + 1 : i + 2])
            found[name[2:].replace("-", "_")] = value if equals else following
    return found


def changed(config: Any, default: Any) -> list[str]:
    """The flags that change the fields of the default to what the config has in them."""
    now = flatten(config)
    return [f"--{name}={now[name]}" for name, v in flatten(default).items() if now[name] != v]
