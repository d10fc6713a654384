"""GPTs that other programs in PyTorch trained compute here what they computed there."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gptjax import model
from gptjax.conversion import model_words, sources, state_dict
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import HEAD, Source, read_params
from gptjax.errors import DataError, UsageError

from .helpers import need
from .test_imports import PICKLE

torch = need("torch")

from . import torch_twins as twins  # noqa: E402

HEADS = {"n_head": twins.H}
Network = Any  # a torch.nn.Module
Saver = Callable[[Path, Network], Any]  # writes a network into a folder, returns what to import


# ---- The comparison ------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def our_logits(cfg: Any, params: model.Params, tokens: jax.Array) -> jax.Array:
    return model.forward(cfg, params, tokens)[0]


def greedy(logits: Callable[[np.ndarray], np.ndarray], start: list[int]) -> list[int]:
    """The start and the likeliest tokens after it, up to the context."""
    ids = list(start)
    while len(ids) < twins.S:
        padded = np.array([ids + [0] * (twins.S - len(ids))])
        ids.append(int(logits(padded)[0, len(ids) - 1, : twins.V].argmax()))
    return ids


def parting(source: Source, network: Network) -> float:
    """How far our logits part from the network's, in units of what is allowed."""
    cfg, params = model.resolve(source.cfg), read_params(source)
    cfg = dataclasses.replace(cfg, dtype="float32", attention="xla")
    tokens = np.random.default_rng(0).integers(twins.V, size=(4, twins.S))

    def ours(ids: np.ndarray) -> np.ndarray:
        return np.asarray(our_logits(cfg, params, jnp.asarray(ids, jnp.int32)))

    def theirs(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = network(torch.from_numpy(ids)).numpy()
        return found

    expected = theirs(tokens)
    largest = np.abs(expected).max()
    assert largest > 2, "too near to nothing to tell"
    difference = np.abs(ours(tokens)[..., : twins.V] - expected).max() / (1e-5 * max(1, largest))
    if difference <= 1:
        assert greedy(ours, [3, 4]) == greedy(theirs, [3, 4])
    return float(difference)


@functools.cache
def trained(kind: str) -> Network:
    made: dict[str, Any] = {
        "2020": twins.MinGPTOf2020,
        "mingpt": twins.MinGPT,
        "tied": lambda: twins.MinGPT(True),
    }
    return twins.train(made[kind]())


def refusal(path: Path, config: SourceConfig = PICKLE) -> str:
    """What is said of a source that is refused, in one line."""
    with pytest.raises((DataError, UsageError)) as error:
        read_params(sources.open_source(str(path), config))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Files as the programs write them ------------------------------------------------------------


def write(folder: Path, saved: Any, name: str = "model.pt", config: Any = None) -> Path:
    torch.save(saved, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / name


def work_folder(folder: Path, network: Network) -> Path:
    """As minGPT's projects leave it: the sizes are null, model_type says them."""
    about = {"model_type": "gpt-nano", "n_layer": 2, "n_head": None, "n_embd": twins.D}
    about |= {"vocab_size": None, "block_size": None, "embd_pdrop": 0.1}
    sections = {"system": {"seed": 1}, "data": {"ndigit": 2}, "trainer": {"max_iters": None}}
    write(folder, network.state_dict(), config={**sections, "model": about})
    return folder


class AttributeDict(dict[str, Any]):
    """As Lightning's, which pickles it."""


def lightning(folder: Path, network: Network) -> Path:
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    hyper = AttributeDict(config=twins.GPTConfig(), learning_rate=1e-3, work_dir=folder)
    saved = {"state_dict": state, "epoch": 3, "hyper_parameters": hyper}
    return write(folder, saved, "last.ckpt")


def build_nanogpt(folder: Path, network: Network) -> Path:
    saved = {"model": network.state_dict(), "config": twins.GPTConfig(), "step": 5}
    return write(folder, {**saved, "val_loss": np.float64(3.5)}, "model_00005.pt")


def safetensors(folder: Path, network: Network, prefix: str = "") -> Path:
    state = {f"{prefix}{k}": v.numpy().copy() for k, v in network.state_dict().items()}
    save_file(state, folder / "x.safetensors")
    (folder / "config.json").write_text(json.dumps(HEADS))
    return folder / "x.safetensors"


def hugging_faces(folder: Path, network: Network) -> Path:
    """The layout of Conv1D, under PEFT's prefix."""
    state = {
        f"base_model.model.{name}": tensor.T.contiguous()
        if ".c_" in name and tensor.dim() == 2
        else tensor
        for name, tensor in network.state_dict().items()
    }
    return write(folder, state, "x.bin", HEADS)


def forked(folder: Path, network: Network) -> Path:
    """nanoGPT with an untied head and its arguments as a namespace."""
    state = {f"module._orig_mod.{name}": t for name, t in network.state_dict().items()}
    args = argparse.Namespace(**vars(twins.GPTConfig()), activation_function="gelu_new")
    return write(folder, {"model": state, "args": args, "iter_num": 7}, "ckpt.pt")


FILES: dict[str, tuple[str, Saver]] = {
    "minGPT": ("mingpt", work_folder),
    "minGPT of 2020": ("2020", lambda at, net: write(at, net.state_dict(), config=HEADS)),
    "makemore": ("mingpt", lambda at, net: write(at, net.state_dict(), config=HEADS)),
    "build-nanogpt": ("tied", build_nanogpt),
    "Lightning": ("mingpt", lightning),
    "Lightning of 2020": ("2020", lightning),
    "safetensors": ("mingpt", safetensors),
    "safetensors under DDP": ("2020", functools.partial(safetensors, prefix="module.")),
    "Hugging Face's layout under PEFT": ("mingpt", hugging_faces),
    "a fork of nanoGPT": ("mingpt", forked),
}


@pytest.mark.parametrize("case", FILES)
def test_the_logits_are_those_of_the_program(tmp_path: Path, case: str) -> None:
    kind, save = FILES[case]
    name = save(tmp_path, trained(kind))
    source = sources.open_source(str(name), PICKLE)
    assert source.cfg.tie_head == (kind == "tied")
    assert source.cfg.activation == ("gelu" if kind == "2020" else "gelu_tanh")
    assert (source.cfg.activation in source.assumed) == (case != "a fork of nanoGPT")
    assert parting(source, trained(kind)) <= 1


# A mistake that a reader could make, and the network whose logits then part.
MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "key before query": (
        "2020",
        lambda patch: patch.setattr(
            state_dict,
            "fuse",
            lambda parts, fuse=state_dict.fuse: fuse([parts[i] for i in (1, 0, 2)]),
        ),
    ),
    "a square kernel not transposed": (
        "mingpt",
        lambda patch: patch.setattr(
            state_dict, "is_linear", lambda name: ".c_" in name and ".attn.c_proj." not in name
        ),
    ),
    "the other GELU": (
        "mingpt",
        lambda patch: patch.setattr(model_words, "choose_activation", lambda *_: ("gelu", "")),
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_the_comparison_sees_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, plant = MISTAKES[case]
    path = write(tmp_path, trained(kind).state_dict(), config=HEADS)
    plant(monkeypatch)
    assert parting(sources.open_source(str(path), PICKLE), trained(kind)) > 5


# ---- What is said about a model ------------------------------------------------------------------


def test_without_n_head_the_flag_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, trained("mingpt").state_dict())
    assert "--config=FILE.json" in refusal(path)
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(HEADS))
    config = dataclasses.replace(PICKLE, config=str(elsewhere))
    for name in (path, tmp_path):
        assert sources.open_source(str(name), config).cfg.n_head == twins.H
    # What the file says by itself counts before a config.json beside it.
    saved = {"model": trained("mingpt").state_dict(), "config": {"activation_function": "gelu_new"}}
    path = write(tmp_path, saved, config={**HEADS, "activation_function": "gelu"})
    assert sources.open_source(str(path), PICKLE).cfg.activation == "gelu_tanh"
    assert "no such file" in refusal(path, dataclasses.replace(PICKLE, config="nowhere.json"))


CONTRADICTIONS = {
    "n_layer": 3,
    "n_embd": 48,
    "block_size": 13,
    "vocab_size": 38,
    "bias": False,
    "n_head": 5,
    "tie_weights": True,
    "model_type": "llama",
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_weights": False,
    "norm_first": False,
    "scale_attn_by_inverse_layer_idx": True,
    "n_inner": 64,
    "use_rope": True,
    "nobody": 1,
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_is_said_must_fit(tmp_path: Path, name: str) -> None:
    config = {**HEADS, name: CONTRADICTIONS[name]}
    text = refusal(write(tmp_path, trained("mingpt").state_dict(), config=config))
    assert f"{name}={CONTRADICTIONS[name]!r}" in text
    if name == "nobody":
        assert "--accept_fields=nobody" in text


def test_fields_of_training_change_nothing(tmp_path: Path) -> None:
    config = {**HEADS, "n_embd2": 64, "embd_pdrop": 0.1, "learning_rate": 1.0, "model_type": "gpt"}
    path = write(tmp_path, trained("mingpt").state_dict(), config=config)
    assert sources.open_source(str(path), PICKLE).cfg.n_embd == twins.D


def test_hugging_faces_words_beside_linear_layers(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": twins.L, "n_head": twins.H, "n_embd": twins.D}
    config |= {"n_positions": twins.S, "vocab_size": twins.V, "tie_word_embeddings": False}
    path = write(tmp_path, trained("mingpt").state_dict(), config=config)
    source = sources.open_source(str(path), PICKLE)
    assert source.says_activation and not source.assumed
    assert parting(source, trained("mingpt")) <= 1


def test_a_word_of_hugging_face_makes_no_mingpt(tmp_path: Path) -> None:
    state = {name: t for name, t in trained("tied").state_dict().items() if "lm_head" not in name}
    path = write(tmp_path, {"model_state": state}, config={"model_type": "gpt2", **HEADS})
    assert parting(sources.open_source(str(path), PICKLE), trained("tied")) <= 1


MINI = {"model_type": "gpt-mini", "n_layer": 2, "n_embd": twins.D, **HEADS}


def test_a_head_that_is_equal(tmp_path: Path) -> None:
    """It is tied, unless the program has no tied heads, or the file says so."""
    network = twins.MinGPT(tied=True)
    for config, tied in (
        (HEADS, True),
        ({**HEADS, "tie_weights": False}, False),
        (MINI, False),
        ({**MINI, "tie_weights": True}, True),
    ):
        path = write(tmp_path, network.state_dict(), config=config)
        source = sources.open_source(str(path), PICKLE)
        assert source.cfg.tie_head == tied
        assert ("lm_head" in read_params(source)) != tied


def test_a_tensor_whose_sign_is_a_mark(tmp_path: Path) -> None:
    """PyTorch turns the signs of a conjugate's imaginary part only when they are read."""
    state = trained("mingpt").state_dict()
    wte = state["transformer.wte.weight"]
    marked = torch.complex(wte, -wte).conj().imag
    assert marked.is_neg()
    path = write(tmp_path, {**state, "transformer.wte.weight": marked}, config=HEADS)
    params = read_params(sources.open_source(str(path), PICKLE))
    np.testing.assert_array_equal(params["wte"]["embedding"][: twins.V], wte)


def test_one_model_in_one_file(tmp_path: Path) -> None:
    """Averaged weights beside those of training, and settings that contradict each other."""
    state, other = trained("mingpt").state_dict(), trained("2020").state_dict()
    path = write(tmp_path, {"model": state, "ema": state}, config=HEADS)
    assert "holds 2 models ('model', 'ema')" in refusal(path)
    averaged = {f"ema.{name}": tensor for name, tensor in state.items()}
    assert "begin in 2 ways" in refusal(write(tmp_path, {**state, **averaged}))
    sizes = {"args": {"n_head": 8}, "config": HEADS}
    text = refusal(write(tmp_path, {"model": state, **sizes}))
    assert f"n_head={twins.H} and n_head=8" in text
    odd = {"model": state, "config": HEADS, "args": {"n_head": state["lm_head.weight"]}}
    assert "n_head=" in refusal(write(tmp_path, odd))
    given = {"model": state, **sizes, "model_args": HEADS}
    assert sources.open_source(str(write(tmp_path, given)), PICKLE).cfg.n_head == twins.H
    twice = {**other, "wte.weight": other["tok_emb.weight"] + 1}
    assert "wte.weight is stored twice" in refusal(write(tmp_path, twice))
    ties = {**HEADS, "tie_weights": False, "tie_head": True}
    text = refusal(write(tmp_path, twins.MinGPT(tied=True).state_dict(), config=ties))
    assert "tie_head=True contradicts tie_weights=False" in text


@pytest.mark.parametrize("tied", [True, False])
def test_nanogpts_padding_is_cut(tmp_path: Path, tied: bool) -> None:
    network = twins.MinGPT()
    state = {**network.state_dict(), "transformer.wte.weight": torch.randn(50304, twins.D)}
    wte = state["transformer.wte.weight"]
    state[HEAD] = wte if tied else wte + 1
    for said in (None, 50257, 50304):
        path = write(tmp_path, {"model": state, "model_args": {**HEADS, "vocab_size": said}})
        source = sources.open_source(str(path), PICKLE)
        assert source.cfg.vocab_size == 50257 and "rows 50257 to 50303" in source.notes[0]
    assert (source.cfg.vocab_size, source.cfg.tie_head) == (50257, tied)
    own = dataclasses.replace(PICKLE, tokenizer="a tokenizer.json")  # perhaps of more tokens
    assert sources.open_source(str(path), own).cfg.vocab_size == 50304
    params = read_params(source)
    if not tied:
        np.testing.assert_array_equal(params["lm_head"]["embedding"][:50257], (wte + 1)[:50257])


STRANGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "h.0.attn.bias": lambda state: torch.ones(1, 1, twins.S, twins.S),  # sees the future
    "h.1.attn.bias": lambda state: mask_of_a_window(),
    "lm_head.bias": lambda state: torch.zeros(twins.V),
    "h.0.attn.rotary.inv_freq": lambda state: torch.ones(3),
}


def mask_of_a_window() -> Any:
    return (twins.mask() * torch.ones(twins.S, twins.S).triu(-3)).clone()


@pytest.mark.parametrize("name", STRANGE)
def test_every_tensor_is_accounted_for(tmp_path: Path, name: str) -> None:
    state = trained("mingpt").state_dict()
    prefix = "" if name.startswith("lm") else "transformer."
    state[f"{prefix}{name}"] = STRANGE[name](state)
    assert f"{name} is not GPT-2's" in refusal(write(tmp_path, state, config=HEADS))


@pytest.mark.parametrize(
    "missing", ["blocks.0.attn.key.bias", "pos_emb", "tok_emb.weight", "head.weight"]
)
def test_nothing_of_2020_may_be_missing(tmp_path: Path, missing: str) -> None:
    state = trained("2020").state_dict()
    del state[missing]
    text = refusal(write(tmp_path, state, config=HEADS))
    assert "missing" in text or "none of GPT-2's" in text or "=None" in text


def test_layouts_are_not_mixed(tmp_path: Path) -> None:
    state = trained("mingpt").state_dict()
    name = "transformer.h.1.mlp.c_fc.weight"
    state[name] = state[name].T.contiguous()
    assert "h.1.mlp.c_fc.weight has shape" in refusal(write(tmp_path, state, config=HEADS))


def test_a_tensor_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    """All its rows are one number of the file, which stays small."""
    state = trained("mingpt").state_dict()
    huge = torch.zeros(1, 1).expand(10**7, 10**6)
    state |= {"transformer.wte.weight": huge, HEAD: huge}
    path = write(tmp_path, state, config=HEADS)
    assert path.stat().st_size < 10**6
    assert "of memory" in refusal(path)


# ---- Pickles run nothing -------------------------------------------------------------------------


class Calls:
    """Pickled as a call of this function with these arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def calls() -> dict[str, Any]:
    import builtins
    import os
    import subprocess

    write_file = "__import__('pathlib').Path('ran').touch()"
    return {
        "os.system": Calls(os.system, "touch ran"),
        "os.mkdir": Calls(os.mkdir, "ran"),
        "exec": Calls(builtins.exec, write_file),
        "eval": Calls(builtins.eval, write_file),
        "getattr": Calls(builtins.getattr, "x", "upper"),
        "subprocess.Popen": Calls(subprocess.Popen, ["touch", "ran"]),
        "functools.partial": functools.partial(os.system, "touch ran"),
        "torch.load": Calls(torch.load, "model.pt"),
        "torch.hub.load": Calls(torch.hub.load, ".", "x"),
        "torch.save": Calls(torch.save, {}, "ran"),
        "numpy.save": Calls(np.save, "ran", 1),
        "numpy.load": Calls(np.load, "ran"),
        "a module": torch.nn.Linear(2, 2),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", calls())
def test_a_pickle_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = {"model": trained("tied").state_dict(), "config": {"x": calls()[case]}}
    torch.save(saved, "model.pt", _use_new_zipfile_serialization=zipped)
    assert "cannot read the pickle" in refusal(Path("model.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_the_module_of_a_class_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name chooses a plain mapping, also where the module is there and the class is a trap."""
    import importlib
    import sys

    (tmp_path / "their_program.py").write_text(
        "import pathlib\npathlib.Path('ran').touch()\n"
        "class Config:\n    def __init__(self, *a): pathlib.Path('made').touch()\n"
        "    def __setstate__(self, state): pathlib.Path('set').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = importlib.import_module("their_program").Config.__new__(
        sys.modules["their_program"].Config
    )
    config.__dict__.update(vars(twins.GPTConfig()), keys="x", items=3, get=None)
    saved = {"model": trained("tied").state_dict(), "config": config}
    torch.save(saved, "model.pt")
    del sys.modules["their_program"]
    Path("ran").unlink()
    text = refusal(Path("model.pt"))  # every attribute is accounted for
    assert "keys='x' is unknown" in text
    accept = dataclasses.replace(PICKLE, accept_fields="keys,items,get")
    assert sources.open_source("model.pt", accept).cfg.n_head == twins.H
    files = [path.name for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"]
    assert files == ["model.pt", "their_program.py"]
    assert "their_program" not in sys.modules
