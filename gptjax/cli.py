"""The command line: argv into a config, refusals into one line with an exit code."""

import contextlib
import difflib
import io
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import tyro

from gptjax.config import flatten
from gptjax.errors import REFUSALS, OutOfMemoryError, OutputError, UsageError
from gptjax.files import cache_dir

T = TypeVar("T")


def parse(
    config_class: type[T], argv: list[str], default: T, description: str, prog: str | None = None
) -> T:
    """Flags --name=value or --name value, with - and _ alike, over a default.

    Raises:
        UsageError: a flag is unknown or its value is not of its type or range.
    """
    known = flatten(default)
    argv = list(argv)
    for i, token in enumerate(argv):
        name = token.partition("=")[0].lstrip("-").replace("-", "_")
        if token.startswith("--") and name not in known and name not in ("", "help"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            raise UsageError(f"unknown flag --{name}: {hint}")
        alone = "=" not in token and (i + 1 == len(argv) or argv[i + 1].startswith("--"))
        if alone and token.startswith("--") and isinstance(known.get(name), bool):
            argv[i] = f"{token}=True"
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                config_class,
                args=argv,
                default=default,
                description=description,
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
            )
    except SystemExit as exit:
        if exit.code:
            raise UsageError(first_paragraph(messages.getvalue())) from None
        raise


def peek(argv: list[str], flag: str) -> str | None:
    """What a flag says, before anything is checked; None if it is not there."""
    value = None
    for i, token in enumerate(argv):
        name, equals, rest = token.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == flag:
            value = rest if equals else "".join(argv[i + 1 : i + 2])
    return value


def first_paragraph(box: str) -> str:
    """What tyro says before the first rule of its box, as one line."""
    said: list[str] = []
    for line in box.splitlines():
        text = line.strip("│ ")
        if text.startswith(("─", "╰")):
            break
        if not text.startswith("╭"):
            said.append(text)
    return re.sub(r"^Error parsing [\w.]*: (?=--)", "", " ".join(said))


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
