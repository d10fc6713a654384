"""The cached decoder says what the plain model would say, whoever else is in the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import model, sampling
from gptjax.config import GPTConfig, SampleConfig
from gptjax.errors import NonFiniteError

from .conftest import scaled_params, tiny

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
    before = sampling.prefill._cache_size(), sampling.decode._cache_size()
    for length in (1, 7, 30, 64):
        text([[2] * length], how, n=20, cfg=cfg, params=params, cache_size=128)
    assert (sampling.prefill._cache_size(), sampling.decode._cache_size()) == before


# ---- Filters: which tokens are left --------------------------------------------------------------

PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
LOGITS = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]])) + 3.0


def support(logits_BV: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(logits_BV)]


@pytest.mark.parametrize(
    ("filtered", "left"),
    [
        (sampling.keep_top_k(LOGITS, 1), {1}),
        (sampling.keep_top_k(LOGITS, 3), {1, 2, 3}),
        (sampling.keep_top_k(LOGITS, 99), {0, 1, 2, 3, 4}),
        (sampling.keep_top_p(LOGITS, 1e-6), {1}),
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
    seen = jnp.array([[True, True, False]])
    assert sampling.penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]
    how = SampleConfig(temperature=0, repetition_penalty=1e6)
    said = text([PROMPT], how, n=10)[0]
    assert len(set(said)) == 10 and not set(said) & set(PROMPT)


def test_draws_have_the_models_probabilities() -> None:
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(LOGITS[0], (20_000, 5))
    drawn = np.asarray(sampling.sample_token(logits, keys, None, SampleConfig(temperature=1.0)))
    ok = np.abs(np.bincount(drawn, minlength=5) / 20_000 - PROBABILITIES).max() <= 0.015
    assert ok
    cold = np.asarray(sampling.sample_token(logits, keys, None, SampleConfig(temperature=0.1)))
    assert (cold == 1).mean() > 0.98
