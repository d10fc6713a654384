"""Each format gives back the model that went in, and refuses what is damaged or hostile."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import model, tokenizer
from gptjax.conversion import gguf, huggingface, llmc, nanogpt, openai
from gptjax.conversion.tensors import HEAD, LIMITS, Source, named_tensors, read_params
from gptjax.errors import DataError, UsageError
from gptjax.functions import ACTIVATIONS

from .helpers import ROOT, need, same_structure, scaled_params, tiny

CFG = tiny(vocab_size=100, vocab_multiple=128)
TF_GPT2 = ROOT / "tests" / "fixtures" / "tf_gpt2"


@pytest.fixture(scope="module")
def params() -> model.Params:
    return jax.device_get(scaled_params(CFG, jax.random.key(1)))


@pytest.fixture
def folder(tmp_path: Path, params: model.Params) -> Path:
    """A model in Hugging Face's format."""
    path = tmp_path / "hf"
    path.mkdir()
    huggingface.write_folder(path, CFG, params, None)
    return path


def assert_same(source: Source, params: model.Params, cfg: Any = CFG) -> None:
    """The source holds exactly this model."""
    assert source.cfg == dataclasses.replace(cfg, dtype="auto", attention="auto")
    found = read_params(source)
    assert same_structure(found, params)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- Hugging Face --------------------------------------------------------------------------------


def test_hf_round_trip(folder: Path, params: model.Params) -> None:
    assert_same(huggingface.open_folder(folder), params)


@pytest.mark.parametrize("multiple", [1, 64])
def test_hf_round_trip_without_biases(tmp_path: Path, multiple: int) -> None:
    cfg = dataclasses.replace(CFG, bias=False, vocab_multiple=multiple)
    params = jax.device_get(scaled_params(cfg, jax.random.key(2)))
    huggingface.write_folder(tmp_path, cfg, params, None)
    assert_same(huggingface.open_folder(tmp_path), params, cfg)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"ln_f\.bias is not zero"):
        huggingface.open_folder(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_hf_in_other_types(folder: Path, params: model.Params, dtype: Any) -> None:
    """Tensors of this type beside some of float32 give the same model."""
    rounded = jax.tree.map(lambda p: p.astype(dtype).astype(np.float32), params)
    huggingface.write_folder(folder, CFG, rounded, None)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: tensors[name].astype(dtype) for name in sorted(tensors)[::2]}
    save_file(tensors, file)
    assert_same(huggingface.open_folder(folder), rounded)


