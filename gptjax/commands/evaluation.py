"""Published evaluations of a language model; docs/evaluation.md has their exact protocols.

B batch, T time, N = B*T, D width, V vocabulary (padded).
"""

import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import GPTConfig
from gptjax.errors import DataError, NonFiniteError, plural
from gptjax.loss import token_losses
from gptjax.model import Params, head, hidden_states
from gptjax.tokenizer import Tokenizer, check_ids, decode

T = TypeVar("T")
SHORTEST = 32  # tokens of the narrowest batch; below, another compilation costs more than it saves


class Text(NamedTuple):
    """Token ids of which the last `scored` are predicted, each from those before it."""

    ids: np.ndarray
    scored: int


class Score(NamedTuple):
    """What the model made of a text's scored tokens."""

    logprobs: np.ndarray  # (scored,) float64, in nats
    hits: np.ndarray  # (scored,) bool: the token was the likeliest one


class Settings(NamedTuple):
    """What a protocol may vary."""

    context: int  # tokens that a prediction sees at most
    stride: int  # tokens between windows; 1 to context
    limit: int = 0  # rows or tokens taken from the start; 0 = all


Scorer = Callable[[list[Text]], list[Score]]
Result = dict[str, float | None]


# ---- Scoring -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="cfg")
def score_batch(
    cfg: GPTConfig, params: Params, windows_BT: Array, lengths_B: Array
) -> tuple[Array, Array]:
    """Log-probability of tokens 1..T of each window, and whether it was the likeliest: (B, T) both.

    Args:
        cfg: the model, without "auto".
        params: its tree, layers stacked.
        windows_BT: ids (B, T+1), padded on the right.
        lengths_B: ids in each window before the padding, which scores 0 and no hit.
    """
    tokens_BT, targets_BT = windows_BT[:, :-1], windows_BT[:, 1:]
    x_BTD, _ = hidden_states(cfg, params, tokens_BT)

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
    """The scores of the texts, in their order.

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
                raise NonFiniteError(
                    "the model's logits are NaN or infinite: its weights are damaged"
                )
            for row, i in enumerate(chosen):
                end = lengths[row] - 1
                scored = slice(end - texts[i].scored, end)
                scores[i] = Score(logprobs[row, scored].astype(np.float64), hits[row, scored])
            progress(len(scores), len(texts))
    return [scores[i] for i in range(len(texts))]


def batch_width(length: int, context: int) -> int:
    """The least power of two that holds this many tokens, within SHORTEST and the context."""
    return min(context, max(SHORTEST, 1 << (length - 1).bit_length()))


def is_too_long(text: Text, context: int) -> bool:
    """Whether its last token would be predicted from more than `context` tokens."""
    return len(text.ids) > context + 1


def cut_left(text: Text, context: int) -> Text:
    """What of the text its last token may see: the last `context` tokens, and that token."""
    return Text(text.ids[-(context + 1) :], min(text.scored, context))


def exp(nats: float) -> float | None:
    """A perplexity; None where no float is that large."""
    return math.exp(nats) if nats < 709 else None


# ---- The protocols: (scorer, tokenizer, the file's text, settings) -> numbers --------------------


def wikitext2(score: Scorer, tokenizer: Tokenizer, text: str, settings: Settings) -> Result:
    """Perplexity of a running text per token and per word, and its bits per byte.

    Raises:
        DataError: the text has less than two tokens or no word, or the tokenizer refuses it.
    """
    ids = tokenizer.encode(text)[: settings.limit or None]
    words = len(decode(tokenizer, ids).split())
    if len(ids) < 2 or not words:
        found = f"{len(ids)} {plural(len(ids), 'token')}, {words} {plural(words, 'word')}"
        raise DataError(f"{found}: too short to evaluate; take more text")
    windows = cut_windows(ids, settings.context, settings.stride)
    nats = -sum(float(window.logprobs.sum()) for window in score(windows))
    n_bytes = len(tokenizer.decode_bytes(ids))
    return {
        "nll": nats / (len(ids) - 1),
        "perplexity": exp(nats / (len(ids) - 1)),
        "word_perplexity": exp(nats / words),
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "stride": settings.stride,
        "windows": len(windows),
        "tokens": len(ids),
        "scored_tokens": sum(window.scored for window in windows),
        "words": words,
        "bytes": n_bytes,
    }


def cut_windows(ids: np.ndarray, context: int, stride: int) -> list[Text]:
    """Windows that score each token but the first exactly once, from at most `context` tokens.

    The first window scores `context` tokens, each further one the next `stride`. A scored token
    sees at least context - stride + 1 tokens, the first `context` of the text excepted.
    """
    windows, done = [], 1
    while done < len(ids):
        end = min(done + (context if done == 1 else stride), len(ids))
        windows.append(Text(ids[max(0, end - context - 1) : end], end - done))
        done = end
    return windows


def lambada(score: Scorer, tokenizer: Tokenizer, text: str, settings: Settings) -> Result:
    """Accuracy and perplexity of the last word of each row's "text".

    Raises:
        DataError: a row, named by its line, is not what it should be.
    """

    def parse(row: dict[str, Any]) -> Text:
        context, space, word = take_field(row, "text", str).rpartition(" ")
        if not space or not word:
            raise DataError('"text" has no last word behind a space')
        return continuation(tokenizer, context, " " + word)

    texts = read_rows(text, settings.limit, parse)
    scores = score(texts)
    return {
        "acc": float(np.mean([score.hits.all() for score in scores])),
        "perplexity": exp(-float(np.mean([score.logprobs.sum() for score in scores]))),
        "last_token_acc": float(np.mean([score.hits[-1] for score in scores])),
        "rows": len(texts),
        "rows_cut": sum(is_too_long(text, settings.context) for text in texts),
        "target_tokens": sum(text.scored for text in texts),
    }


def hellaswag(score: Scorer, tokenizer: Tokenizer, text: str, settings: Settings) -> Result:
    """Accuracy of choosing the likeliest of several endings, plain and by three measures of length.

    Raises:
        DataError: a row, named by its line, is not what it should be.
    """

    def parse(row: dict[str, Any]) -> tuple[list[Text], list[str], int]:
        query, choices, gold = parse_question(row)
        return [continuation(tokenizer, query, " " + c) for c in choices], choices, gold

    rows = read_rows(text, settings.limit, parse)
    texts = [text for endings, _, _ in rows for text in endings]
    scores = iter(score(texts))
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": [], "acc_tokens": []}
    for endings, choices, gold in rows:
        logprobs = [next(scores).logprobs for _ in endings]
        sums = np.array([x.sum() for x in logprobs])
        sizes = {
            "acc": np.ones(len(choices)),
            "acc_norm": np.array([len(choice) for choice in choices]),
            "acc_bytes": np.array([len(choice.encode()) for choice in choices]),
            "acc_tokens": np.array([len(x) for x in logprobs]),
        }
        for name, size in sizes.items():
            right[name].append(int(np.argmax(sums / size)) == gold)
    return {
        **{name: float(np.mean(flags)) for name, flags in right.items()},
        "rows": len(rows),
        "choices": len(texts),
        "choices_cut": sum(is_too_long(text, settings.context) for text in texts),
    }


# ---- Rows of JSON --------------------------------------------------------------------------------


def read_rows(text: str, limit: int, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Each line's JSON object, parsed; empty lines are skipped.

    Raises:
        DataError: there is no row, or a line, named by its number, is not as it should be.
    """
    rows: list[T] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if limit and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} is not a JSON object but {line.strip()[:40]}")
        try:
            rows.append(parse(row))
        except DataError as error:
            raise DataError(f"line {number}: {error}") from error
    if not rows:
        raise DataError("no rows: one JSON object per line is expected")
    return rows


