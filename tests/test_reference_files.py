"""verify reads every format a second time, so that a mistake of the importer shows."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import model
from gptjax.conversion import (
    gguf,
    gguf_file,
    huggingface,
    llmc,
    openai,
    sources,
    state_dict,
    verify,
)
from gptjax.conversion.reference import fill, how_read, load_reference, reference_config
from gptjax.conversion.reference_files import FORMATS
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import Source, read_params
from gptjax.conversion.verify import Check
from gptjax.errors import DataError
from gptjax.tokenizer import ByteTokenizer

from . import test_lora
from .helpers import need, scaled_params, tiny
from .test_formats import TF_GPT2, save_nanogpt

torch = need("torch")
GPT2LMHeadModel = need("transformers").GPT2LMHeadModel
from . import torch_twins as twins  # noqa: E402

CFG = tiny(vocab_size=256, vocab_multiple=128)
ANY = SourceConfig(allow_pickle=True)
Files = dict[str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A file in every format: of one model where gptjax writes it, else of another."""
    folder = tmp_path_factory.mktemp("formats")
    params = jax.device_get(scaled_params(CFG, jax.random.key(5)))
    save_nanogpt(folder / "ckpt.pt", dataclasses.replace(CFG, activation="gelu"), params)
    llmc.write_file(folder / "llmc.bin", CFG, params)
    (folder / "hf").mkdir()
    huggingface.write_folder(folder / "hf", CFG, params, None)
    weights = load_file(folder / "hf" / "model.safetensors")
    named = {f"_orig_mod.{name}": array for name, array in weights.items()}
    save_file(named, folder / "hf" / "b.safetensors")
    gguf.write_file(folder / "a.gguf", CFG, params, ByteTokenizer())
    quantise(folder / "a.gguf", folder / "q8.gguf")
    heads = json.dumps({"n_head": twins.H})
    for name, network in (("mingpt", twins.MinGPT()), ("old", twins.MinGPTOf2020())):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(heads)
        torch.save(noisy(network), folder / name / "model.pt")
    return {
        "nanogpt": str(folder / "ckpt.pt"),
        "llmc": str(folder / "llmc.bin"),
        "huggingface": str(folder / "hf" / "b.safetensors"),
        "openai": str(TF_GPT2),
        "gguf": str(folder / "a.gguf"),
        "quantised gguf": str(folder / "q8.gguf"),
        "mingpt": str(folder / "mingpt"),
        "mingpt of 2020": str(folder / "old"),
    }


