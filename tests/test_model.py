"""The model is GPT-2: its numbers against PyTorch's, its fast paths against its slow ones."""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.typing import ArrayLike

from gptjax import attention, blocks, functions, kv_cache, model
from gptjax.config import GPTConfig
from gptjax.errors import UsageError
from gptjax.functions import ACTIVATIONS
from gptjax.kernels import cuda, decode_attention
from gptjax.kv_cache import KVCache
from gptjax.loss import loss_fn
from gptjax.settings import architecture, fields_of, names

from .helpers import init_params, need, other_values, scaled_params, tiny

TOKENS = np.random.default_rng(0).integers(0, 61, (3, 16))


def max_difference(a: ArrayLike, b: ArrayLike) -> float:
    """Largest absolute difference; NaN if anything is NaN, so that `<=` fails."""
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def logits(cfg: GPTConfig, params: model.Params, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Of the real vocabulary, without its padding."""
    return np.asarray(jax.jit(model.forward, static_argnums=0)(cfg, params, tokens)[0])[
        ..., : cfg.vocab_size
    ]


# ---- Size and initialisation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ({}, 124_439_808),
        ({"n_layer": 24, "n_head": 16, "n_embd": 1024}, 354_823_168),
        ({"n_layer": 36, "n_head": 20, "n_embd": 1280}, 774_030_080),
        ({"n_layer": 48, "n_head": 25, "n_embd": 1600}, 1_557_611_200),
    ],
)
def test_parameter_counts_are_gpt2s(shape: dict[str, int], count: int) -> None:
    assert model.count_params(GPTConfig(**shape)) == count  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": False, "tie_head": False},
        *({name: v} for name in fields_of(GPTConfig) for v in other_values(name, tiny())),
    ],
)
def test_shapes_are_those_of_fresh_parameters(changes: dict[str, Any]) -> None:
    """With every value of every setting of the model."""
    cfg = dataclasses.replace(tiny(), **changes)
    made = jax.eval_shape(functools.partial(model.init_params, cfg), jax.random.key(0))
    assert model.param_shapes(cfg) == made


def test_tree_is_the_documented_one() -> None:
    cfg = tiny()
    params = init_params(cfg, jax.random.key(0))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == {
        "wte/embedding": (64, 32),
        "wpe/embedding": (16, 32),
        "h/ln_1/scale": (2, 32),
        "h/ln_1/bias": (2, 32),
        "h/attn/c_attn/kernel": (2, 32, 96),
        "h/attn/c_attn/bias": (2, 96),
        "h/attn/c_proj/kernel": (2, 32, 32),
        "h/attn/c_proj/bias": (2, 32),
        "h/ln_2/scale": (2, 32),
        "h/ln_2/bias": (2, 32),
        "h/mlp/c_fc/kernel": (2, 32, 128),
        "h/mlp/c_fc/bias": (2, 128),
        "h/mlp/c_proj/kernel": (2, 128, 32),
        "h/mlp/c_proj/bias": (2, 32),
        "ln_f/scale": (32,),
        "ln_f/bias": (32,),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_initial_statistics() -> None:
    cfg = tiny(n_layer=8, n_embd=128, tie_head=False)
    params = init_params(cfg, jax.random.key(0))
    rows = [params[name]["embedding"] for name in ("wte", "lm_head")]
    assert abs(np.corrcoef(np.ravel(rows[0]), np.ravel(rows[1]))[0, 1]) < 0.05
    h = params["h"]
    for kernel, std in (
        *((row[: cfg.vocab_size], 0.02) for row in rows),
        (h["attn"]["c_attn"]["kernel"], 0.02),
        (h["mlp"]["c_fc"]["kernel"], 0.02),
        (h["attn"]["c_proj"]["kernel"], 0.02 / math.sqrt(16)),
        (h["mlp"]["c_proj"]["kernel"], 0.02 / math.sqrt(16)),
    ):
        assert abs(float(kernel.std()) / std - 1) <= 0.03
        assert abs(float(kernel.mean())) <= 0.03 * std
    assert float(jnp.abs(h["mlp"]["c_fc"]["bias"]).max()) == 0
    assert all(float(jnp.abs(row[cfg.vocab_size :]).max()) == 0 for row in rows)
    layers = h["attn"]["c_attn"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])


def test_first_loss_is_the_loss_of_knowing_nothing() -> None:
    cfg = tiny(n_embd=64)
    log_probabilities = jax.nn.log_softmax(logits(cfg, init_params(cfg, jax.random.key(0))))
    targets = np.random.default_rng(1).integers(0, cfg.vocab_size, TOKENS.shape)
    loss = -np.take_along_axis(np.asarray(log_probabilities), targets[..., None], -1).mean()
    assert abs(loss - math.log(cfg.vocab_size)) <= 0.1


# ---- Causality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 7, 15])
def test_no_gradient_from_the_future(position: int) -> None:
    """The logits at a position depend on the embeddings at and before it, on no later one."""
    cfg = tiny()
    params = scaled_params(cfg, jax.random.key(0))
    positions = params["wpe"]["embedding"]

    def probe(wpe: jax.Array) -> jax.Array:
        changed = {**params, "wpe": {"embedding": wpe}}
        logits, _ = model.forward(cfg, changed, jnp.asarray(TOKENS[:1]))
        return logits[0, position, : cfg.vocab_size].sum()

    gradient = np.abs(jax.grad(probe)(positions)).max(axis=1)
    assert (gradient[: position + 1] > 0).all()
    assert (gradient[position + 1 :] == 0).all()


def test_causality_gate_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(q: jax.Array, k: jax.Array, v: jax.Array, **_: object) -> jax.Array:
        return attention.attend(q, k, v, jnp.full((1, q.shape[1]), k.shape[1]))

    monkeypatch.setitem(attention.ATTENTION, "xla", leaky)
    with pytest.raises(AssertionError):
        test_no_gradient_from_the_future(7)


# ---- The same function by other ways -------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [{"unroll": 1}, {"unroll": 2}, {"remat": True}, {"remat": True, "unroll": 1}]
)
def test_scan_unrolled_and_remat_agree_to_the_bit(other: dict[str, Any]) -> None:
    cfg = tiny(n_layer=4)
    params = scaled_params(cfg, jax.random.key(0))

    def value_and_grad(cfg: GPTConfig) -> tuple[jax.Array, model.Params]:
        def probe(params: model.Params) -> jax.Array:
            logits, _ = model.forward(cfg, params, jnp.asarray(TOKENS))
            return jnp.square(logits[..., : cfg.vocab_size]).mean()

        return jax.jit(jax.value_and_grad(probe))(params)

    expected, found = (value_and_grad(c) for c in (cfg, dataclasses.replace(cfg, **other)))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        scale = float(jnp.abs(a).max())
        assert max_difference(a, b) <= 1e-6 * scale


def test_unstacked_layers_are_the_same_model() -> None:
    cfg = tiny()
    params = scaled_params(cfg, jax.random.key(0))
    unstacked = model.unstack_layers(params, cfg.n_layer)
    expected = logits(cfg, params)
    assert max_difference(expected, logits(cfg, unstacked)) <= 1e-6 * np.abs(expected).max()


@functools.cache
def cached_case() -> tuple[GPTConfig, model.Params, np.ndarray]:
    """A model, its layers unstacked, and the logits of TOKENS without a cache."""
    cfg = tiny()
    params = scaled_params(cfg, jax.random.key(0))
    return cfg, model.unstack_layers(params, cfg.n_layer), logits(cfg, params)


def check_pieces(cuts: list[int]) -> None:
    """Feed TOKENS to the cache in pieces that end at these positions; compare every logit."""
    cfg, params, expected = cached_case()
    forward = jax.jit(model.forward, static_argnums=0)
    cache = kv_cache.make_cache(cfg, len(TOKENS), cfg.block_size)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, TOKENS.shape[1]], strict=True):
        piece, cache = forward(cfg, params, TOKENS[:, start:end], cache=cache)
        pieces.append(piece[..., : cfg.vocab_size])
    found = np.concatenate(pieces, axis=1)
    assert max_difference(expected, found) <= 2e-6 * np.abs(expected).max()
    assert np.array_equal(expected.argmax(-1), found.argmax(-1))
    assert cache is not None and cache.length_B.tolist() == [TOKENS.shape[1]] * len(TOKENS)


def check_prompts_of_different_length() -> None:
    """Read padded prompts, then one token at a time; compare the logits of every next token."""
    cfg, params, expected = cached_case()
    next_logits = jax.jit(model.next_logits, static_argnums=0)
    rows, length_B = np.arange(3), np.array([3, 9, 1])
    cache = kv_cache.make_cache(cfg, 3, cfg.block_size)
    found, cache = next_logits(cfg, params, TOKENS[:, :9], cache, length_B)
    for step in range(7):
        wanted = expected[rows, length_B + step - 1]
        assert max_difference(wanted, found[:, : cfg.vocab_size]) <= 2e-6 * np.abs(expected).max()
        assert cache.length_B.tolist() == (length_B + step).tolist()
        found, cache = next_logits(cfg, params, TOKENS[rows, length_B + step][:, None], cache)


CUTS = {
    "token by token": list(range(1, 16)),
    "prefill 1": [1, 9],
    "prefill 8": [8, 9, 10],
    "all": [],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_cached_is_the_full_forward_at_every_position(cuts: list[int]) -> None:
    check_pieces(cuts)


def test_next_logits_are_the_full_forwards_behind_prompts_of_different_length() -> None:
    check_prompts_of_different_length()


WRITE, OF_LAYER, ADVANCE = kv_cache.write, KVCache.of_layer, KVCache.advance
CACHE_MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "written at the start again": (kv_cache, "write", lambda x, new, at: WRITE(x, new, at * 0)),
    "written one too late": (kv_cache, "write", lambda x, new, at: WRITE(x, new, at + 1)),
    "positions one too high": (
        KVCache,
        "positions",
        lambda cache, T: cache.length_B[:, None] + jnp.arange(1, T + 1)[None],
    ),
    "positions that begin at 0 again": (
        KVCache,
        "positions",
        lambda cache, T: cache.length_B[:, None] * 0 + jnp.arange(T)[None],
    ),
    "one layer for all": (KVCache, "of_layer", lambda cache, layer: OF_LAYER(cache, 0)),
    "not advanced": (KVCache, "advance", lambda cache, count: cache),
    "padding counted": (
        KVCache,
        "advance",
        lambda cache, count: ADVANCE(cache, count) if isinstance(count, int) else cache,
    ),
    "nothing masked": (
        attention.CACHED_ATTENTION,
        "xla",
        attention.after_update(
            lambda q, k, v, positions: attention.attend(q, k, v, positions + 99)
        ),
    ),
    "no token sees the newest": (
        attention.CACHED_ATTENTION,
        "xla",
        attention.after_update(
            lambda q, k, v, positions: attention.attend(q, k, v, jnp.maximum(positions - 1, 0))
        ),
    ),
}


@pytest.mark.parametrize("mistake", CACHE_MISTAKES)
def test_cache_gate_turns_red(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = CACHE_MISTAKES[mistake]
    cached_case()
    jax.clear_caches()
    patch = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
    patch(owner, name, wrong)
    with pytest.raises(AssertionError):
        check_prompts_of_different_length()
    if mistake == "written at the start again":
        with pytest.raises(AssertionError):
            check_pieces([15])
    jax.clear_caches()


def check_products_are_two_dimensional() -> None:
    """All that read a weight or make its gradient; attention's have four dimensions."""
    cfg = tiny(unroll=1)
    step = jax.jit(jax.grad(loss_fn, argnums=1), static_argnums=0)
    text = step.lower(cfg, init_params(cfg, jax.random.key(0)), TOKENS).as_text()
    products = re.findall(r"dot_general [^:]*: \(tensor<(.*?)>, tensor<(.*?)>", text)
    dimensions = [shape.count("x") for operands in products for shape in operands]
    assert dimensions.count(2) >= 2 * 15  # 4 weights and the head, 3 products each
    assert {*dimensions} == {2, 4}


def test_products_are_two_dimensional() -> None:
    check_products_are_two_dimensional()


def test_two_dimensions_gate_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(cfg: GPTConfig, x: jax.Array, features: int, name: str, *_: float) -> jax.Array:
        return nn.Dense(features, use_bias=cfg.bias, name=name)(x)

    monkeypatch.setattr(blocks, "linear", linear)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        check_products_are_two_dimensional()
    jax.clear_caches()


def test_bfloat16_is_near_float32() -> None:
    cfg = tiny()
    params = init_params(cfg, jax.random.key(0))
    half = logits(dataclasses.replace(cfg, dtype="bfloat16"), params)
    assert half.dtype == np.float32
    full = logits(cfg, params)
    difference = max_difference(half, full)
    assert 0 < difference <= 0.03 * np.abs(full).max()


def test_padding_rows_never_speak() -> None:
    cfg = tiny()
    params = scaled_params(cfg, jax.random.key(0))
    padded, _ = model.forward(cfg, params, jnp.asarray(TOKENS))
    assert padded.shape[-1] == 64
    assert (np.asarray(padded)[..., 61:] == -np.inf).all()


def test_dropout_comes_from_its_key_alone() -> None:
    cfg = tiny(dropout=0.3)
    params = scaled_params(cfg, jax.random.key(0))
    run = jax.jit(model.hidden_states, static_argnums=0)
    keys = [jax.random.split(jax.random.key(i), len(TOKENS)) for i in (1, 1, 2)]
    first, again, other = (run(cfg, params, TOKENS, dropout_key=key)[0] for key in keys)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    without = dataclasses.replace(cfg, dropout=0.0)
    assert np.array_equal(logits(cfg, params), logits(without, params))


# ---- Attention -----------------------------------------------------------------------------------


HERE = [name for name in attention.ATTENTION if name == "xla"]  # the others are tested below


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 256])
def test_attention_is_the_reference(name: str, length: int) -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, length, 2, 8)) * 3
    positions = jnp.arange(length)[None]

    def probe(attend: Any) -> Any:
        square = jax.value_and_grad(lambda *qkv: (attend(*qkv) ** 2).sum(), argnums=(0, 1, 2))
        return jax.tree.leaves(jax.jit(square)(q, k, v))

    expected = probe(lambda q, k, v: attention.attend(q, k, v, positions))
    for a, b in zip(expected, probe(attention.ATTENTION[name]), strict=True):
        assert max_difference(a, b) <= 1e-5 * max(1, float(jnp.abs(a).max()))


