"""Text from the model: prefill the KV cache, then one jitted scan over new tokens.

B batch, T prompt time (padded), V vocabulary, C new tokens per chunk.

When a row fills the context, its last block_size // 2 tokens are read again into an empty cache,
and sampling goes on from there; a prompt longer than the context is cut in the same way. Each row
does so on its own, so what it says does not depend on its neighbours.
"""

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import GPTConfig, SampleConfig
from gptjax.errors import NonFiniteError
from gptjax.filters import History, make_history, narrow, penalize, remember
from gptjax.kv_cache import KVCache, make_cache
from gptjax.model import Params, next_logits

CHUNK = 16  # tokens per call into JAX: few enough to stream, enough to make the call's cost small
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
    """The state that the decoder's scan carries from token to token."""

    cache: KVCache
    token_B: Array  # the newest token, not in the cache yet
    n_drawn: Array  # tokens drawn since the prompt, which numbers the random keys
    history: History | None  # what the filters remember of prompt and text
    finite: Array  # whether all logits so far were
    scores: Scores | None = None  # of the newest token, where they are asked for


def draw(
    state: DecoderState,
    logits_BV: Array,
    keys_B: Array,
    how: SampleConfig,
    n_likeliest: int | None = None,
) -> DecoderState:
    """Return the state after the next token of each row was drawn from its logits."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.n_drawn)
    token_B = sample_token(logits_BV, keys_B, state.history, how)
    history = state.history
    if history is not None:
        history = remember(history, token_B)
    finite = state.finite & jnp.all(jnp.isfinite(logits_BV.max(axis=-1)))
    scores = None if n_likeliest is None else score_token(logits_BV, token_B, n_likeliest)
    return DecoderState(state.cache, token_B, state.n_drawn + 1, history, finite, scores)


@functools.partial(jax.jit, static_argnames=("cfg", "how", "size", "n_likeliest"))
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
    cache = make_cache(cfg, len(tokens_BT), size)
    logits_BV, cache = next_logits(cfg, params, tokens_BT, cache, length_B)
    start = DecoderState(cache, length_B, n_drawn, history, jnp.array(True))
    return draw(start, logits_BV, keys_B, how, n_likeliest)


@functools.partial(jax.jit, static_argnames=("cfg", "how", "n_steps"), donate_argnames=("state",))
def decode(
    cfg: GPTConfig,
    how: SampleConfig,
    n_steps: int,
    params: Params,
    state: DecoderState,
    keys_B: Array,
) -> tuple[DecoderState, Array, Scores | None]:
    """Draw n_steps tokens for each row in one scan.

    Returns:
        The state, the tokens (n_steps, B), and their scores (n_steps, B, ...) if the state has any.
    """
    n_likeliest = None if state.scores is None else state.scores.likeliest.shape[1]

    def step(state: DecoderState, _: None) -> tuple[DecoderState, tuple[Array, Scores | None]]:
        logits_BV, cache = next_logits(cfg, params, state.token_B[:, None], state.cache)
        state = draw(state._replace(cache=cache), logits_BV, keys_B, how, n_likeliest)
        return state, (state.token_B, state.scores)

    state, (new_nB, scores) = jax.lax.scan(step, state, length=n_steps)
    return state, new_nB, scores


def bucket(n: int, limit: int = 2**30) -> int:
    """Return the least of 64, 256, 1024 ... that holds n, or the limit: few shapes to compile."""
    size = 64
    while size < n:
        size *= 4
    return min(size, limit)


class Piece(NamedTuple):
    """The next n tokens of each row."""

    ids: np.ndarray  # (B, n) int32
    scores: Scores | None  # of NumPy arrays (B, n, ...)


def generate(
    cfg: GPTConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    how: SampleConfig,
    *,
    max_new_tokens: int,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    cache_size: int = 0,
) -> Iterator[np.ndarray]:
    """Continue prompts, token by token.

    Args:
        cfg: the model, without "auto".
        params: with unstacked layers (see `model.unstack_layers`).
        prompts: token ids of each row, none empty; they may differ in length.
        how: temperature and filters.
        max_new_tokens: per row.
        seed: seed of the draws.
        samples: row i is sample number samples[i] (0 if not given) of its prompt. A row depends on
            its prompt, the seed and this number, and on nothing else in the batch.
        cache_size: tokens of the cache; 0 = as many as this call needs. A fixed one saves compiling
            again for longer prompts.

    Yields:
        New tokens (B, n) as they come, max_new_tokens in all.

    Raises:
        NonFiniteError: the logits became NaN or infinite.
    """
    pieces = generate_pieces(
        cfg,
        params,
        prompts,
        how,
        max_new_tokens=max_new_tokens,
        seed=seed,
        samples=samples,
        cache_size=cache_size,
    )
    for piece in pieces:
        yield piece.ids


def generate_pieces(
    cfg: GPTConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    how: SampleConfig,
    *,
    max_new_tokens: int,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    cache_size: int = 0,
    n_likeliest: int | None = None,
) -> Iterator[Piece]:
    """Continue prompts as `generate` does, with the same arguments, and score the tokens.

    Beside each token drawn its n_likeliest alternatives are scored; None scores nothing. Scores are
    what the decoder saw: once the context was read again, they depend on what was read.
    """
    assert all(len(prompt) for prompt in prompts), "a prompt must hold at least one token"
    if max_new_tokens < 1:
        return
    limit = cfg.block_size
    contexts = [cut(list(prompt), limit) for prompt in prompts]
    samples = samples if samples is not None else [0] * len(prompts)
    keys_B = jnp.stack(
        [row_key(seed, i, prompt) for i, prompt in zip(samples, prompts, strict=True)]
    )
    # A row that fills it, and starts again, has filled the whole context: one size for all.
    size = cache_size or bucket(max(map(len, contexts)) + max_new_tokens, limit)
    drawn: list[list[int]] = [[] for _ in prompts]
    state: DecoderState | None = None
    while len(drawn[0]) < max_new_tokens:
        # The newest token is not in the cache yet, so this many forward passes still fit.
        room = size - max(map(len, contexts)) + 1
        if state is None or room == 0:
            contexts = [cut(context, limit) for context in contexts]
            tokens_BT = np.zeros((len(contexts), bucket(max(map(len, contexts)), size)), np.int32)
            for row, context in zip(tokens_BT, contexts, strict=True):
                row[: len(context)] = context
            length_B = np.array([len(context) for context in contexts], np.int32)
            n_drawn = np.int32(len(drawn[0]))
            most = bucket(max(map(len, prompts)) + len(drawn[0]) + size)  # until it is read again
            history = make_history(how, cfg.padded_vocab_size, prompts, drawn, most)
            state = prefill(
                cfg, how, size, params, tokens_BT, length_B, keys_B, n_drawn, history, n_likeliest
            )
            new_nB, scores = jax.tree.map(lambda x: x[None], (state.token_B, state.scores))
            room = 1
        else:
            state, new_nB, scores = decode(cfg, how, CHUNK, params, state, keys_B)
        if not state.finite:
            raise NonFiniteError("the model's logits are NaN or infinite: its weights are damaged")
        # Steps beyond the room have overwritten the last slot of a cache that is now full, and
        # will not be used again. Their tokens are dropped.
        count = min(room, max_new_tokens - len(drawn[0]))
        turn = functools.partial(first_rows, count=count)
        piece = Piece(*jax.tree.map(turn, (new_nB, scores)))
        for context, text, new in zip(contexts, drawn, piece.ids.tolist(), strict=True):
            context.extend(new)
            text.extend(new)
        yield piece


def first_rows(x_nB: Array, count: int) -> np.ndarray:
    """Return the first `count` of n steps as a NumPy array, rows first: (B, count, ...)."""
    return np.asarray(x_nB)[:count].swapaxes(0, 1)


def row_key(seed: int, sample: int, prompt: Sequence[int]) -> Array:
    """Return the random key of a row, made of nothing but these arguments."""
    key = jax.random.fold_in(jax.random.key(seed), sample)
    return jax.random.fold_in(key, zlib.crc32(np.asarray(prompt, np.int32).tobytes()))


def cut(context: list[int], limit: int) -> list[int]:
    """Return the context, or its last limit // 2 tokens if it is longer than the limit."""
    return context if len(context) <= limit else context[-max(1, limit // 2) :]
