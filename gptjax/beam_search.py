"""Beam search: the likeliest text that is found by going on with several texts at once.

K beams, V vocabulary (padded), S new tokens at most, C candidates of a step.

Equal to transformers' `generate(num_beams=K, do_sample=False, early_stopping=False)`. All texts of
a search end where the context is full, since what they share would have to be read again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import GPTConfig, SampleConfig
from gptjax.decoding import Scores, score_token
from gptjax.errors import DAMAGED_WEIGHTS, NonFiniteError
from gptjax.filters import History, make_history, penalize, remember
from gptjax.kv_cache import KVCache, make_cache
from gptjax.model import Params, next_logits
from gptjax.sampling import bucket, cut

CHUNK = 16  # steps of a call into JAX, after which a search may be stopped


class Texts(NamedTuple):
    """K texts, the best first."""

    ids_KS: Array
    length_K: Array  # tokens of each; 0 where there is no text yet
    scores: Scores | None  # of arrays (K, S, ...), by the model itself
    total_K: Array  # what they are compared by; -inf where there is no text yet


class SearchState(NamedTuple):
    """The state that the search carries from token to token."""

    cache: KVCache  # of the running texts, without their newest tokens
    history: History | None  # of the running texts
    running: Texts  # by their log-probability
    ended: Texts  # by their log-probability / length**length_penalty
    is_open: Array  # whether a running text may still become better than one that ended
    finite: Array  # whether all logits so far were


class Rules(NamedTuple):
    """What a search goes by; a constant of the compiled program."""

    how: SampleConfig  # whose penalties hold for beams; nothing is drawn
    beams: int
    ends: tuple[int, ...]  # ids that end a text
    length_penalty: float
    n_likeliest: int | None  # likeliest tokens to score beside each token; None = score nothing


def step(rules: Rules, state: SearchState, logits_KV: Array, limit: Array) -> SearchState:
    """Return the state after each beam went on with its candidates and the best were kept.

    Args:
        rules: what the search goes by.
        state: the cache holds all tokens of the running texts.
        logits_KV: of the tokens that follow them.
        limit: tokens at which texts end.
    """
    K, V = logits_KV.shape
    n = state.running.length_K[0]
    logprobs_KV = jax.nn.log_softmax(logits_KV)
    if state.history is not None:
        logprobs_KV = penalize(logprobs_KV, state.history, rules.how)
    totals_KV = logprobs_KV + state.running.total_K[:, None]
    # Each beam has one candidate for each end at most: K that do not end are among them.
    C = min(max(2, 1 + len(rules.ends)) * K, K * V)
    total_C, place_C = jax.lax.top_k(totals_KV.reshape(-1), C)
    parent_C, token_C = place_C // V, (place_C % V).astype(jnp.int32)

    def write(texts_KS: Array, new_C: Array) -> Array:
        return texts_KS[parent_C].at[:, n].set(new_C)

    scores = state.running.scores
    if scores is not None and rules.n_likeliest is not None:
        new = score_token(logits_KV[parent_C], token_C, rules.n_likeliest)
        scores = jax.tree.map(write, scores, new)
    ids_CS = write(state.running.ids_KS, token_C)
    candidates = Texts(ids_CS, jnp.full(C, n + 1), scores, total_C)
    ends_C = jnp.isin(token_C, jnp.array(rules.ends, jnp.int32)) | (n + 1 >= limit)

    running, chosen_K = best(candidates, jnp.where(ends_C, -jnp.inf, total_C), K)
    # Only the K best may end: the others are there to keep K running.
    counts_C = ends_C & (jnp.arange(C) < K)
    final_C = total_C / (n + 1).astype(jnp.float32) ** rules.length_penalty
    final_C = jnp.where(counts_C, final_C, -jnp.inf)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), state.ended, candidates)
    ended, _ = best(both, jnp.concatenate([state.ended.total_K, final_C]), K)

    parent_K, token_K = parent_C[chosen_K], token_C[chosen_K]
    cache, history = jax.tree.map(lambda x: x[parent_K], (state.cache, state.history))
    if history is not None:
        history = remember(history, token_K)
    # A running text is compared by the length that it has now, which favours ending early.
    hope = running.total_K[0] / (n + 1).astype(jnp.float32) ** rules.length_penalty
    is_open = (n + 1 < limit) & (hope > ended.total_K.min())
    finite = state.finite & jnp.all(jnp.isfinite(logits_KV.max(axis=-1)))
    return SearchState(cache, history, running, ended, is_open, finite)


def best(texts: Texts, total_C: Array, k: int) -> tuple[Texts, Array]:
    """Return the k texts of the highest totals, and their numbers."""
    total_K, chosen_K = jax.lax.top_k(total_C, k)
    kept: Texts = jax.tree.map(lambda x: x[chosen_K], texts)
    return kept._replace(total_K=total_K), chosen_K


@functools.partial(jax.jit, static_argnames=("cfg", "rules", "size", "room"))
def begin(
    cfg: GPTConfig,
    rules: Rules,
    size: int,
    room: int,
    params: Params,
    tokens_1T: Array,
    length_1: Array,
    history: History | None,
    limit: Array,
) -> SearchState:
    """Read a prompt, padded on the right, and take the first step.

    Args:
        cfg: the model, without "auto".
        rules: what the search goes by.
        size: tokens that the cache has room for.
        room: tokens that a text has room for, at least `limit`.
        params: from `prepare_for_decoding`.
        tokens_1T: the prompt.
        length_1: its length without the padding.
        history: of K rows alike; None where no penalty needs one.
        limit: tokens at which texts end.
    """
    K = rules.beams
    logits_1V, cache = next_logits(cfg, params, tokens_1T, make_cache(cfg, 1, size), length_1)
    logits_KV, cache = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), (logits_1V, cache))
    scores = None
    if rules.n_likeliest is not None:
        scores = Scores(
            jnp.zeros((K, room)),
            jnp.zeros((K, room, rules.n_likeliest), jnp.int32),
            jnp.zeros((K, room, rules.n_likeliest)),
        )
    nowhere_K = jnp.full(K, -jnp.inf)
    none = Texts(jnp.zeros((K, room), jnp.int32), jnp.zeros(K, jnp.int32), scores, nowhere_K)
    running = none._replace(total_K=nowhere_K.at[0].set(0.0))  # all beams are one text so far
    state = SearchState(cache, history, running, none, jnp.array(True), jnp.array(True))
    return step(rules, state, logits_KV, limit)


@functools.partial(jax.jit, static_argnames=("cfg", "rules"), donate_argnames=("state",))
def go_on(
    cfg: GPTConfig, rules: Rules, params: Params, state: SearchState, limit: Array
) -> SearchState:
    """Take CHUNK steps, fewer where the search is over."""

    def advance(carry: tuple[Array, SearchState]) -> tuple[Array, SearchState]:
        i, state = carry
        newest_K1 = jnp.take_along_axis(
            state.running.ids_KS, state.running.length_K[:, None] - 1, axis=1
        )
        logits_KV, cache = next_logits(cfg, params, newest_K1, state.cache)
        return i + 1, step(rules, state._replace(cache=cache), logits_KV, limit)

    def goes_on(carry: tuple[Array, SearchState]) -> Array:
        return (carry[0] < CHUNK) & carry[1].is_open

    return jax.lax.while_loop(goes_on, advance, (jnp.int32(0), state))[1]


class Found(NamedTuple):
    """A text that a search found."""

    ids: np.ndarray  # (n,) int32, with the id that ended it
    score: float  # its log-probability / n**length_penalty
    scores: Scores | None  # of NumPy arrays (n, ...)


def search(
    cfg: GPTConfig,
    params: Params,
    prompt: Sequence[int],
    how: SampleConfig,
    *,
    beams: int,
    max_new_tokens: int,
    ends: Sequence[int] = (),
    length_penalty: float = 1.0,
    cache_size: int = 0,
    n_likeliest: int | None = None,
    stopped: Callable[[], object] = lambda: False,
) -> list[Found]:
    """Return the texts that beam search finds after a prompt, the best first.

    Args:
        cfg: the model, without "auto".
        params: from `prepare_for_decoding`.
        prompt: token ids, at least one; one longer than the context is cut as by `sampling.cut`.
        how: its penalties hold; its temperature and the filters for drawing are not used.
        beams: texts to go on with, and to return; fewer are returned if fewer ended.
        max_new_tokens: most tokens of a text, which also ends where the context is full.
        ends: ids that end a text.
        length_penalty: power of the length by which log-probabilities are divided.
        cache_size: tokens of the cache; 0 = as many as this call needs.
        n_likeliest: likeliest tokens to score beside each token; None = score nothing.
        stopped: is asked every 16 tokens whether to give up, and return nothing.

    Raises:
        NonFiniteError: the logits became NaN or infinite.
    """
    context = cut(list(prompt), cfg.block_size)
    # The last token is predicted from a full context, and is not read itself.
    limit = min(max_new_tokens, cfg.block_size - len(context) + 1)
    if limit < 1:
        return []
    size = cache_size or bucket(len(context) + limit, cfg.block_size)
    tokens_1T = np.zeros((1, bucket(len(context), size)), np.int32)
    tokens_1T[0, : len(context)] = context
    length_1 = np.array([len(context)], np.int32)
    rules = Rules(how, beams, tuple(ends), length_penalty, n_likeliest)
    whole = bucket(len(prompt) + limit)
    rows = [prompt] * beams
    history = make_history(how, cfg.padded_vocab_size, rows, [[]] * beams, whole)
    room = bucket(limit)
    state = begin(cfg, rules, size, room, params, tokens_1T, length_1, history, np.int32(limit))
    while state.is_open and state.finite:
        if stopped():
            return []
        state = go_on(cfg, rules, params, state, np.int32(limit))
    if not state.finite:
        raise NonFiniteError(DAMAGED_WEIGHTS)
    ended = jax.device_get(state.ended)
    found = []
    for k in np.flatnonzero(np.isfinite(ended.total_K)):
        n = ended.length_K[k]
        ids, scores = jax.tree.map(lambda x, k=k, n=n: x[k, :n], (ended.ids_KS, ended.scores))
        found.append(Found(ids, float(ended.total_K[k]), scores))
    return found
