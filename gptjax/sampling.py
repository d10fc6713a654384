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
import numpy as np
from jax import Array

from gptjax import fused
from gptjax.attention import choose_cached_attention
from gptjax.config import GPTConfig, SampleConfig
from gptjax.decoding import NOT_FINITE, Scores, grow, prefill
from gptjax.errors import DAMAGED_WEIGHTS, NonFiniteError
from gptjax.filters import History, make_history
from gptjax.kernels.cuda import KernelError
from gptjax.model import Params

SMALL_CACHE = 128  # tokens that a cache has room for at least
SMALL_CACHE_OF_CPU = 256  # the same where a text is longer
MANY_ROWS = 64  # from which a cache on a GPU grows: 0.57 ms a token at 128 places, 0.86 at 512


def on_cpu() -> bool:
    """Return whether the host computes: then its calls cost little, and reading ahead wins nothing.

    A text that ends early would even wait for the chunk that was started and is not wanted.
    """
    return jax.default_backend() == "cpu"


def chunk_size() -> int:
    """Return the tokens of a row that a call into JAX draws.

    A call costs an H100 1.6 ms at batch 1, where a token of GPT-2 small takes 0.45 ms: 64 tokens
    come 30 times a second. A CPU takes a third of a second for 16 of them.
    """
    return 16 if on_cpu() else 64


def count_of(count: int, name: str = "plain") -> np.int32 | None:
    """Return `count` as an operand of the decoder of this name; None where it draws a whole chunk.

    XLA's loop on a GPU waits for the host after each token, if its length is an operand.
    """
    return np.int32(count) if name == "kernel" or on_cpu() else None


def bucket(n: int, limit: int = 2**30) -> int:
    """Return the least of 64, 256, 1024 ... that holds n, or the limit: few shapes to compile."""
    size = 64
    while size < n:
        size *= 4
    return min(size, limit)


def cache_size(n: int, limit: int) -> int:
    """Return the least of 128, 256, 512 ... that holds n, or the limit."""
    return min(max(SMALL_CACHE, 1 << (n - 1).bit_length()), limit)


