"""Downloads from a real HTTP server on loopback: whole and right, or refused in time."""

import errno
import hashlib
import http.server
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest

from gptjax import files
from gptjax.data.datasets import DATASETS, load_dataset
from gptjax.data.text import write_tokens
from gptjax.errors import DataError, OutputError
from gptjax.files import append_line, cache_dir, download, file_sha256, locked, replacing
from gptjax.terminal import cli
from gptjax.tokenizer import ByteTokenizer
from gptjax.training import metrics

from .helpers import ROOT, start_process

BODY = b"To be, or not to be\n" * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as its path says, and counts."""

    requests: ClassVar[list[str]] = []
    hang = threading.Event()

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        body = BODY[:-1] + b"!" if self.path == "/changed" else BODY
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = self.path in ("/cut", "/stall")
        self.wfile.write(body[: len(body) // 2] if half else body)
        if self.path == "/stall":
            self.wfile.flush()
            self.hang.wait(20)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Handler.requests = []
    Handler.hang.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Handler.hang.set()
        server.shutdown()
        thread.join()


def test_good_download_is_cached(url: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = tmp_path / "new" / "text.txt"
    download(f"{url}/good", SHA256, path, progress=lambda *report: seen.append(report))
    assert path.read_bytes() == BODY
    assert seen[-1] == ("downloading text.txt", len(BODY), len(BODY))
    download(f"{url}/good", SHA256, path)
    assert Handler.requests == ["/good"]


def test_poisoned_cache_is_fetched_again(url: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"garbage")
    download(f"{url}/good", SHA256, path)
    assert file_sha256(path) == SHA256


@pytest.mark.parametrize(
    ("answer", "reason", "requests"),
    [
        ("missing", "404", 1),
        ("cut", "cut short after 50,000 of 100,000 bytes", 2),
        ("changed", rf"sha256 \w{{64}}, expected {SHA256}", 2),
    ],
)
def test_bad_download_leaves_nothing(
    url: str, tmp_path: Path, answer: str, reason: str, requests: int
) -> None:
    with pytest.raises(DataError, match=f"cannot download {url}/{answer}: .*{reason}") as error:
        download(f"{url}/{answer}", SHA256, tmp_path / "text.txt")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert len(Handler.requests) == requests


def test_a_full_disk_is_no_failed_download(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the dataset `auto` would go on with other data."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "replacing", full)
    with pytest.raises(OutputError, match="cannot write to the cache"), files.writing_to_cache():
        download(f"{url}/good", SHA256, tmp_path / "text.txt")


def test_silence_ends_in_time(url: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match="timed out"):
        download(f"{url}/stall", SHA256, tmp_path / "text.txt", timeout=0.5)
    assert time.monotonic() - began < 5
    assert list(tmp_path.iterdir()) == []


def test_named_dataset_arrives_through_the_network(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    monkeypatch.setitem(DATASETS, "tinyshakespeare", (f"{url}/good", SHA256))
    loaded = load_dataset("auto", block_size=64)
    assert loaded.name == "tinyshakespeare"
    assert len(loaded.train[0]) + len(loaded.val[0]) == len(BODY)


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- Locks, lines, modes, and where the cache is


def test_a_lock_names_its_holder_until_a_kill_frees_it(tmp_path: Path) -> None:
    """Also after others were refused: the packages that lock files empty them first, or did."""
    path = tmp_path / ".lock"
    hold = (
        "import sys, time; from pathlib import Path; from gptjax.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = start_process(
        [sys.executable, "-c", hold, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    for _ in range(2):
        said = f"in use by process {holder.pid} on "
        with pytest.raises(OutputError, match=said) as error, locked(path):
            pass
        assert error.value.exit_code == 73
    holder.kill()
    holder.communicate()
    with locked(path):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_a_line_begins_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "one")
    with path.open("a") as file:
        file.write("cut sho")
    append_line(path, "two \u00e9\nthree")
    assert path.read_bytes() == "one\ncut sho\ntwo é\nthree\n".encode()


def test_a_line_that_the_disk_takes_in_part_is_taken_back(tmp_path: Path) -> None:
    """A file that may not grow beyond 100 bytes, as on a disk that is full."""
    path = tmp_path / "lines"
    append_line(path, "a" * 80)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(path, "b" * 80)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    append_line(path, "c")
    assert path.read_text() == "a" * 80 + "\nc\n"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_and_folders_have_the_modes_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "config.json") as file:
            file.write(b"{}")
        with locked(tmp_path / ".lock"):
            pass
        metrics.append_metrics(tmp_path / "metrics.jsonl", {"step": 1})
        metrics.drop_metrics_from(tmp_path / "metrics.jsonl", 2)
        ids = np.zeros(3, np.int32)
        write_tokens(tmp_path / "tokens", {"train": iter([ids])}, ByteTokenizer(), lambda: None)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user: no HOME, and in no passwd file."""
    for name in ("HOME", "XDG_CACHE_HOME", "GPTJAX_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_the_cache_needs_no_home_where_it_is_named(
    homeless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="GPTJAX_CACHE"):
        cache_dir()
    monkeypatch.setenv("GPTJAX_CACHE", "/data/cache")
    assert cache_dir() == Path("/data/cache")
    monkeypatch.delenv("GPTJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/data")
    assert cache_dir() == Path("/data/gptjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *args, **kwargs: Path("~/x"))
    with pytest.raises(OutputError, match="GPTJAX_CACHE"):  # as older versions of it say
        cache_dir()


def test_the_cache_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GPTJAX_CACHE", "~/cache")
    assert cache_dir() == tmp_path / "cache"


def test_a_cache_that_cannot_be_written_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="Not a directory; set the variable GPTJAX_CACHE"):
        load_dataset("pydocs", block_size=8)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 40)
    with pytest.raises(OutputError, match="Not a directory; set the variable GPTJAX_CACHE"):
        load_dataset(str(tmp_path / "text.txt"), block_size=8)


def test_a_compile_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--compile_cache="):
        cli.use_compile_cache(str(tmp_path / "file" / "xla"))
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "file"))
    compiled = jax.config.values["jax_compilation_cache_dir"]
    cli.use_compile_cache("auto")  # works without
    assert jax.config.values["jax_compilation_cache_dir"] == compiled
    said = capsys.readouterr().err
    assert said.startswith("warning: compiled programs are not kept") and "GPTJAX_CACHE" in said
