"""Beam search finds transformers' texts with transformers' scores, and stays in the context."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import beam_search, model, sampling
from gptjax.config import SampleConfig
from gptjax.conversion.tensors import named_tensors
from gptjax.errors import NonFiniteError
from gptjax.scoring import Text, score_texts

from .helpers import need, scaled_params, tiny

CFG = tiny(block_size=32)
PARAMS = scaled_params(CFG, jax.random.key(3), scale=16.0)  # whose texts vary
DECODER = model.prepare_for_decoding(CFG, PARAMS)
PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(20))]
PLAIN = SampleConfig()


def search(prompt: Sequence[int], beams: int, n: int, **kwargs: Any) -> list[beam_search.Found]:
    how = kwargs.pop("how", PLAIN)
    return beam_search.search(CFG, DECODER, prompt, how, beams=beams, max_new_tokens=n, **kwargs)


@functools.cache
def reference() -> Any:
    """The same model in transformers."""
    torch, transformers = need("torch"), need("transformers")
    shape = transformers.GPT2Config(
        n_layer=CFG.n_layer,
        n_head=CFG.n_head,
        n_embd=CFG.n_embd,
        n_positions=CFG.block_size,
        vocab_size=CFG.vocab_size,
        bos_token_id=None,
        eos_token_id=None,
    )
    gpt2 = transformers.GPT2LMHeadModel(shape).eval()
    tensors = {
        f"transformer.{name}": torch.from_numpy(np.array(array, np.float32))
        for name, array in named_tensors(CFG, PARAMS)
    }
    gpt2.load_state_dict(tensors, strict=False)
    gpt2.tie_weights()
    return gpt2


def their_beams(
    prompt: Sequence[int],
    beams: int,
    n: int,
    ends: Sequence[int],
    length_penalty: float,
    how: SampleConfig,
) -> list[tuple[list[int], float]]:
    """Return their texts with their scores."""
    torch = need("torch")
    ids = torch.tensor([prompt])
    found = reference().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        early_stopping=False,
        length_penalty=length_penalty,
        max_new_tokens=n,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        repetition_penalty=how.repetition_penalty,
        no_repeat_ngram_size=how.no_repeat_ngram,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        new = row[len(prompt) :]
        at = [i for i, token in enumerate(new) if token in ends]
        texts.append((new[: at[0] + 1] if at else new, score))
    return texts


# The ids that end a text are among the likely ones, so that beams end early, late and never.
CASES: list[tuple[int, int, tuple[int, ...], float, SampleConfig]] = [
    (2, 12, (), 1.0, PLAIN),
    (4, 12, (24,), 1.0, PLAIN),
    (4, 12, (8, 24, 27), 1.0, PLAIN),
    (5, 12, tuple(range(0, 61, 6)), 1.0, PLAIN),
    (3, 12, tuple(range(0, 61, 4)), 0.0, PLAIN),
    (3, 12, tuple(range(0, 61, 4)), 2.0, PLAIN),
    (3, 12, (24,), 1.0, SampleConfig(repetition_penalty=1.4, no_repeat_ngram=2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} beams, {len(case[2])} ends")
def test_beams_are_those_of_transformers(
    case: tuple[int, int, tuple[int, ...], float, SampleConfig],
) -> None:
    beams, n, ends, length_penalty, how = case
    for prompt in PROMPTS:
        ours = search(prompt, beams, n, ends=ends, length_penalty=length_penalty, how=how)
        theirs = their_beams(prompt, beams, n, ends, length_penalty, how)
        assert [found.ids.tolist() for found in ours] == [text for text, _ in theirs]
        scores = [(found.score, score) for found, (_, score) in zip(ours, theirs, strict=True)]
        assert max(abs(a - b) for a, b in scores) <= 1e-5


@pytest.mark.parametrize("mistake", ["length", "candidates", "cache"])
def test_beam_gate_turns_red(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistakes: no length, an end among the running, the caches of other beams."""
    beams, n, ends, length_penalty, _ = CASES[5]
    step, best = beam_search.step, beam_search.best

    def no_length(rules: beam_search.Rules, *args: Any) -> beam_search.SearchState:
        return step(rules._replace(length_penalty=0.0), *args)

    def all_run(texts: beam_search.Texts, totals: jax.Array, k: int) -> Any:
        return best(texts, texts.total_K if len(totals) == len(ends) * k + k else totals, k)

    def not_gathered(rules: beam_search.Rules, state: Any, *args: Any) -> beam_search.SearchState:
        return step(rules, state, *args)._replace(cache=state.cache)

    name, planted = {
        "length": ("step", no_length),
        "candidates": ("best", all_run),
        "cache": ("step", not_gathered),
    }[mistake]
    monkeypatch.setattr(beam_search, name, planted)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_beams_are_those_of_transformers((beams, n, ends, length_penalty, PLAIN))
    jax.clear_caches()


def test_one_beam_is_greedy() -> None:
    greedy = sampling.generate(
        CFG, DECODER, [PROMPTS[1]], SampleConfig(temperature=0), max_new_tokens=9
    )
    (found,) = search(PROMPTS[1], 1, 9)
    assert found.ids.tolist() == np.concatenate(list(greedy), axis=1)[0].tolist()


def test_the_scores_of_tokens_are_the_models_own() -> None:
    """Also where a penalty has changed what was found, and every likeliest token is scored."""
    how = SampleConfig(no_repeat_ngram=1)
    for found in search(PROMPTS[1], 3, 20, how=how, n_likeliest=CFG.vocab_size, ends=(24,)):
        assert found.scores is not None
        ids = np.array([*PROMPTS[1], *found.ids])
        text = Text(ids, len(found.ids))
        (score,) = score_texts(CFG, PARAMS, [text], context=CFG.block_size, batch_size=1)
        assert np.abs(found.scores.logprob - score.logprobs).max() <= 1e-5
        mean = found.scores.logprob.mean()
        assert abs(found.score - mean) <= 1e-5
        assert (np.sort(found.scores.likeliest, axis=1) == np.arange(CFG.vocab_size)).all()
        assert np.abs(np.exp(found.scores.likeliest_logprob).sum(axis=1) - 1).max() <= 1e-5


def test_texts_end_where_the_context_is_full() -> None:
    for prompt, n in ((PROMPTS[2], 13), (list(range(32)), 1), (list(range(33)), 17)):
        for found in search(prompt, 3, 500):
            assert len(found.ids) == n
    assert search(PROMPTS[0], 3, 0) == []


def test_few_tokens_for_many_beams() -> None:
    """More beams than there are texts: those that there are come, each once."""
    cfg = tiny(vocab_size=3, vocab_multiple=8)
    params = model.prepare_for_decoding(cfg, scaled_params(cfg, jax.random.key(2)))
    found = beam_search.search(cfg, params, [1], PLAIN, beams=12, max_new_tokens=2)
    texts = [tuple(text.ids.tolist()) for text in found]
    assert set(texts) == {(a, b) for a in range(3) for b in range(3)} and len(texts) == 9
    assert [text.score for text in found] == sorted((text.score for text in found), reverse=True)


def test_it_gives_up_when_told_and_refuses_broken_weights() -> None:
    assert search(PROMPTS[0], 2, 30, stopped=lambda: True) == []
    broken = {**DECODER, "ln_f": jax.tree.map(lambda p: p * np.nan, DECODER["ln_f"])}
    with pytest.raises(NonFiniteError, match="NaN"):
        beam_search.search(CFG, broken, [1], PLAIN, beams=2, max_new_tokens=4)