@pytest.mark.parametrize("name", HERE)
def test_dropout_of_attention_keeps_the_mean(name: str) -> None:
    """What is kept is larger by as much: the weights still have the sum 1, on average."""
    q, k = jax.random.normal(jax.random.key(0), (2, 8, 200, 4, 8))
    attend = jax.jit(attention.ATTENTION[name], static_argnames="dropout")
    keys = jax.random.split(jax.random.key(1), len(q))
    sums = attend(q, k, jnp.ones_like(q), dropout=0.25, keys_B=keys)[..., 0]
    assert abs(float(sums.mean()) - 1) <= 0.01
    assert float(sums[:, -1].std()) >= 0.05


def test_the_settings_are_the_functions() -> None:
    """Every choice but auto has a function for whole sequences."""
    names = get_args(get_type_hints(GPTConfig)["attention"])
    assert {*names} - {"auto"} == {*attention.ATTENTION}


def test_attention_with_a_cache_is_the_formula() -> None:
    """In float64, head by head; what lies behind a query's position has no say."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 12, 3, 8)).astype(np.float32)
    q, length_B = q[:, :2], jnp.array([4, 10])
    behind = np.arange(12)[None, :, None, None] >= length_B[:, None, None, None]
    held_k, held_v = (np.where(behind, np.float32(1e4), x) for x in (k, v))
    new_k, new_v = (np.stack([x[0, 4:6], x[1, 10:12]]) for x in (k, v))
    cache = KVCache((held_k,), (held_v,), length_B)
    found, cache = jax.jit(attention.CACHED_ATTENTION["xla"])(q, new_k, new_v, cache)
    for b, t, h in np.ndindex(2, 2, 3):
        seen = slice(0, length_B[b] + t + 1)
        assert np.array_equal(cache.k[0][b, seen], k[b, seen])
        assert np.array_equal(cache.v[0][b, seen], v[b, seen])
        scores = k[b, seen, h].astype(np.float64) @ q[b, t, h] / math.sqrt(8)
        weights = np.exp(scores - scores.max())
        expected = weights @ v[b, seen, h] / weights.sum()
        assert max_difference(found[b, t, h], expected) <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "shape", "expected"),
    [
        ({}, (2, 1, 512), "flash"),
        ({"attention": "flash"}, (2, 1, 512), "flash"),
        ({}, (2, 2, 512), "xla"),
        ({"dtype": "float16"}, (2, 1, 512), "cudnn"),
        ({"n_head": 6}, (2, 1, 512), "cudnn"),
        ({"n_head": 192}, (2, 1, 512), "xla"),  # heads of 4
        ({"n_head": 4}, (2, 1, 512), "xla"),  # heads of 192
        ({"attention": "xla"}, (2, 1, 512), "xla"),
        ({"kernels": "off"}, (2, 1, 512), "xla"),
        ({"cache": "int8"}, (2, 1, 512), "int8"),
        ({}, (4, 1024, 1024), "cudnn_prompt"),
        ({}, (3, 1024, 1024), "xla"),  # not worth loading cuDNN for
        ({}, (4, 1024, 2048), "xla"),  # others may stand before these
        ({"n_head": 4}, (4, 1024, 1024), "xla"),
        ({"attention": "xla"}, (4, 1024, 1024), "xla"),
        ({"kernels": "off"}, (4, 1024, 1024), "xla"),
        ({"cache": "int8"}, (4, 1024, 1024), "int8"),
    ],
)
def test_what_attends_to_a_cache(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    shape: tuple[int, int, int],
    expected: str,
) -> None:
    monkeypatch.setattr(cuda, "capability", lambda: cuda.HOPPER)
    monkeypatch.setattr(cuda, "available", lambda: True)
    fields = {"dtype": "bfloat16", "attention": "cudnn", **changes}
    cfg = GPTConfig(n_layer=1, n_embd=768, **{"n_head": 12, **fields})
    assert attention.choose_cached_attention(cfg, *shape) == expected
    monkeypatch.setattr(cuda, "capability", lambda: (8, 0))
    without = "cudnn" if expected == "flash" else expected
    assert attention.choose_cached_attention(cfg, *shape) == without


def test_prompts_that_fill_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are read as whole sequences, and the tokens behind them are those of the plain decoder."""
    cfg, params, expected = cached_case()
    tokens, shapes = jnp.array(TOKENS), []

    def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
        shapes.append(q_BTHK.shape)
        return attention.attend_xla(q_BTHK, k_BTHK, v_BTHK)

    monkeypatch.setattr(attention, "attend_cudnn", attend)
    monkeypatch.setattr(attention, "PROMPT_SCORES", 3 * 9**2)
    monkeypatch.setitem(attention.CACHED_ATTENTION, "cudnn", attention.CACHED_ATTENTION["xla"])
    cfg = dataclasses.replace(cfg, attention="cudnn")
    cache = kv_cache.make_cache(cfg, 3, 9)
    assert cache.size == 9
    found, cache = model.next_logits(cfg, params, tokens[:, :9], cache, jnp.full(3, 9))
    assert shapes == [(3, 9, cfg.n_head, cfg.head_dim)] * cfg.n_layer
    cache = cache.grow(cfg.block_size)
    for step in range(9, 12):
        wanted = expected[:, step - 1]
        difference = max_difference(wanted, found[:, : cfg.vocab_size])
        assert difference <= 2e-6 * np.abs(wanted).max()
        found, cache = model.next_logits(cfg, params, tokens[:, step, None], cache)
    assert len(shapes) == cfg.n_layer


