"""Text from the model, piece by piece: the host's loop around the programs of `decoding`.

B batch, V vocabulary.

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
from gptjax.decoding import DecoderState, Scores, decode, prefill
from gptjax.errors import NonFiniteError
from gptjax.filters import make_history
from gptjax.model import Params

CHUNK = 16  # tokens per call into JAX: few enough to stream, enough to make the call's cost small


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
