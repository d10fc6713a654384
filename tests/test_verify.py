"""verify says yes to GPT-2 and no to every mistake a converter makes."""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import convert_gpt2
from gptjax import attention, functions
from gptjax.checkpoints.run_folder import Run
from gptjax.conversion import convert, huggingface, sources, verify
from gptjax.conversion.common_rows import common_rows, cut_reference
from gptjax.conversion.reference import load_reference, write_random_model
from gptjax.conversion.resize import resize
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import Source, read_params
from gptjax.conversion.verify import Check
from gptjax.errors import DataError
from gptjax.functions import ACTIVATIONS
from gptjax.terminal import cli

from .helpers import need, scaled_params, tiny
from .test_formats import save_nanogpt

need("torch")
need("transformers")
CFG = tiny(vocab_size=256, vocab_multiple=128, block_size=64)
BYTE = SourceConfig(tokenizer="byte")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that transformers wrote."""
    path = tmp_path_factory.mktemp("random")
    write_random_model(CFG, path)
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return sources.open_source(str(folder), BYTE)


@pytest.fixture(scope="module")
def loaded_reference(source: Source) -> Any:
    return load_reference(source)


@pytest.fixture
def reference(loaded_reference: Any) -> Any:
    return copy.deepcopy(loaded_reference)  # verify casts it to bfloat16


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    jax.clear_caches()  # a planted mistake must be traced, and must not outlive its test
    yield sources.load_model(str(folder), BYTE)
    jax.clear_caches()


def failing(checks: list[Check]) -> set[str]:
    return {check.group for check in checks if not check.ok}


def test_the_same_model_passes(run: Run, reference: Any) -> None:
    checks = verify.verify(run.config.model, run.params, reference)
    assert not failing(checks), verify.first_failure(checks)
    names = [check.name for check in checks if check.group == "activation"]
    assert names[:6] == ["embeddings", "h.0.ln_1", "h.0.attn", "h.0.ln_2", "h.0.mlp", "h.0"]
    assert names[-1] == "ln_f"
    assert {check.group for check in checks} == {
        *("tensor", "activation", "logits", "gradient", "tokens")
    }


# ---- Planted mistakes ----------------------------------------------------------------------------


def change(path: str, function: Callable[[jax.Array], jax.Array]) -> Callable[..., None]:
    """A mistake in a parameter."""

    def plant(patch: pytest.MonkeyPatch, params: Any, reference: Any) -> None:
        *parents, leaf = path.split("/")
        for key in parents:
            params = params[key]
        params[leaf] = function(params[leaf])

    return plant


def replace(module: Any, name: str, value: Any) -> Callable[..., None]:
    """A mistake in the code."""

    def plant(patch: pytest.MonkeyPatch, params: Any, reference: Any) -> None:
        if isinstance(module, dict):
            patch.setitem(module, name, value)
        else:
            patch.setattr(module, name, value)

    return plant


def split_wrongly(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
    """Heads interleaved: (K, H) instead of (H, K)."""

    def wrong(x_BTHK: jax.Array) -> jax.Array:
        B, T, H, K = x_BTHK.shape
        return x_BTHK.reshape(B, T, K, H).swapaxes(2, 3)

    y = attention.attend_xla(wrong(q), wrong(k), wrong(v), **kwargs)
    return y.swapaxes(2, 3).reshape(y.shape)


def swap_q_and_k(kernel: jax.Array) -> jax.Array:
    q, k, v = jnp.split(kernel, 3, axis=-1)
    return jnp.concatenate([k, q, v], axis=-1)


def untie(patch: pytest.MonkeyPatch, params: Any, reference: Any) -> None:
    """The reference has a head of its own, which we ignored."""
    import torch

    weight = reference.lm_head.weight.detach().clone()
    weight[7] += 0.1
    reference.lm_head.weight = torch.nn.Parameter(weight)


MISTAKES: dict[str, tuple[Callable[..., None], str]] = {
    # mistake -> how it is planted, the first activation or logit where the models part
    "erf GELU": (
        replace(ACTIVATIONS, "gelu_tanh", lambda x: nn.gelu(x, approximate=False)),
        "activation h.0.mlp",
    ),
    "epsilon 1e-6": (replace(functions, "EPSILON", 1e-6), "activation h.0.ln_1"),
    "a square c_proj transposed": (
        change("h/attn/c_proj/kernel", lambda w: w.swapaxes(1, 2)),
        "activation h.0.attn",
    ),
    "q and k swapped": (change("h/attn/c_attn/kernel", swap_q_and_k), "activation h.0.attn"),
    "shifted positions": (
        change("wpe/embedding", lambda w: jnp.roll(w, 1, axis=0)),
        "activation embeddings",
    ),
    "heads split wrongly": (
        replace(attention.ATTENTION, "xla", split_wrongly),
        "activation h.0.attn",
    ),
    "a missing bias": (change("h/attn/c_attn/bias", lambda b: b * 0), "activation h.0.attn"),
    "layers in another order": (
        lambda patch, params, reference: params.update(
            h=jax.tree.map(lambda x: x[::-1], params["h"])
        ),
        "activation h.0.ln_1",
    ),
    "an untied head ignored": (untie, "logits largest difference"),  # verify: tensor lm_head.weight
    "NaN in a weight": (
        change("h/mlp/c_fc/kernel", lambda w: w.at[1, 0, 0].set(jnp.nan)),
        "activation h.1.mlp",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_turns_red(
    mistake: str, run: Run, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, where = MISTAKES[mistake]
    plant(monkeypatch, run.params, reference)
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 32))
    # Not the tensors, which an equally wrong mapping back would make equal again.
    checks = list(verify.compare_outputs(CFG, run.params, reference, tokens))
    first = verify.first_failure(checks)
    assert first is not None
    assert f"{first.group} {first.name}" == where
    assert "logits" in failing(checks)


@pytest.mark.parametrize("mistake", ["an untied head ignored", "NaN in a weight"])
def test_the_whole_report_names_the_first_place(
    mistake: str, run: Run, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    MISTAKES[mistake][0](monkeypatch, run.params, reference)
    checks = verify.verify(run.config.model, run.params, reference)
    first = verify.first_failure(checks)
    place = {"an untied head ignored": "lm_head.weight", "NaN in a weight": "h.1.mlp.c_fc.weight"}
    assert first is not None and (first.group, first.name) == ("tensor", place[mistake])
    assert {"logits", "gradient"} <= failing(checks) and len(checks) == 75


def test_nan_is_never_ok() -> None:
    assert not Check("logits", "x", (), math.nan, 1.0).ok
    assert not Check("logits", "x", (), 0.0, math.nan).ok
    assert not verify.compare("logits", "x", np.zeros(1), np.array([np.inf]), 1e-5).ok
    assert not verify.compare("logits", "x", np.zeros(2), np.zeros(3), 1.0).ok


def test_nanogpts_and_our_own_exports(tmp_path: Path) -> None:
    """Absent biases are zeros in the reference; its activation is the source's."""
    cfg = dataclasses.replace(CFG, activation="gelu", bias=False)
    params = jax.device_get(scaled_params(cfg, jax.random.key(0)))
    (tmp_path / "hf").mkdir()
    huggingface.write_folder(tmp_path / "hf", cfg, params, None)
    save_nanogpt(tmp_path / "ckpt.pt", cfg, params)
    nanogpt = SourceConfig(allow_pickle=True, activation=cfg.activation)
    for name, config in (("ckpt.pt", nanogpt), ("hf", SourceConfig())):
        source = sources.open_source(str(tmp_path / name), config)
        checks = verify.verify(source.cfg, params, load_reference(source))
        assert not failing(checks), verify.first_failure(checks)
        assert not any(c.name == "ln_f.bias" and c.group == "gradient" for c in checks)
    wrong = dataclasses.replace(source.cfg, activation="gelu_tanh")  # another one is seen
    source = sources.open_source(str(tmp_path / name), config)
    first = verify.first_failure(verify.verify(wrong, params, load_reference(source)))
    assert first is not None and (first.group, first.name) == ("activation", "h.0.mlp")


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_smallest_context_and_weights_that_are_all_zero(
    block_size: int, tmp_path: Path
) -> None:
    """No token follows another in a context of one: there are no gradients and no greedy text."""
    cfg = tiny(vocab_size=20, block_size=block_size, n_layer=1)
    params = jax.tree.map(jnp.zeros_like, scaled_params(cfg, jax.random.key(0)))
    huggingface.write_folder(tmp_path, cfg, jax.device_get(params), None)
    source = sources.open_source(str(tmp_path), BYTE)
    checks = verify.verify(source.cfg, params, load_reference(source))
    assert not failing(checks)
    assert ("gradient" in {check.group for check in checks}) == (block_size == 2)


