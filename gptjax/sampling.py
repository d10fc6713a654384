"""Text from the model: prefill the KV cache, then one jitted scan over new tokens.

B batch, T prompt time (padded), V vocabulary, C new tokens per chunk.

When a row fills the context, its last block_size // 2 tokens are read again into an empty cache,
and sampling goes on from there; a prompt longer than the context is cut in the same way. Each row
does so on its own, so what it says does not depend on its neighbours.
"""

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import GPTConfig, SampleConfig
from gptjax.errors import NonFiniteError
from gptjax.kv_cache import KVCache, make_cache
from gptjax.model import Params, next_logits

CHUNK = 16  # tokens per call into JAX: few enough to stream, enough to make the call's cost small
SMALLEST = float(np.finfo(np.float32).tiny)  # what float32 can divide by


# ---- Logits filters: logits_BV -> logits_BV, with -inf for what must not be drawn ----------------


def penalize_repetition(logits_BV: Array, seen_BV: Array, penalty: float) -> Array:
    """Make the tokens marked in seen_BV less likely.

    Source: Keskar et al. 2019, "CTRL", extended to negative logits by Hugging Face.
    """
    penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized, logits_BV)


def keep_top_k(logits_BV: Array, k: int) -> Array:
    """Keep the k likeliest tokens, more only where the k-th is tied.

    Source: Fan et al. 2018, "Hierarchical Neural Story Generation".
    """
    threshold_B1 = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: Array, p: float) -> Array:
    """Keep the fewest tokens that together hold probability p, and at least one.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    sorted_BV = -jnp.sort(-logits_BV)
    probability_BV = jax.nn.softmax(sorted_BV)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    last_B1 = jnp.sum(before_BV[:, 1:] < p, axis=-1, keepdims=True)  # p may be 0 in float32
    threshold_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def keep_min_p(logits_BV: Array, p: float) -> Array:
    """Keep the tokens that are at least p times as likely as the likeliest.

    Source: Nguyen et al. 2024, "Turning Up the Heat".
    """
    threshold_B1 = logits_BV.max(axis=-1, keepdims=True) + math.log(p)  # of p in float64
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def sample_token(
    logits_BV: Array, keys_B: Array, seen_BV: Array | None, how: SampleConfig
) -> Array:
    """Draw one token per row, after penalty, temperature, top-k, top-p and min-p.

    Args:
        logits_BV: float32, -inf where a token cannot occur.
        keys_B: a random key per row.
        seen_BV: tokens that the repetition penalty makes less likely; None without one.
        how: temperature and filters.

    Returns:
        (B,) int32.
    """
    if seen_BV is not None:
        logits_BV = penalize_repetition(logits_BV, seen_BV, how.repetition_penalty)
    if how.temperature < SMALLEST:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The likeliest is 0 whatever the temperature: the others may become -inf, it cannot overflow.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / how.temperature
    if how.top_k:
        logits_BV = keep_top_k(logits_BV, how.top_k)
    if how.top_p < 1:
        logits_BV = keep_top_p(logits_BV, how.top_p)
    if how.min_p > 0:
        logits_BV = keep_min_p(logits_BV, how.min_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


# ---- The decoder ---------------------------------------------------------------------------------


class DecoderState(NamedTuple):
    """The state that the decoder's scan carries from token to token."""

    cache: KVCache
    token_B: Array  # the newest token, not in the cache yet
    n_drawn: Array  # tokens drawn since the prompt, which numbers the random keys
    seen_BV: Array | None  # tokens of prompt and text, for the repetition penalty
    finite: Array  # whether all logits so far were


def draw(state: DecoderState, logits_BV: Array, keys_B: Array, how: SampleConfig) -> DecoderState:
    """Return the state after the next token of each row was drawn from its logits."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.n_drawn)
    token_B = sample_token(logits_BV, keys_B, state.seen_BV, how)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    finite = state.finite & jnp.all(jnp.isfinite(logits_BV.max(axis=-1)))
    return DecoderState(state.cache, token_B, state.n_drawn + 1, seen_BV, finite)


@functools.partial(jax.jit, static_argnames=("cfg", "how", "size"))
def prefill(
    cfg: GPTConfig,
    how: SampleConfig,
    size: int,
    params: Params,
    tokens_BT: Array,
    length_B: Array,
    keys_B: Array,
    n_drawn: Array,
    seen_BV: Array | None,
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
        seen_BV: tokens that the repetition penalty makes less likely; None without one.
    """
    cache = make_cache(cfg, len(tokens_BT), size)
    logits_BV, cache = next_logits(cfg, params, tokens_BT, cache, length_B)
    start = DecoderState(cache, length_B, n_drawn, seen_BV, jnp.array(True))
    return draw(start, logits_BV, keys_B, how)