CUDA, ROCM = "PJRT C API cuda 13000", "PJRT C API rocm 60000"


def fake_devices(
    monkeypatch: pytest.MonkeyPatch, backend: str, version: str, *capabilities: str | None
) -> None:
    client = SimpleNamespace(platform_version=version)
    devices = [SimpleNamespace(client=client, compute_capability=c) for c in capabilities]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.mark.parametrize(
    ("backend", "version", "capability", "dtype", "runs"),
    [
        ("cpu", "cpu", None, "bfloat16", False),
        ("gpu", CUDA, "9.0", "bfloat16", True),
        ("gpu", CUDA, "8.0", "float16", True),
        ("gpu", CUDA, "9.0", "float32", False),
        ("gpu", CUDA, "7.5", "float16", False),
        ("gpu", ROCM, "gfx90a", "bfloat16", False),
        ("tpu", "TFRT TPU v5e", None, "bfloat16", False),
    ],
)
def test_cudnn_is_refused_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    version: str,
    capability: str | None,
    dtype: Any,
    runs: bool,
) -> None:
    """Whatever machine the test itself is on."""
    fake_devices(monkeypatch, backend, version, capability)
    chosen = model.resolve(GPTConfig(dtype=dtype)).attention
    assert chosen == ("cudnn" if runs else "xla")
    if runs:
        assert model.resolve(GPTConfig(attention="cudnn", dtype=dtype)).attention == "cudnn"
    else:
        with pytest.raises(UsageError, match="--attention=cudnn: needs an NVIDIA GPU"):
            model.resolve(GPTConfig(attention="cudnn", dtype=dtype))
    with pytest.raises(UsageError, match="--dropout="):
        GPTConfig(attention="cudnn", dropout=0.1)