def first_size(cfg: GPTConfig, rows: int, longest: int, left: int) -> int:
    """Return the size of a cache for texts that begin, of `longest` tokens, with `left` to draw.

    Attention reads every place of a cache, so that of many rows starts small and grows with the
    text; each size is one more program to compile. A few rows on a GPU do not save the time for it,
    nor does a small model on a CPU, where GPT-2 small takes 66 ms a token with 128 places, 93 with
    512 and 153 with 1024. The kernel for a token reads only what each row holds.
    """
    whole, first = longest + left - 1, longest + min(left - 1, chunk_size())
    if on_cpu():
        first = min(whole, max(first, SMALL_CACHE_OF_CPU))
    elif rows < MANY_ROWS or choose_cached_attention(cfg, rows, 1, cfg.block_size) == "flash":
        first = whole
    return cache_size(first, cfg.block_size)


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
) -> Iterator[np.ndarray]:
    """Continue prompts, token by token.

    Args:
        cfg: the model, without "auto".
        params: from `model.prepare_for_decoding`.
        prompts: token ids of each row, none empty; they may differ in length.
        how: temperature and filters.
        max_new_tokens: per row.
        seed: seed of the draws.
        samples: row i is sample number samples[i] (0 if not given) of its prompt. A row depends on
            its prompt, the seed and this number, and on nothing else in the batch.

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
    contexts = [list(prompt) for prompt in prompts]
    samples = samples if samples is not None else [0] * len(prompts)
    keys_B = row_keys(*key_parts(seed, samples, prompts))
    drawn: list[list[int]] = [[] for _ in prompts]
    while len(drawn[0]) < max_new_tokens:
        contexts = [cut(context, limit) for context in contexts]
        # Prompt and text until the context is read again.
        most = bucket(max(map(len, prompts)) + len(drawn[0]) + limit)
        history = make_history(how, cfg.padded_vocab_size, prompts, drawn, most)
        left = max_new_tokens - len(drawn[0])
        chunks = fill_context(
            cfg, params, how, contexts, keys_B, history, len(drawn[0]), left, n_likeliest
        )
        for chunk in chunks if on_cpu() else one_ahead(chunks):
            count = min(limit + 1 - max(map(len, contexts)), max_new_tokens - len(drawn[0]))
            piece: Piece = jax.tree.map(functools.partial(first_rows, count=count), chunk)
            if (piece.ids == fused.GAVE_UP).any():
                fused.give_up("blocks waited in vain")
                break  # and read all that came before again
            if (piece.ids == NOT_FINITE).any():
                raise NonFiniteError(DAMAGED_WEIGHTS)
            for context, text, new in zip(contexts, drawn, piece.ids.tolist(), strict=True):
                context.extend(new)
                text.extend(new)
            yield piece


def fill_context(
    cfg: GPTConfig,
    params: Params,
    how: SampleConfig,
    contexts: Sequence[Sequence[int]],
    keys_B: Array,
    history: History | None,
    n_drawn: int,
    left: int,
    n_likeliest: int | None,
) -> Iterator[Piece]:
    """Start the computation of the next tokens, until the longest context is full.

    Args:
        cfg: the model, without "auto".
        params: from `prepare_for_decoding`.
        how: temperature and filters.
        contexts: what each row reads first, at most block_size tokens.
        keys_B: a random key per row.
        history: what the filters remember of each row; None where they need nothing.
        n_drawn: tokens drawn so far.
        left: tokens to draw at most.
        n_likeliest: as of `generate_pieces`.

    Yields:
        One token of each row, then chunks, maybe computed only later: arrays (n, B, ...). The last
        may hold more tokens than count.
    """
    longest, limit, chunk = max(map(len, contexts)), cfg.block_size, chunk_size()
    left = min(left, limit - longest + 1)  # the newest token is not in the cache yet
    size = first_size(cfg, len(contexts), longest, left)
    tokens_BT = np.zeros((len(contexts), bucket(longest, size)), np.int32)
    for row, context in zip(tokens_BT, contexts, strict=True):
        row[: len(context)] = context
    length_B = np.array([len(context) for context in contexts], np.int32)
    plain = fused.without_kernel(params)
    state = prefill(
        cfg, how, size, plain, tokens_BT, length_B, keys_B, np.int32(n_drawn), history, n_likeliest
    )
    yield jax.tree.map(lambda x: np.asarray(x)[None], Piece(state.token_B, state.scores))
    done, name, weights = 1, "plain", plain
    if done < left and "kernel" in params and fused.takes(cfg, len(contexts)):
        state, size = state._replace(cache=fused.stack_cache(cfg, state.cache)), limit
        name, weights = "kernel", params["kernel"]
    while done < left:
        count = min(chunk, left - done)
        if (needed := longest + done - 1 + count) > size:
            size = cache_size(needed, limit)
            state = grow(state, size)
        # If a whole chunk is drawn, steps past `count` overwrite the last place of a cache that is
        # not read again.
        try:
            state, new_nB, scores = fused.DECODE[name](
                cfg, how, chunk, weights, state, keys_B, count_of(count, name)
            )
        except (KernelError, jax.errors.JaxRuntimeError) as error:
            if name == "plain":
                raise
            fused.give_up(str(error).strip().partition("\n")[0])
            return  # all that came before will be read again
        yield Piece(new_nB, scores)
        done += count


def one_ahead(chunks: Iterator[Piece]) -> Iterator[Piece]:
    """Yield the chunks, from the second on when the next one was started: a GPU need not wait."""
    yield next(chunks)
    waiting = next(chunks, None)
    try:
        while waiting is not None:
            ready, waiting = waiting, next(chunks, None)
            yield ready
    finally:
        jax.block_until_ready(waiting)  # Python may crash at its end while JAX computes


def first_rows(x_nB: Array, count: int) -> np.ndarray:
    """Return the first `count` of n steps as a NumPy array, rows first: (B, count, ...)."""
    return np.asarray(x_nB)[:count].swapaxes(0, 1)


def key_parts(
    seed: int, samples: Sequence[int], prompts: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what the random keys of rows are made of, and nothing but that: see `row_keys`."""
    prompt_B = [zlib.crc32(np.asarray(prompt, np.int32).tobytes()) for prompt in prompts]
    return np.asarray(seed, np.uint32), np.array(samples, np.int32), np.array(prompt_B, np.uint32)


@jax.jit
def row_keys(seed: Array, sample_B: Array, prompt_B: Array) -> Array:
    """Return a random key for each row (B,): of the seed, the number of its sample, its prompt."""
    key = jax.random.key(seed)
    fold = jax.vmap(lambda i, prompt: jax.random.fold_in(jax.random.fold_in(key, i), prompt))
    return fold(sample_B, prompt_B)


def cut(context: list[int], limit: int) -> list[int]:
    """Return the context, or its last limit // 2 tokens if it is longer than the limit."""
    return context if len(context) <= limit else context[-max(1, limit // 2) :]