@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_hf_names_with_and_without_prefix_and_mask_buffers(
    folder: Path, params: model.Params, dtype: Any
) -> None:
    file = folder / "model.safetensors"
    bare = {name.removeprefix("transformer."): a for name, a in load_file(file).items()}
    for layer in range(CFG.n_layer):
        bare[f"h.{layer}.attn.bias"] = np.tri(4, dtype=dtype)[None, None]
        bare[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file({**bare, HEAD: bare["wte.weight"]}, file)
    assert_same(huggingface.open_folder(folder), params)
    for name, strange in (
        ("h.1.attn.bias", np.ones((1, 1, 4, 4), dtype)),  # sees the future
        ("h.0.attn.masked_bias", np.array(-0.5, np.float32)),  # and this a little of it
        ("h.0.attn.bias", np.zeros(96, np.float32)),
    ):
        save_file({**bare, name: strange}, file)
        with pytest.raises(DataError, match=rf"another mask .* {re.escape(name)} is not GPT-2's"):
            read_params(huggingface.open_folder(folder))


def shard(folder: Path) -> dict[str, str]:
    """Split the weights of a folder into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_hf_shards(folder: Path, params: model.Params) -> None:
    shard(folder)
    assert_same(huggingface.open_folder(folder), params)


@pytest.mark.parametrize(
    "place",
    [
        "../secret",
        "/etc/passwd",
        "sub/a",
        "..",
        "",
        "x\0.safetensors",
        "\ud800.safetensors",
        "é" * 200,
    ],
)
def test_shards_stay_in_their_folder(folder: Path, place: str) -> None:
    weight_map = shard(folder)
    (folder / "sub").mkdir()
    shutil.copy(folder / "a.safetensors", folder.parent / "secret")
    shutil.copy(folder / "a.safetensors", folder / "sub" / "a")
    moved = {n: place if file == "a.safetensors" else file for n, file in weight_map.items()}
    write_index(folder, moved)
    with pytest.raises(DataError, match="not a plain file of this folder"):
        huggingface.open_folder(folder)


def test_a_shard_may_not_be_a_link_out_of_the_folder(folder: Path) -> None:
    shard(folder)
    (folder / "a.safetensors").rename(folder.parent / "secret")
    (folder / "a.safetensors").symlink_to(folder.parent / "secret")
    with pytest.raises(DataError, match="not a plain file of this folder"):
        huggingface.open_folder(folder)


def test_the_hubs_cache_links_to_its_blobs(folder: Path, params: model.Params) -> None:
    cache = folder.parent / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = folder.rename(cache / "snapshots" / "abc")
    (snapshot / "model.safetensors").rename(cache / "blobs" / "1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    assert_same(huggingface.open_folder(snapshot), params)


def test_the_index_must_say_the_truth(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, dict.fromkeys(weight_map, "b.safetensors"))
    with pytest.raises(DataError, match="is in the index and in no file"):
        read_params(huggingface.open_folder(folder))
    write_index(folder, dict(zip(weight_map, reversed(weight_map.values()), strict=True)))
    with pytest.raises(DataError, match="the index says"):
        huggingface.open_folder(folder)
    write_index(folder, {**weight_map, "h.9.bogus": "a.safetensors"})
    with pytest.raises(DataError, match=r"h\.9\.bogus is in the index and in no file"):
        huggingface.open_folder(folder)
    write_index(folder, {})
    with pytest.raises(DataError, match="no weight_map"):
        huggingface.open_folder(folder)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "clipped GELU": ({"activation_function": "gelu_10"}, "activation_function='gelu_10'"),
    "no activation": ({"activation_function": None}, "activation_function=None"),
    "another epsilon": ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    "scaled by layer": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
    "unscaled": ({"scale_attn_weights": False}, "scale_attn_weights"),
    "untied without a head": ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    "tied in a word": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "another model": ({"model_type": "llama"}, "model_type='llama'"),
    "another width": ({"n_inner": 5}, "n_inner=5"),
    "an unknown flag": ({"rotary": True}, "rotary=True is unknown"),
    "layers beyond belief": ({"n_layer": 10**9}, "n_layer=1000000000"),
    "no layers": ({"n_layer": 0}, "n_layer=0"),
    "negative width": ({"n_embd": -32}, "n_embd=-32"),
    "a string": ({"n_embd": "32"}, "n_embd='32'"),
    "a bool": ({"n_head": True}, "n_head=True"),
    "a float": ({"vocab_size": 100.0}, "vocab_size=100.0"),
    "null": ({"n_positions": None}, "block_size=None"),
    "heads that do not divide": ({"n_head": 3}, "n_head=3 does not divide"),
    "strange gptjax": ({"gptjax": {"x": 1}}, "gptjax={'x': 1}"),
    "a bias that is no bool": ({"gptjax": {"bias": 0}}, "gptjax={'bias': 0}"),
    "pruned": ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    "strange multiple": ({"gptjax": {"vocab_multiple": 0}}, "vocab_multiple=0"),
    "fewer layers than the file": ({"n_layer": 1}, "h.1.ln_1.weight is not GPT-2's"),
    "more layers than the file": ({"n_layer": 3}, "h.2.ln_1.weight is missing"),
    "another vocabulary": ({"vocab_size": 99}, "wte.weight has shape (100, 32)"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_is_honoured_or_refused(folder: Path, case: str) -> None:
    changes, message = CONFIGS[case]
    edit_json(folder / "config.json", **changes)
    with pytest.raises(DataError) as error:
        read_params(huggingface.open_folder(folder))
    assert message in str(error.value)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_the_activation_goes_out_and_comes_back(
    tmp_path: Path, params: model.Params, activation: Any
) -> None:
    cfg = dataclasses.replace(CFG, activation=activation)
    huggingface.write_folder(tmp_path, cfg, params, None)
    assert_same(huggingface.open_folder(tmp_path), params, cfg)
    said = json.loads((tmp_path / "config.json").read_text())["activation_function"]
    assert said == {"gelu_tanh": "gelu_new", "gelu": "gelu"}[activation]


@pytest.mark.parametrize("equal", [False, True])
def test_an_untied_head_goes_out_and_comes_back(tmp_path: Path, equal: bool) -> None:
    """Also one whose numbers are those of the embedding: it is what config.json says."""
    cfg = dataclasses.replace(CFG, tie_head=False)
    params = jax.device_get(scaled_params(cfg, jax.random.key(1)))
    assert not np.array_equal(params["lm_head"]["embedding"], params["wte"]["embedding"])
    if equal:
        params["lm_head"] = params["wte"]
    huggingface.write_folder(tmp_path, cfg, params, None)
    assert_same(huggingface.open_folder(tmp_path), params, cfg)
    assert load_file(tmp_path / "model.safetensors")[HEAD].shape == (100, 32)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    if equal:
        del params["lm_head"]
        return assert_same(huggingface.open_folder(tmp_path), params)
    with pytest.raises(DataError, match="tie_word_embeddings"):
        read_params(huggingface.open_folder(tmp_path))
    return None


def test_an_activation_of_transformers_is_ours_or_refused(folder: Path) -> None:
    """Whatever is the same function is taken for it, under any name; nothing else is."""
    known, torch = need("transformers.activations"), need("torch")
    x = torch.cat([torch.linspace(-14, 14, 2801), torch.tensor([-100.0, 100.0])])
    for name in known.ACT2CLS:
        edit_json(folder / "config.json", activation_function=name)
        same = []
        if name not in ("prelu", "xielu"):  # which have parameters
            theirs = known.ACT2FN[name](x).numpy()
            for setting, function in ACTIVATIONS.items():
                if np.allclose(function(x.numpy()), theirs, rtol=0, atol=4e-6):
                    same.append(setting)
        if same:
            assert [huggingface.open_folder(folder).cfg.activation] == same, name
        else:
            with pytest.raises(DataError, match=f"activation_function='{name}'"):
                huggingface.open_folder(folder)


def test_all_problems_of_a_config_are_listed(folder: Path) -> None:
    edit_json(folder / "config.json", n_layer=0, activation_function="relu", rotary=1)
    with pytest.raises(DataError) as error:
        huggingface.open_folder(folder)
    assert all(word in str(error.value) for word in ("n_layer=0", "relu", "rotary"))


JSONS = {
    "not JSON": "{",
    "a list": "[]",
    "NaN": '{"n_layer": NaN}',
    "a key twice": '{"n_layer": 2, "n_layer": 3}',
    "nested": "[" * 100_000,
    "a gigabyte": " " * (2**24 + 1),
}


@pytest.mark.parametrize("case", JSONS)
def test_json_that_nobody_vouches_for(folder: Path, case: str) -> None:
    (folder / "config.json").write_text(JSONS[case])
    with pytest.raises(DataError, match=r"cannot read .*config\.json"):
        huggingface.open_folder(folder)


# The fields of real files beyond those that every test here has.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 1024, "task_specific_params": {"text-generation": {"do_sample": True}}},
    "gpt2-medium": {"n_special": 0, "predict_special_tokens": True, "n_ctx": 1024},
    "gpt2-xl": {"output_past": True, "summary_first_dropout": 0.1},
    "distilgpt2": {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "n_ctx": 1024},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(folder: Path, params: model.Params, name: str) -> None:
    edit_json(folder / "config.json", **PUBLISHED[name])
    assert_same(huggingface.open_folder(folder), params)


def test_zeros_that_are_no_biases_of_ours_are_not_dropped(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, bias=False)
    huggingface.write_folder(tmp_path, cfg, scaled_params(cfg, jax.random.key(2)), None)
    tensors = load_file(tmp_path / "model.safetensors")
    zeros = {"adapter.bias": np.zeros((5, 5), np.float32)}
    save_file({**tensors, **zeros}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"adapter\.bias is not GPT-2's"):
        read_params(huggingface.open_folder(tmp_path))


def test_biases_of_a_strange_type_are_not_dropped(tmp_path: Path) -> None:
    """numpy has no such type, so that reading them would fail."""
    cfg = dataclasses.replace(CFG, bias=False)
    huggingface.write_folder(tmp_path, cfg, scaled_params(cfg, jax.random.key(2)), None)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.ln_f.bias"
    tensors[name] = np.zeros(32, ml_dtypes.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"ln_f\.bias is not GPT-2's"):
        read_params(huggingface.open_folder(tmp_path))


def safetensors_damage() -> dict[str, Any]:
    def header(change: Any) -> Any:
        def damage(data: bytes) -> bytes:
            size = int.from_bytes(data[:8], "little")
            fields = json.loads(data[8 : 8 + size])
            change(fields)
            text = json.dumps(fields).encode()
            return len(text).to_bytes(8, "little") + text + data[8 + size :]

        return damage

    def overlap(fields: Any) -> None:
        fields["transformer.ln_f.bias"]["data_offsets"] = fields["transformer.ln_f.weight"][
            "data_offsets"
        ]

    return {
        "empty": lambda data: b"",
        "cut in the header": lambda data: data[:100],
        "cut in the data": lambda data: data[:-1],
        "longer": lambda data: data + b"x",
        "header beyond the file": lambda data: (2**40).to_bytes(8, "little") + data[8:],
        "overlapping": header(overlap),
        "offsets beyond": header(
            lambda f: f["transformer.ln_f.bias"].update(data_offsets=[0, 2**40])
        ),
        "wrong shape": header(lambda f: f["transformer.ln_f.bias"].update(shape=[33])),
        "unknown dtype": header(lambda f: f["transformer.ln_f.bias"].update(dtype="F31")),
        # These two the library reads.
        "an entry as a list": header(
            lambda f: f.update({name: list(f[name].values()) for name in ["transformer.ln_f.bias"]})
        ),
        "dtype as an object": header(
            lambda f: f["transformer.ln_f.bias"].update(dtype={"F32": None})
        ),
    }


def test_safetensors_cut_after_it_was_opened(folder: Path) -> None:
    file = folder / "model.safetensors"
    source = huggingface.open_folder(folder)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"model\.safetensors\): cut short since it was opened"):
        read_params(source)


@pytest.mark.parametrize("case", safetensors_damage())
def test_damaged_safetensors(folder: Path, case: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(safetensors_damage()[case](file.read_bytes()))
    with pytest.raises(DataError, match=r"model\.safetensors"):
        huggingface.open_folder(folder)


def test_another_model_is_told_before_its_weights_are_read(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"config\.json.*model_type='llama'"):
        huggingface.open_folder(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        huggingface.open_folder(folder)


# ---- Pickles -------------------------------------------------------------------------------------


class Canary:
    """Makes a folder when it is unpickled the careless way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def to_bin(folder: Path, extra: Any = None) -> None:
    """Weights as PyTorch pickles them."""
    torch = need("torch")
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array)
        for name, array in load_file(folder / "model.safetensors").items()
    }
    torch.save({**tensors, **({"x": extra} if extra else {})}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_pickle_is_read_only_if_allowed(folder: Path, params: model.Params) -> None:
    to_bin(folder)
    with pytest.raises(UsageError, match="--allow_pickle"):
        huggingface.open_folder(folder)
    assert_same(huggingface.open_folder(folder, allow_pickle=True), params)


def test_a_pickle_runs_no_code(folder: Path) -> None:
    canary = folder.parent / "canary"
    to_bin(folder, Canary(canary))
    with pytest.raises(DataError, match="cannot read the pickle"):
        huggingface.open_folder(folder, allow_pickle=True)
    with pytest.raises(UsageError, match="--allow_pickle"):
        huggingface.open_folder(folder)
    assert not canary.exists()


def test_a_pickle_from_before_pytorch_1_6(folder: Path, params: model.Params) -> None:
    """Such as the pytorch_model.bin of 2019, which is no zip file."""
    torch = need("torch")
    to_bin(folder)
    file = folder / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert_same(huggingface.open_folder(folder, allow_pickle=True), params)
    canary = folder.parent / "canary"
    torch.save({"x": Canary(canary)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match="cannot read the pickle"):
        huggingface.open_folder(folder, allow_pickle=True)
    assert not canary.exists()


def test_a_damaged_pickle(folder: Path) -> None:
    to_bin(folder)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot read the pickle"):
        huggingface.open_folder(folder, allow_pickle=True)


def test_an_old_pytorch_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = need("torch")
    to_bin(folder)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UsageError, match=r"2\.9\.1\+cpu is too old"):
        huggingface.open_folder(folder, allow_pickle=True)


# ---- nanoGPT -------------------------------------------------------------------------------------


def nanogpt_state(cfg: Any, params: model.Params) -> dict[str, Any]:
    """What nanoGPT's model.state_dict() holds: linear layers (out, in), the head beside wte."""
    torch = need("torch")
    state = {}
    for name, array in named_tensors(cfg, params):
        if name.endswith(".bias") and not cfg.bias:
            continue
        linear = any(part in name for part in ("c_attn.w", "c_proj.w", "c_fc.w"))
        tensor = torch.tensor(array.T if linear else array)
        state[f"_orig_mod.transformer.{name}"] = torch.nn.Parameter(tensor)
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(4, 4).tril().view(1, 1, 4, 4)
    return state


def nanogpt_args(cfg: Any = CFG) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in (*LIMITS, "bias")}


