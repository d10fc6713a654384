"""What people give to an import: it is read by whatever prefix, or told by what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import model
from gptjax.conversion import gguf, huggingface, llmc, sources
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import HEAD, Source, read_params
from gptjax.errors import DataError, UsageError
from gptjax.tokenizer import ByteTokenizer

from .helpers import BYTES as CFG
from .helpers import need, scaled_params, tiny
from .test_formats import edit_json, nanogpt_args, nanogpt_state, shard, to_bin

PICKLE = SourceConfig(tokenizer="byte", allow_pickle=True)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Store the tensors of a folder, and a head, under other names."""
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors["transformer.wte.weight"].copy()
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")


def assert_opens(name: Path, params: model.Params, config: SourceConfig = PICKLE) -> Source:
    source = sources.open_source(str(name), config)
    jax.tree.map(np.testing.assert_array_equal, read_params(source), params)
    return source


def refusal(name: Path, config: SourceConfig = PICKLE) -> str:
    """What an import says of a source that it refuses."""
    with pytest.raises((DataError, UsageError)) as error:
        sources.read_model(sources.open_source(str(name), config), str(name), config)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Names ---------------------------------------------------------------------------------------

PREFIXES: dict[str, Callable[[str], str]] = {
    "none": lambda name: name.removeprefix("transformer."),
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT over DDP": lambda name: f"module.base_model.model.{name}",
    "Lightning": lambda name: f"model.{name}",
    "decoder": lambda name: f"decoder.{name}",
    "decoder in the place of transformer": lambda name: name.replace("transformer.", "decoder."),
    "a head below the prefix": lambda name: f"transformer.{name.removeprefix('transformer.')}",
    "blocks compiled each": lambda name: name.replace("h.1.", "h.1._orig_mod."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "h.0.", "h.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_a_common_prefix_is_no_part_of_the_names(hf: Path, params: model.Params, case: str) -> None:
    torch = need("torch")
    rename(hf, PREFIXES[case])
    source = assert_opens(hf, params)
    # transformers by itself reads only what Hugging Face writes.
    assert source.is_hf == (case == "none")
    shard(hf)
    assert_opens(hf, params)
    state = {PREFIXES[case](name.removeprefix("_orig_mod.")): tensor
             for name, tensor in nanogpt_state(CFG, params).items()}  # fmt: skip
    torch.save({"model": state, "model_args": nanogpt_args(CFG)}, hf / "ckpt.pt")
    assert_opens(hf / "ckpt.pt", params)


def test_names_that_become_one_are_refused(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    more = {"module.transformer.ln_f.bias": np.zeros(32, np.float32)}
    save_file({**tensors, **more}, hf / "model.safetensors")
    assert "is stored twice" in refusal(hf)


def test_two_models_in_one_file_are_refused(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    both = {f"{who}.{name}": a for who in ("policy", "critic") for name, a in tensors.items()}
    save_file(both, hf / "model.safetensors")
    text = refusal(hf)
    assert "begin in 2 ways ('critic.transformer.', 'policy.transformer.')" in text
    kept = {name: a for name, a in both.items() if "policy" in name or "wte" in name}
    save_file(kept, hf / "model.safetensors")
    assert "begin in 2 ways" in refusal(hf)


def test_some_of_each_kind_of_problem_are_shown(hf: Path) -> None:
    """Where 40 tensors are missing, the misshapen one is still named."""
    edit_json(hf / "config.json", n_layer=9)
    tensors = load_file(hf / "model.safetensors")
    tensors["transformer.wpe.weight"] = np.zeros((3, 32), np.float32)
    tensors["transformer.ln_f.bias"] = np.zeros(32, np.int64)
    strange = {f"transformer.h.0.x{i}": np.zeros(1, np.float32) for i in range(40)}
    save_file({**tensors, **strange}, hf / "model.safetensors")
    text = refusal(hf)
    assert "126 problems" in text  # 7 * 12 + 40 + 2
    for part in ("h.2.ln_1.weight is missing", "h.0.x0 is not", "wpe.weight has shape (3, 32)"):
        assert part in text
    assert "ln_f.bias is I64" in text and "and 78 more like these (is missing ...)" in text
    assert text.count("is not GPT-2's") == 6 and len(text) < 1500


STRANGE = {
    "LoRA": ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", "merge them"),
    "a classifier": ("score.weight", "another head"),
    "a value head": ("v_head.summary.weight", "another head"),
    "GPTQ": ("transformer.h.0.attn.c_attn.qweight", "are quantised"),
    "bitsandbytes": ("transformer.h.0.attn.c_attn.weight.absmax", "are quantised"),
    "cross attention": ("transformer.h.0.crossattention.c_attn.weight", "attend to an encoder"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_tensors_of_other_models_are_explained(hf: Path, case: str) -> None:
    name, reason = STRANGE[case]
    if name.startswith("base_model"):
        rename(hf, PREFIXES["PEFT"])
    tensors = load_file(hf / "model.safetensors")
    save_file({**tensors, name: np.zeros(3, np.float32)}, hf / "model.safetensors")
    text = refusal(hf)
    assert reason in text and "is not GPT-2's" in text


def test_of_quite_another_model_some_names_are_shown(hf: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": np.zeros(3)}, hf / "model.safetensors")
    assert "none of GPT-2's tensors" in refusal(hf) and "model.layers.0.mlp" in refusal(hf)


# ---- Files on their own --------------------------------------------------------------------------


def test_hugging_faces_weights_by_their_own_name(hf: Path, params: model.Params) -> None:
    source = assert_opens(hf / "model.safetensors", params)
    assert source.is_hf and source.files == (hf / "model.safetensors",)
    (hf / "model.safetensors").rename(hf / "other.safetensors")
    assert "other.safetensors" in refusal(hf)
    source = assert_opens(hf / "other.safetensors", params)
    assert not source.is_hf  # transformers would look for another file
    (hf / "other.safetensors").rename(hf / "model.safetensors")
    to_bin(hf)
    assert_opens(hf / "pytorch_model.bin", params)


def test_the_file_that_was_named_is_the_one_that_is_read(hf: Path, params: model.Params) -> None:
    other = jax.device_get(scaled_params(CFG, jax.random.key(2)))
    to_bin(hf)
    huggingface.write_folder(hf, CFG, other, None)
    assert_opens(hf / "pytorch_model.bin", params)
    assert_opens(hf, other)


def test_weights_without_their_config(hf: Path) -> None:
    (hf / "config.json").unlink()
    assert "no config.json does" in refusal(hf / "model.safetensors")
    assert "the config.json of these weights" in refusal(hf)
    edit = {"model_type": "gpt2"}
    (hf / "config.json").write_text(json.dumps(edit))
    to_bin(hf)
    (hf / "config.json").unlink()
    assert "no config.json does" in refusal(hf / "pytorch_model.bin")
    assert "llm.c" not in refusal(hf / "pytorch_model.bin")


def test_parts_of_a_model(hf: Path) -> None:
    shard(hf)
    for name in ("a.safetensors", "model.safetensors.index.json", "config.json"):
        path = hf / name
        if name == "a.safetensors":
            path = path.rename(hf / "model-00001-of-00002.safetensors")
        assert "only a part of a model; give the folder" in refusal(path)
    assert "files that are not there" in refusal(hf) and "a.safetensors" in refusal(hf)


def test_an_adapter_is_told_by_its_config(hf: Path) -> None:
    fields = {"peft_type": "LORA", "base_model_name_or_path": "gpt2-medium"}
    (hf / "adapter_config.json").write_text(json.dumps(fields))
    shutil.copy(hf / "model.safetensors", hf / "adapter_model.safetensors")
    for path in (hf, hf / "adapter_model.safetensors"):
        text = refusal(path)
        assert "an adapter of the model 'gpt2-medium'" in text and "--base=gpt2-medium" in text
    (hf / "model.safetensors").unlink()
    (hf / "config.json").unlink()
    assert "an adapter" in refusal(hf)
    assert "only a part of a model" in refusal(hf / "adapter_config.json")


def test_a_flag_without_effect_is_refused(tmp_path: Path, hf: Path) -> None:
    assert "not a LoRA adapter" in refusal(hf, SourceConfig(base=str(hf)))
    words = tmp_path / "words.json"
    words.write_text('{"n_head": 2}')
    gguf.write_file(
        tmp_path / "model.gguf", CFG, scaled_params(CFG, jax.random.key(0)), ByteTokenizer()
    )
    said = refusal(tmp_path / "model.gguf", SourceConfig(config=str(words)))
    assert "says itself what the model is" in said


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path)
    (tmp_path / "gpt2_124M.bin").write_bytes(b"x")
    assert "gpt2_124M.bin" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5", "model.onnx"])
def test_weights_of_other_frameworks_alone(hf: Path, name: str) -> None:
    (hf / "model.safetensors").rename(hf / name)
    assert f"it has {name} (" in refusal(hf) and "does not read" in refusal(hf)
    assert "does not read" in refusal(hf / name)


# ---- Flags ---------------------------------------------------------------------------------------


def test_bytes_are_proposed_only_where_they_fit(hf: Path, tmp_path: Path) -> None:
    assert "--tokenizer=byte" in refusal(hf, SourceConfig())
    cfg = tiny(vocab_size=65, vocab_multiple=128)
    (tmp_path / "chars").mkdir()
    params = scaled_params(cfg, jax.random.key(0))
    huggingface.write_folder(tmp_path / "chars", cfg, params, None)
    for tokenizer in ("auto", "byte", "gpt2"):
        text = refusal(tmp_path / "chars", SourceConfig(tokenizer=tokenizer))
        assert "tokenizer=byte" not in text and "--tokenizer=ids" in text


def test_who_has_no_such_flag_is_told_the_command(hf: Path, tmp_path: Path) -> None:
    """sample.py and train.py --init_from open a source without any of import's flags."""

    def start(path: Path) -> str:
        with pytest.raises((DataError, UsageError)) as error:
            sources.load_model(str(path))
        return str(error.value)

    command = "import it by python convert_gpt2.py import {} --out_dir=RUN {}"
    assert command.format(hf, "--tokenizer=byte (") in start(hf)
    edit_json(hf / "config.json", nobody=1)
    assert command.format(hf, "--accept_fields=nobody (") in start(hf)
    with_space = hf.rename(tmp_path / "with space")
    to_bin(with_space)
    edit_json(with_space / "config.json", nobody=None)
    assert command.format(f"'{with_space}'", "--allow_pickle (") in start(with_space)
    assert "then take --init_from=RUN" in start(with_space)
    llmc.write_file(tmp_path / "x.bin", CFG, scaled_params(CFG, jax.random.key(0)))
    assert command.format(tmp_path / "x.bin", "--tokenizer=byte (") in start(tmp_path / "x.bin")
