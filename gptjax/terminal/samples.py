"""Samples on their way to the reader: as text that comes piece by piece, or as JSON."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax

from gptjax import beam_search, sampling, speculative
from gptjax.config import GPTConfig
from gptjax.decoding import Scores
from gptjax.drafts import Draft
from gptjax.errors import plural
from gptjax.model import Params
from gptjax.sampler_config import SamplerConfig
from gptjax.terminal.console import printable
from gptjax.terminal.output import note
from gptjax.tokenizer import StreamDecoder, Tokenizer, decode


@dataclasses.dataclass
class Sample:
    """One sample, which ends at a stop string or at an id that ends a text."""

    tokenizer: Tokenizer
    prompt: str
    prompt_ids: list[int]
    number: int  # of its prompt's samples
    stop: Sequence[str] = ()  # strings that end it
    ends: Mapping[int, str] = dataclasses.field(default_factory=dict)  # ids, and what they are
    ids: list[int] = dataclasses.field(default_factory=list)  # with the one that ended it
    scores: list[Scores] = dataclasses.field(default_factory=list)  # of each id, where asked for
    score: float | None = None  # of beam search
    drafted: int | None = None  # tokens of it that were drafted, where any were
    right: int = 0  # of these
    text: str = ""  # all that may be shown so far
    held: str = ""  # the end of the text, which a stop string might begin in
    ended: str = ""  # by "eot", "stop", "stop_id" or "length"
    ended_by: str | int | None = None  # which string or id that was

    def __post_init__(self) -> None:
        """Begin with nothing shown."""
        self.decoder = StreamDecoder(self.tokenizer, self.prompt_ids if self.prompt else ())
        self.stop = [stop for stop in self.stop if stop]

    def feed(self, ids: Sequence[int], scores: Scores | None = None) -> str:
        """Return the text that may be shown after these ids, beside what was shown before.

        Args:
            ids: the next ones.
            scores: of arrays (len(ids), ...).
        """
        shown = ""
        for i, token in enumerate(ids):
            if self.ended:
                break
            self.ids.append(token)
            if scores is not None:
                self.scores.append(jax.tree.map(lambda x, i=i: x[i], scores))
            if token in self.ends:
                self.ended, self.ended_by = self.ends[token], token
                shown += self._release(self.held + self.decoder.flush())
            else:
                shown += self._release(self.held + self.decoder.feed([token]))
        return shown

    def finish(self) -> str:
        """Return what is left at the end."""
        if self.ended:
            return ""
        self.ended = "length"
        return self._release(self.held + self.decoder.flush())

    def _release(self, text: str) -> str:
        found = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        hold = 0
        if found:
            at, self.ended_by = min(found)
            self.ended, text = "stop", text[:at]
        elif not self.ended:
            beginnings = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
            hold = max((len(part) for part in beginnings if text.endswith(part)), default=0)
        text, self.held = text[: len(text) - hold], text[len(text) - hold :]
        self.text += text
        return text


def draw(
    config: SamplerConfig,
    cfg: GPTConfig,
    params: Params,
    samples: list[Sample],
    stopped: Sequence[object],
    draft: Draft | None = None,
) -> Iterator[sampling.Piece]:
    """Yield the next tokens of some samples: as they are drawn, or all that beam search found."""
    prompts, ends = [sample.prompt_ids for sample in samples], list(samples[0].ends)
    n_likeliest = min(config.logprobs, cfg.vocab_size) if config.json else None
    if draft is not None:
        tally = speculative.Tally(len(samples))
        for piece in speculative.generate_pieces(
            cfg,
            params,
            prompts,
            config.sample,
            draft=draft,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            samples=[sample.number for sample in samples],
            n_likeliest=n_likeliest,
            tally=tally,
        ):
            for sample, *counts in zip(samples, tally.drafted, tally.right, strict=True):
                sample.drafted, sample.right = map(int, counts)
            yield piece
        return
    if config.beams == 1:
        yield from sampling.generate_pieces(
            cfg,
            params,
            prompts,
            config.sample,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            samples=[sample.number for sample in samples],
            n_likeliest=n_likeliest,
        )
        return
    (sample,) = samples
    found = beam_search.search(
        cfg,
        params,
        sample.prompt_ids,
        config.sample,
        beams=config.beams,
        max_new_tokens=config.max_new_tokens,
        ends=ends,
        length_penalty=config.length_penalty,
        cache_size=cfg.block_size if config.interactive else 0,  # one program for all prompts
        n_likeliest=n_likeliest,
        stopped=lambda: stopped,
    )
    for text in found[:1]:
        sample.score = text.score
        if len(text.ids) < config.max_new_tokens and text.ids[-1] not in ends:
            note(
                f"note: the context of {cfg.block_size} tokens is full after {len(text.ids)} new "
                f"{plural(len(text.ids), 'token')}: beam search ends there"
            )
        yield jax.tree.map(lambda x: x[None], sampling.Piece(text.ids, text.scores))


def to_text(sample: Sample, echo: bool) -> str:
    """Return a sample as one of several: a line that names it, the prompt if `echo`, its text."""
    title = f"---- {printable(sample.prompt)[:40]!r}, sample {sample.number}"
    return f"{title}\n{sample.prompt if echo else ''}{sample.text}\n"


def to_json(sample: Sample) -> str:
    """Return a sample as a line of JSON, in ASCII: it reads the same in any encoding."""
    fields: dict[str, object] = {
        "prompt": sample.prompt,
        "prompt_ids": sample.prompt_ids,
        "sample": sample.number,
        "ids": sample.ids,
        "text": sample.text,
        "logprobs": [number(scores.logprob) for scores in sample.scores],
        "ended": sample.ended,
        "ended_by": sample.ended_by,
    }
    if sample.score is not None:
        fields["score"] = number(sample.score)
    if sample.drafted is not None:
        fields |= {"drafted": sample.drafted, "right": sample.right}
    likeliest = [
        [
            {"id": int(i), "text": decode(sample.tokenizer, [int(i)]), "logprob": number(logprob)}
            for i, logprob in zip(scores.likeliest, scores.likeliest_logprob, strict=True)
        ]
        for scores in sample.scores
    ]
    if any(likeliest):
        fields["likeliest"] = likeliest
    return json.dumps(fields).replace("\x7f", "\\u007f") + "\n"


def number(value: object) -> float | None:
    """Return a number as JSON holds it, to the digits that float32 knows."""
    rounded = round(float(value), 6)  # type: ignore[arg-type]
    return rounded if math.isfinite(rounded) else None


def write(text: str, raw: bool) -> None:
    """Print a text at once; on a terminal, unless `raw`, with its control characters escaped."""
    raw = raw or not sys.stdout.isatty()
    sys.stdout.write(text if raw else printable(text))
    sys.stdout.flush()