def test_another_size_is_named(run: Run, source: Source) -> None:
    verify.check_sizes(run.config.model, source)
    erf = source._replace(cfg=dataclasses.replace(source.cfg, activation="gelu"), assumed="Why so")
    with pytest.raises(DataError, match=r"activation is gelu_tanh, there gelu; Why so$"):
        verify.check_sizes(run.config.model, erf)
    other = source._replace(cfg=tiny(vocab_size=256, n_layer=3, block_size=64))
    with pytest.raises(DataError, match="n_layer is 2, there 3"):
        verify.check_sizes(run.config.model, other)


# ---- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["", "--activation=gelu"])
def test_the_self_test_passes(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verify", "--self_test", "--size=tiny", *filter(None, [flag])]
    assert cli.run(convert_gpt2.main, argv) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = [line.rstrip() for line in said.out.splitlines()]
    assert lines[-1] == "75 of 75 comparisons hold"
    assert sum(bool(re.search(r" \d+ of \d+ ", line)) for line in lines) == 8  # one each part
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_the_self_test_passes_at_full_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(convert_gpt2.main, ["verify", "--self_test", "--size=gpt2"]) == 0
    assert "365 of 365 comparisons hold" in capsys.readouterr().out


def test_a_run_against_its_source_and_against_another(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*args: str) -> int:
        return cli.run(convert_gpt2.main, ["verify", *args])

    convert.import_run(str(folder), tmp_path / "run", BYTE)
    flags = ["--tokenizer=byte", "--json"]
    assert command(str(tmp_path / "run"), f"--against={folder}", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"ok", "first_difference", "checks"}
    first = {"group": "tensor", "name": "wte.weight", "shape": [256, 32], "ours": "wte/embedding"}
    assert report["checks"][0] == {**first, "difference": 0.0, "allowed": 0.0, "ok": True}
    assert report["ok"] and report["first_difference"] is None and len(report["checks"]) == 75
    convert.import_run(str(folder), tmp_path / "short", BYTE, block_size=32)
    against = str(tmp_path / "short"), f"--against={folder}"
    assert command(*against, *flags) == 65 and "--resized" in capsys.readouterr().err
    assert command(*against, *flags, "--resized") == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    # A head of its own, as a trained-on model may have it: a whole report, and its first place.
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    untied = tmp_path / "untied"
    untied.mkdir()
    (untied / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + np.float32(0.1)
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    assert command(str(tmp_path / "run"), f"--against={untied}", *flags) == 65
    said = capsys.readouterr()
    assert json.loads(said.out)["first_difference"] == "tensor lm_head.weight", said.err
    (tmp_path / "other").mkdir()
    write_random_model(CFG, tmp_path / "other", seed=1)
    assert command(str(tmp_path / "run"), f"--against={tmp_path / 'other'}", *flags) == 65
    said = capsys.readouterr()
    assert "tensor wte.weight" in said.err
    assert json.loads(said.out)["first_difference"] == "tensor wte.weight"


def test_a_head_of_its_own_is_compared_as_a_tensor_and_by_its_gradient(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, tie_head=False)
    write_random_model(cfg, tmp_path)
    source = sources.open_source(str(tmp_path), BYTE)
    assert not source.cfg.tie_head
    params = sources.load_model(str(tmp_path), BYTE).params
    checks = verify.verify(source.cfg, params, load_reference(source))
    assert not failing(checks), verify.first_failure(checks)
    assert len(checks) == 76
    heads = [check for check in checks if check.name == "lm_head.weight"]
    assert [check.group for check in heads] == ["tensor", "gradient"]
    assert {check.ours for check in heads} == {"lm_head/embedding"}
    params["lm_head"]["embedding"] = params["wte"]["embedding"]  # as if it were tied
    checks = verify.verify(source.cfg, params, load_reference(source))
    first = verify.first_failure(checks)
    assert first is not None and (first.group, first.name) == ("tensor", "lm_head.weight")
    assert {"logits", "gradient"} <= failing(checks)


@pytest.mark.parametrize(
    ("sizes", "tie_head"),
    [({"vocab_size": 200, "block_size": 40}, True), ({"vocab_size": 300}, False)],
)
def test_a_resized_run_is_compared_where_both_have_rows(
    sizes: dict[str, int], tie_head: bool, tmp_path: Path
) -> None:
    write_random_model(dataclasses.replace(CFG, tie_head=tie_head), tmp_path / "hf")
    source = sources.open_source(str(tmp_path / "hf"), BYTE)
    cfg, params = (smaller := resize(source, **sizes).source).cfg, read_params(smaller)
    with pytest.raises(DataError, match="pass --resized"):
        verify.check_sizes(cfg, source)
    verify.check_sizes(cfg, source, resized=True)
    wider = dataclasses.replace(cfg, n_layer=3)
    with pytest.raises(DataError, match="n_layer is 3, there 2"):
        verify.check_sizes(wider, source, resized=True)
    ours, reference = common_rows(cfg, params, source.cfg), load_reference(source)
    cut_reference(reference, ours.cfg)
    assert f"first {min(256, cfg.vocab_size)} tokens" in ours.note
    rolled = {**ours.params, "wpe": {"embedding": np.roll(ours.params["wpe"]["embedding"], 1)}}
    assert failing(list(verify.compare_tensors(ours.cfg, rolled, reference))) == {"tensor"}
    checks = verify.verify(ours.cfg, ours.params, reference)
    assert not failing(checks), verify.first_failure(checks)
    assert common_rows(source.cfg, params, source.cfg).note == ""
