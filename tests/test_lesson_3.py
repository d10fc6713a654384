"""What lesson 3 says can be recomputed, is recomputed; what it quotes stands in the docs."""

import importlib
import itertools
import json
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import model
from gptjax.config import GPTConfig
from gptjax.presets import PRESETS
from gptjax.training.metrics import PEAK_FLOPS, flops_per_token

from .helpers import ROOT

LESSONS = ROOT / "lessons"
TEXT = (LESSONS / "3_scaling.md").read_text(encoding="utf-8")
PROSE = re.sub(r"\s+", " ", TEXT)
MEASURED = json.loads((LESSONS / "3_measured.json").read_text())
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
SIZES = {n: model.count_params(PRESETS[n].model) for n in ("gpt2", "gpt2_large", "gpt2_xl")}


@pytest.fixture(autouse=True)
def in_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader's prompt has it."""
    monkeypatch.chdir(LESSONS)
    monkeypatch.syspath_prepend(str(LESSONS))


def module(name: str) -> Any:
    return importlib.import_module(f"scale.{name}")


@pytest.mark.parametrize("fit", ["HOFFMANN", "BESIROGLU"])
@pytest.mark.parametrize("flops", [1e18, 2.7e20, 5.76e23])
def test_the_best_size_is_the_lowest_point_of_the_formula(fit: str, flops: float) -> None:
    law = getattr(module("law"), fit)
    n = np.geomspace(1e6, 1e13, 20_001)
    lowest = n[np.argmin([law.loss(x, flops / 6 / x) for x in n])]
    best = law.best_size(flops)
    assert math.isclose(best, lowest, rel_tol=2e-3)
    assert math.isclose(law.best_tokens(best), flops / 6 / best, rel_tol=1e-9)


def test_the_fits_ask_for_what_the_text_says() -> None:
    law = module("law")
    ours = [law.BESIROGLU.best_tokens(n) / n for n in (*SIZES.values(), 354_823_168)]
    assert round(min(ours)) == 22 and round(max(ours)) == 25
    assert "22 to 25 tokens for each parameter" in PROSE
    n, tokens = law.at_budget(law.HOFFMANN, law.CHINCHILLA_FLOPS)
    assert tokens / n > 4 * law.TOKENS_A_PARAMETER  # far from the rule of the same paper
    for fit in (law.HOFFMANN, law.BESIROGLU):
        said = ", ".join(f"{name} = {value}" for name, value in fit._asdict().items())
        assert said in PROSE


def test_the_budget_of_a_day_is_worked_out_right() -> None:
    law, utilisation = module("law"), module("utilisation")
    flops = law.day_flops()
    assert math.isclose(flops, 8 * 86_400 * 0.4 * 989e12)
    loss = {name: law.BESIROGLU.loss(n, flops / 6 / n) for name, n in SIZES.items()}
    best = law.BESIROGLU.loss(*law.at_budget(law.BESIROGLU, flops))
    assert f"loses {loss['gpt2_large'] - best:.3f} nats" in PROSE
    assert f"GPT-2 124M loses {loss['gpt2'] - best:.2f}" in PROSE
    four_cards = utilisation.RUNS[3]
    hours = 20 * SIZES["gpt2_xl"] / (2 * four_cards.rate) / 3600
    assert f"{hours:.1f} hours for {20 * SIZES['gpt2_xl'] / 1e9:.1f} billion tokens" in PROSE
    assert f"which is {utilisation.mfu(four_cards):.1%}".replace("%", " %") in PROSE
    assert f"state has {12 * SIZES['gpt2_xl'] / 1e9:.1f} GB" in PROSE


def test_what_is_quoted_stands_in_the_docs() -> None:
    utilisation = module("utilisation")
    for run in utilisation.RUNS:
        assert f"| {run.rate:,} |" in PERFORMANCE, run
    for rate, loss in utilisation.FORMATS.values():
        assert f"| {rate} | {loss} |" in PERFORMANCE, rate
    for number in ("43.7", "700 W", "1600 to 1635"):
        assert number in PERFORMANCE
    assert {"43.7 GB", "700 W", "1.62 GHz"} <= set(re.findall(r"43\.7 GB|700 W|1\.62 GHz", PROSE))
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert "527,762" in benchmarks and "527,762" in PROSE
    assert "5,080" in benchmarks and "5,080" in PROSE  # of figure 2, as `generating` has it
    assert "| 1 | 1024 | 2.0 |" in benchmarks
    (alone,) = re.findall(r"^\| 1 \| 2.7 \| ([\d,]+) \|.*? 5,080 \|", benchmarks, re.MULTILINE)
    (many,) = re.findall(r"^\| 64 \| 7.6 \| ([\d,]+) \|", benchmarks, re.MULTILINE)
    assert f"{alone} tokens/s with GPT-2 124M for one row and {many} for 64 rows" in PROSE
    assert round(94_515 / 2_393) == 39 and "39 times as many" in PROSE
    assert round(94_515 / 5_080) == 19 and "a nineteenth" in PROSE


