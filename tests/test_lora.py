"""Adapters of the peft kind: W + scale B A to the bit of the formula, and every tensor's place."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import model
from gptjax.conversion import huggingface, lora, sources
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import HEAD, Source, named_tensors, read_params

from .helpers import need, scaled_params, tiny
from .test_formats import edit_json
from .test_torch_models import refusal

CFG = tiny(vocab_size=40, n_embd=16, vocab_multiple=8)
D, V, F = 16, 40, 64
SIZES = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def params() -> model.Params:
    return jax.device_get(scaled_params(CFG, jax.random.key(1)))


@pytest.fixture
def base(tmp_path: Path, params: model.Params) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    huggingface.write_folder(folder, CFG, params, None)
    return folder


def config(base: Path, **changes: Any) -> dict[str, Any]:
    """adapter_config.json as peft writes it for GPT-2."""
    fields: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["c_attn"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return fields | changes


def pair(name: str, r: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A and B of a layer under peft's names."""
    random, where = np.random.default_rng([seed, len(name)]), f"{PREFIX}{name}"
    if name.endswith(("wte", "wpe")):
        rows = V if name.endswith("wte") else CFG.block_size
        shapes = {"lora_embedding_A": (r, rows), "lora_embedding_B": (D, r)}
    else:
        kind = name.partition("h.")[2].partition(".")[2]
        into, out = SIZES.get(kind, (D, V))  # else the head's
        shapes = {"lora_A.weight": (r, into), "lora_B.weight": (out, r)}
    return {
        f"{where}.{end}": random.normal(size=shape).astype(np.float32)
        for end, shape in shapes.items()
    }


def layers(*kinds: str, r: int = 4) -> dict[str, np.ndarray]:
    """Pairs of these layers in every block."""
    found: dict[str, np.ndarray] = {}
    for layer in range(CFG.n_layer):
        for kind in kinds:
            found |= pair(f"transformer.h.{layer}.{kind}", r, layer)
    return found


def save(base: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    folder = base.parent / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(base, **changes)))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def opened(folder: Path, **changes: Any) -> tuple[Source, dict[str, np.ndarray]]:
    """The merged model, and its tensors by published names."""
    source = sources.open_source(str(folder), SourceConfig(**changes))
    return source, dict(named_tensors(source.cfg, read_params(source)))


