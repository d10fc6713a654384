"""The decoder's two programs: read prompts into a cache, then draw tokens by one jitted loop.

B batch, T prompt time (padded), V vocabulary, N likeliest tokens.

What draws a token is everything behind the logits: filters, random numbers and scores. What makes
the logits is `token_logits`: whatever computes the same faster takes its place there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import GPTConfig, SampleConfig
from gptjax.filters import History, narrow, penalize, remember
from gptjax.kv_cache import KVCache, make_cache
from gptjax.model import Params, next_logits
from gptjax.xla_options import Jitted, untuned

NOT_FINITE = -1  # in the place of a token that no logits stand for
SMALLEST = float(np.finfo(np.float32).tiny)  # what float32 can divide by


# ---- One token -----------------------------------------------------------------------------------


def sample_token(
    logits_BV: Array, keys_B: Array, history: History | None, how: SampleConfig
) -> Array:
    """Draw one token per row, after the filters (see `filters` for their order).

    Args:
        logits_BV: float32, -inf where a token cannot occur.
        keys_B: a random key per row.
        history: what the filters remember of each row; None where they need nothing.
        how: temperature and filters.

    Returns:
        (B,) int32.
    """
    if history is not None:
        logits_BV = penalize(logits_BV, history, how)
    if how.temperature < SMALLEST:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = narrow(logits_BV, how)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


class Scores(NamedTuple):
    """Log-probabilities by the model itself: in nats, before the temperature and all filters."""

    logprob: Array  # (B,) of the token drawn
    likeliest: Array  # (B, N) the N likeliest tokens, the likeliest first
    likeliest_logprob: Array  # (B, N)


def score_token(logits_BV: Array, token_B: Array, n: int) -> Scores:
    """Return the log-probabilities of the token that was drawn and of the n likeliest ones."""
    logprobs_BV = jax.nn.log_softmax(logits_BV)
    logprob_B1 = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)
    likeliest_logprob, likeliest = jax.lax.top_k(logprobs_BV, n)
    return Scores(logprob_B1[:, 0], likeliest, likeliest_logprob)


# ---- The decoder ---------------------------------------------------------------------------------


class DecoderState(NamedTuple):
    """The state that the decoder's loop carries from token to token."""

    cache: KVCache
    token_B: Array  # the newest token, not in the cache yet
    n_drawn: Array  # tokens drawn since the prompt, which numbers the random keys
    history: History | None  # what the filters remember of prompt and text
    scores: Scores | None = None  # of the newest token, where they are asked for


def draw(
    state: DecoderState,
    logits_BV: Array,
    keys_B: Array,
    how: SampleConfig,
    n_likeliest: int | None = None,
) -> DecoderState:
    """Return the state after the next token of each row was drawn from its logits.

    The token is NOT_FINITE where logits are NaN or infinite: what reads tokens need read no more.
    """
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.n_drawn)
    token_B = sample_token(logits_BV, keys_B, state.history, how)
    token_B = jnp.where(jnp.isfinite(logits_BV.max(axis=-1)), token_B, NOT_FINITE)
    history = state.history
    if history is not None:
        history = remember(history, token_B)
    scores = None if n_likeliest is None else score_token(logits_BV, token_B, n_likeliest)
    return DecoderState(state.cache, token_B, state.n_drawn + 1, history, scores)


@functools.partial(Jitted, options=untuned, static_argnames=("cfg", "how", "size", "n_likeliest"))
def prefill(
    cfg: GPTConfig,
    how: SampleConfig,
    size: int,
    params: Params,
    tokens_BT: Array,
    length_B: Array,
    keys_B: Array,
    n_drawn: Array,
    history: History | None,
    n_likeliest: int | None = None,
) -> DecoderState:
    """Read prompts, padded on the right, into a new cache of `size` and draw one token each.

    Args:
        cfg: the model, without "auto".
        how: temperature and filters.
        size: tokens that the cache has room for.
        params: from `prepare_for_decoding`.
        tokens_BT: the prompts.
        length_B: their lengths without the padding.
        keys_B: a random key per row.
        n_drawn: tokens drawn so far, which numbers the draws.
        history: what the filters remember of each row; None where they need nothing.
        n_likeliest: likeliest tokens to score beside the one drawn; None = score nothing.
    """
    # Attention reads every place, so there are no more of them while the prompts are read.
    cache = make_cache(cfg, *tokens_BT.shape)
    logits_BV, cache = next_logits(cfg, params, tokens_BT, cache, length_B)
    start = DecoderState(cache.grow(size), length_B, n_drawn, history)
    return draw(start, logits_BV, keys_B, how, n_likeliest)


def token_logits(
    cfg: GPTConfig, params: Params, token_B: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """Return float32 logits (B, V) of the token after `token_B`, and the cache one token longer.

    Args:
        cfg: the model, without "auto".
        params: from `prepare_for_decoding`.
        token_B: the newest token of each row, not in the cache yet.
        cache: keys and values of all tokens before; it has room for one more.
    """
    return next_logits(cfg, params, token_B[:, None], cache)


@functools.partial(jax.jit, static_argnames=("cfg", "how", "n_steps"), donate_argnames=("state",))
def decode(
    cfg: GPTConfig,
    how: SampleConfig,
    n_steps: int,
    params: Params,
    state: DecoderState,
    keys_B: Array,
    count: Array | None = None,
) -> tuple[DecoderState, Array, Scores | None]:
    """Draw n_steps tokens for each row, or the first `count` of them, in one loop.

    Args:
        cfg: the model, without "auto".
        how: temperature and filters.
        n_steps: tokens.
        params: from `prepare_for_decoding`.
        state: from `prefill`, or as returned.
        keys_B: a random key per row.
        count: draw only so many, at most n_steps; the other tokens are 0. It is an operand, so one
            program serves every number. On a GPU a loop of unknown length is slower, since it waits
            for the host after each token.

    Returns:
        The state, the tokens (n_steps, B), and their scores (n_steps, B, ...) if the state has any.
    """
    n_likeliest = None if state.scores is None else state.scores.likeliest.shape[1]
    Drawn = tuple[Array, Scores | None]

    def step(state: DecoderState, _: None) -> tuple[DecoderState, Drawn]:
        logits_BV, cache = token_logits(cfg, params, state.token_B, state.cache)
        state = draw(state._replace(cache=cache), logits_BV, keys_B, how, n_likeliest)
        return state, (state.token_B, state.scores)

    def write_step(i: Array, carry: tuple[DecoderState, Drawn]) -> tuple[DecoderState, Drawn]:
        state, new = step(carry[0], None)
        return state, jax.tree.map(lambda all_n, x: all_n.at[i].set(x), carry[1], new)

    if count is None:
        state, (new_nB, scores) = jax.lax.scan(step, state, length=n_steps)
    else:
        drawn = (state.token_B, state.scores)
        zeros = jax.tree.map(lambda x: jnp.zeros((n_steps, *x.shape), x.dtype), drawn)
        state, (new_nB, scores) = jax.lax.fori_loop(0, count, write_step, (state, zeros))
    return state, new_nB, scores


@functools.partial(jax.jit, static_argnames="size")
def grow(state: DecoderState, size: int) -> DecoderState:
    """Return the state with a cache that has room for `size` tokens."""
    return state._replace(cache=state.cache.grow(size))
