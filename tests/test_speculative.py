"""A draft changes the speed of a sample, and nothing else of it."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
from gptjax import drafts, model, sampling, speculative
from gptjax.config import GPTConfig, SampleConfig, TrainConfig
from gptjax.drafts import Draft
from gptjax.errors import NonFiniteError
from gptjax.speculative import Tally
from gptjax.terminal import cli
from gptjax.tokenizer import ByteTokenizer, CharTokenizer

from .helpers import scaled_params, tiny

CFG = tiny()
PARAMS = model.prepare_for_decoding(CFG, scaled_params(CFG, jax.random.key(0), scale=4.0))
# A smaller model, whose vocabulary is padded otherwise: by chance it seldom guesses right.
SMALL = tiny(n_layer=1, n_embd=16, vocab_multiple=1)
STRANGER = model.prepare_for_decoding(SMALL, scaled_params(SMALL, jax.random.key(1)))
GREEDY = SampleConfig(temperature=0)
PROMPTS = [[3, 1, 4, 1, 5], [7], list(range(17)), [5, 6] * 6]


def like(params: model.Params, noise: float) -> model.Params:
    """Return a model that guesses right the more often, the less noise."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noisy = [
        leaf + noise * leaf.std() * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


DRAFTS: dict[str, tuple[GPTConfig | None, model.Params | None]] = {
    "ngram": (None, None),
    "stranger": (SMALL, STRANGER),
    "alike": (CFG, like(PARAMS, 0.2)),
    "itself": (CFG, PARAMS),
}


def drafted(
    name: str, prompts: list[list[int]], how: SampleConfig, n: int, k: int = 3, **kwargs: Any
) -> tuple[Any, Tally]:
    """The pieces of all rows, joined, and how many drafts were right."""
    cfg, params = DRAFTS[name]
    tally = Tally(len(prompts))
    pieces = speculative.generate_pieces(
        CFG,
        kwargs.pop("params", PARAMS),
        prompts,
        how,
        draft=Draft(k, cfg, params),
        max_new_tokens=n,
        tally=tally,
        **kwargs,
    )
    return join(list(pieces)), tally


def plain(prompts: list[list[int]], how: SampleConfig, n: int, **kwargs: Any) -> Any:
    """The same by the plain decoder, the reference."""
    pieces = sampling.generate_pieces(CFG, PARAMS, prompts, how, max_new_tokens=n, **kwargs)
    return join(list(pieces))


def join(pieces: list[sampling.Piece]) -> Any:
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *pieces)


HOWS = {
    "greedy": GREEDY,
    "filters": SampleConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": SampleConfig(
        temperature=1.2,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        presence_penalty=0.2,
        no_repeat_ngram=2,
    ),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", DRAFTS)
def test_the_text_is_the_plain_decoders(name: str, how: str) -> None:
    """Token for token, in rows of other lengths and luck that outgrow the context of 16 twice."""
    for seed in range(1 if how == "greedy" else 6):
        said, tally = drafted(name, PROMPTS, HOWS[how], 30, seed=seed)
        assert said.ids.tolist() == plain(PROMPTS, HOWS[how], 30, seed=seed).ids.tolist()
        assert ((tally.right >= 0) & (tally.right <= tally.drafted)).all() and tally.drafted.all()


def test_one_row_and_any_length_of_a_draft() -> None:
    expected = plain([PROMPTS[0]], GREEDY, 20).ids
    for k in (1, 20):  # the last is longer than the context
        for n in (1, 20):
            assert (drafted("alike", [PROMPTS[0]], GREEDY, n, k)[0].ids == expected[:, :n]).all()


def test_a_model_that_drafts_for_itself_is_right() -> None:
    """But where a context or the text ends within a draft."""
    for how in HOWS.values():
        said, tally = drafted("itself", [PROMPTS[0]], how, 11)
        assert said.ids.shape == (1, 11)
        assert tally.right == tally.drafted == 9  # tokens 2 to 5, 6 to 9, 10 to 11


