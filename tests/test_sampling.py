"""The cached decoder says what the plain model would say, whoever else is in the batch."""

import dataclasses
import functools
import itertools
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import decoding, filters, fused, model, sampling, scoring
from gptjax.config import GPTConfig, SampleConfig
from gptjax.errors import NonFiniteError
from gptjax.kv_cache import KVCache

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


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_the_keys_of_rows_are_folded_one_by_one(seed: int) -> None:
    prompts, samples = [[1], PROMPT], [3, 0]
    keys = sampling.row_keys(*sampling.key_parts(seed, samples, prompts))
    for key, prompt, number in zip(keys, prompts, samples, strict=True):
        plain = jax.random.fold_in(jax.random.key(seed), number)
        plain = jax.random.fold_in(plain, zlib.crc32(np.array(prompt, np.int32).tobytes()))
        assert (jax.random.key_data(key) == jax.random.key_data(plain)).all()


def test_a_penalty_holds_for_prompt_and_text() -> None:
    how = SampleConfig(temperature=0, repetition_penalty=1e6)
    said = text([PROMPT], how, n=10)[0]
    assert len(set(said)) == 10 and not set(said) & set(PROMPT)


def test_no_run_comes_twice() -> None:
    """Across prompt and text, and where the context was read again."""
    how = SampleConfig(temperature=1.0, no_repeat_ngram=2)
    said = [*PROMPT, *text([PROMPT], how, n=60)[0]]
    pairs = list(itertools.pairwise(said))
    assert len(set(pairs)) == len(pairs)


def test_counts_go_on_when_the_context_is_read_again() -> None:
    """So heavy a penalty lets every token come once before any comes twice; the prompt is free."""
    for how in (
        SampleConfig(temperature=1.0, presence_penalty=1e3),
        SampleConfig(temperature=1.0, frequency_penalty=1e3),
    ):
        said = text([PROMPT], how, n=61)[0]
        assert sorted(said) == list(range(61))


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


def test_nothing_is_shown_of_a_chunk_that_is_not_finite() -> None:
    """Not even the tokens before the broken one, since the chunk is read as a whole."""
    cfg = dataclasses.replace(CFG, block_size=128)
    params = model.prepare_for_decoding(cfg, scaled_params(cfg, jax.random.key(1)))
    wpe = params["wpe"]["embedding"]
    params = {**params, "wpe": {"embedding": wpe.at[66].set(np.nan)}}  # behind the padded prompt
    shown = []
    with pytest.raises(NonFiniteError, match="NaN"):
        for piece in sampling.generate(cfg, params, [[3] * 58, [1]], GREEDY, max_new_tokens=30):
            shown.append(piece.shape)
    assert shown == [(2, 1)]


LONG = dataclasses.replace(CFG, block_size=64)
LONG_DECODER = model.prepare_for_decoding(LONG, scaled_params(LONG, jax.random.key(2), scale=4.0))


def said_by(monkeypatch: pytest.MonkeyPatch, small: int, chunk: int, cpu: bool) -> list[list[int]]:
    """Three rows that fill the context and read it again, with these sizes of caches and chunks."""
    monkeypatch.setattr(sampling, "SMALL_CACHE", small)
    monkeypatch.setattr(sampling, "SMALL_CACHE_OF_CPU", small)
    monkeypatch.setattr(sampling, "MANY_ROWS", 1)
    monkeypatch.setattr(sampling, "chunk_size", lambda: chunk)
    monkeypatch.setattr(sampling, "on_cpu", lambda: cpu)
    how = SampleConfig(temperature=1.0, no_repeat_ngram=3)
    return text([[7], PROMPT, [2] * 9], how, n=70, cfg=LONG, params=LONG_DECODER, seed=4)


@pytest.mark.parametrize(("small", "chunk", "cpu"), [(8, 5, True), (8, 5, False), (32, 64, False)])
def test_no_token_depends_on_chunks_or_the_size_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, small: int, chunk: int, cpu: bool
) -> None:
    expected = said_by(monkeypatch, 64, 16, True)
    assert said_by(monkeypatch, small, chunk, cpu) == expected