@pytest.mark.parametrize(
    ("changes", "capability", "why"),
    [
        ({}, "9.0", ""),
        ({}, "8.0", "is for an H100"),
        ({"dtype": "float16"}, "9.0", "for bfloat16, but this is float16"),
        ({"block_size": 96}, "9.0", "but this is 64, 96"),
        ({"n_head": 16}, "9.0", "but this is 48, 1024"),
        ({"activation": "gelu"}, "9.0", "NVRTC is missing"),
        ({"kernels": "off"}, "9.0", "off"),  # auto does not take it; who names it gets it
    ],
)
def test_flash_is_chosen_for_dropout_where_its_kernels_run(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], capability: str, why: str
) -> None:
    fake_devices(monkeypatch, "gpu", CUDA, capability)
    monkeypatch.setattr(cuda, "available", lambda: "NVRTC" not in why)
    monkeypatch.setattr(cuda, "refusal", lambda: why)
    cfg = dataclasses.replace(GPTConfig(dtype="bfloat16", dropout=0.1), **changes)
    named = dataclasses.replace(cfg, attention="flash")
    assert model.resolve(cfg).attention == ("xla" if why else "flash")
    if why in ("", "off"):
        assert model.resolve(named).attention == "flash"
    else:
        with pytest.raises(UsageError, match=f"--attention=flash: .*{why}"):
            model.resolve(named)
    without = dataclasses.replace(cfg, attention_dropout=False)
    assert model.resolve(without).attention == "cudnn"