def save_nanogpt(path: Path, cfg: Any, params: model.Params, **changes: Any) -> None:
    torch = need("torch")
    saved = {
        "model_args": nanogpt_args(cfg),
        "model": nanogpt_state(cfg, params),
        "iter_num": 5,
        "config": {},
    }
    torch.save({**saved, **changes}, path)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path: Path, bias: bool) -> None:
    cfg = dataclasses.replace(CFG, bias=bias, activation="gelu")
    params = jax.device_get(scaled_params(cfg, jax.random.key(3)))
    save_nanogpt(tmp_path / "ckpt.pt", cfg, params)
    assert_same(nanogpt.open_file(tmp_path / "ckpt.pt", True), params, cfg)
    with pytest.raises(UsageError, match="--allow_pickle"):
        nanogpt.open_file(tmp_path / "ckpt.pt", False)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": {"a": 1}},
        {"model": lambda torch: {"a": torch.zeros(2).to_sparse()}},
        {"model": lambda torch: {"a": torch.empty(2, device="meta")}},
        {"model": lambda torch: {f"{x}transformer.a": torch.ones(1) for x in ("", "_orig_mod.")}},
        {"model_args": {**nanogpt_args(), "use_rope": True}},
        {"model_args": {}},
        {"model_args": {"n_layer": "2", "bias": True}},
        {"model_args": {**nanogpt_args(), "n_layer": 10**9}},
        {"model_args": {**nanogpt_args(), "n_layer": 2.0}},
    ],
)
def test_not_nanogpts(tmp_path: Path, params: model.Params, changes: Any) -> None:
    torch = need("torch")
    made = {name: value(torch) if callable(value) else value for name, value in changes.items()}
    save_nanogpt(tmp_path / "ckpt.pt", CFG, params, **made)
    with pytest.raises(DataError, match=r"ckpt\.pt"):
        nanogpt.open_file(tmp_path / "ckpt.pt", True)


