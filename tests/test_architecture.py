"""Every architecture option is counted, and never taken for another, wherever a model goes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import train
from gptjax import model, sampling
from gptjax.checkpoints import record
from gptjax.checkpoints.run_folder import Run
from gptjax.config import GPTConfig, SampleConfig, TrainConfig
from gptjax.config_file import load_config
from gptjax.conversion import tensors, verify
from gptjax.conversion.tensors import Source
from gptjax.errors import DataError, UsageError
from gptjax.settings import architecture, flatten, names
from gptjax.terminal import cli
from gptjax.tokenizer import ByteTokenizer
from gptjax.training import metrics, origin

from .helpers import TINY, init_params, need, other_values, scaled_params, tiny

ALL = names(GPTConfig, architecture)
CHANGES = [{name: value} for name in ALL for value in other_values(name, tiny())]
SIZES = [change for change in CHANGES if type(*change.values()) is int]
OPTIONS = [change for change in CHANGES if change not in SIZES]


# ---- What it computes, beside tests/test_model.py, which compares each with the PyTorch twin


@pytest.mark.parametrize("changes", [{}, *OPTIONS], ids=str)
def test_decoding_is_the_full_forward(changes: dict[str, Any]) -> None:
    cfg = tiny(**changes)
    params = scaled_params(cfg, jax.random.key(1))
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, 4).tolist()
    pieces = sampling.generate(
        cfg,
        model.prepare_for_decoding(cfg, params),
        [prompt],
        SampleConfig(temperature=0),
        max_new_tokens=12,
    )
    new = np.concatenate(list(pieces), axis=1)
    logits, _ = jax.jit(model.forward, static_argnums=0)(
        cfg, params, np.array([[*prompt, *new[0]]])
    )
    assert np.argmax(logits[:, 3:-1], axis=-1).tolist() == new.tolist()


def test_what_is_no_architecture_option_computes_the_same() -> None:
    """No other setting of the model changes a parameter, or the logits by more than rounding."""
    cfg, tokens = tiny(), np.arange(16)[None]
    params = init_params(cfg, jax.random.key(0))
    forward = jax.jit(model.forward, static_argnums=0)
    expected, _ = forward(cfg, params, tokens)
    for name in set(flatten(cfg)) - {*ALL, "attention"}:  # cudnn is refused on a CPU
        values: dict[str, list[Any]] = {"dropout": [0.5], "unroll": [1]}
        for value in values.get(name) or other_values(name, cfg):
            other = model.resolve(dataclasses.replace(cfg, **{name: value}))
            assert model.param_shapes(other) == model.param_shapes(cfg), name
            logits, _ = forward(other, params, tokens)
            real = slice(cfg.vocab_size)
            assert np.abs(logits - expected)[..., real].max() <= 2e-2 * np.std(expected[..., real])


@pytest.mark.parametrize("changes", [{}, *CHANGES], ids=str)
def test_parameters_and_flops_are_those_of_the_twin(changes: dict[str, Any]) -> None:
    """PaLM's formula counts 6 for each bias and LayerNorm too, which multiply no matrix."""
    torch = need("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from .torch_gpt import TorchGPT, mean_loss

    cfg = tiny(**changes)
    twin = TorchGPT(dataclasses.replace(cfg, vocab_multiple=1))
    assert model.count_params(cfg) == sum(p.numel() for p in twin.parameters())
    windows = torch.zeros((1, cfg.block_size + 1), dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mean_loss(twin, windows).backward()
    vectors = sum(p.numel() for p in twin.parameters() if p.dim() == 1)
    products = counter.get_total_flops() / cfg.block_size
    assert metrics.flops_per_token(cfg) == products + 6 * vectors


# ---- Resuming


@pytest.fixture(scope="module")
def run_dir(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    path = tmp_path_factory.mktemp("architecture") / "run"
    argv = [*TINY, f"--dataset={folder}/corpus.txt", f"--out_dir={path}", "--max_iters=1"]
    argv += ["--warmup_iters=0", "--sample_tokens=0", "--compile_cache=off"]
    assert cli.run(train.main, argv) == 0
    return path


def resume(run_dir: Path, name: str, value: Any) -> int:
    """Try to go on with another value; no step may be touched by that."""
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    argv = [f"--out_dir={run_dir}", "--init_from=resume", f"--{name}={value}"]
    code = cli.run(train.main, [*argv, "--max_iters=1", "--compile_cache=off"])
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before == ["1"]
    return code


@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("restore_process")
def test_another_one_is_refused_on_resume(
    name: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in other_values(name, load_config(run_dir / "config.json").model):
        assert resume(run_dir, name, value) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in ALL if name != "vocab_size"])
@pytest.mark.usefixtures("restore_process")
def test_a_forgotten_one_ends_with_the_name_of_an_array(
    name: str, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its field were not declared as architecture: no sound step is set aside."""
    monkeypatch.setattr(record, "FIXED", [])
    monkeypatch.setattr(record, "COMPARED", [])
    cfg = load_config(run_dir / "config.json").model
    for value in other_values(name, cfg):
        other = dataclasses.replace(cfg, **{name: value})
        if model.param_shapes(other) == model.param_shapes(cfg):
            continue  # nothing but its declaration can tell then
        assert resume(run_dir, name, value) == 75
        assert "params/" in capsys.readouterr().err


# ---- --init_from


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_source_keeps_its_own(changes: dict[str, Any]) -> None:
    theirs = tiny(**{"dropout": 0.1, **changes})
    source = Run(TrainConfig(model=theirs), ByteTokenizer(), {}, 0)
    config = TrainConfig(model=tiny(), init_from="out/other")
    (name,) = changes
    taken = origin.model_of_source(config, source, given=())
    kept: dict[str, Any] = {"block_size": 16} if name == "block_size" else {}  # longer ones are cut
    assert taken == dataclasses.replace(theirs, dropout=0.0, **kept)
    if name != "block_size":
        with pytest.raises(UsageError, match=f"--{name}="):
            origin.model_of_source(config, source, given=(name,))
    smaller = Run(TrainConfig(model=tiny()), ByteTokenizer(), {}, 0)
    with pytest.raises(UsageError, match=f"--{name}={changes[name]}: "):
        origin.model_of_source(TrainConfig(model=theirs, init_from="x"), smaller, given=(name,))


def test_a_source_is_cut_to_a_shorter_context() -> None:
    long, short = tiny(block_size=32), tiny()
    params = init_params(long, jax.random.key(0))
    cut = origin.take_params(model.param_shapes(short), params)
    assert jax.tree.map(np.shape, cut) == jax.tree.map(np.shape, model.param_shapes(short))
    assert np.array_equal(cut["wpe"]["embedding"], params["wpe"]["embedding"][:16])
    del cut["wpe"], params["wpe"]
    assert jax.tree.all(jax.tree.map(np.array_equal, cut, params))


def test_a_source_has_no_say_over_what_it_does_not_have() -> None:
    """As adapters beside its matrices; but nothing of its own may be lost."""
    theirs = {"wte": np.ones(3), "h": {"kernel": np.ones((2, 2))}}
    fresh = {"wte": np.zeros(3), "h": {"kernel": np.zeros((2, 2)), "adapter": np.zeros(2)}}
    taken = origin.take_params(fresh, theirs)
    assert taken["wte"].all() and taken["h"]["kernel"].all() and not taken["h"]["adapter"].any()
    with pytest.raises(UsageError, match="adapter"):
        origin.take_params(theirs, fresh)


# ---- Conversion


def source_of(cfg: GPTConfig) -> Source:
    return Source(cfg, {}, lambda name: np.zeros(0), "a file", ())


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_verify_names_another_one(changes: dict[str, Any]) -> None:
    (name,) = changes
    verify.check_sizes(tiny(), source_of(tiny()))
    if name in verify.UNSAID:  # padding is no part of a format, and biases are compared one by one
        return verify.check_sizes(tiny(**changes), source_of(tiny()))
    with pytest.raises(DataError, match=rf"\b{name} is {changes[name]},"):
        verify.check_sizes(tiny(**changes), source_of(tiny()))
    return None


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_parameter_has_a_published_name_or_is_refused(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(**changes)
    (name,) = changes
    params = init_params(cfg, jax.random.key(0))
    if name in tensors.SAID:
        written = sum(array.size for _, array in tensors.named_tensors(cfg, params))
        assert written == model.count_params(dataclasses.replace(cfg, bias=True))
        assert sum(int(np.prod(s.shape)) for s in tensors.slots(cfg)) == model.count_params(cfg)
        said = [other for other in tensors.SAID if other != name]
        monkeypatch.setattr(tensors, "SAID", said)  # as if the formats could not say it
    with pytest.raises(UsageError, match=f"--{name}={changes[name]}: "):
        dict(tensors.named_tensors(cfg, params))


def test_a_parameter_without_a_published_name_is_refused() -> None:
    """As one that is added by what is no architecture option: an export would be without it."""
    cfg = tiny()
    params = init_params(cfg, jax.random.key(0))
    params["h"]["attn"]["adapter"] = {"kernel": np.zeros((2, 32, 4))}
    with pytest.raises(UsageError, match="h/attn/adapter/kernel"):
        dict(tensors.named_tensors(cfg, params))