def by_hand(
    params: model.Params,
    tensors: dict[str, np.ndarray],
    scale: Callable[[str], float],
    wte: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The formula, in float64 and NumPy."""
    expected = {name: array.astype(np.float64) for name, array in named_tensors(CFG, params)}
    if wte is not None:
        expected["wte.weight"] = wte.astype(np.float64)
    expected[HEAD] = expected["wte.weight"]
    for name, A in tensors.items():
        module = name.removeprefix(PREFIX).removeprefix("transformer.")
        if not module.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        B, layer = tensors[name.replace("_A", "_B")], module.partition(".lora")[0]
        change = scale(layer) * B.astype(np.float64) @ A.astype(np.float64)
        change = change if layer == "lm_head" else change.T
        expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + change
    return expected


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=2e-6, atol=2e-5, err_msg=name)


# ---- The numbers ---------------------------------------------------------------------------------

ALL = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
PATTERN = {"rank_pattern": {"attn.c_proj": 2}, "alpha_pattern": {"c_fc": 7, "h.1.attn.c_proj": 3}}


def of_pattern(layer: str) -> float:
    alpha = 7 if "c_fc" in layer else 3 if layer == "h.1.attn.c_proj" else 16
    return alpha / (2 if "attn.c_proj" in layer else 4)


Case = tuple[dict[str, np.ndarray], dict[str, Any], Callable[[str], float], bool]
CASES: dict[str, Case] = {
    "c_attn": (layers("attn.c_attn"), {}, lambda _: 4.0, True),
    "rslora": (layers("attn.c_attn"), {"use_rslora": True}, lambda _: 16 / math.sqrt(4), True),
    "all linear layers": (layers(*ALL), {"target_modules": "all-linear"}, lambda _: 4.0, True),
    "c_proj is two layers": (
        layers("attn.c_proj", "mlp.c_proj"),
        {"target_modules": ["c_proj"], "fan_in_fan_out": False},
        lambda _: 4.0,
        True,
    ),
    "patterns": (
        {**layers(*ALL), **layers("attn.c_proj", r=2)},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], **PATTERN},
        of_pattern,
        True,
    ),
    "one block": (
        pair("transformer.h.1.attn.c_attn", 4),
        {"layers_to_transform": [1]},
        lambda _: 4.0,
        True,
    ),
    "the embedding": (
        pair("transformer.wte", 4),
        {"target_modules": ["wte"]},
        lambda _: 4.0,
        False,
    ),
    "positions": (pair("transformer.wpe", 4), {"target_modules": ["wpe"]}, lambda _: 4.0, True),
    "the head": (pair("lm_head", 4), {"target_modules": ["lm_head"]}, lambda _: 4.0, False),
    "a regular expression": (
        layers("mlp.c_fc"),
        {"target_modules": r".*(a+)+\.c_fc"},
        lambda _: 4.0,
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_weights_are_those_of_the_formula(
    base: Path, params: model.Params, case: str
) -> None:
    """Where embedding or head change alone, the head is one of its own, as in training."""
    tensors, changes, scale, tied = CASES[case]
    source, found = opened(save(base, tensors, **changes))
    assert source.cfg.tie_head == tied
    assert_close(found, by_hand(params, tensors, scale))
    assert not source.is_hf and len(source.files) == 2


def test_the_formula_sees_mistakes(base: Path, params: model.Params) -> None:
    """A and B of another block, and the scale of rslora."""
    tensors = layers("attn.c_attn")
    expected = by_hand(params, tensors, lambda _: 4.0)
    swapped = {n.replace("h.0", "h.x").replace("h.1", "h.0").replace("h.x", "h.1"): a
               for n, a in tensors.items()}  # fmt: skip
    for wrong in (swapped, {name: -a if "A" in name else a for name, a in tensors.items()}):
        with pytest.raises(AssertionError):
            assert_close(opened(save(base, wrong))[1], expected)
    with pytest.raises(AssertionError):
        assert_close(opened(save(base, tensors, use_rslora=True))[1], expected)


def test_pickles_of_adapters(base: Path, params: model.Params) -> None:
    torch = need("torch")
    tensors = layers("attn.c_attn")
    folder = save(base, tensors)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({n: torch.from_numpy(a) for n, a in tensors.items()}, folder / "adapter_model.bin")
    assert "--allow_pickle" in refusal(folder, SourceConfig())
    _, found = opened(folder / "adapter_model.bin", allow_pickle=True)
    assert_close(found, by_hand(params, tensors, lambda _: 4.0))


def test_modules_that_are_saved_whole(base: Path, params: model.Params) -> None:
    head = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    norm = {
        f"{PREFIX}transformer.ln_f.{end}": np.full(D, 3, np.float32) for end in ("weight", "bias")
    }
    whole = {f"{PREFIX}lm_head.weight": head, **norm}
    tensors = {**layers("attn.c_attn"), **whole}
    source, found = opened(save(base, tensors, modules_to_save=["lm_head", "ln_f"]))
    assert not source.cfg.tie_head and any("of its own" in note for note in source.notes)
    expected = by_hand(params, tensors, lambda _: 4.0)
    expected |= {HEAD: head, **dict.fromkeys(("ln_f.weight", "ln_f.bias"), np.full(D, 3.0))}
    assert_close(found, expected)
    # Embedding and head alike stay one; without ln_f's bias the layer is not whole.
    both = {f"{PREFIX}transformer.wte.weight": head, f"{PREFIX}lm_head.weight": head.copy()}
    source, found = opened(save(base, {**layers("attn.c_attn"), **both}))
    assert source.cfg.tie_head
    np.testing.assert_array_equal(found["wte.weight"], head)
    # As peft stores an adapted embedding: as it was, beside the head and the adapter's matrices.
    wte = pair("transformer.wte", 4)
    parts = {f"{PREFIX}transformer.wte.base_layer.weight": head, f"{PREFIX}lm_head.weight": head}
    source, found = opened(save(base, {**wte, **parts}, target_modules=["wte"]))
    assert not source.cfg.tie_head
    assert_close(found, by_hand(params, wte, lambda _: 4.0, head) | {HEAD: head})
    del parts[f"{PREFIX}lm_head.weight"]  # peft would change a tied head by it, or would not
    text = refusal(save(base, {**wte, **parts}, target_modules=["wte"]))
    assert "wte.weight is stored, and modules_to_save does not name it" in text
    original = {f"{PREFIX}lm_head.original_module.weight": head}
    text = refusal(save(base, {**tensors, **original}, modules_to_save=["lm_head", "ln_f"]))
    assert "original_module.weight is not GPT-2's" in text
    del tensors[f"{PREFIX}transformer.ln_f.bias"]
    text = refusal(save(base, tensors, modules_to_save=["lm_head", "ln_f"]))
    assert "ln_f.bias is missing" in text
    assert "modules_to_save does not name" in refusal(save(base, tensors))


def test_biases(base: Path, params: model.Params) -> None:
    biases = {
        f"{PREFIX}transformer.{name}": array + 1
        for name, array in named_tensors(CFG, params)
        if name.endswith(".bias")
    }
    tensors = {**layers("attn.c_attn"), **biases}
    _, found = opened(save(base, tensors, bias="all"))
    assert_close(
        found,
        by_hand(params, tensors, lambda _: 4.0)
        | {name.removeprefix(f"{PREFIX}transformer."): array for name, array in biases.items()},
    )
    assert "modules_to_save does not name" in refusal(save(base, tensors))
    del tensors[f"{PREFIX}transformer.h.0.ln_1.bias"]
    assert "h.0.ln_1.bias is missing" in refusal(save(base, tensors, bias="all"))


def test_an_untied_base(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, tie_head=False)
    params = jax.device_get(scaled_params(cfg, jax.random.key(2)))
    (tmp_path / "base").mkdir()
    huggingface.write_folder(tmp_path / "base", cfg, params, None)
    tensors = pair("transformer.wte", 4)
    source, found = opened(save(tmp_path / "base", tensors, target_modules=["wte"]))
    assert not source.cfg.tie_head
    np.testing.assert_array_equal(found[HEAD], params["lm_head"]["embedding"][:V])
    assert not np.array_equal(found["wte.weight"], params["wte"]["embedding"][:V])


# ---- The names -----------------------------------------------------------------------------------

GOOD = layers("attn.c_attn")
FIRST = f"{PREFIX}transformer.h.0.attn.c_attn.lora_"


def without(name: str) -> dict[str, Any]:
    return {key: array for key, array in GOOD.items() if key != name}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an A without its B": (without(f"{FIRST}B.weight"), "h.0.attn.c_attn.lora_B is missing"),
    "a B without its A": (without(f"{FIRST}A.weight"), "h.0.attn.c_attn.lora_A is missing"),
    "a block without": (
        pair("transformer.h.1.attn.c_attn", 4),
        "h.0.attn.c_attn.lora_A is missing",
    ),
    "a block too many": ({**GOOD, **pair("transformer.h.2.attn.c_attn", 4)}, "is not GPT-2's"),
    "a layer that is not named": (
        {**GOOD, **pair("transformer.h.0.mlp.c_fc", 4)},
        "target_modules does not name it",
    ),
    "another rank": (layers("attn.c_attn", r=3), "has shape (3, 16), expected (4, 16)"),
    "DoRA's vector": (
        {**GOOD, f"{FIRST}magnitude_vector": np.ones(48, np.float32)},
        "is not GPT-2's",
    ),
    "integers": ({**GOOD, f"{FIRST}A.weight": np.ones((4, D), np.int32)}, "expected floats"),
    "twice": (
        {**GOOD, f"{FIRST}A.default.weight": GOOD[f"{FIRST}A.weight"]},
        "is stored twice",
    ),
    "NaN": ({**GOOD, f"{FIRST}A.weight": np.full((4, D), np.nan, np.float32)}, "NaN or infinity"),
    "a norm": (
        {**GOOD, f"{PREFIX}transformer.ln_f.lora_A.weight": np.ones((4, D), np.float32)},
        "is not GPT-2's",
    ),
    "another model's": (
        {f"{PREFIX}model.layers.0.q_proj.lora_A.weight": np.ones((4, D), np.float32)},
        "is not GPT-2's",
    ),
    "nothing": ({}, "is missing"),
}


def test_an_adapter_of_nothing(base: Path) -> None:
    for targets in (None, ["nobody"], ".*nobody"):
        assert "changes nothing" in refusal(save(base, {}, target_modules=targets))


@pytest.mark.parametrize("case", BAD)
def test_each_tensor_has_its_place(base: Path, case: str) -> None:
    tensors, message = BAD[case]
    assert message in refusal(save(base, tensors))


FIELDS: dict[str, Any] = {
    "use_dora": True,
    "peft_type": "IA3",
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "lora_bias": True,
    "r": 0,
    "lora_alpha": "16",
    "rank_pattern": {"(a+)+": 2},
    "alpha_pattern": [1],
    "target_modules": 3,
    "exclude_modules": "h.*",
    "layers_to_transform": ["a"],
    "bias": "some",
    "nobody": 1,
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_honoured_or_refused(base: Path, name: str) -> None:
    text = refusal(save(base, GOOD, **{name: FIELDS[name]}))
    assert str(FIELDS[name])[:5] in text and (name in text or "pattern" in name)


# ---- The base ------------------------------------------------------------------------------------


def test_the_base_is_named_by_the_flag_or_by_the_adapter(base: Path, params: model.Params) -> None:
    expected = by_hand(params, GOOD, lambda _: 4.0)
    folder = save(base, GOOD, base_model_name_or_path="gpt2-medium")
    assert "--base=gpt2-medium" in refusal(folder)
    assert_close(opened(folder, base=str(base))[1], expected)
    for odd in (None, 3, "", "\0", "x" * 5000, "no such/place/at all", ["a"]):
        edit_json(folder / "adapter_config.json", base_model_name_or_path=odd)
        assert "--base=SOURCE" in refusal(folder)
    assert "an adapter itself" in refusal(folder, SourceConfig(base=str(folder)))


def test_a_base_that_is_another_model(base: Path) -> None:
    folder = save(base, GOOD)
    tensors = load_file(base / "model.safetensors")
    del tensors["transformer.h.1.ln_2.bias"]
    save_file(tensors, base / "model.safetensors")
    assert "h.1.ln_2.bias is missing" in refusal(folder)
    edit_json(base / "config.json", quantization_config={"bits": 4})
    assert "quantised" in refusal(folder)


def test_no_adapter_in_its_folder(base: Path) -> None:
    folder = save(base, GOOD)
    (folder / "adapter_model.safetensors").unlink()
    assert all(name in refusal(folder) for name in lora.FILES)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 600)
    assert "zero bytes" in refusal(folder)