# ---- llm.c ---------------------------------------------------------------------------------------


def test_llmc_round_trip(tmp_path: Path, params: model.Params) -> None:
    llmc.write_file(tmp_path / "model.bin", CFG, params)
    assert_same(llmc.open_file(tmp_path / "model.bin"), params)


def test_llmcs_bfloat16(tmp_path: Path, params: model.Params) -> None:
    path = tmp_path / "model.bin"
    llmc.write_file(path, CFG, params)
    header = np.fromfile(path, np.int32, 256)
    header[1] = 5
    weights = np.fromfile(path, np.float32, offset=1024).astype(ml_dtypes.bfloat16)
    path.write_bytes(header.tobytes() + weights.tobytes())
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    assert_same(llmc.open_file(path), rounded)


def test_llmc_has_no_exact_gelu(tmp_path: Path, params: model.Params) -> None:
    erf = dataclasses.replace(CFG, activation="gelu")
    with pytest.raises(UsageError, match=r"^--to=llmc: llm\.c computes GELU by tanh"):
        llmc.write_file(tmp_path / "model.bin", erf, params)
    with pytest.raises(UsageError, match=r"^--to=gguf: llama\.cpp computes GELU by tanh"):
        gguf.write_file(tmp_path / "model.gguf", erf, params, tokenizer.ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_llmcs_layout(tmp_path: Path, params: model.Params) -> None:
    """By hand: after the header wte, wpe, ln_1 of all layers, then c_attn as (out, in)."""
    llmc.write_file(tmp_path / "model.bin", CFG, params)
    data = np.fromfile(tmp_path / "model.bin", np.float32, offset=1024)
    D, L = CFG.n_embd, CFG.n_layer
    at = (CFG.padded_vocab_size + CFG.block_size + 2 * L) * D
    second = data[at + 3 * D * D : at + 6 * D * D].reshape(3 * D, D)
    assert np.array_equal(second, params["h"]["attn"]["c_attn"]["kernel"][1].T)
    header = np.fromfile(tmp_path / "model.bin", np.int32, 8)
    assert header.tolist() == [20240326, 3, 16, 100, 2, 2, 32, 128]


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, 1, "no magic number"),
        (1, 4, "version 4"),
        (4, 0, "n_layer=0, expected"),
        (4, 10**6, "n_layer=1000000, expected"),
        (6, -32, "n_embd=-32, expected"),
        (4, 3, "bytes, expected"),
        (7, 101, "padded to 101"),
        (8, 1, "does not know"),
    ],
)
def test_llmcs_header(
    tmp_path: Path, params: model.Params, index: int, value: int, message: str
) -> None:
    path = tmp_path / "model.bin"
    llmc.write_file(path, CFG, params)
    data = np.fromfile(path, np.int32)
    data[index] = value
    data.tofile(path)
    with pytest.raises(DataError, match=message):
        llmc.open_file(path)