def mistakes(prompts: list[list[int]] = PROMPTS) -> int:
    """How many greedy tokens a draft changes."""
    said, _ = drafted("alike", prompts, GREEDY, 30)
    return int((said.ids != plain(prompts, GREEDY, 30).ids).sum())


def test_a_draft_that_is_kept_whole_turns_the_gate_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mistakes() == 0
    everything = lambda draft_BK, _: jnp.full(len(draft_BK), draft_BK.shape[1])  # noqa: E731
    monkeypatch.setattr(speculative, "count_right", everything)
    jax.clear_caches()
    assert mistakes() > 10
    jax.clear_caches()


def test_scores_are_the_plain_decoders() -> None:
    how = HOWS["filters"]
    said, _ = drafted("alike", PROMPTS, how, 30, n_likeliest=5)
    expected = plain(PROMPTS, how, 30, n_likeliest=5)
    assert (said.scores.likeliest == expected.scores.likeliest).all()
    assert np.abs(said.scores.logprob - expected.scores.logprob).max() <= 1e-5
    difference = said.scores.likeliest_logprob - expected.scores.likeliest_logprob
    assert np.abs(difference).max() <= 1e-5


def test_broken_weights_are_an_error() -> None:
    broken = {**PARAMS, "ln_f": jax.tree.map(lambda p: p * np.nan, PARAMS["ln_f"])}
    with pytest.raises(NonFiniteError, match="NaN"):
        drafted("ngram", PROMPTS, GREEDY, 8, params=broken)


# ---- In distribution, without the plain decoder --------------------------------------------------

FEW = tiny(n_layer=1, vocab_size=5, vocab_multiple=1)
FEW_PARAMS = scaled_params(FEW, jax.random.key(2), scale=16.0)


def chi_square() -> float:
    """Of the pairs of tokens that 4000 samples begin with, against all pairs' probabilities."""
    decoder, n = model.prepare_for_decoding(FEW, FEW_PARAMS), 4000
    draft, how = Draft(2, FEW, like(decoder, 0.5)), SampleConfig(temperature=1.0)
    prompt = np.tile(np.array([1, 2], np.int32), (n, 1))
    length, end = np.full(n, 2, np.int32), np.full(n, 4, np.int32)
    state = speculative.begin(FEW, draft, 4, decoder, prompt, length, 0 * length, None)
    keys = jax.random.split(jax.random.key(7), n)
    state = speculative.go_on(FEW, how, draft, decoder, state, keys, end, end)
    ids = np.asarray(state.text.ids_BS[:, 2:4])
    found = np.bincount(5 * ids[:, 0] + ids[:, 1], minlength=25)
    texts = jnp.array([[1, 2, i] for i in range(5)])
    logprobs = jax.nn.log_softmax(model.forward(FEW, FEW_PARAMS, texts)[0])
    expected = n * np.exp(logprobs[0, 1][:, None] + logprobs[:, 2]).reshape(-1)
    return float(((found - expected) ** 2 / expected).sum())


