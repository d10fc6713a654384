"""Files and what may be wrong with them: downloads by hash, atomic replacement, JSON, the cache."""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import platformdirs

from gptjax.errors import DataError, OutputError, UsageError, plural

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all (0 = unknown)
ELSEWHERE = "set the variable GPTJAX_CACHE to a folder that can be written"
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
JSON_LIMIT = 2**24  # bytes; GPT-2's largest JSON, its vocabulary, has a million


def expand(path: str | Path) -> Path:
    """Return a path with the user's home folder for its `~`, or another user's for `~name`.

    Raises:
        UsageError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{path}: there is no such home folder; write the full path, or ./{path} for this name"
        ) from error


def cache_dir() -> Path:
    """Return $GPTJAX_CACHE, or gptjax in $XDG_CACHE_HOME or in the system's place for caches.

    Raises:
        OutputError: neither variable is set, and this user has no home folder.
    """
    if own := os.environ.get("GPTJAX_CACHE"):
        return expand(own)
    with contextlib.suppress(RuntimeError):  # a container's user who is in no passwd file
        path = platformdirs.user_cache_path("gptjax", appauthor=False)
        if path.is_absolute():  # older versions of platformdirs give the `~` back
            return path
    raise OutputError(f"this user has no home folder for a cache; {ELSEWHERE}")


@contextlib.contextmanager
def writing_to_cache() -> Iterator[None]:
    """Turn a failed write into an OutputError that says how to take another cache folder."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"cannot write to the cache ({cache_dir()}): {reason}; {ELSEWHERE}"
        ) from error


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder and its subfolders; one that vanishes counts 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).lstat().st_size
    return total


def show_paths(paths: Sequence[Path], among: Sequence[Path] = ()) -> str:
    """Return file names for a message; of more than three, the first and the last.

    Paths are shown whole where two of all the files share a name.

    Args:
        paths: the files to show.
        among: other files in the same message.
    """
    every = {*paths, *among}
    unique = len({path.name for path in every}) == len(every)
    names = [path.name if unique else str(path) for path in paths]
    return (
        ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)} files)"
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces `path` when the block ends without an error.

    It lies beside `path` until then, with the modes that the user's umask says; those of `tempfile`
    are private.
    """
    temporary = path.parent / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, text: str) -> None:
    """Append a text in UTF-8 on a new line, even if the last writer was cut short within one.

    Raises:
        OSError: it cannot be written; then the file is as it was, if the disk allows.
    """
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        fresh = size == 0
        if not fresh:
            file.seek(size - 1)
            fresh = file.read(1) == b"\n"
        line = ("" if fresh else "\n") + text + "\n"
        data = memoryview(line.encode(errors="surrogatepass"))
        try:
            while data:  # a disk that fills up takes a part first
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which the kernel frees whatever becomes of the process.

    On a network file system a lock may not reach other hosts; the file names its holder. The
    package filelock does not serve: its versions up to 3.20 empty the file before they ask for the
    lock, and so forget its holder, and where there is no flock a kill -9 leaves its lock behind.

    Raises:
        OutputError: another process holds it.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise OutputError(
                f"{path.parent} is in use by {holder}; wait for its end, or take another --out_dir"
            ) from error
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        yield


def download(
    url: str,
    sha256: str,
    path: Path,
    *,
    timeout: float = 30,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Download a file to `path`, unless the file with this sha256 is there already.

    Raises:
        DataError: no connection, an HTTP error, silence for `timeout` seconds, or a body that was
            twice cut short or of the wrong hash.
        OSError: the file cannot be written.
    """
    if path.is_file() and file_sha256(path) == sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        try:
            with (
                urllib.request.urlopen(url, timeout=timeout) as response,
                replacing(path) as temporary,
            ):
                total, done = int(response.headers.get("Content-Length") or 0), 0
                digest = hashlib.sha256()
                while chunk := response.read(2**16):
                    digest.update(chunk)
                    temporary.write(chunk)
                    done += len(chunk)
                    progress(f"downloading {path.name}", done, total)
                if done < total:
                    got = f"{done:,} of {total:,} {plural(total, 'byte')}"
                    raise DataError(f"cannot download {url}: cut short after {got}")
                if (found := digest.hexdigest()) != sha256:
                    raise DataError(f"cannot download {url}: sha256 {found}, expected {sha256}")
            return
        except DataError:  # other bytes than were asked for: worth a second try
            if last:
                raise
        except urllib.error.HTTPError as error:
            error.close()
            raise DataError(f"cannot download {url}: {error}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                raise
            raise DataError(f"cannot download {url}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that is not trusted.

    Raises:
        DataError: it is not a JSON object, has a key twice, or is larger than `JSON_LIMIT`.
    """

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"larger than {JSON_LIMIT:,} bytes")
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=once, parse_constant=refuse_constant)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read {path}: {reason}") from error
    return found