def test_llmcs_file_cut_short(tmp_path: Path, params: model.Params) -> None:
    path = tmp_path / "model.bin"
    llmc.write_file(path, CFG, params)
    for size in (0, 100, 2000):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DataError, match=r"model\.bin"):
            llmc.open_file(path)


def test_llmc_pads_the_vocabulary(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, bias=False, vocab_multiple=1)
    params = jax.device_get(scaled_params(cfg, jax.random.key(5)))
    llmc.write_file(tmp_path / "model.bin", cfg, params)
    found = read_params(llmc.open_file(tmp_path / "model.bin"))
    assert np.array_equal(found["wte"]["embedding"][:100], params["wte"]["embedding"])
    assert found["wte"]["embedding"].shape == (128, 32)
    assert not found["h"]["attn"]["c_attn"]["bias"].any()


# ---- OpenAI --------------------------------------------------------------------------------------


def test_openais_checkpoint() -> None:
    source = openai.open_folder(TF_GPT2)
    assert (source.cfg.n_layer, source.cfg.n_embd, source.cfg.vocab_size) == (2, 16, 257)
    params = read_params(source)
    expected = np.load(TF_GPT2 / "expected.npz")
    assert np.array_equal(
        params["h"]["mlp"]["c_proj"]["kernel"][1], expected["model/h1/mlp/c_proj/w"][0]
    )
    assert np.array_equal(params["h"]["ln_2"]["scale"][0], expected["model/h0/ln_2/g"])
    assert np.array_equal(params["wte"]["embedding"][:257], expected["model/wte"])
    assert len(source.tensors) == len(expected.files) == 28