def test_samples_have_the_models_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of 24 degrees of freedom: above 60 once in 10,000 tests that find nothing."""
    assert chi_square() <= 60
    everything = lambda draft_BK, _: jnp.full(len(draft_BK), draft_BK.shape[1])  # noqa: E731
    monkeypatch.setattr(speculative, "count_right", everything)
    jax.clear_caches()
    assert chi_square() > 300
    jax.clear_caches()


# ---- Drafts from the text ------------------------------------------------------------------------


def looked_up(text: list[int], n: int) -> list[int]:
    """The reference, in Python."""
    found, best = 0, -1
    for place in range(1, len(text)):
        same = 0
        while same < min(drafts.NGRAM, place) and text[place - 1 - same] == text[-1 - same]:
            same += 1
        if same >= best:
            found, best = place, same
    period = text[found:]
    return [period[i % len(period)] for i in range(n)]


def test_an_ngram_finds_what_followed() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 3, n).tolist() for n in range(1, 30)]
    texts.append([7, 8, 9, 1, 2, 7, 8, 9])
    padded = np.full((len(texts), 40), 8, np.int32)  # garbage that would match
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    found = drafts.draft_by_ngram(jnp.asarray(padded), jnp.array([len(text) for text in texts]), 6)
    assert found.tolist() == [looked_up(text, 6) for text in texts]
    assert found[-1].tolist() == [1, 2, 7, 8, 9, 1]


# ---- In the program ------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, restore_process: None) -> None:
    """Let sample.py find models over bytes, of which `short` has a shorter context."""
    large, short = tiny(vocab_size=256, block_size=32), tiny(vocab_size=256, n_embd=16)
    small = dataclasses.replace(short, block_size=32)

    def run(cfg: GPTConfig, tokenizer: Any) -> Any:
        params = scaled_params(cfg, jax.random.key(cfg.n_embd))
        return SimpleNamespace(config=TrainConfig(model=cfg), params=params, tokenizer=tokenizer)

    found = {
        "small": run(small, ByteTokenizer()),
        "short": run(short, ByteTokenizer()),
        "chars": run(small, CharTokenizer("ab")),
    }
    params = scaled_params(large, jax.random.key(4))
    monkeypatch.setattr(
        sample, "load_model", lambda config, opened: (large, params, ByteTokenizer())
    )
    monkeypatch.setattr(sample.sources, "load_model", found.__getitem__)


def say(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> tuple[str, str]:
    assert cli.run(sample.main, ["--compile_cache=off", "--start=ab", *argv]) == code
    return capsys.readouterr()


def test_the_program_says_the_same_with_a_draft(
    runs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--num_samples=2", "--max_new_tokens=24", "--json")
    lines = [json.loads(line) for line in say(capsys, *common)[0].splitlines()]
    for name in ("ngram", "small"):
        out, err = say(capsys, *common, f"--draft={name}", "--draft_tokens=2")
        found = [json.loads(line) for line in out.splitlines()]
        drafted = [(line.pop("drafted"), line.pop("right")) for line in found]
        assert [line["ids"] for line in found] == [line["ids"] for line in lines]
        assert all(0 <= right <= of and of > 0 for of, right in drafted)
        assert err.startswith("note: ") and f"of {sum(of for of, _ in drafted)} drafted" in err
    text, _ = say(capsys, "--max_new_tokens=9", "--draft=ngram")
    assert text == say(capsys, "--max_new_tokens=9")[0]


@pytest.mark.parametrize(
    ("argv", "widths"),
    [
        (["--max_new_tokens=9"], [32]),
        (["--max_new_tokens=9", "--draft=small"], [16]),
        (["--max_new_tokens=9", "--draft=ngram"], []),
        (["--max_new_tokens=7", "--draft=small"], []),
        (["--max_new_tokens=7"], []),
    ],
)
def test_a_long_text_is_what_the_kernel_is_for(
    argv: list[str],
    widths: list[int],
    runs: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a draft it computes the small model, which is 16 wide, and not the large one."""
    asked: list[int] = []

    def with_kernel(cfg: GPTConfig, params: model.Params) -> model.Params:
        asked.append(cfg.n_embd)
        return params

    monkeypatch.setattr(sample.fused, "with_kernel", with_kernel)
    monkeypatch.setattr(sample.fused, "takes", lambda cfg, rows: True)
    monkeypatch.setattr(sample.fused, "MANY_STEPS", 8)
    say(capsys, *argv)
    assert asked == widths


def test_who_cannot_draft_is_refused(runs: None, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in (("chars", "tokenizer"), ("short", "16 tokens is shorter")):
        _, err = say(capsys, f"--draft={name}", code=2)
        assert err.startswith(f"error: --draft={name}") and reason in err
    for argv in (
        ("--draft=ngram", "--beams=2"),
        ("--draft_tokens=2",),
        ("--draft=ngram", "--draft_tokens=0"),
    ):
        assert "--draft" in say(capsys, *argv, code=2)[1]