def noisy(network: Any) -> dict[str, Any]:
    """The tensors of a network in which no two LayerNorms are alike."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dict(network.state_dict())


def quantise(path: Path, to: Path) -> None:
    """Write a GGUF file once more, its matrices in Q8_0, whose blocks are 32 numbers of a row."""
    library = need("gguf")
    writer = library.GGUFWriter(to, "gpt2")
    for key, value in gguf_file.read_header(path).fields.items():
        if key.startswith("gpt2.") and isinstance(value, int):
            writer.add_uint32(key, value)
    writer.add_layer_norm_eps(1e-5)
    kind = library.GGMLQuantizationType.Q8_0
    for name, _, *_, data, _ in library.GGUFReader(path).tensors:
        if data.ndim == 2:
            writer.add_tensor(name, library.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compared(source: Source) -> list[Check]:
    """Compare what the importer reads of a source with its reference, tensor by tensor."""
    reference = load_reference(source)
    params: model.Params = read_params(source)
    return list(verify.compare_tensors(source.cfg, params, reference))


def failed(source: Source) -> set[str]:
    return {check.name for check in compared(source) if not check.ok}


FORMAT = (
    *("nanogpt", "llmc", "huggingface", "openai", "gguf", "quantised gguf", "mingpt"),
    "mingpt of 2020",
)


@pytest.mark.parametrize("name", FORMAT)
def test_both_readings_agree(name: str, files: Files) -> None:
    source = sources.open_source(files[name], ANY)
    assert source.format in FORMATS and not source.is_hf
    assert "second time" in how_read(source)
    assert FORMATS[source.format](source).n_head == source.cfg.n_head
    checks = compared(source)
    assert all(check.ok for check in checks) and len(checks) == 12 * source.cfg.n_layer + 5


def test_the_whole_comparison_holds(files: Files) -> None:
    source = sources.open_source(files["mingpt of 2020"], ANY)
    reference = load_reference(source)
    checks = verify.verify(source.cfg, read_params(source), reference)
    assert verify.first_failure(checks) is None


def test_a_tensor_that_only_one_of_them_finds_is_refused(files: Files) -> None:
    source = sources.open_source(files["llmc"], ANY)
    deeper = dataclasses.replace(source.cfg, n_embd=16)
    with pytest.raises(DataError, match="second reading"):
        fill(GPT2LMHeadModel(reference_config(deeper)), FORMATS["llmc"](source).tensors, source)
    few = itertools.islice(FORMATS["llmc"](source).tensors, 5)
    with pytest.raises(DataError, match="found no"):
        fill(GPT2LMHeadModel(reference_config(source.cfg)), few, source)


# ---- Planted mistakes ----------------------------------------------------------------------------

Read = Callable[[str], np.ndarray]


def swap_q_and_k(read: Read, name: str) -> np.ndarray:
    array = read(name)
    if ".c_attn." not in name:
        return array
    q, k, v = np.split(array, 3, axis=-1)
    return np.concatenate([k, q, v], axis=-1)


def forget_to_transpose(read: Read, name: str) -> np.ndarray:
    return read(name).T if name.endswith("attn.c_proj.weight") else read(name)


def exchange(one: str, other: str) -> Callable[[Read, str], np.ndarray]:
    def reads(read: Read, name: str) -> np.ndarray:
        return read(name.replace(one, "#").replace(other, one).replace("#", other))

    return reads


MISTAKES = {
    "q and k": (swap_q_and_k, "h.0.attn.c_attn.weight"),
    "no transpose": (forget_to_transpose, "h.0.attn.c_proj.weight"),
    "layers exchanged": (exchange("h.0.", "h.1."), "h.1.mlp.c_fc.bias"),
    "LayerNorms exchanged": (exchange(".ln_1.", ".ln_2."), "h.0.ln_1.weight"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_importer_turns_red(mistake: str, files: Files) -> None:
    reads, wrong = MISTAKES[mistake]
    source = sources.open_source(files["gguf"], ANY)
    assert wrong in failed(source._replace(read=lambda tensor: reads(source.read, tensor)))


Named = Callable[[str], str]


def exchange_names(names: Named) -> Named:
    return lambda name: (
        names(name).replace("ln_1", "#").replace("ln_2", "ln_1").replace("#", "ln_2")
    )


def exchange_published(names: Callable[..., Files]) -> Callable[..., Files]:
    def wrong(stored: Any, where: object) -> Files:
        return {name: exchange_names(str)(right) for name, right in names(stored, where).items()}

    return wrong


def all_but_c_proj(is_linear: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: is_linear(name) and not name.endswith("attn.c_proj.weight")


def reverse_parts(fuse: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda parts: fuse(parts[::-1])


IN_THE_CODE: list[tuple[str, Any, str, Any, str]] = [
    # format, the importer's function, the mistake in it, a tensor that it makes wrong
    ("nanogpt", state_dict, "is_linear", all_but_c_proj, "h.1.attn.c_proj.weight"),
    ("mingpt", state_dict, "published_names", exchange_published, "h.0.ln_2.bias"),
    ("mingpt of 2020", state_dict, "fuse", reverse_parts, "h.1.attn.c_attn.bias"),
    ("llmc", llmc, "is_linear", all_but_c_proj, "h.1.attn.c_proj.weight"),
    ("openai", openai, "published_name", exchange_names, "h.0.ln_2.bias"),
    ("gguf", gguf, "is_linear", all_but_c_proj, "h.1.attn.c_proj.weight"),
    ("gguf", gguf, "published_name", exchange_names, "h.0.ln_2.bias"),
    ("huggingface", state_dict, "published_names", exchange_published, "h.0.ln_2.bias"),
]


@pytest.mark.parametrize(("name", "module", "function", "mistake", "wrong"), IN_THE_CODE)
def test_a_mistake_in_the_importers_code_turns_red(
    name: str,
    module: Any,
    function: str,
    mistake: Any,
    wrong: str,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, function, mistake(getattr(module, function)))
    assert wrong in failed(sources.open_source(files[name], ANY))


# ---- LoRA ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "base"
    folder.mkdir()
    params = jax.device_get(scaled_params(test_lora.CFG, jax.random.key(1)))
    huggingface.write_folder(folder, test_lora.CFG, params, None)
    return folder


@pytest.mark.parametrize("case", test_lora.CASES)
def test_adapters_are_merged_by_both_alike(case: str, base: Path) -> None:
    tensors, changes, _, tied = test_lora.CASES[case]
    source = sources.open_source(str(test_lora.save(base, tensors, **changes)), ANY)
    assert "second time" in how_read(source) and source.format == "lora on pytorch"
    assert failed(source) == set()
    assert load_reference(source).config.tie_word_embeddings == tied


def test_modules_saved_whole_and_biases_replace_the_bases(base: Path) -> None:
    rng, prefix = np.random.default_rng(0), test_lora.PREFIX
    tensors = {f"{prefix}lm_head.weight": rng.normal(size=(test_lora.V, test_lora.D))}
    for i in range(2):
        name = f"{prefix}transformer.h.{i}.attn.c_attn.base_layer.bias"
        tensors[name] = rng.normal(size=3 * test_lora.D)
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    tensors |= test_lora.layers("attn.c_attn")
    changes = {"modules_to_save": ["lm_head"], "bias": "lora_only"}
    source = sources.open_source(str(test_lora.save(base, tensors, **changes)), ANY)
    assert failed(source) == set() and not source.cfg.tie_head


@pytest.mark.parametrize("mistake", ["doubled", "transposed", "not merged"])
def test_a_mistake_in_merging_turns_red(mistake: str, base: Path) -> None:
    tensors = test_lora.layers("attn.c_proj")
    folder = test_lora.save(base, tensors, target_modules=["attn.c_proj"])
    source = sources.open_source(str(folder), ANY)
    read, unmerged = source.read, sources.open_source(str(base), ANY).read
    wrong = {
        "doubled": lambda name: 2 * read(name) - unmerged(name),
        "transposed": lambda name: forget_to_transpose(read, name),
        "not merged": unmerged,
    }
    source = source._replace(read=wrong[mistake])
    assert "h.0.attn.c_proj.weight" in failed(source)
