"""Downloads from a real HTTP server on loopback: whole and right, or refused in time."""

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from gptjax import data
from gptjax.errors import DataError
from gptjax.files import download, file_sha256, replacing

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
    monkeypatch.setitem(data.DATASETS, "tinyshakespeare", (f"{url}/good", SHA256))
    loaded = data.load_dataset("auto", block_size=64)
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
