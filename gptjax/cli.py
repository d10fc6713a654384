"""The command line: argv into a config, refusals into one line with an exit code."""

import contextlib
import dataclasses
import difflib
import errno
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import jax
import tyro

from gptjax import nanogpt_flags, output
from gptjax.config import flatten, require
from gptjax.errors import REFUSALS, OutOfMemoryError, OutputError, UsageError
from gptjax.files import ELSEWHERE, cache_dir

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
    given = read_flags(argv, kinds(default))
    return expand_paths(change(default, given), given)


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
            changes[field.name] = str(Path(value).expanduser())
    return dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


def given_flags(argv: list[str]) -> dict[str, str]:
    """Return what each flag says, the last of a kind, before anything is checked."""
    found: dict[str, str] = {}
    for i, token in enumerate(argv):
        name, equals, value = token.partition("=")
        if name.startswith("--"):
            following = "".join(argv[i + 1 : i + 2])
            found[name[2:].replace("-", "_")] = value if equals else following
    return found


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
    output.prepare_streams()
    if not debug:
        output.show_warnings_briefly()
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except REFUSALS as error:
        code, text = error.exit_code, str(error)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        output.let_go(sys.stdout)
        return 141
    except OSError as error:  # the disk, mostly
        code, text = 74, str(error)
        output.flush_or_let_go(sys.stdout)  # else Python would fail once more, at its end
    except MemoryError:
        code, text = OutOfMemoryError.exit_code, "out of memory"
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    except (RuntimeError, AssertionError):
        problem = backend_problem()
        if problem is None:
            raise
        code, text = UsageError.exit_code, problem
    with contextlib.suppress(OSError):  # nobody may be there to read it
        if debug:
            traceback.print_exc()
        print(f"error: {output.one_line(text)}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():  # the orderly end would wait for the other processes
        output.flush_or_let_go(sys.stdout)
        os._exit(code)
    return code


# ---- The devices that JAX was told to take ------------------------------------------------------


def backend_problem() -> str | None:
    """Return why JAX has no device to compute on and what to do about it, None if it has one."""
    try:
        jax.devices()
        return None
    except (RuntimeError, AssertionError) as error:  # an AssertionError: cuda without its plugin
        said = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].rstrip(".")
    names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
    asked = "".join(f"{name}={os.environ[name]}: " for name in names if os.environ.get(name))
    first = "unset it, or take cpu" if asked else "set JAX_PLATFORMS=cpu to compute on the CPU"
    return (
        f"{asked}JAX finds no such device ({said or 'its plugin is not installed'}); {first}; for "
        "an NVIDIA GPU pip install 'jax[cuda13]'; gptjax doctor tells more"
    )


# ---- Signals -------------------------------------------------------------------------------------

# Ctrl-C, and what ends a session or announces a batch system's limit.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a run to end, those left out that are ignored (as by nohup)."""
    known = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


def catch_stop_signals() -> list[int]:
    """From now on signals that ask to stop only add their number to the list that this returns.

    A second SIGINT ends the process at once, with exit code 130, whatever it is doing: Python's own
    handlers would wait until XLA has compiled, so a thread watches for it.
    """
    received: list[int] = []
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # gets the number of every signal

    def watch() -> None:
        interrupts = 0
        while numbers := os.read(read, 64):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts >= 2:
                show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a bar hides it
                text = f"{show_cursor}error: interrupted twice, nothing was saved\n"
                with contextlib.suppress(OSError):
                    os.write(2, text.encode())
                os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
    for number in stop_signals():
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def use_compile_cache(folder: str) -> None:
    """Keep compiled programs in this folder; "auto" is the user's cache, "off" keeps none.

    Raises:
        OutputError: a folder that was named cannot be written to.
    """
    if folder == "off":
        return
    try:
        path = (cache_dir() / "xla" if folder == "auto" else Path(folder)).absolute()
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = str(error) if isinstance(error, OutputError) else error.strerror
        if folder != "auto":
            raise OutputError(f"--compile_cache={folder}: cannot be written: {reason}") from error
        print(
            f"warning: compiled programs are not kept ({reason}); {ELSEWHERE}, or pass "
            "--compile_cache=FOLDER",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
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
