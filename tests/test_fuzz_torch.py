"""300 damaged or odd checkpoints, configurations and adapters: read, or refused in one line."""

import copy
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gptjax.conversion import huggingface, sources
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import read_params

from . import test_lora as lora
from .helpers import need
from .test_fuzz import TEXT, VALUES, damaged, edited, fuzz, places, safetensors
from .test_fuzz import scarce_memory as scarce_memory

torch = need("torch")

from . import torch_twins as twins  # noqa: E402

READ = SourceConfig(allow_pickle=True, drop_heads=True)


def read(path: Path) -> None:
    read_params(sources.open_source(str(path), READ))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small valid inputs of every kind."""
    place = tmp_path_factory.mktemp("torch")
    torch.manual_seed(0)
    for name, network in (("new", twins.MinGPT()), ("old", twins.MinGPTOf2020())):
        folder = place / name
        folder.mkdir()
        config = {"n_head": twins.H, "n_layer": twins.L, "bias": True, "tie_weights": False}
        (folder / "config.json").write_text(json.dumps(config))
        state = network.state_dict()
        save_file({k: v.numpy() for k, v in state.items()}, folder / "x.safetensors")
        saved = {"state_dict": state, "hyper_parameters": twins.GPTConfig()}
        torch.save(saved, folder / "model.ckpt")
        old = io.BytesIO()
        torch.save(saved, old, _use_new_zipfile_serialization=False)
        (folder / "legacy.ckpt").write_bytes(old.getvalue())
    work = {"model_type": "gpt-nano", "n_layer": 2, "n_head": 3, "n_embd": twins.D}
    sections = {"system": {}, "data": {}, "model": work, "trainer": {"max_iters": 3}}
    (place / "new" / "sections.json").write_text(json.dumps(sections))
    base = place / "base"
    base.mkdir()
    params = lora.scaled_params(lora.CFG, lora.jax.random.key(1))
    huggingface.write_folder(base, lora.CFG, params, None)
    pairs = {**lora.layers("attn.c_attn"), **lora.pair("transformer.wte", 4)}
    changes = {"target_modules": ["c_attn", "wte"], "rank_pattern": {"c_attn": 4}}
    lora.save(base, pairs, **changes, alpha_pattern={"wte": 3}, modules_to_save=[])
    return place


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A copy of them, where the adapter finds its base."""
    copied = shutil.copytree(whole, tmp_path / "place")
    config = copied / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": str(copied / "base")}))
    return copied


def pickled(whole: bytes) -> st.SearchStrategy[bytes]:
    """A checkpoint with damage in its pickle, which the zip file around it does not notice."""
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        parts = {info.filename: file.read(info) for info in file.infolist()}
    name = next(name for name in parts if name.endswith("data.pkl"))

    def wrap(content: bytes) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            for key, value in parts.items():
                file.writestr(key, content if key == name else value)
        return packed.getvalue()

    return damaged(parts[name]).map(wrap)


# file -> how many cases, how it is damaged, and what is opened
FILES: dict[str, tuple[int, Any, str]] = {
    "new/model.ckpt": (30, pickled, "new/model.ckpt"),
    "old/model.ckpt": (20, pickled, "old/model.ckpt"),
    "old/legacy.ckpt": (20, damaged, "old/legacy.ckpt"),
    "new/config.json": (40, edited, "new/x.safetensors"),
    "new/x.safetensors": (30, safetensors, "new/x.safetensors"),
    "old/x.safetensors": (30, safetensors, "old/x.safetensors"),
    "adapter/adapter_config.json": (50, edited, "adapter"),
    "adapter/adapter_model.safetensors": (30, safetensors, "adapter"),
}
STATES, SETTINGS = 30, 40


def test_there_are_300_cases() -> None:
    assert sum(cases for cases, *_ in FILES.values()) + STATES + SETTINGS >= 300


