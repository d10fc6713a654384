"""The cached decoder says what the plain model would say, whoever else is in the batch."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import kv_cache, model, sampling
from gptjax.config import GPTConfig, SampleConfig
from gptjax.errors import NonFiniteError, UsageError
from gptjax.kv_cache import KVCache
from gptjax.settings import fields_of

from .helpers import count_programs, scaled_params, tiny

CFG = tiny()
PARAMS = scaled_params(CFG, jax.random.key(0), scale=4.0)
DECODER = model.prepare_for_decoding(CFG, PARAMS)
GREEDY = SampleConfig(temperature=0)
PROMPT = [3, 1, 4, 1, 5]


def text(
    prompts: list[list[int]],
    how: SampleConfig = GREEDY,
    n: int = 8,
    *,
    cfg: GPTConfig = CFG,
    params: model.Params = DECODER,
    **kwargs: object,
) -> list[list[int]]:
    """All new tokens of each row."""
    pieces = sampling.generate(cfg, params, prompts, how, max_new_tokens=n, **kwargs)  # type: ignore[arg-type]
    return np.concatenate(list(pieces), axis=1).tolist()


def plain_greedy(prompt: list[int], n: int, cfg: GPTConfig = CFG) -> list[int]:
    """The reference: no cache, the whole context again for every token, the documented window."""
    forward = jax.jit(model.forward, static_argnums=0)
    context = sampling.cut(prompt, cfg.block_size)
    said = []
    for _ in range(n):
        padded = np.zeros((1, cfg.block_size), np.int32)
        padded[0, : len(context)] = context
        logits = forward(cfg, PARAMS, padded)[0][0, len(context) - 1]
        said.append(int(jnp.argmax(logits)))
        context = sampling.cut([*context, said[-1]], cfg.block_size)
    return said


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 48])
def test_greedy_is_the_model_without_a_cache(length: int) -> None:
    """Prompts up to three contexts long, and text that outgrows the context several times."""
    prompt = np.random.default_rng(length).integers(0, 61, length).tolist()
    assert text([prompt], n=40) == [plain_greedy(prompt, 40)]


def test_greedy_gate_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain_greedy(PROMPT, 40)
    monkeypatch.setattr(sampling, "cut", lambda context, limit: context[-limit:])
    assert text([PROMPT], n=40) != [expected]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    prompts = [[7], PROMPT, list(range(17)), list(range(30))]
    how = SampleConfig(temperature=1.0, repetition_penalty=1.3)
    together = text(prompts, how, n=30, seed=3)
    for prompt, said in zip(prompts, together, strict=True):
        assert text([prompt], how, n=30, seed=3) == [said]


def test_seed_and_number_make_the_sample() -> None:
    how = SampleConfig(temperature=1.0)
    first = text([PROMPT] * 3, how, n=20, seed=1, samples=[0, 1, 2])
    assert first == text([PROMPT] * 3, how, n=20, seed=1, samples=[0, 1, 2])
    assert first[1] == text([PROMPT], how, n=20, seed=1, samples=[1])[0]
    assert len({tuple(row) for row in first}) == 3
    assert first[0] != text([PROMPT], how, n=20, seed=2)[0]


def test_number_of_tokens() -> None:
    for n in (0, 1, 2, 16, 17, 18):
        pieces = list(sampling.generate(CFG, DECODER, [PROMPT], GREEDY, max_new_tokens=n))
        assert sum(piece.shape[1] for piece in pieces) == n


def test_padding_rows_are_never_drawn() -> None:
    flat = jax.tree.map(jnp.zeros_like, DECODER)  # all tokens alike
    said = text([[0]], SampleConfig(temperature=5.0), n=400, params=flat)[0]
    assert max(said) < CFG.vocab_size < CFG.padded_vocab_size
    assert len(set(said)) > 50


def test_broken_weights_are_an_error_not_token_zero() -> None:
    broken = {**DECODER, "ln_f": jax.tree.map(lambda p: p * np.nan, DECODER["ln_f"])}
    with pytest.raises(NonFiniteError, match="NaN"):
        text([PROMPT], params=broken)


def test_compiles_once_for_a_bucket_of_prompts() -> None:
    cfg = dataclasses.replace(CFG, block_size=128)
    params = model.prepare_for_decoding(cfg, scaled_params(cfg, jax.random.key(1)))
    how = SampleConfig(temperature=0.77)  # so that no other test has compiled it
    text([[1] * 3], how, n=20, cfg=cfg, params=params, cache_size=128)
    before = count_programs(sampling.prefill), count_programs(sampling.decode)
    for length in (1, 7, 30, 64):
        text([[2] * length], how, n=20, cfg=cfg, params=params, cache_size=128)
    assert (count_programs(sampling.prefill), count_programs(sampling.decode)) == before


def check_cache_stays_in_place() -> None:
    """The compiled decoder copies no layer of the cache from token to token."""
    cfg = dataclasses.replace(CFG, block_size=1024)
    decoder = jax.eval_shape(
        lambda: model.prepare_for_decoding(cfg, model.init_params(cfg, jax.random.key(0)))
    )
    for rows in (1, 2):
        keys = jax.eval_shape(lambda rows=rows: jax.random.split(jax.random.key(0), rows))
        state = jax.eval_shape(
            lambda rows=rows: sampling.DecoderState(
                sampling.make_cache(cfg, rows, 1024),
                jnp.zeros(rows, jnp.int32),
                jnp.int32(0),
                None,
                jnp.array(True),
            )
        )
        compiled = sampling.decode.lower(cfg, GREEDY, 4, decoder, state, keys).compile()
        program = compiled.as_text()
        assert program is not None
        copied = re.findall(r"= f32(\[[\d,]*1024,2,16\])\S* copy\(", program)
        assert copied == []


def test_cache_stays_in_place() -> None:
    check_cache_stays_in_place()


def test_in_place_gate_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: one array for all layers."""

    def stacked_cache(cfg: GPTConfig, batch: int, size: int) -> KVCache:
        shape = (cfg.n_layer, batch, size, cfg.n_head, cfg.head_dim)
        return KVCache((jnp.zeros(shape),), (jnp.zeros(shape),), jnp.zeros(batch, jnp.int32))

    def update(cache: KVCache, layer: int, k: jax.Array, v: jax.Array) -> object:
        k_LBSHK, v_LBSHK = (
            old.at[layer].set(kv_cache.write(old[layer], new, cache.length_B))
            for old, new in ((cache.k[0], k), (cache.v[0], v))
        )
        return k_LBSHK[layer], v_LBSHK[layer], KVCache((k_LBSHK,), (v_LBSHK,), cache.length_B)

    monkeypatch.setattr(sampling, "make_cache", stacked_cache)
    monkeypatch.setattr(KVCache, "update", update)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        check_cache_stays_in_place()
    jax.clear_caches()