@pytest.mark.parametrize(
    ("backend", "version", "capabilities", "dtype"),
    [
        ("cpu", "cpu", [None], "float32"),
        ("gpu", CUDA, ["9.0"], "bfloat16"),
        ("gpu", CUDA, ["12.0"], "bfloat16"),
        ("gpu", CUDA, ["8.0"], "bfloat16"),
        ("gpu", CUDA, ["7.5"], "float16"),
        ("gpu", CUDA, ["7.0"], "float16"),
        ("gpu", CUDA, ["8.6", "7.5"], "float16"),
        ("gpu", ROCM, ["gfx90a"], "bfloat16"),
        ("tpu", "TFRT TPU v5e", [None], "bfloat16"),
    ],
)
def test_half_precision_is_what_the_devices_compute_in(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    version: str,
    capabilities: list[str | None],
    dtype: str,
) -> None:
    fake_devices(monkeypatch, backend, version, *capabilities)
    cfg = model.resolve(GPTConfig())
    modern = version == CUDA and dtype == "bfloat16"
    assert (cfg.dtype, cfg.attention) == (dtype, "cudnn" if modern else "xla")
    assert model.resolve(GPTConfig(dtype="bfloat16")).dtype == "bfloat16"  # emulated, if need be


# ---- Against PyTorch -----------------------------------------------------------------------------