@pytest.mark.parametrize(
    "changes", [{"n_layer": 0}, {"n_head": 3}, {"n_vocab": "257"}, {"activation": "relu"}]
)
def test_openais_hparams(tmp_path: Path, changes: Any) -> None:
    folder = shutil.copytree(TF_GPT2, tmp_path / "tf")
    edit_json(folder / "hparams.json", **changes)
    with pytest.raises(DataError, match=r"n_layer=0|does not divide|vocab_size='257'|unknown"):
        openai.open_folder(folder)


def test_two_names_of_one_tensor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI calls a LayerNorm's scale g and a kernel w; a tensor with both would hide one."""
    index = openai.read_index(TF_GPT2 / "model.ckpt")
    both = {**index, "model/ln_f/w": index["model/ln_f/g"]}
    monkeypatch.setattr(openai, "read_index", lambda prefix: both)
    with pytest.raises(DataError, match=r"stored twice: ln_f\.weight"):
        openai.open_folder(TF_GPT2)


# ---- GGUF ----------------------------------------------------------------------------------------


def test_gguf(tmp_path: Path, params: model.Params) -> None:
    library = need("gguf")
    gguf.write_file(tmp_path / "model.gguf", CFG, params, tokenizer.IdsTokenizer(100))
    reader = library.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    known = library.get_tensor_name_map(library.MODEL_ARCH.GPT2, CFG.n_layer)
    for name, array in named_tensors(CFG, params):
        theirs = known.get_name(f"transformer.{name}", try_suffixes=(".weight", ".bias"))
        linear = ".c_" in name and name.endswith(".weight")
        assert np.array_equal(found.pop(theirs), array.T if linear else array), name
    assert not found
    assert reader.fields["gpt2.block_count"].contents() == CFG.n_layer


# ---- No pickle anywhere else ---------------------------------------------------------------------


def test_nothing_else_unpickles() -> None:
    """The grep gate: a guarded torch.load, a reader of plain pickles, and nothing else runs."""
    hostile = ["exec(", " eval(", "(eval(", "yaml.load(", "trust_remote_code", "shell=True"]
    hostile += [f"import {name}" for name in ("marshal", "shelve", "dill")]
    files = [*(ROOT / "gptjax").rglob("*.py"), *ROOT.glob("*.py")]
    for file in files:
        text = file.read_text()
        assert not [word for word in hostile if word in text], file
        knows_pickle = file.name in ("meta_pickle.py", "nanogpt_export.py")
        assert ("import pickle" in text) == knows_pickle, file
        assert ("torch.load(" in text) == (file.name == "torch_file.py"), file
        reads = re.search(r"\bpickle\.\w*(load|Unpickle)|from pickle\b|import pickle as", text)
        assert bool(reads) == (file.name == "meta_pickle.py"), file