def test_growing_gate_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: room in front of the tokens, not behind them."""
    expected = said_by(monkeypatch, 64, 16, True)

    def grow(state: Any, size: int) -> Any:
        more = size - state.cache.k[0].shape[1]
        k, v = (
            tuple(jnp.pad(x, ((0, 0), (more, 0), (0, 0), (0, 0))) for x in part)
            for part in (state.cache.k, state.cache.v)
        )
        return state._replace(cache=KVCache(k, v, state.cache.length_B))

    monkeypatch.setattr(sampling, "grow", grow)
    assert said_by(monkeypatch, 8, 5, False) != expected


def test_a_chunk_is_read_when_the_next_one_was_started() -> None:
    log: list[str] = []

    def chunks() -> Any:
        for i in range(4):
            log.append(f"start {i}")
            yield i

    for i in sampling.one_ahead(chunks()):
        log.append(f"read {i}")
    assert log == [
        *("start 0", "read 0", "start 1", "start 2", "read 1", "start 3", "read 2", "read 3")
    ]


def test_compiles_once_for_a_bucket_of_prompts() -> None:
    cfg = dataclasses.replace(CFG, block_size=128)
    params = model.prepare_for_decoding(cfg, scaled_params(cfg, jax.random.key(1)))
    how = SampleConfig(temperature=0.77)  # so that no other test has compiled it
    text([[1] * 3], how, n=20, cfg=cfg, params=params)
    before = count_programs(decoding.prefill.jitted), count_programs(decoding.decode)
    for length in (1, 7, 30, 64):
        text([[2] * length], how, n=20, cfg=cfg, params=params)
    assert (count_programs(decoding.prefill.jitted), count_programs(decoding.decode)) == before


@pytest.mark.parametrize("n_likeliest", [None, 3])
def test_only_the_tokens_wanted_are_drawn(n_likeliest: int | None) -> None:
    """A number that is read at run time draws the same tokens, and leaves the same state."""
    how, keys = (
        SampleConfig(temperature=1.0, presence_penalty=1.0),
        jax.random.split(jax.random.key(0), 1),
    )
    prompt, length = np.array([PROMPT], np.int32), np.full(1, len(PROMPT), np.int32)
    history = filters.make_history(how, CFG.padded_vocab_size, [PROMPT], [[]], 64)

    def drawn(n_steps: int, count: int | None) -> Any:
        read = (DECODER, prompt, length, keys, np.int32(0), history, n_likeliest)
        state = decoding.prefill(CFG, how, 16, *read)
        wanted = None if count is None else np.int32(count)
        return decoding.decode(CFG, how, n_steps, DECODER, state, keys, wanted)

    expected_state, *expected = drawn(5, None)
    state, *found = drawn(8, 5)
    assert int(state.n_drawn) == 1 + 5
    assert all(not np.any(new[5:]) for new in jax.tree.leaves(found))
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, state, expected_state)
    jax.tree.map(lambda new, old: same(new[:5], old), found, expected)


def test_a_text_asks_for_no_more_tokens_than_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, plain = [], fused.DECODE["plain"]

    def decode(*args: Any) -> Any:
        asked.append(args[-1])
        return plain(*args)

    monkeypatch.setitem(fused.DECODE, "plain", decode)
    cfg = dataclasses.replace(CFG, block_size=64)
    params = model.prepare_for_decoding(cfg, scaled_params(cfg, jax.random.key(0)))
    text([PROMPT], n=1 + 16 + 3, cfg=cfg, params=params)
    assert asked == [16, 3]


def check_cache_stays_in_place(count: np.int32 | None = None) -> None:
    """The compiled decoder copies no layer of the cache from token to token."""
    cfg = dataclasses.replace(CFG, block_size=1024)
    decoder = jax.eval_shape(
        lambda: model.prepare_for_decoding(cfg, model.init_params(cfg, jax.random.key(0)))
    )
    for rows in (1, 2):
        keys = jax.eval_shape(lambda rows=rows: jax.random.split(jax.random.key(0), rows))
        state = jax.eval_shape(
            lambda rows=rows: decoding.DecoderState(
                decoding.make_cache(cfg, rows, 1024),
                jnp.zeros(rows, jnp.int32),
                jnp.int32(0),
                None,
            )
        )
        compiled = decoding.decode.lower(cfg, GREEDY, 4, decoder, state, keys, count).compile()
        program = compiled.as_text()
        assert program is not None
        copied = re.findall(r"= f32(\[[\d,]*1024,2,16\])\S* copy\(", program)
        assert copied == []


@pytest.mark.parametrize("count", [None, np.int32(4)])
def test_cache_stays_in_place(count: np.int32 | None) -> None:
    check_cache_stays_in_place(count)


def test_in_place_gate_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: one array for all layers."""

    def stacked_cache(cfg: GPTConfig, batch: int, size: int) -> KVCache:
        shape = (cfg.n_layer, batch, size, cfg.n_head, cfg.head_dim)
        return KVCache((jnp.zeros(shape),), (jnp.zeros(shape),), jnp.zeros(batch, jnp.int32))

    def of_layer(cache: KVCache, layer: int) -> KVCache:
        return KVCache((cache.k[0][layer],), (cache.v[0][layer],), cache.length_B)

    def with_layer(cache: KVCache, layer: int, one: KVCache) -> KVCache:
        k, v = (
            (old.at[layer].set(new),)
            for old, new in ((cache.k[0], one.k[0]), (cache.v[0], one.v[0]))
        )
        return KVCache(k, v, cache.length_B)

    monkeypatch.setattr(decoding, "make_cache", stacked_cache)
    monkeypatch.setattr(KVCache, "of_layer", of_layer)
    monkeypatch.setattr(KVCache, "with_layer", with_layer)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        check_cache_stays_in_place()
    jax.clear_caches()