def torch_results(cfg: GPTConfig, params: model.Params) -> tuple[np.ndarray, float, dict]:
    """Logits and loss of TOKENS from the PyTorch twin, and the loss's gradient by our names."""
    torch = need("torch")
    from .torch_gpt import TorchGPT, copy_params, mean_loss, named_gradients

    twin = TorchGPT(cfg)
    copy_params(params, twin)
    out = twin(torch.tensor(TOKENS))[..., : cfg.vocab_size]
    loss = mean_loss(lambda tokens: twin(tokens)[..., : cfg.vocab_size], torch.tensor(TOKENS))
    loss.backward()
    return out.detach().numpy(), loss.item(), named_gradients(twin)


def check_against_torch(cfg: GPTConfig) -> None:
    params = scaled_params(cfg, jax.random.key(3))
    expected, expected_loss, gradients = torch_results(cfg, params)
    found = logits(cfg, params)
    assert max_difference(expected, found) <= 1e-5 * max(1, np.abs(expected).max())
    assert np.array_equal(expected.argmax(-1), found.argmax(-1))

    gradient = jax.jit(jax.value_and_grad(loss_fn, argnums=1), static_argnums=0)
    loss, grads = gradient(cfg, params, TOKENS)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    for path, ours in jax.tree_util.tree_leaves_with_path(grads):
        theirs = gradients[jax.tree_util.keystr(path, simple=True, separator="/")]
        assert max_difference(ours, theirs) <= 1e-5 * np.abs(theirs).max(), path


