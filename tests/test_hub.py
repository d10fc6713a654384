"""Models by name, from a local server that answers as the Hub does, and from its cache."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from gptjax import model
from gptjax.conversion import huggingface
from gptjax.conversion.sources import SourceConfig, load_model
from gptjax.errors import DataError, UsageError

from .helpers import BYTES
from .test_formats import shard, to_bin
from .test_lora import config as adapter_config

BYTE = SourceConfig(tokenizer="byte")
NAME = "someone/gpt2"


class Server:
    """Serves a folder as the only revision of the model someone/gpt2; counts what is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cut: str | None = None  # the file of which only half arrives
        self.failing: str | None = None  # the file at which the server fails
        self.sent: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def do_GET(self) -> None:
                outer.answer(self, body=True)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request: Any, *, body: bool) -> None:
        *repo, revision, file = request.path.strip("/").rsplit("/", 2)
        error = None
        if repo != [f"{NAME}/resolve"]:
            error = "RepoNotFound"
        elif revision not in ("main", "v1", "c" * 40):
            error = "RevisionNotFound"
        elif not (self.folder / file).is_file():
            error = "EntryNotFound"
        data = b"" if error else (self.folder / file).read_bytes()
        request.send_response(500 if file == self.failing else 404 if error else 200)
        if error:
            request.send_header("X-Error-Code", error)
        request.send_header("X-Repo-Commit", "c" * 40)
        request.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            self.sent.append(file)
            request.wfile.write(data[: len(data) // 2] if file == self.cut else data)
            if file == self.cut:
                request.connection.close()


@pytest.fixture
def server(
    tmp_path: Path, params: model.Params, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    huggingface.write_folder(folder, BYTES, params, None)
    server = Server(folder)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.http.shutdown()
    server.http.server_close()


def assert_loaded(params: model.Params, config: SourceConfig = BYTE) -> None:
    jax.tree.map(np.testing.assert_array_equal, load_model(NAME, config).params, params)


@contextlib.contextmanager
def offline(server: Server) -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1."""
    asked = len(server.sent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield
    assert len(server.sent) == asked


def test_a_single_file_once_then_from_the_cache(server: Server, params: model.Params) -> None:
    assert_loaded(params)
    assert sorted(server.sent)[-2:] == ["config.json", "model.safetensors"]
    with offline(server):
        assert_loaded(params)


def test_shards(server: Server, params: model.Params) -> None:
    shard(server.folder)
    assert_loaded(params)
    with offline(server):
        assert_loaded(params)


def test_a_revision(server: Server, params: model.Params) -> None:
    assert_loaded(params, SourceConfig(tokenizer="byte", revision="v1"))
    with pytest.raises(DataError, match="has no revision v2"):
        load_model(NAME, SourceConfig(tokenizer="byte", revision="v2"))


def test_no_such_model(server: Server) -> None:
    with pytest.raises(DataError, match="no such model on the Hub"):
        load_model("someone/gpt3", BYTE)
    with pytest.raises(UsageError, match=r"no file or folder \.\./gpt2"):
        load_model("../gpt2", BYTE)


def test_an_adapter_is_told_and_its_base_named(server: Server) -> None:
    fields = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    (server.folder / "adapter_config.json").write_text(json.dumps(fields))
    for _ in range(2):  # with a config.json beside it, and without
        with pytest.raises(UsageError, match=r"adapter of the model 'gpt2'.* --base=gpt2"):
            load_model(NAME, BYTE)
        (server.folder / "config.json").unlink(missing_ok=True)
    (server.folder / "adapter_config.json").unlink()


def test_an_adapter_is_merged(server: Server, tmp_path: Path, params: model.Params) -> None:
    base = tmp_path / "base"
    shutil.copytree(server.folder, base)
    for old in server.folder.iterdir():
        old.unlink()
    fields = adapter_config(base, target_modules=["c_proj"])
    (server.folder / "adapter_config.json").write_text(json.dumps(fields))
    layers = [f"h.{i}.{part}.c_proj" for i in range(2) for part in ("attn", "mlp")]
    width = {"attn": 32, "mlp": 128}
    tensors = {}
    for layer in layers:
        d_in = width[layer.split(".")[2]]
        tensors[f"base_model.model.transformer.{layer}.lora_A.weight"] = np.ones((4, d_in))
        tensors[f"base_model.model.transformer.{layer}.lora_B.weight"] = np.ones((32, 4))
    halves = {name: array.astype(np.float16) for name, array in tensors.items()}
    save_file(halves, server.folder / "adapter_model.safetensors")
    for named in ("", str(base)):
        merged = load_model(NAME, dataclasses.replace(BYTE, base=named)).params
        change = merged["h"]["mlp"]["c_proj"]["kernel"] - params["h"]["mlp"]["c_proj"]["kernel"]
        assert np.allclose(change, 4 * 16 / 4, atol=1e-4)
    with offline(server):
        load_model(NAME, BYTE)


def test_a_model_in_another_format(server: Server) -> None:
    """Such as one that holds GGUF only."""
    (server.folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"has no config\.json on the Hub"):
        load_model(NAME, BYTE)


def test_never_fetched_and_no_network(server: Server) -> None:
    with offline(server), pytest.raises(DataError, match="cannot reach the Hub"):
        load_model(NAME, BYTE)


@pytest.mark.parametrize("proxy", [True, False])
def test_nobody_listens(
    server: Server, params: model.Params, monkeypatch: pytest.MonkeyPatch, proxy: bool
) -> None:
    if not proxy:
        monkeypatch.setattr("urllib.request.getproxies", dict)
    assert_loaded(params)
    server.http.shutdown()
    server.http.server_close()
    assert_loaded(params)  # from the cache
    with pytest.raises(DataError, match="cannot reach the Hub"):
        load_model("someone/else", BYTE)


def test_a_download_cut_short_is_not_used(server: Server, params: model.Params) -> None:
    server.cut = "model.safetensors"
    with pytest.raises(DataError, match="cannot download"):
        load_model(NAME, BYTE)
    server.cut = None
    assert_loaded(params)


def test_pickles_are_not_even_fetched(server: Server, params: model.Params) -> None:
    to_bin(server.folder)
    with pytest.raises(DataError, match=r"--allow_pickle \(which also takes pytorch"):
        load_model(NAME, BYTE)
    assert "pytorch_model.bin" not in server.sent
    assert_loaded(params, SourceConfig(tokenizer="byte", allow_pickle=True))


def test_an_index_may_not_name_other_folders(server: Server) -> None:
    weight_map = shard(server.folder)
    index = {"weight_map": dict.fromkeys(weight_map, "../../x.safetensors")}
    (server.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not a plain file name"):
        load_model(NAME, BYTE)


def blob_of(tmp_path: Path) -> Path:
    """The weights in the cache."""
    (file,) = (tmp_path / "hub").glob("*/snapshots/*/model.safetensors")
    return file.resolve()


def test_a_poisoned_cache_is_fetched_again(
    server: Server, params: model.Params, tmp_path: Path
) -> None:
    assert_loaded(params)
    blob = blob_of(tmp_path)
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    with offline(server), pytest.raises(DataError, match=r"has sha256 \w{64}, but the cache"):
        load_model(NAME, BYTE)
    assert not blob.exists()
    assert_loaded(params)
    blob.write_bytes(data)
    assert_loaded(params)  # at once, with a network
    assert server.sent.count("model.safetensors") == 3


def test_a_server_that_fails_is_no_reason_to_take_a_pickle(server: Server) -> None:
    weights = (server.folder / "model.safetensors").read_bytes()
    to_bin(server.folder)
    (server.folder / "model.safetensors").write_bytes(weights)
    server.failing = "model.safetensors"
    with pytest.raises(DataError, match="cannot reach the Hub"):
        load_model(NAME, SourceConfig(tokenizer="byte", allow_pickle=True))
    assert "pytorch_model.bin" not in server.sent
