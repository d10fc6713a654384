"""Int8 weights and an int8 cache: what they stand for, and what they cost."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
from gptjax import attention, kv_cache, model
from gptjax.commands import evaluate
from gptjax.kernels import int8
from gptjax.kernels.int8 import Int8, dequantize, quantize
from gptjax.terminal import cli

from .helpers import scaled_params, tiny

CFG = tiny()
PARAMS = scaled_params(CFG, jax.random.key(0), scale=4.0)
TOKENS = jax.random.randint(jax.random.key(9), (3, 12), 0, 61)


def worst(a: Any, b: Any) -> float:
    """The largest difference of finite numbers."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(b)
    return float(np.abs(a[finite] - b[finite]).max())


def logits(cfg: model.GPTConfig, params: model.Params) -> jax.Array:
    """By the decoder, with a cache."""
    return model.forward(cfg, params, TOKENS, cache=kv_cache.make_cache(cfg, 3, 16))[0]


# ---- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, -1])
def test_a_number_moves_by_half_a_step_at_most(axis: int) -> None:
    x = np.random.default_rng(1).normal(size=(40, 30)).astype(np.float32)
    x[3], x[:, 4] = 0, 0  # nothing to scale by
    q = quantize(jnp.asarray(x), axis)
    assert q.values.dtype == jnp.int8 and q.scale.shape == np.delete(x.shape, axis)
    step = np.abs(x).max(axis=axis, keepdims=True) / 127
    assert (np.abs(dequantize(q, axis) - x) <= 0.501 * step).all()
    assert int(jnp.abs(q.values).max()) == 127


@pytest.mark.parametrize("name", int8.PRODUCTS)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_product_is_that_of_the_dequantized_weights(name: str, rows: int) -> None:
    """In float64; the parts round x to 1/64516 of a row's largest number."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(rows, 64)).astype(np.float32) * np.logspace(0, 3, rows)[:, None]
    w = quantize(jnp.asarray(rng.normal(size=(64, 48)).astype(np.float32)), 0)
    found = jax.jit(int8.PRODUCTS[name])(x.astype(np.float32), w)
    turned = jax.jit(int8.PRODUCTS[name], static_argnums=2)(
        x.astype(np.float32), Int8(w.values.T, w.scale), 1
    )
    assert np.abs(found - turned).max() <= 1e-6 * np.abs(found).max()
    exact = np.asarray(dequantize(w, 0), np.float64)
    step = 1e-6 if name == "plain" else 1 / 129032  # or what float32 rounds
    limit = step * np.abs(x).max(1, keepdims=True) * np.abs(exact).sum(0)
    assert (np.abs(found - x @ exact) <= limit).all()


def test_a_product_of_cut_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jnp, "round", jnp.trunc)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_a_product_is_that_of_the_dequantized_weights("parts", 5)
    jax.clear_caches()  # no test is to find the program with the mistake


# ---- The model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("tie_head", [True, False])
def test_int8_weights_are_the_rounded_matrices(kernels: str, tie_head: bool) -> None:
    cfg = tiny(kernels=kernels, tie_head=tie_head)
    params = scaled_params(cfg, jax.random.key(0), scale=4.0)
    rounded = model.forward(cfg, model.round_matrices(params), TOKENS)[0]
    decoder = model.prepare_for_decoding(cfg, params, "int8")
    assert worst(logits(cfg, decoder), rounded) <= (1e-6 if kernels == "off" else 3e-4)
    # As they should, they differ from what was rounded by far more.
    assert 2e-3 < worst(rounded, model.forward(cfg, params, TOKENS)[0]) < 0.1
    matrices = [leaf for leaf in jax.tree.leaves(decoder) if leaf.dtype == jnp.int8]
    assert len(matrices) == 4 * cfg.n_layer + 2 - tie_head


def test_a_scale_of_the_wrong_axis_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: a scale for each input of a matrix, which is square here."""

    def mistaken(x: jax.Array, axis: int) -> Int8:
        return quantize(x, -1 if x.shape[-1] == x.shape[-2] else axis)

    monkeypatch.setattr(model, "quantize", mistaken)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_int8_weights_are_the_rounded_matrices("off", True)
    jax.clear_caches()


# ---- The cache -----------------------------------------------------------------------------------


def test_attention_to_int8_is_that_to_the_dequantized() -> None:
    q, k, v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 12, 3, 8)), jnp.float32)
    q, positions = q[:, :2], jnp.array([[4, 5], [10, 11]])
    k8, v8 = quantize(k, -1), quantize(v, -1)
    exact = attention.attend(q, dequantize(k8, -1), dequantize(v8, -1), positions)
    assert worst(attention.attend_int8(q, k8, v8, positions), exact) <= 1e-6
    swapped = attention.attend_int8(q, k8._replace(scale=v8.scale), v8, positions)
    assert worst(swapped, exact) > 1e-2


def test_an_int8_cache_holds_each_token_and_head_to_half_a_step() -> None:
    cfg = dataclasses.replace(CFG, cache="int8")
    decoder = model.prepare_for_decoding(cfg, PARAMS)
    cache = kv_cache.make_cache(cfg, 3, 16)
    assert isinstance(cache.k[0], Int8) and cache.k[0].values.dtype == jnp.int8
    assert cache.k[0].scale.shape == (3, 16, cfg.n_head)
    whole, _ = model.forward(cfg, decoder, TOKENS, cache=cache)
    assert 1e-5 < worst(whole, logits(CFG, decoder)) < 0.02
    grown = cache.grow(20).k[0]
    assert grown.values.shape[:2] == grown.scale.shape[:2] == (3, 20)
    # Token by token the same, so that a row's text does not depend on how it was read.
    for i in range(12):
        one, longer = model.forward(cfg, decoder, TOKENS[:, i : i + 1], cache=cache)
        assert longer is not None
        cache = longer
        assert worst(one[:, 0], whole[:, i]) <= 1e-2


# ---- Their cost ----------------------------------------------------------------------------------


def test_they_cost_a_trained_model_little(out: Path, folder: Path, capsys: Any) -> None:
    """Of the tests' run, after 40 steps: a thousandth of its loss."""
    losses = {}
    for flags in ((), ("--weights=int8",), ("--cache=int8",)):
        argv = [str(out), "--task=wikitext2", f"--data={folder}/corpus.txt", *flags]
        assert cli.run(evaluate.main, [*argv, "--compile_cache=off", "--limit=800"]) == 0
        losses[flags] = json.loads(capsys.readouterr().out)["nll"]
    plain = losses.pop(())
    for flags, loss in losses.items():
        assert 0 < abs(loss - plain) <= 1e-3 * plain, (flags, loss, plain)


def test_the_program_takes_them(out: Path, capsys: Any, restore_process: None) -> None:
    common = ["--compile_cache=off", f"--out_dir={out}", "--max_new_tokens=20", "--temperature=0"]
    for flags in ([], ["--weights=int8", "--cache=int8", "--draft=ngram"]):
        assert cli.run(sample.main, [*common, *flags]) == 0
        assert len(capsys.readouterr().out) > 20