on_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason="cuDNN needs an NVIDIA GPU: "
    "JAX_PLATFORMS=cuda pytest -n 0 tests/test_model.py -k 'cudnn or on_a_gpu'",
)


@on_gpu
def test_cudnn_attention_is_attention() -> None:
    """Forward and gradients in bfloat16: as near to float32 as the reference in bfloat16 is."""
    q, k, v, g = jax.random.normal(jax.random.key(0), (4, 2, 256, 6, 64))

    def run(function: Any, dtype: str) -> list[np.ndarray]:
        y, vjp = jax.vjp(lambda *qkv: function(*(x.astype(dtype) for x in qkv)), q, k, v)
        return [np.asarray(x, np.float32) for x in (y, *vjp(g.astype(dtype)))]

    with jax.default_matmul_precision("highest"):
        exact = run(attention.attend_xla, "float32")
    reference, fast = (
        run(function, "bfloat16") for function in (attention.attend_xla, attention.attend_cudnn)
    )
    for name, x, y, z in zip("yqkv", exact, reference, fast, strict=True):
        error, allowed = np.linalg.norm(z - x), np.linalg.norm(y - x)
        assert error <= 1.5 * allowed, (name, error, allowed)


@on_gpu
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_attention_to_caches_on_a_gpu(name: str) -> None:
    """Of one token a row, at positions up to one that no longer fits into the cache."""
    if name == "flash" and (why := decode_attention.refusal(1, 64, "bfloat16")):
        pytest.skip(why)
    q, new_k, new_v = jax.random.normal(jax.random.key(0), (3, 9, 1, 12, 64))
    k, v = jax.random.normal(jax.random.key(1), (2, 9, 256, 12, 64))
    length_B = jnp.array([0, 1, 2, 63, 64, 127, 200, 255, 256])

    def run(name: str, dtype: str) -> list[np.ndarray]:
        cache = KVCache((k.astype(dtype),), (v.astype(dtype),), length_B)
        new = (q.astype(dtype), new_k.astype(dtype), new_v.astype(dtype))
        y, cache = attention.CACHED_ATTENTION[name](*new, cache)
        return [np.asarray(x, np.float32) for x in (y, cache.k[0], cache.v[0])]

    with jax.default_matmul_precision("highest"):
        exact, *_ = run("xla", "float32")
    reference, *caches = run("xla", "bfloat16")
    fast, *found = run(name, "bfloat16")
    allowed, error = (np.linalg.norm((y - exact).reshape(9, -1), axis=1) for y in (reference, fast))
    assert (error <= 1.5 * allowed + 1e-6).all(), (error, allowed)
    assert all(map(np.array_equal, found, caches))


