"""An output folder that appears whole or not at all, also when its process is killed."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from gptjax.errors import DiskError, OutputError, Refusal
from gptjax.files import locked

LOCK = ".lock"  # of a temporary folder while it is written


def refuse_existing(path: Path) -> None:
    """Raise OutputError if there is anything at `path` but an empty folder."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputError(f"--out_dir={path}: exists already; take another, or remove it")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` if the block ends without an error.

    Else it is removed. It holds a lock, which shows later whether its process was killed.

    Raises:
        OutputError: `path` holds something already, or cannot be written.
        DiskError: the disk fails in the block; it names `path`, as all refusals in it do.
    """
    refuse_existing(path)
    temporary = path.absolute().parent / f".{path.absolute().name}.{os.getpid()}.tmp"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.absolute())
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write to --out_dir={path}: {error.strerror}") from error
    try:
        with locked(temporary / LOCK):
            yield temporary
            (temporary / LOCK).unlink()
            temporary.replace(path)
    except Refusal as error:
        text = str(error).replace(str(temporary), str(path)).replace(temporary.name, path.name)
        raise type(error)(text) from error
    except OSError as error:
        raise DiskError(f"cannot write to --out_dir={path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary folders for `path` whose processes were killed on this machine."""
    form = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.tmp")
    for folder in path.parent.iterdir():
        match = form.fullmatch(folder.name)
        if match and folder.is_dir() and is_left(folder, int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def is_left(folder: Path, process: int) -> bool:
    """Return whether no process writes into a temporary folder; False if it is another host's."""
    lock = folder / LOCK
    try:
        holder = lock.read_text(errors="replace") if lock.exists() else ""
        if holder:
            if f" on {socket.gethostname()} " not in holder:
                return False
            with locked(lock):
                return True
        os.kill(process, 0)  # from before there were locks, or killed before it had one
    except ProcessLookupError:
        return True
    except OSError:  # somebody holds it, or it is another user's
        return False
    return process == os.getpid()  # which has made none yet
