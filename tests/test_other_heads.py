"""A model with the head of another task is imported without it, if that is asked for."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert_gpt2
from gptjax import model
from gptjax.checkpoints.run_folder import load_run
from gptjax.config import GPTConfig
from gptjax.conversion import sources
from gptjax.conversion.tensors import HEAD, read_params

from .helpers import BYTES as CFG
from .helpers import need
from .test_formats import edit_json, nanogpt_args, nanogpt_state, to_bin
from .test_imports import PICKLE, assert_opens, refusal

DROP = dataclasses.replace(PICKLE, drop_heads=True)
D = CFG.n_embd
OTHER: dict[str, dict[str, tuple[int, ...]]] = {
    "classification": {"score.weight": (3, D)},
    "tokens": {"classifier.weight": (5, D), "classifier.bias": (5,)},
    "questions": {"qa_outputs.weight": (2, D), "qa_outputs.bias": (2,)},
    "double heads": {
        "multiple_choice_head.summary.weight": (1, D),
        "multiple_choice_head.summary.bias": (1,),
    },
    "value": {"v_head.summary.weight": (1, D), "v_head.summary.bias": (1,)},
}


def add(folder: Path, extra: dict[str, tuple[int, ...]]) -> None:
    tensors = load_file(folder / "model.safetensors")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in extra.items()}
    save_file({**tensors, **zeros}, folder / "model.safetensors")


@pytest.mark.parametrize("case", OTHER)
def test_the_trunk_is_imported_if_asked_for(hf: Path, params: model.Params, case: str) -> None:
    add(hf, OTHER[case])
    text = refusal(hf)
    assert "--drop_heads" in text and all(name in text for name in OTHER[case])
    source = assert_opens(hf, params, DROP)
    assert source.cfg.tie_head
    (note,) = source.notes
    assert all(name in note for name in OTHER[case]) and "the token embedding" in note
    add(hf, {"h.0.score.weight": (2,), "extra.weight": (2,)})
    text = refusal(hf, DROP)
    assert "h.0.score.weight is not" in text and "extra.weight is not" in text


def test_a_head_of_its_own_stays(hf: Path) -> None:
    """Double heads of an untied model; where none is stored, the head is the embedding."""
    edit_json(hf / "config.json", tie_word_embeddings=False)
    add(hf, {**OTHER["double heads"], HEAD: (CFG.vocab_size, D)})
    assert not opened_cfg(hf).tie_head
    tensors = load_file(hf / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, hf / "model.safetensors")
    assert opened_cfg(hf).tie_head


def opened_cfg(folder: Path) -> GPTConfig:
    source = sources.open_source(str(folder), DROP)
    read_params(source)
    return source.cfg


def test_in_pickles_too(hf: Path, tmp_path: Path, params: model.Params) -> None:
    torch = need("torch")
    add(hf, OTHER["value"])
    to_bin(hf)
    assert_opens(hf, params, DROP)
    state = {**nanogpt_state(CFG, params), "_orig_mod.score.weight": torch.zeros(2, D)}
    torch.save({"model": state, "model_args": nanogpt_args(CFG)}, tmp_path / "ckpt.pt")
    assert "--drop_heads" in refusal(tmp_path / "ckpt.pt")
    assert_opens(tmp_path / "ckpt.pt", params, DROP)


def test_the_command_says_what_was_left_out(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], restore_process: None
) -> None:
    add(hf, OTHER["classification"])
    argv = ["import", str(hf), "--tokenizer=byte", f"--out_dir={tmp_path}/run", "--drop_heads"]
    assert convert_gpt2.main(argv) == 0
    said = capsys.readouterr().out
    assert "left out: score.weight" in said and "--drop_heads=True" in said
    assert load_run(tmp_path / "run").config.model.n_layer == CFG.n_layer