# ---- Filters: which tokens are left --------------------------------------------------------------

PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
LOGITS = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]])) + 3.0


SAYS = {  # a value that leaves only the likeliest token, or makes it rare
    "temperature": 0.0,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 1.0,
    "repetition_penalty": 1e6,
}


@pytest.mark.parametrize("name", fields_of(SampleConfig))
def test_every_setting_has_a_say(name: str) -> None:
    logits = jnp.tile(LOGITS[:1], (200, 1))
    seen = jnp.zeros(logits.shape, bool).at[:, 1].set(True)  # the likeliest
    keys = jax.random.split(jax.random.key(0), 200)
    plain, drawn = (
        np.bincount(sampling.sample_token(logits, keys, seen, how), minlength=5)[1]
        for how in (
            SampleConfig(temperature=1),
            SampleConfig(**{"temperature": 1, name: SAYS[name]}),  # type: ignore[arg-type]
        )
    )
    assert 60 < plain < 100
    assert drawn < 30 if name == "repetition_penalty" else drawn == 200


def support(logits_BV: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(logits_BV)]


@pytest.mark.parametrize(
    ("filtered", "left"),
    [
        (sampling.keep_top_k(LOGITS, 1), {1}),
        (sampling.keep_top_k(LOGITS, 3), {1, 2, 3}),
        (sampling.keep_top_k(LOGITS, 99), {0, 1, 2, 3, 4}),
        (sampling.keep_top_p(LOGITS, 1e-6), {1}),
        (sampling.keep_top_p(LOGITS, 1e-45), {1}),
        (sampling.keep_top_p(LOGITS, 5e-324), {1}),
        (sampling.keep_top_p(LOGITS, 1 - 1e-12), {0, 1, 2, 3, 4}),
        (sampling.keep_top_p(LOGITS, 0.39), {1}),
        (sampling.keep_top_p(LOGITS, 0.41), {1, 2}),
        (sampling.keep_top_p(LOGITS, 0.86), {1, 2, 3, 4}),
        (sampling.keep_min_p(LOGITS, 1.0), {1}),
        (sampling.keep_min_p(LOGITS, 0.45), {1, 2, 3}),
    ],
)
def test_support(filtered: jax.Array, left: set[int]) -> None:
    assert support(filtered) == [left, {4 - i for i in left}]
    kept = np.isfinite(np.asarray(filtered))
    assert np.array_equal(np.asarray(filtered)[kept], np.asarray(LOGITS)[kept])


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    logits = jnp.array([[2.0, -2.0, 2.0]])
    assert support(sampling.keep_min_p(SPREAD * 9, 1e-300)) == [{1, 2, 3}, {0, 1, 2, 3}]
    seen = jnp.array([[True, True, False]])
    assert sampling.penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]
    how = SampleConfig(temperature=0, repetition_penalty=1e6)
    said = text([PROMPT], how, n=10)[0]
    assert len(set(said)) == 10 and not set(said) & set(PROMPT)