def test_what_46_percent_is() -> None:
    cfg, peak = GPTConfig(), PEAK_FLOPS["H200"]
    assert f"{527_762 * flops_per_token(cfg) / peak:.0%}" == "46%"
    assert round(158_300 * flops_per_token(cfg) / peak * 100) == 14 and "tokens/s, 14 %" in PROSE
    ours, twin = "118.4", "134.8"
    assert f"| {ours} |" in PERFORMANCE and f"| {twin} |" in PERFORMANCE
    for ms, share in ((ours, "48 %"), (twin, "42 %")):
        assert f"{64 * 1024 / float(ms) * 1e3 * flops_per_token(cfg) / peak:.0%}" == share[:2] + "%"
        assert re.search(rf"{ms} ms[^.]*? {share}", PROSE), ms
    assert math.isclose(132 * 4096 * 1.83e9, peak, rel_tol=1e-3)
    assert f"{132 * 4096 * 1.62e9 / 1e12:.0f} TFLOP/s" in PROSE


def test_softmax_by_tiles_is_softmax() -> None:
    flash, rng = module("flash"), np.random.default_rng(0)
    scores, values = 30 * rng.standard_normal(12), rng.standard_normal(12)
    for tile in (1, 2, 5, 12):
        *_, (top, _, total, mixed) = flash.online_softmax(scores.tolist(), values.tolist(), tile)
        truth = np.exp(scores - scores.max())
        assert top == scores.max() and math.isclose(total, truth.sum(), rel_tol=1e-12)
        assert math.isclose(mixed / total, truth @ values / truth.sum(), rel_tol=1e-9)


def test_the_curves_of_equal_compute_are_what_the_text_says() -> None:
    isoflop, curves = module("isoflop"), MEASURED["isoflop"]["curves"]
    assert [curve["flops"] for curve in curves] == isoflop.BUDGETS
    for curve in curves:
        assert len(curve["points"]) >= 4 and curve["best"]["inside"]
        for key, value in isoflop.lowest(curve["points"]).items():
            assert math.isclose(curve["best"][key], value, rel_tol=1e-3)
        for p in curve["points"]:
            assert p["tokens"] <= MEASURED["isoflop"]["text"]  # nothing was read twice
            cfg = GPTConfig(
                n_layer=p["layers"], n_embd=p["width"], n_head=2, block_size=64, bias=False,
                vocab_size=MEASURED["isoflop"]["kinds"], vocab_multiple=1,
            )  # fmt: skip
            assert model.count_params(cfg) == p["parameters"]
            spent = flops_per_token(cfg) * p["tokens"]
            assert 0.85 <= spent / curve["flops"] <= 1
    for small, large in itertools.pairwise(curves):
        assert large["best"]["loss"] < small["best"]["loss"]
        assert large["best"]["parameters"] > small["best"]["parameters"]
        below = {p["parameters"]: p["loss"] for p in large["points"]}
        for p in small["points"]:
            assert below.get(p["parameters"], 0) < p["loss"]


def test_each_figure_has_a_caption_and_each_section_a_takeaway() -> None:
    captions = re.findall(
        r"!\[[^\]]{20,}\]\(figures/\w+\.png\)\n\n\*Figure (\d+)\. [^*]+\*\n", TEXT
    )
    assert [int(n) for n in captions] == list(range(1, TEXT.count("![") + 1))
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    assert len(sections) == 6 and all(s.count("**Takeaway.**") == 1 for s in sections)


def test_terms_are_told() -> None:
    for term in ("arithmetic intensity", "memory-bound", "compute-bound", "Utilisation", "MFU",
                 "Prefill", "Decode"):  # fmt: skip
        assert f"**{term}**" in TEXT, term
    assert "6 N D" not in TEXT and "D = 20" not in TEXT  # D is the width, and nothing else


def test_a_slice_into_the_cache_is_refused_while_tracing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def sliced(cache: jax.Array, new: jax.Array, length: Any) -> jax.Array:
        return cache.at[:, length : length + new.shape[1]].set(new)

    importlib.import_module("exercises").check("3.7", sliced)
    assert capsys.readouterr().out.startswith("exercise 3.7: your code raised")


def test_a_changed_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling, law = importlib.import_module("scaling"), module("law")
    assert scaling.filled(TEXT, MEASURED) == TEXT
    monkeypatch.setattr(law, "BESIROGLU", law.BESIROGLU._replace(alpha=0.35))
    assert scaling.filled(TEXT, MEASURED) != TEXT