# ---- Scores --------------------------------------------------------------------------------------


def scored(prompts: list[list[int]], how: SampleConfig, n: int, **kwargs: Any) -> list[Any]:
    """The ids and the scores of each row, their arrays (n, ...)."""
    pieces = list(
        sampling.generate_pieces(
            CFG, kwargs.pop("params", DECODER), prompts, how, max_new_tokens=n, **kwargs
        )
    )
    whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *pieces)
    return [jax.tree.map(lambda x, row=row: x[row], whole) for row in range(len(prompts))]


def worst_logprob(n: int) -> float:
    """The largest difference to what scoring.py says of the same tokens after the same context."""
    how = SampleConfig(temperature=3.0, top_k=20, repetition_penalty=1.5)
    worst = [0.0]
    prompts = [PROMPT, list(range(30))]
    for prompt, row in zip(prompts, scored(prompts, how, n, n_likeliest=5), strict=True):
        context = sampling.cut(prompt, CFG.block_size)
        for token, logprob in zip(row.ids.tolist(), row.scores.logprob.tolist(), strict=True):
            seen = scoring.Text(np.array([*context, token]), 1)
            (score,) = scoring.score_texts(CFG, PARAMS, [seen], context=16, batch_size=1)
            worst.append(abs(score.logprobs[0] - logprob))
            context = sampling.cut([*context, token], CFG.block_size)
    return max(worst)


def test_logprobs_are_those_of_scoring() -> None:
    """Before temperature and filters; also once the context was read again, twice here."""
    assert worst_logprob(25) <= 1e-5


def test_logprob_gate_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: logits after the penalty."""
    draw = decoding.draw

    def penalized(state: Any, logits: jax.Array, keys: jax.Array, how: Any, n: Any) -> Any:
        return draw(state, filters.penalize(logits, state.history, how), keys, how, n)

    monkeypatch.setattr(decoding, "draw", penalized)
    jax.clear_caches()
    assert worst_logprob(6) > 1e-3
    jax.clear_caches()


def test_scores_change_no_token_and_hold_the_likeliest() -> None:
    how = SampleConfig(temperature=2.0)
    (row,) = scored([PROMPT], how, 30, n_likeliest=61, seed=2)
    assert row.ids.tolist() == text([PROMPT], how, 30, seed=2)[0]
    assert (np.sort(row.scores.likeliest, axis=1) == np.arange(61)).all()
    assert np.abs(np.exp(row.scores.likeliest_logprob).sum(axis=1) - 1).max() <= 1e-5
    assert (np.diff(row.scores.likeliest_logprob, axis=1) <= 0).all()
    at = row.scores.likeliest == row.ids[:, None]
    assert (row.scores.likeliest_logprob[at] == row.scores.logprob).all()
    (none,) = scored([PROMPT], how, 3, n_likeliest=0)
    assert none.scores.likeliest.shape == (3, 0) and none.scores.logprob.shape == (3,)