def test_draws_have_the_models_probabilities() -> None:
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(LOGITS[0], (20_000, 5))
    drawn = np.asarray(sampling.sample_token(logits, keys, None, SampleConfig(temperature=1.0)))
    assert np.abs(np.bincount(drawn, minlength=5) / 20_000 - PROBABILITIES).max() <= 0.015
    cold = np.asarray(sampling.sample_token(logits, keys, None, SampleConfig(temperature=0.1)))
    assert (cold == 1).mean() > 0.98


SPREAD = jnp.array([[-90.0, 99.0, 99.00001, 40.0, -jnp.inf], [3e-5, 2e-5, 1e-5, 0.0, -jnp.inf]])


@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 1e-45}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-40, 1e-38, 1.2e-38, 1e-37, 1e-30, 1e-8])
def test_the_coldest_is_greedy(temperature: float, filters: dict[str, float]) -> None:
    """Also where the temperature is 0 in float32, or logits divided by it are infinite."""
    how = SampleConfig(temperature=temperature, **filters)  # type: ignore[arg-type]
    draw = jax.jit(sampling.sample_token, static_argnums=3)
    drawn = [draw(SPREAD, jax.random.split(jax.random.key(i)), None, how) for i in range(3)]
    assert np.array(drawn).tolist() == [[2, 0]] * 3


@pytest.mark.parametrize(
    ("setting", "worst"),
    [
        *[("temperature", value) for value in (1e7, 1e30, 1e38, 1e39, 1e308)],
        *[("repetition_penalty", value) for value in (5e-324, 1e-45, 1e-38, 1e-7, 1e7, 1e39)],
        *[("top_p", value) for value in (0.0, -1e-45, float("nan"), 1 + 1e-12)],
        *[("min_p", value) for value in (-5e-324, float("nan"), 1 + 1e-12)],
    ],
)
def test_what_float32_cannot_compute_is_refused(setting: str, worst: float) -> None:
    with pytest.raises(UsageError, match=f"--{setting}=.*: must be "):
        SampleConfig(**{setting: worst})  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_hottest_is_uniform_and_penalties_keep_their_order(penalty: float) -> None:
    """At the ends of what is allowed."""
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.broadcast_to(SPREAD[0], (4000, 5))
    hot = SampleConfig(temperature=1e6)
    drawn = np.bincount(np.asarray(sampling.sample_token(logits, keys, None, hot)), minlength=5)
    assert drawn[4] == 0 and drawn[:4].min() > 900
    for filters, only in (({"top_k": 1}, 2), ({"min_p": 1.0}, 2), ({"top_p": 1e-45}, 2)):
        how = dataclasses.replace(hot, **filters)
        assert set(sampling.sample_token(logits[:99], keys[:99], None, how).tolist()) == {only}
    assert support(sampling.keep_min_p(SPREAD * 9, 1e-300)) == [{1, 2, 3}, {0, 1, 2, 3}]
    seen = jnp.array([[True, True, False, False, True]])
    greedy = SampleConfig(temperature=0, repetition_penalty=penalty)
    assert sampling.sample_token(SPREAD[:1], keys[:1], seen, greedy).tolist() == [
        1 if penalty < 1 else 2
    ]
