"""Each filter is transformers' own, on random logits; what it leaves is what its help says."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import decoding, filters
from gptjax.config import SampleConfig
from gptjax.errors import UsageError
from gptjax.settings import fields_of

from .helpers import need

PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
LOGITS = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]])) + 3.0


SAYS = {  # a value that leaves only the likeliest token, or makes it rare
    "temperature": 0.0,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 1.0,
    "repetition_penalty": 1e6,
    "frequency_penalty": 1e3,
    "presence_penalty": 1e3,
    "no_repeat_ngram": 1,
}


@pytest.mark.parametrize("name", fields_of(SampleConfig))
def test_every_setting_has_a_say(name: str) -> None:
    logits = jnp.tile(LOGITS[:1], (200, 1))
    keys = jax.random.split(jax.random.key(0), 200)
    counts = []
    for how in (
        SampleConfig(temperature=1),
        SampleConfig(**{"temperature": 1, name: SAYS[name]}),  # type: ignore[arg-type]
    ):
        history = filters.make_history(how, 5, [[1]] * 200, [[1]] * 200, 2)  # the likeliest
        drawn = decoding.sample_token(logits, keys, history, how)
        counts.append(np.bincount(drawn, minlength=5)[1])
    plain, changed = counts
    assert 60 < plain < 100
    if name in ("temperature", "top_k", "top_p", "min_p"):
        assert changed == 200
    else:
        assert changed < 30 if name == "repetition_penalty" else changed == 0


def support(logits_BV: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(logits_BV)]


@pytest.mark.parametrize(
    ("filtered", "left"),
    [
        (filters.keep_top_k(LOGITS, 1), {1}),
        (filters.keep_top_k(LOGITS, 3), {1, 2, 3}),
        (filters.keep_top_k(LOGITS, 99), {0, 1, 2, 3, 4}),
        (filters.keep_top_p(LOGITS, 1e-6), {1}),
        (filters.keep_top_p(LOGITS, 1e-45), {1}),
        (filters.keep_top_p(LOGITS, 5e-324), {1}),
        (filters.keep_top_p(LOGITS, 1 - 1e-12), {0, 1, 2, 3, 4}),
        (filters.keep_top_p(LOGITS, 0.39), {1}),
        (filters.keep_top_p(LOGITS, 0.41), {1, 2}),
        (filters.keep_top_p(LOGITS, 0.86), {1, 2, 3, 4}),
        (filters.keep_min_p(LOGITS, 1.0), {1}),
        (filters.keep_min_p(LOGITS, 0.45), {1, 2, 3}),
    ],
)
def test_support(filtered: jax.Array, left: set[int]) -> None:
    assert support(filtered) == [left, {4 - i for i in left}]
    kept = np.isfinite(np.asarray(filtered))
    assert np.array_equal(np.asarray(filtered)[kept], np.asarray(LOGITS)[kept])


@pytest.mark.parametrize("V", [1, 5, 61, 50304])
def test_without_sorting_the_same_tokens_are_kept(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by sorting, which is what a GPU does; ties, zeros of both signs, neighbours, padding."""
    random_BV = 3 * jax.random.normal(jax.random.key(V), (3, V))
    near_BV = np.float32(-7.5).view(np.uint32) + np.random.default_rng(0).permutation(V)[None]
    near_BV = near_BV.astype(np.uint32).view(np.float32)
    logits_BV = jnp.concatenate([random_BV, jnp.round(random_BV), near_BV, 0 * random_BV[:1]])
    logits_BV = logits_BV.at[:, V - V // 8 :].set(-jnp.inf)
    ps = (1e-45, 1e-6, 0.1, 0.5, 0.95, 1 - 1e-7)

    def kept() -> Iterator[np.ndarray]:
        """Which tokens top-k keeps, then those of top-p, with a little less and a little more."""
        yield from (np.isfinite(filters.keep_top_k(logits_BV, k)) for k in (1, 2, 40, V // 2 + 1))
        for p in ps:
            nearly = (p * (1 - 1e-5), p, p * (1 + 1e-5))
            yield np.stack([np.isfinite(filters.keep_top_p(logits_BV, q)) for q in nearly])

    found = list(kept())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for ours, sorted_out in zip(found, kept(), strict=True):
        if ours.ndim == 2:
            assert np.array_equal(ours, sorted_out)
        else:  # float32 sums up in one order or another
            assert np.all(ours[1] >= sorted_out[0])
            assert np.all(ours[1] <= sorted_out[2])


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    logits = jnp.array([[2.0, -2.0, 2.0]])
    assert support(filters.keep_min_p(SPREAD * 9, 1e-300)) == [{1, 2, 3}, {0, 1, 2, 3}]
    seen = jnp.array([[True, True, False]])
    assert filters.penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]


def test_draws_have_the_models_probabilities() -> None:
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(LOGITS[0], (20_000, 5))
    drawn = np.asarray(decoding.sample_token(logits, keys, None, SampleConfig(temperature=1.0)))
    assert np.abs(np.bincount(drawn, minlength=5) / 20_000 - PROBABILITIES).max() <= 0.015
    cold = np.asarray(decoding.sample_token(logits, keys, None, SampleConfig(temperature=0.1)))
    assert (cold == 1).mean() > 0.98


SPREAD = jnp.array([[-90.0, 99.0, 99.00001, 40.0, -jnp.inf], [3e-5, 2e-5, 1e-5, 0.0, -jnp.inf]])


@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 1e-45}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-40, 1e-38, 1.2e-38, 1e-37, 1e-30, 1e-8])
def test_the_coldest_is_greedy(temperature: float, filters: dict[str, float]) -> None:
    """Also where the temperature is 0 in float32, or logits divided by it are infinite."""
    how = SampleConfig(temperature=temperature, **filters)  # type: ignore[arg-type]
    draw = jax.jit(decoding.sample_token, static_argnums=3)
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
    drawn = np.bincount(np.asarray(decoding.sample_token(logits, keys, None, hot)), minlength=5)
    assert drawn[4] == 0 and drawn[:4].min() > 900
    for values, only in (({"top_k": 1}, 2), ({"min_p": 1.0}, 2), ({"top_p": 1e-45}, 2)):
        how = dataclasses.replace(hot, **values)
        assert set(decoding.sample_token(logits[:99], keys[:99], None, how).tolist()) == {only}
    assert support(filters.keep_min_p(SPREAD * 9, 1e-300)) == [{1, 2, 3}, {0, 1, 2, 3}]
    seen = filters.History(seen_BV=jnp.array([[True, True, False, False, True]]))
    greedy = SampleConfig(temperature=0, repetition_penalty=penalty)
    assert decoding.sample_token(SPREAD[:1], keys[:1], seen, greedy).tolist() == [
        1 if penalty < 1 else 2
    ]


