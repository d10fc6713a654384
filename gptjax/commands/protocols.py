"""Published evaluations of a language model; docs/evaluation.md has their exact protocols.

A protocol takes (scorer, tokenizer, the file's text, settings) and returns numbers by name.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from gptjax.errors import DataError, plural
from gptjax.scoring import Score, Text, is_too_long
from gptjax.tokenizer import Tokenizer, decode

T = TypeVar("T")
Row = Mapping[str, object]  # a line's JSON object


class Settings(NamedTuple):
    """The settings of a protocol."""

    context: int  # tokens that a prediction sees at most
    stride: int  # tokens between windows; 1 to context
    limit: int = 0  # rows or tokens taken from the start; 0 = all


Scorer = Callable[[list[Text]], list[Score]]
Result = dict[str, float | None]


def wikitext2(score: Scorer, tokenizer: Tokenizer, text: str, settings: Settings) -> Result:
    """Return the perplexity of a running text per token and per word, and its bits per byte.

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
    """Cut windows that score each token but the first once, from `context` tokens at most.

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
    """Return accuracy and perplexity of the last word of each row's "text".

    Raises:
        DataError: a row, named by its line, is not what it should be.
    """

    def parse(row: Row) -> Text:
        context, space, word = take_field(row, "text", str).rpartition(" ")
        if not space or not word:
            raise DataError('"text" has no last word after a space')
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
    """Return the accuracy of choosing the likeliest ending, plain and by three measures of length.

    Raises:
        DataError: a row, named by its line, is not what it should be.
    """

    def parse(row: Row) -> tuple[list[Text], list[str], int]:
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


def read_rows(text: str, limit: int, parse: Callable[[Row], T]) -> list[T]:
    """Return each line's JSON object, parsed; skip empty lines.

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


def take_field(row: Row, name: str, kind: type[T]) -> T:
    """Return a field of a row; DataError if it is missing or of another type."""
    if name not in row:
        raise DataError(f'no field "{name}" among {", ".join(row) or "none"}')
    value = row[name]
    if not isinstance(value, kind):
        raise DataError(f'"{name}" is a {type(value).__name__}, not a {kind.__name__}')
    return value


def parse_question(row: Row) -> tuple[str, list[str], int]:
    """Return query, choices and the right one's index, of a prepared row or one of HellaSwag."""
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
    """Return a text of HellaSwag without WikiHow's marks, just as lm-eval removes them."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def continuation(tokenizer: Tokenizer, context: str, target: str) -> Text:
    """Join both to one text, of which the tokens behind those of the context are scored.

    White space at the end of the context counts as the target's; an empty context becomes the
    tokenizer's start token. Source: lm-eval.

    Raises:
        DataError: the tokenizer refuses the text, or leaves the target no token of its own.
    """
    ids = tokenizer.encode(context + target)
    scored = len(ids) - len(tokenizer.encode(context.rstrip()))
    if scored < 1:
        raise DataError(f"{target!r} has no token of its own after its context")
    if scored == len(ids):
        ids = np.concatenate([np.array([tokenizer.start_id], ids.dtype), ids])
    return Text(ids, scored)


def exp(nats: float) -> float | None:
    """Return e to the power of `nats`, None if no float is that large."""
    return math.exp(nats) if nats < 709 else None