@on_gpu
def test_prompts_by_cudnn_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs that read prompts of GPT-2's width beside the one in float32."""
    kinds: dict[str, Any] = {"n_layer": 2, "n_head": 12, "n_embd": 768, "block_size": 256}
    cfg = GPTConfig(**kinds, vocab_size=1000, dtype="bfloat16", attention="cudnn")
    exactly = dataclasses.replace(cfg, dtype="float32", attention="xla", kernels="off")
    params = init_params(exactly, jax.random.key(0))
    weights = {c.dtype: model.prepare_for_decoding(c, params) for c in (cfg, exactly)}
    tokens = jax.random.randint(jax.random.key(1), (8, 256), 0, 1000)
    length_B = jnp.array([1, 2, 63, 64, 65, 200, 255, 256])
    monkeypatch.setattr(attention, "PROMPT_SCORES", 8 * 256**2)
    assert attention.choose_cached_attention(cfg, 8, 256, 256) == "cudnn_prompt"

    def read(cfg: GPTConfig) -> np.ndarray:
        cache = kv_cache.make_cache(cfg, 8, 256)
        logits, _ = model.next_logits(cfg, weights[cfg.dtype], tokens, cache, length_B)
        return np.asarray(logits, np.float32)[:, :1000]

    with jax.default_matmul_precision("highest"):
        exact = read(exactly)
    fast = read(cfg)
    monkeypatch.setattr(attention, "PROMPT_SCORES", 8 * 256**2 + 1)
    reference = read(cfg)
    assert not np.array_equal(fast, reference)
    allowed, error = (np.linalg.norm(y - exact, axis=1) for y in (reference, fast))
    assert (error <= 1.5 * allowed).all(), (error, allowed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layer", 2),
        *((name, v) for name in names(GPTConfig, architecture) for v in other_values(name, tiny())),
    ],
)
def test_logits_loss_and_gradients_are_pytorchs(name: str, value: Any) -> None:
    """With every value of every architecture option."""
    check_against_torch(tiny(**{name: value}))


def with_gradient(function: Any, backward: Any) -> Any:
    """`function` of one array, with this gradient."""
    changed = jax.custom_vjp(lambda x: function(x))
    changed.defvjp(lambda x: (function(x), x), backward)
    return changed


def norm_by_constants(x_ND: jax.Array, scale_D: jax.Array) -> jax.Array:
    mean_N1, rstd_N1 = jax.lax.stop_gradient(functions._moments(x_ND))
    return (x_ND - mean_N1) * rstd_N1 * scale_D[None]


PLANTED = {
    "erf GELU": (ACTIVATIONS, "gelu_tanh", lambda x: nn.gelu(x, approximate=False)),
    "tanh GELU": (ACTIVATIONS, "gelu", lambda x: nn.gelu(x, approximate=True)),
    "GELU's gradient without the gate's slope": (
        ACTIVATIONS,
        "gelu_tanh",
        with_gradient(
            functions.gelu_tanh, lambda x, gradient: (gradient * functions._tanh_gate(x),)
        ),
    ),
    "exact GELU's gradient without the gate's slope": (
        ACTIVATIONS,
        "gelu",
        with_gradient(functions.gelu_erf, lambda x, gradient: (gradient * functions._erf_gate(x),)),
    ),
    "LayerNorm's moments taken for constants": (blocks, "layer_norm", norm_by_constants),
    "shifted positions": (
        model.jnp,
        "broadcast_to",
        lambda x, shape, broadcast=jnp.broadcast_to: broadcast(jnp.roll(x, 1, axis=0), shape),
    ),
    "epsilon 1e-6": (functions, "EPSILON", 1e-6),
}


@pytest.mark.parametrize("name", PLANTED)
def test_pytorch_gate_turns_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, mistake = PLANTED[name]
    jax.clear_caches()
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        if isinstance(owner, dict):
            patch.setitem(owner, attribute, mistake)
        else:
            patch.setattr(owner, attribute, mistake)
        check_against_torch(tiny(activation=attribute) if owner is ACTIVATIONS else tiny())
    jax.clear_caches()
