"""What stands in the place of weights is told by its first bytes, a pickle by what it holds."""

import dataclasses
import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from gptjax import model
from gptjax.conversion.sources import SourceConfig

from .helpers import BYTES as CFG
from .helpers import need, scaled_params
from .test_formats import nanogpt_args, nanogpt_state, save_nanogpt, to_bin
from .test_imports import PICKLE, assert_opens, refusal

# ---- What is there in the place of weights -------------------------------------------------------


def tar(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("model.safetensors"))
    return file.getvalue()


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("weights/config.json", "{}")
    return file.getvalue()


INSTEAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "an LFS pointer": (
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "git lfs pull",
    ),
    "an HTML page": (lambda data: b"<!DOCTYPE html><html>401</html>", "a web page"),
    "a message": (lambda data: b"Entry not found", "text ('Entry not found')"),
    "nothing": (lambda data: b"", "empty; download it again"),
    "zeros": (lambda data: bytes(5000), "zero bytes"),
    "half of it": (lambda data: data[: len(data) // 2], "cut short"),
    "its beginning": (lambda data: data[:600], "cut short"),
    "gzip": (gzip.compress, "compressed by gzip"),
    "tar": (tar, "a tar archive"),
    "zip": (zipped, "weights/config.json"),
    "GGUF": (lambda data: b"GGUF\x03\0\0\0" + bytes(90), "a GGUF file"),
    "HDF5": (lambda data: b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5"),
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("case", INSTEAD)
def test_what_is_no_weights_is_told_by_its_first_bytes(hf: Path, file: str, case: str) -> None:
    """As the folder and as the file, also without --allow_pickle: there is no pickle."""
    change, reason = INSTEAD[case]
    if file == "pytorch_model.bin":
        to_bin(hf)
    path = hf / file
    path.write_bytes(change(path.read_bytes()))
    for source in (hf, path):
        text = refusal(source, SourceConfig())
        assert reason in text and "llm.c" not in text and "pickle, which can" not in text


def test_a_length_that_looks_like_gzip_is_a_length(hf: Path, params: model.Params) -> None:
    """A safetensors file begins with the length of its header: here 0x088b1f, gzip's mark."""
    path = hf / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    length = 0x088B1F
    path.write_bytes(length.to_bytes(8, "little") + data[8:end].ljust(length) + data[end:])
    assert path.read_bytes().startswith(gzip.compress(b"")[:3])
    assert_opens(path, params)


# ---- Pickles of other programs -------------------------------------------------------------------


@dataclasses.dataclass
class GPTConfig:
    """As build-nanogpt's, which pickles it."""

    block_size: int = 16
    vocab_size: int = 256
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


@pytest.mark.parametrize("zipped", [True, False])
def test_build_nanogpts_checkpoint(tmp_path: Path, params: model.Params, zipped: bool) -> None:
    torch = need("torch")
    path = tmp_path / "model_05000.pt"
    state = nanogpt_state(CFG, params)
    saved = {"model": state, "config": GPTConfig(), "step": 5, "val_loss": 3.0}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    assert assert_opens(path, params).cfg.activation == "gelu_tanh"


@pytest.mark.parametrize("bias", [True, False])
def test_an_old_nanogpt_does_not_name_its_biases(tmp_path: Path, bias: bool) -> None:
    """The tensors say whether there are any."""
    args = {name: value for name, value in nanogpt_args(CFG).items() if name != "bias"}
    cfg = dataclasses.replace(CFG, bias=bias)
    params = jax.device_get(scaled_params(cfg, jax.random.key(0)))
    save_nanogpt(tmp_path / "ckpt.pt", cfg, params, model_args=args)
    source = assert_opens(tmp_path / "ckpt.pt", params)
    assert source.cfg.activation == ("gelu_tanh" if bias else "gelu")


def test_a_bias_that_is_no_bool(tmp_path: Path, params: model.Params) -> None:
    save_nanogpt(tmp_path / "ckpt.pt", CFG, params, model_args={**nanogpt_args(CFG), "bias": 1})
    assert "bias=1, expected true or false" in refusal(tmp_path / "ckpt.pt")


def test_a_bare_state_dict(hf: Path, params: model.Params) -> None:
    """In either layout, beside a config.json in Hugging Face's words."""
    torch = need("torch")
    torch.save(nanogpt_state(CFG, params), hf / "model.pt")
    assert_opens(hf / "model.pt", params)
    to_bin(hf)
    (hf / "pytorch_model.bin").rename(hf / "model.pt")
    assert_opens(hf / "model.pt", params)
    (hf / "config.json").unlink()
    assert "--config=FILE.json" in refusal(hf / "model.pt")


def test_other_things_in_a_pickle(tmp_path: Path) -> None:
    torch = need("torch")
    path = tmp_path / "ckpt.pt"
    for saved, text in (
        ([1, 2], "but a list"),
        ({"state_dict": {}, "epoch": 3}, "but 'state_dict', 'epoch'"),
        ({1: torch.zeros(2)}, "but '1'"),
        ({"model": {1: torch.zeros(2)}, "model_args": nanogpt_args(CFG)}, "not a state dict"),
        (torch.nn.Linear(2, 2), "it holds torch.nn.modules.linear.Linear"),
    ):
        torch.save(saved, path)
        assert text in refusal(path)


def test_unknown_model_args_are_accepted_by_name(tmp_path: Path, params: model.Params) -> None:
    path = tmp_path / "ckpt.pt"
    args = {**nanogpt_args(CFG), "flash": True, "sparse": None, "name": "x", "wandb": 1}
    save_nanogpt(path, CFG, params, model_args=args)
    assert "wandb=1 is unknown; pass --accept_fields=wandb (" in refusal(path)
    assert_opens(path, params, dataclasses.replace(PICKLE, accept_fields="wandb"))


def test_a_pickle_larger_than_memory_is_not_read(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = need("torch")
    to_bin(hf)
    path = hf / "pytorch_model.bin"
    size = path.stat().st_size
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size - 1}.get)
    for source in (hf, path):
        assert "of memory" in refusal(source)
    path.rename(hf / "ckpt.pt")
    assert "of memory" in refusal(hf / "ckpt.pt")
    os.truncate(hf / "ckpt.pt", 2 * size)  # no longer a zip file, but that comes second
    assert "of memory" in refusal(hf / "ckpt.pt")
    os.truncate(hf / "ckpt.pt", size)
    # Shards are held together.
    for i in (1, 2):
        shutil.copy(hf / "ckpt.pt", hf / f"{i}.bin")
    index = {"weight_map": {"a": "1.bin", "b": "2.bin"}}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * size - 1}.get)
    assert "1.bin and 1 more" in refusal(hf)
