"""Log-probabilities of the tokens of texts, each predicted from those before it.

B batch, T time, D width, V vocabulary (padded).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import GPTConfig
from gptjax.errors import DAMAGED_WEIGHTS, NonFiniteError
from gptjax.kv_cache import make_cache
from gptjax.loss import token_losses
from gptjax.model import Params, head, hidden_states, unstack_layers
from gptjax.tokenizer import check_ids

SHORTEST = 32  # tokens of the narrowest batch; below, another compilation costs more than it saves


class Text(NamedTuple):
    """Token ids of which the last `scored` are predicted, each from those before it."""

    ids: np.ndarray
    scored: int


class Score(NamedTuple):
    """The model's predictions of a text's scored tokens."""

    logprobs: np.ndarray  # (scored,) float64, in nats
    hits: np.ndarray  # (scored,) bool: the token was the likeliest one


@functools.partial(jax.jit, static_argnames="cfg")
def score_batch(
    cfg: GPTConfig, params: Params, windows_BT: Array, lengths_B: Array
) -> tuple[Array, Array]:
    """Return the log-probability of tokens 1..T of each window, and whether it was the likeliest.

    Args:
        cfg: the model, without "auto".
        params: its tree, layers stacked.
        windows_BT: ids (B, T+1), padded on the right.
        lengths_B: ids in each window before the padding, which scores 0 and no hit.

    Returns:
        Both (B, T).
    """
    tokens_BT, targets_BT = windows_BT[:, :-1], windows_BT[:, 1:]
    cache = None
    if cfg.cache != "auto":  # else none is needed
        params, cache = unstack_layers(params, cfg.n_layer), make_cache(cfg, *tokens_BT.shape)
    x_BTD, _ = hidden_states(cfg, params, tokens_BT, cache=cache)

    def score_row(row: tuple[Array, Array]) -> tuple[Array, Array]:
        x_TD, targets_T = row
        logits_TV = head(cfg, params, x_TD)
        return -token_losses(logits_TV, targets_T), logits_TV.argmax(axis=1) == targets_T

    # Row by row, because the float32 logits of a batch are by far the largest array: 0.2 GB a row
    # for GPT-2.
    logprobs_BT, hits_BT = jax.lax.map(score_row, (x_BTD, targets_BT))
    is_token_BT = jnp.arange(1, targets_BT.shape[1] + 1)[None] < lengths_B[:, None]
    return jnp.where(is_token_BT, logprobs_BT, 0), hits_BT & is_token_BT


def score_texts(
    cfg: GPTConfig,
    params: Params,
    texts: list[Text],
    *,
    context: int,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Return the scores of the texts, in their order.

    Texts of similar length share batches, whose width is a power of two: few shapes to compile.

    Args:
        cfg: the model, without "auto".
        params: its tree, layers stacked.
        texts: of at least one token before the scored ones; too long ones are cut (`cut_left`).
        context: tokens that a prediction sees at most; at most block_size.
        batch_size: texts per forward pass.
        progress: is told (texts done, texts in all).

    Raises:
        DataError: an id is outside the model's vocabulary.
        NonFiniteError: the model says NaN or infinity.
    """
    texts = [cut_left(text, context) for text in texts]
    groups: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        assert 0 < text.scored < len(text.ids), text
        groups.setdefault(batch_width(len(text.ids) - 1, context), []).append(i)
    scores: dict[int, Score] = {}
    for width, members in sorted(groups.items()):
        for first in range(0, len(members), batch_size):
            chosen = members[first : first + batch_size]
            windows = np.zeros((batch_size, width + 1), np.int32)
            lengths = np.zeros(batch_size, np.int32)
            for row, i in enumerate(chosen):
                ids = check_ids(texts[i].ids, cfg.vocab_size)
                windows[row, : len(ids)], lengths[row] = ids, len(ids)
            logprobs, hits = jax.device_get(score_batch(cfg, params, windows, lengths))
            if not np.isfinite(logprobs).all():
                raise NonFiniteError(DAMAGED_WEIGHTS)
            for row, i in enumerate(chosen):
                end = lengths[row] - 1
                scored = slice(end - texts[i].scored, end)
                scores[i] = Score(logprobs[row, scored].astype(np.float64), hits[row, scored])
            progress(len(scores), len(texts))
    return [scores[i] for i in range(len(texts))]


def batch_width(length: int, context: int) -> int:
    """Return the least power of two >= `length`, but within SHORTEST and the context."""
    return min(context, max(SHORTEST, 1 << (length - 1).bit_length()))


def is_too_long(text: Text, context: int) -> bool:
    """Return whether a text's last token would be predicted from more than `context` tokens."""
    return len(text.ids) > context + 1


def cut_left(text: Text, context: int) -> Text:
    """Return the last `context` + 1 tokens of a text: its last token, and what that may see."""
    return Text(text.ids[-(context + 1) :], min(text.scored, context))
