"""The common ground of the programs: errors as a line and an exit code, signals, caches."""

import contextlib
import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax

from gptjax import allocator
from gptjax.errors import OutOfMemoryError, OutputError, Refusal, UsageError, first_line
from gptjax.files import ELSEWHERE, cache_dir
from gptjax.terminal import output

T = TypeVar("T")


def run(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a program's main; turn an error into `error: ...` on stderr and its exit code."""
    allocator.keep_freed_memory()
    debug = any(token in argv for token in ("--debug", "--debug=True"))
    output.prepare_streams()
    if not debug:
        output.show_warnings_briefly()
    try:
        if sys.platform == "win32":  # which has neither fcntl nor fork
            raise UsageError("gptjax needs Linux; on Windows run it inside WSL2 (wsl --install)")
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except Refusal as error:
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
    """Return why JAX has no device to compute on and what to do, None if it has one."""
    try:
        jax.devices()
        return None
    except (RuntimeError, AssertionError) as error:  # an AssertionError: cuda without its plugin
        said = str(error) and first_line(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
    names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
    asked = "".join(f"{name}={os.environ[name]}: " for name in names if os.environ.get(name))
    nvidia = not asked or "cuda" in asked or "gpu" in asked
    install = "for an NVIDIA GPU pip install 'jax[cuda13]'; " if nvidia else ""
    first = "unset it, or take cpu" if asked else "set JAX_PLATFORMS=cpu to compute on the CPU"
    return (
        f"{asked}JAX finds no such device ({said or 'its plugin is not installed'}); {first}; "
        f"{install}gptjax doctor tells more"
    )


# ---- Signals -------------------------------------------------------------------------------------

# Ctrl-C, and what ends a session or announces a batch system's limit.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a run to end, without those that are ignored (as by nohup)."""
    known = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


def catch_stop_signals() -> list[int]:
    """Make signals that ask to stop only add their number to the list that this returns.

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


@contextlib.contextmanager
def delay_interrupt() -> Iterator[list[int]]:
    """Make the first SIGINT in this block only add its number to a list; the second interrupts.

    Python may crash at its end if it interrupted JAX before, with a computation under way.
    """
    received: list[int] = []
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of a job in the background
        yield received
        return

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


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
        if folder != "auto":
            reason = error.strerror or error
            raise OutputError(f"--compile_cache={folder}: cannot be written: {reason}") from error
        known = isinstance(error, OutputError)  # which says what to do
        said = str(error) if known else f"{error.strerror}; {ELSEWHERE}"
        output.note(f"warning: compiled programs are not kept: {said}, or --compile_cache=FOLDER")
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def make_run_dir(path: Path) -> None:
    """Create an output folder and check that it can be written to.

    Raises:
        OutputError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to --out_dir={path}: {error.strerror}") from error