# ---- Against transformers ------------------------------------------------------------------------

SIZES = (5, 1000)
SEEDS = range(20)


def random_case(seed: int, V: int) -> tuple[np.ndarray, list[list[int]]]:
    """Logits of 3 rows, flat to peaked, the last of a column that cannot occur; and their texts."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, V), scale=(0.5, 2.0, 8.0)[seed % 3]).astype(np.float32)
    logits[2, V - 1] = -np.inf
    texts = [rng.integers(0, min(V - 2, 4), n).tolist() for n in rng.integers(1, 40, 3)]
    return logits, texts


def apply(logits: jax.Array, history: filters.History, how: SampleConfig) -> jax.Array:
    return filters.narrow(filters.penalize(logits, history, how), how)


filtered = jax.jit(apply, static_argnums=2)


def ours(how: SampleConfig, logits: np.ndarray, texts: list[list[int]]) -> np.ndarray:
    """Return the logits after our filters, the text all prompt."""
    history = filters.make_history(how, logits.shape[1], texts, [[]] * 3, 40)
    return np.asarray(filtered(logits, history or filters.History(), how))


@functools.cache
def tiny_reference() -> Any:
    transformers = need("transformers")
    shape = transformers.GPT2Config(n_layer=0, n_embd=2, n_head=1, vocab_size=5, n_positions=1)
    return transformers.GPT2LMHeadModel(shape)


def theirs(how: SampleConfig, logits: np.ndarray, texts: list[list[int]]) -> np.ndarray:
    """Return them after transformers', which it chooses and orders itself."""
    torch, transformers = need("torch"), need("transformers")
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=float(how.temperature),
        top_k=how.top_k,
        top_p=how.top_p,
        min_p=how.min_p or None,
        repetition_penalty=how.repetition_penalty,
        no_repeat_ngram_size=how.no_repeat_ngram,
    )
    processors = tiny_reference()._get_logits_processor(config, 1)
    rows = [
        processors(torch.tensor([text]), torch.tensor(row[None]))
        for text, row in zip(texts, logits, strict=True)
    ]
    return torch.cat(rows).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers: np.ndarray = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def worst_difference(values: dict[str, Any], V: int) -> float:
    """Return the largest relative difference of a probability; 1 where one of the two is 0.

    Tokens at the very edge of top_p do not count: float32 sums them up in one order or another.
    """
    worst = []
    for seed in SEEDS:
        logits, texts = random_case(seed, V)
        how = SampleConfig(**{"temperature": 1.0, **values})
        a, b = softmax(ours(how, logits, texts)), softmax(theirs(how, logits, texts))
        difference = np.abs(a - b) / np.maximum(np.maximum(a, b), 1e-30)
        if how.top_p < 1:
            edges = (dataclasses.replace(how, top_p=how.top_p + e) for e in (-1e-5, 1e-5))
            fewer, more = (np.isfinite(ours(edge, logits, texts)) for edge in edges)
            difference[fewer != more] = 0
        worst.append(difference.max())
    return float(max(worst))


FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 4},
    {"top_p": 0.7},
    {"top_p": 0.999},
    {"min_p": 0.01},
    {"min_p": 0.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.2},
    *({"no_repeat_ngram": n} for n in (1, 2, 3, 50)),
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.5, "repetition_penalty": 1.2, "no_repeat_ngram": 2, "top_k": 3, "top_p": 0.8},
]


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_a_filter_is_that_of_transformers(values: dict[str, Any]) -> None:
    assert max(worst_difference(values, V) for V in SIZES) <= 1e-4


@pytest.mark.parametrize("mistake", ["order", "ngram", "top_p"])
def test_filter_gate_turns_red(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistakes: top-p before the temperature, runs one token longer, one token too few."""
    narrow, forbid, keep = filters.narrow, filters.forbid_repeated_ngrams, filters.keep_top_p

    def top_p_first(logits_BV: jax.Array, how: SampleConfig) -> jax.Array:
        return narrow(keep(logits_BV, how.top_p), dataclasses.replace(how, top_p=1.0))

    def longer(logits: jax.Array, tokens: jax.Array, length: jax.Array, n: int) -> jax.Array:
        return forbid(logits, tokens, length, n + 1)

    name, planted = {
        "order": ("narrow", top_p_first),
        "ngram": ("forbid_repeated_ngrams", longer),
        "top_p": ("keep_top_p", lambda logits_BV, p: keep(logits_BV, p - 0.02)),
    }[mistake]
    monkeypatch.setattr(filters, name, planted)
    again = jax.jit(lambda *args: apply(*args), static_argnums=2)  # not from the compiled ones
    monkeypatch.setattr(sys.modules[__name__], "filtered", again)
    assert worst_difference(FILTERS[-1], 61) > 1e-4


@pytest.mark.parametrize("V", SIZES)
def test_counts_are_subtracted(V: int) -> None:
    """OpenAI's formula, of the drawn tokens alone, in plain NumPy."""
    rng = np.random.default_rng(V)
    for frequency, presence in ((0.7, 0.0), (0.0, 1.1), (-0.5, 2.0)):
        how = SampleConfig(frequency_penalty=frequency, presence_penalty=presence)
        logits = rng.normal(size=(2, V)).astype(np.float32)
        prompts, drawn = rng.integers(0, V, (2, 2, 30)).tolist()
        history = filters.make_history(how, V, prompts, [row[:10] for row in drawn], 0)
        assert history is not None
        for tokens in zip(*[row[10:] for row in drawn], strict=True):
            history = filters.remember(history, jnp.array(tokens))
        expected = logits.copy()
        for row, new in enumerate(drawn):
            for token in set(new):
                expected[row, token] -= frequency * new.count(token) + presence
        found = np.asarray(filters.penalize(jnp.asarray(logits), history, how))
        assert np.abs(found - expected).max() <= 1e-5


def test_the_history_grows_as_if_it_were_made_anew() -> None:
    how = SampleConfig(repetition_penalty=2.0, presence_penalty=1.0, no_repeat_ngram=2)
    prompts, drawn = [[1, 2, 3], [4]], [[5, 5, 6], [7, 4, 9]]
    history = filters.make_history(how, 10, prompts, [[], []], 6)
    for tokens in zip(*drawn, strict=True):
        assert history is not None
        history = filters.remember(history, jnp.array(tokens))
    whole = filters.make_history(how, 10, prompts, drawn, 6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), history, whole))
    assert filters.make_history(SampleConfig(), 10, prompts, drawn, 6) is None


def test_where_every_token_is_forbidden_the_text_goes_on() -> None:
    logits = jnp.array([[1.0, 2.0, 3.0, -jnp.inf]])
    for text, left in (([0, 2], [1]), ([0, 1, 2], [0, 1, 2])):
        tokens, length = jnp.array([text]), jnp.array([len(text)])
        found = filters.forbid_repeated_ngrams(logits, tokens, length, 1)
        assert support(found) == [set(left)]
