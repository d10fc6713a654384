"""The command line: argv into a config, refusals into one line with an exit code."""

import contextlib
import dataclasses
import difflib
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import jax
import tyro

from gptjax.config import flatten, require
from gptjax.errors import REFUSALS, OutOfMemoryError, OutputError, UsageError
from gptjax.files import cache_dir

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
    return change(default, read_flags(argv, kinds(default)))


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
            raise UsageError(f"unexpected word {token!r}: flags are --name=value; see --help")
        if name not in known or not token.startswith("--"):
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


def peek(argv: list[str], flag: str) -> str | None:
    """What a flag says, before anything is checked; None if it is not there."""
    value = None
    for i, token in enumerate(argv):
        name, equals, rest = token.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == flag:
            value = rest if equals else "".join(argv[i + 1 : i + 2])
    return value


def command(script: str, *words: str) -> str:
    """The line that runs one of the scripts from the current directory, quoted for a shell."""
    path = Path(__file__).parent.parent / script
    here = not path.is_file() or (Path(script).is_file() and path.samefile(script))
    return shlex.join(["python", script if here else str(path), *words])


def flags(config: Any, default: Any) -> list[str]:
    """The flags that change the fields of the default to what the config has in them."""
    now = flatten(config)
    return [f"--{name}={now[name]}" for name, v in flatten(default).items() if now[name] != v]


def run(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a script's main; a refusal becomes `error: ...` on stderr and its exit code."""
    debug = any(token in argv for token in ("--debug", "--debug=True"))
    if not debug:  # orbax explains itself at length, and its threads what is raised here anyway
        for name in ("absl", "orbax", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        threading.excepthook = lambda args: None
    try:
        return main(argv) or 0
    except REFUSALS as error:
        code, text = error.exit_code, str(error)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # the disk, mostly
        code, text = 74, str(error)
    except MemoryError:
        code, text = OutOfMemoryError.exit_code, "out of memory"
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    if debug:
        traceback.print_exc()
    line = " ".join(text.split())  # which may quote a file: nothing in it commands a terminal
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(f"error: {line}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():  # the orderly end would wait for the other processes
        sys.stdout.flush()
        os._exit(code)
    return code


def catch_stop_signals() -> list[int]:
    """From now on SIGINT and SIGTERM only add their number to the list that this returns.

    A second SIGINT ends the process at once, with exit code 130, whatever it is doing: Python's own
    handlers would wait until XLA has compiled, so a thread watches for it.
    """
    received: list[int] = []
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)  # gets the number of every signal

    def watch() -> None:
        interrupts = 0
        while numbers := os.read(read, 64):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts >= 2:
                show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a bar hides it
                os.write(2, f"{show_cursor}error: interrupted twice, nothing was saved\n".encode())
                os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    return received


@contextlib.contextmanager
def delay_interrupt() -> Iterator[list[int]]:
    """Meanwhile the first SIGINT only adds its number to this list; the second interrupts.

    Python may crash at its end if it interrupted JAX before, with a computation under way.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def use_compile_cache(folder: str) -> None:
    """Keep compiled programs in this folder; "auto" is the user's cache, "off" keeps none."""
    if folder == "off":
        return
    path = cache_dir() / "xla" if folder == "auto" else Path(folder)
    jax.config.update("jax_compilation_cache_dir", str(path.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def make_run_dir(path: Path) -> None:
    """Create an output folder and see that it can be written to.

    Raises:
        OutputError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to --out_dir={path}: {error.strerror}") from error