@functools.partial(jax.jit, static_argnames=("cfg", "how", "n_steps"), donate_argnames=("state",))
def decode(
    cfg: GPTConfig,
    how: SampleConfig,
    n_steps: int,
    params: Params,
    state: DecoderState,
    keys_B: Array,
) -> tuple[DecoderState, Array]:
    """Draw n_steps tokens for each row in one scan; return the state and them, (n_steps, B)."""

    def step(state: DecoderState, _: None) -> tuple[DecoderState, Array]:
        logits_BV, cache = next_logits(cfg, params, state.token_B[:, None], state.cache)
        state = draw(state._replace(cache=cache), logits_BV, keys_B, how)
        return state, state.token_B

    return jax.lax.scan(step, state, length=n_steps)


def bucket(n: int, limit: int) -> int:
    """Return the least of 64, 256, 1024 ... that holds n, or the limit: few shapes to compile."""
    size = 64
    while size < n:
        size *= 4
    return min(size, limit)


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
    assert all(len(prompt) for prompt in prompts), "a prompt must hold at least one token"
    if max_new_tokens < 1:
        return
    limit = cfg.block_size
    contexts = [cut(list(prompt), limit) for prompt in prompts]
    samples = samples if samples is not None else [0] * len(prompts)
    keys_B = jnp.stack(
        [row_key(seed, i, prompt) for i, prompt in zip(samples, prompts, strict=True)]
    )
    seen = None
    if how.repetition_penalty != 1:
        seen = np.zeros((len(prompts), cfg.padded_vocab_size), bool)
        mark(seen, prompts)

    # A row that fills it, and starts again, has filled the whole context: one size for all.
    size = cache_size or bucket(max(map(len, contexts)) + max_new_tokens, limit)
    n_drawn = 0
    state: DecoderState | None = None
    while n_drawn < max_new_tokens:
        # The newest token is not in the cache yet, so this many forward passes still fit.
        room = size - max(map(len, contexts)) + 1
        if state is None or room == 0:
            contexts = [cut(context, limit) for context in contexts]
            tokens_BT = np.zeros((len(contexts), bucket(max(map(len, contexts)), size)), np.int32)
            for row, context in zip(tokens_BT, contexts, strict=True):
                row[: len(context)] = context
            length_B = np.array([len(context) for context in contexts], np.int32)
            state = prefill(
                cfg, how, size, params, tokens_BT, length_B, keys_B, np.int32(n_drawn), seen
            )
            new_Bn = np.asarray(state.token_B)[:, None]
        else:
            state, new_nB = decode(cfg, how, CHUNK, params, state, keys_B)
            # Steps beyond the room have overwritten the last slot of a cache that is now full, and
            # will not be used again. Their tokens are dropped.
            new_Bn = np.asarray(new_nB).T[:, :room]
        if not state.finite:
            raise NonFiniteError("the model's logits are NaN or infinite: its weights are damaged")
        new_Bn = new_Bn[:, : max_new_tokens - n_drawn]
        n_drawn += new_Bn.shape[1]
        for context, new in zip(contexts, new_Bn.tolist(), strict=True):
            context.extend(new)
        if seen is not None:
            mark(seen, new_Bn)
        yield new_Bn


def mark(seen_BV: np.ndarray, tokens: Sequence[Sequence[int]] | np.ndarray) -> None:
    """Mark in each row the tokens that have occurred."""
    for row, new in zip(seen_BV, tokens, strict=True):
        row[np.asarray(new)] = True


def row_key(seed: int, sample: int, prompt: Sequence[int]) -> Array:
    """Return the random key of a row, made of nothing but these arguments."""
    key = jax.random.fold_in(jax.random.key(seed), sample)
    return jax.random.fold_in(key, zlib.crc32(np.asarray(prompt, np.int32).tobytes()))


def cut(context: list[int], limit: int) -> list[int]:
    """Return the context, or its last limit // 2 tokens if it is longer than the limit."""
    return context if len(context) <= limit else context[-max(1, limit // 2) :]