@pytest.mark.filterwarnings("ignore:.*pickle protocol:UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str, place: Path) -> None:
    cases, strategy, opened = FILES[name]
    content = (place / name).read_bytes()

    def attempt(damaged: bytes) -> None:
        (place / name).write_bytes(damaged)
        read(place / opened)

    fuzz(cases, content, strategy(content), attempt)


def change(state: dict[str, Any], at: int, kind: str, name: str, shape: list[int]) -> Any:
    """A state dict with one tensor removed, renamed, doubled, of another shape or another type."""
    names = sorted(state)
    chosen, other = names[at % len(names)], names[(at // 7) % len(names)]
    changed = dict(state)
    tensor = changed.pop(chosen)
    made: dict[str, Any] = {
        "remove": {},
        "rename": {name: tensor},
        "exchange": {chosen: state[other], other: tensor},
        "double": {chosen: tensor, f"module.{chosen}": tensor},
        "shape": {chosen: torch.zeros(shape)},
        "transpose": {chosen: tensor.mT if tensor.dim() > 1 else tensor[None]},
        "whole": {chosen: torch.zeros(tensor.shape, dtype=torch.int64)},
        "complex": {chosen: torch.zeros(tensor.shape, dtype=torch.complex64)},
        "sparse": {chosen: tensor.to_sparse()},
        "meta": {chosen: tensor.to("meta")},
        "NaN": {chosen: torch.full(tensor.shape, float("nan"))},
        "text": {chosen: name},
        "half": {chosen: tensor.half()},
    }
    return {**changed, **made[kind]}


KINDS = ["remove", "rename", "exchange", "double", "shape", "transpose", "whole", "complex"]
KINDS += ["sparse", "meta", "NaN", "text", "half"]


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
def test_odd_state_dicts(place: Path) -> None:
    states = {
        name: torch.load(place / name / "model.ckpt", weights_only=False)["state_dict"]
        for name in ("new", "old")
    }
    words = st.one_of(TEXT, st.sampled_from(["h.0.attn.bias", "wte.weight", "blocks.0.attn.mask"]))
    shapes = st.lists(st.integers(0, 40), max_size=4)
    kinds, at = st.sampled_from(KINDS), st.integers(0, 999)
    cases = st.tuples(st.sampled_from(["new", "old"]), at, kinds, words, shapes)

    def attempt(case: tuple[str, int, str, str, list[int]]) -> None:
        name, at, kind, word, shape = case
        torch.save(change(states[name], at, kind, word, shape), place / name / "odd.pt")
        read(place / name / "odd.pt")

    fuzz(STATES, ("new", 0, "half", "", []), cases, attempt)


def replace(document: Any, at: int, value: Any) -> Any:
    """A document with another value somewhere, which may be a tensor or itself."""
    document = copy.deepcopy(document)
    found = list(places(document))
    inside, key = found[at % len(found)]
    inside[key] = {"itself": document, "a tensor": torch.zeros(3)}.get(str(value), value)
    return document


def test_odd_settings_in_a_checkpoint(place: Path) -> None:
    """Where nanoGPT, minGPT or Lightning would keep them, of any value and nesting."""
    state = torch.load(place / "new" / "model.ckpt", weights_only=False)["state_dict"]
    sections = json.loads((place / "new" / "sections.json").read_text())
    documents = [
        {"model_args": sections["model"], "iter_num": 3},
        {"config": sections, "epoch": 1},
        {"hyper_parameters": {"config": {"args": sections["model"]}, "lr": 0.1}},
    ]
    values = st.one_of(VALUES, st.sampled_from(["itself", "a tensor"]))
    cases = st.builds(replace, st.sampled_from(documents), st.integers(0, 999), values)

    def attempt(document: Any) -> None:
        torch.save({"model": state, **document}, place / "new" / "odd.pt")
        read(place / "new" / "odd.pt")

    good = {"model_args": {"n_head": twins.H}}
    fuzz(SETTINGS, good, cases, attempt)


def test_what_was_fuzzed_is_whole(place: Path) -> None:
    for _, _, opened in FILES.values():
        read(place / opened)
    assert load_file(place / "adapter" / "adapter_model.safetensors")