def take_field(row: dict[str, Any], name: str, kind: type[T]) -> T:
    """A field of a row; DataError if it is missing or of another type."""
    if name not in row:
        raise DataError(f'no field "{name}" among {", ".join(row) or "none"}')
    value = row[name]
    if not isinstance(value, kind):
        raise DataError(f'"{name}" is a {type(value).__name__}, not a {kind.__name__}')
    return value


def parse_question(row: dict[str, Any]) -> tuple[str, list[str], int]:
    """Query, choices and the right one's index, from a prepared row or one of HellaSwag itself."""
    prepared = "query" in row
    choices = take_field(row, "choices" if prepared else "endings", list)
    if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise DataError("the choices must be two strings or more")
    if prepared:
        query, gold = take_field(row, "query", str), row.get("gold")
    else:
        query, gold = take_field(row, "activity_label", str) + ": ", row.get("label")
        if "ctx_a" in row:
            subject = take_field(row, "ctx_b", str)
            query += take_field(row, "ctx_a", str) + " " + subject.capitalize()
        else:
            query += take_field(row, "ctx", str)
        query, choices = clean(query), [clean(choice) for choice in choices]
    if not all(choices):
        raise DataError("a choice is empty")
    if str(gold) not in map(str, range(len(choices))):
        raise DataError(f"the right choice is {gold!r}, not one of 0 to {len(choices) - 1}")
    return query, choices, int(str(gold))


def clean(text: str) -> str:
    """A text of HellaSwag without WikiHow's marks in brackets, just as lm-eval removes them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def continuation(tokenizer: Tokenizer, context: str, target: str) -> Text:
    """Both as one text, of which the tokens behind those of the context are scored.

    White space at the end of the context counts as the target's; an empty context becomes the
    tokenizer's start token. Source: lm-eval.

    Raises:
        DataError: the tokenizer refuses the text, or leaves the target no token of its own.
    """
    ids = tokenizer.encode(context + target)
    scored = len(ids) - len(tokenizer.encode(context.rstrip()))
    if scored < 1:
        raise DataError(f"{target!r} has no token of its own behind its context")
    if scored == len(ids):
        ids = np.concatenate([np.array([tokenizer.start_id], ids.dtype), ids])
    return Text(ids, scored)
