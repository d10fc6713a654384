"""verify reads every format a second time, so that a mistake of the importer shows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import model
from gptjax.conversion import huggingface, llmc, nanogpt, openai, sources, verify
from gptjax.conversion.reference import how_read, load_reference
from gptjax.conversion.reference_files import FORMATS
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import Source, read_params
from gptjax.conversion.verify import Check

from .helpers import need, scaled_params, tiny
from .test_formats import TF_GPT2, save_nanogpt

need("torch")
need("transformers")
CFG = tiny(vocab_size=100, vocab_multiple=128)
ANY = SourceConfig(allow_pickle=True)
Files = dict[str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The same model in every format that is written here, and OpenAI's."""
    folder = tmp_path_factory.mktemp("formats")
    params = jax.device_get(scaled_params(CFG, jax.random.key(5)))
    save_nanogpt(folder / "ckpt.pt", dataclasses.replace(CFG, activation="gelu"), params)
    llmc.write_file(folder / "llmc.bin", CFG, params)
    huggingface.write_folder(folder, CFG, params, None)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"_orig_mod.{name}": array for name, array in weights.items()}, folder / "b.safetensors"
    )
    return {
        "nanogpt": str(folder / "ckpt.pt"),
        "llmc": str(folder / "llmc.bin"),
        "huggingface": str(folder / "b.safetensors"),
        "openai": str(TF_GPT2),
    }


def compared(source: Source) -> list[Check]:
    """Compare what the importer reads of a source with its reference, tensor by tensor."""
    reference = load_reference(source)
    params: model.Params = read_params(source)
    return list(verify.compare_tensors(source.cfg, params, reference))


def failed(source: Source) -> set[str]:
    return {check.name for check in compared(source) if not check.ok}


FORMAT = ("nanogpt", "llmc", "huggingface", "openai")


@pytest.mark.parametrize("name", FORMAT)
def test_both_readings_agree(name: str, files: Files) -> None:
    source = sources.open_source(files[name], ANY)
    assert source.format == name in FORMATS and not source.is_hf
    assert "second time" in how_read(source)
    assert FORMATS[name](source).n_head == source.cfg.n_head
    checks = compared(source)
    assert all(check.ok for check in checks) and len(checks) == 12 * source.cfg.n_layer + 5


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
@pytest.mark.parametrize("name", FORMAT)
def test_a_mistake_of_the_importer_turns_red(name: str, mistake: str, files: Files) -> None:
    reads, wrong = MISTAKES[mistake]
    source = sources.open_source(files[name], ANY)
    assert wrong in failed(source._replace(read=lambda tensor: reads(source.read, tensor)))


def test_without_a_second_reading_the_report_says_so(files: Files) -> None:
    source = sources.open_source(files["llmc"], ANY)._replace(format="")
    assert "not verified" in how_read(source)
    # And there such a mistake goes unseen.
    wrong = source._replace(read=lambda name: swap_q_and_k(source.read, name))
    assert failed(wrong) == set()


Named = Callable[[str], str]


def exchange_names(names: Named) -> Named:
    return lambda name: names(
        name.replace("ln_1", "#").replace("ln_2", "ln_1").replace("#", "ln_2")
    )


def exchange_published(names: Callable[..., Files]) -> Callable[..., Files]:
    def wrong(stored: Any, where: object) -> Files:
        return {name: exchange_names(str)(right) for name, right in names(stored, where).items()}

    return wrong


def all_but_c_proj(is_linear: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: is_linear(name) and not name.endswith("attn.c_proj.weight")


IN_THE_CODE: list[tuple[str, Any, str, Any, str]] = [
    # format, the importer's function, the mistake in it, a tensor that it makes wrong
    ("nanogpt", nanogpt, "is_linear", all_but_c_proj, "h.1.attn.c_proj.weight"),
    ("nanogpt", nanogpt, "published_names", exchange_published, "h.0.ln_2.bias"),
    ("llmc", llmc, "is_linear", all_but_c_proj, "h.1.attn.c_proj.weight"),
    ("openai", openai, "published_name", exchange_names, "h.0.ln_2.bias"),
    ("huggingface", huggingface, "published_names", exchange_published, "h.0.ln_2.bias"),
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
