"""Lesson 2: what its functions are compared with, its runs, and the numbers in its prose."""

import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest

from .helpers import ROOT

LESSONS = ROOT / "lessons"
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
NEEDS = "put tinyshakespeare at ../shared/data/tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def in_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader's kernel has it."""
    monkeypatch.chdir(LESSONS)
    monkeypatch.syspath_prepend(str(LESSONS))


@pytest.fixture
def parts() -> ModuleType:
    return importlib.import_module("parts")


@pytest.fixture
def parts_2() -> ModuleType:
    return importlib.import_module("parts_2")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runs at their full length."""
    monkeypatch.delenv("GPTJAX_LESSONS", raising=False)
    return importlib.reload(importlib.import_module("runs"))


def cells(kind: str) -> dict[str, str]:
    notebook = nbformat.read(LESSONS / "2_pretrain.ipynb", as_version=4)
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == kind}


# ---- The parts -----------------------------------------------------------------------------------


def without_overlap(tokens: Any, seed: int, step: int, batch_size: int, block_size: int) -> Any:
    """Windows of T tokens: the last one has no target."""
    parts_2 = importlib.import_module("parts_2")
    return parts_2.windows_of(tokens, seed, step, batch_size, block_size)[:, :-1]


def eps_inside(params: Any, grads: Any, mu: Any, nu: Any, n: int, rate: float) -> Any:
    """The epsilon in the square root."""
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
    nu = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, nu, grads)

    def move(path: Any, p: Any, m: Any, v: Any) -> Any:
        step = (m / (1 - 0.9**n)) / jnp.sqrt(v / (1 - 0.95**n) + 1e-8)
        decay = 0.1 * p if path[-1].key in ("kernel", "embedding") else 0
        return p - rate * (step + decay)

    return jax.tree.map_with_path(move, params, mu, nu), mu, nu


def decay_in_gradient(params: Any, grads: Any, mu: Any, nu: Any, n: int, rate: float) -> Any:
    """Adam with an L2 penalty, which is no AdamW."""
    parts_2 = importlib.import_module("parts_2")
    zeros = jax.tree.map(jnp.zeros_like, params)
    penalised = jax.tree.map(lambda g, p: g + 0.1 * p, grads, params)
    moved, mu, nu = parts_2.adamw(zeros, penalised, mu, nu, n, rate)
    return jax.tree.map(jnp.add, params, moved), mu, nu


def counts_from_zero(loss_fn: Any, state: Any, batch: Any, rate: float, max_norm: float) -> Any:
    """The first step divides by 1 - beta**0 = 0."""
    parts_2 = importlib.import_module("parts_2")
    params, mu, nu, n = state
    done, values = parts_2.train_step(loss_fn, (params, mu, nu, n - 1), batch, rate, max_norm)
    return (*done[:3], n + 1), values


MORE_MISTAKES: list[tuple[str, Callable[..., Any]]] = [
    ("windows_of", without_overlap),
    ("cross_entropy", lambda logits, targets: jnp.float32(1)),
    ("cross_entropy", lambda logits, targets: logits[0]),
    ("rate", lambda step, peak, floor, warmup, steps: peak),
    ("rate", lambda step, peak, floor, warmup, steps: math.nan),
    ("clip", lambda grads, max_norm: (grads, jnp.float32(max_norm))),
    ("is_decayed", lambda name: True),
    ("adamw", decay_in_gradient),
    ("adamw", eps_inside),
    ("train_step", counts_from_zero),
]


@pytest.mark.parametrize(("name", "function"), MORE_MISTAKES)
def test_further_mistakes_are_told(
    parts: ModuleType, name: str, function: Callable[..., Any]
) -> None:
    verdict = parts.grade(name, function)
    assert not verdict.is_right and parts.all_parts()[name].hint in verdict.said


def test_every_part_is_written_and_graded_in_the_notebook(parts_2: ModuleType) -> None:
    code = "\n".join(cells("code").values())
    assert re.findall(r'^check_part\("(\w+)", \1\)$', code, re.MULTILINE) == list(parts_2.PARTS)
    assert code.count("### BEGIN SOLUTION") == len(parts_2.PARTS) >= 5
    assert re.findall(r'^        "(\w+)": \1,$', cells("code")["save"], re.MULTILINE) == list(
        parts_2.PARTS
    )


# ---- The runs ------------------------------------------------------------------------------------


def test_lesson_4_takes_a_folder_or_a_name_of_the_hub(
    runs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GPTJAX_GPT2_DIR", raising=False)
    assert (runs.published() / "model.safetensors").is_file()
    monkeypatch.setenv("GPTJAX_GPT2_DIR", str(tmp_path))
    assert runs.published() == tmp_path
    asked: list[Any] = []

    def download(*what: Any) -> Path:
        asked.append(what)
        return tmp_path

    monkeypatch.setattr(runs.hub, "download_model", download)
    monkeypatch.setenv("GPTJAX_GPT2_DIR", "gpt2")
    assert runs.published() == tmp_path and asked == [("gpt2", ["model.safetensors"])]


def test_the_runs_differ_in_nothing_else(runs: ModuleType) -> None:
    def told(name: str) -> dict[str, str]:
        return dict(flag.split("=") for flag in runs.RUNS[name])

    def differing(a: str, b: str) -> set[str]:
        both = told(a) | told(b)
        return {flag for flag in both if told(a).get(flag) != told(b).get(flag)}

    allowed = {"--optimizer", "--max_iters", "--warmup_iters"}
    asked = {"--eval_interval", "--eval_iters", "--stop_step"}
    assert differing("adamw", "muon") <= allowed | asked
    assert differing("muon", "bpe") == {"--dataset", "--tokenizer"}


def test_quick_runs_are_short(runs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    full = runs.STEPS
    monkeypatch.setenv("GPTJAX_LESSONS", "quick")
    quick = importlib.reload(runs)
    assert full / quick.STEPS >= 20 and quick.COMPARED >= 4
    assert quick.settings().max_iters == quick.STEPS
    monkeypatch.delenv("GPTJAX_LESSONS")
    importlib.reload(runs)


# ---- The numbers in the prose --------------------------------------------------------------------


def test_numbers_of_the_run(runs: ModuleType) -> None:
    exercises = importlib.import_module("exercises_2")
    config, prose = runs.settings(), "\n".join(cells("markdown").values())
    tokens = runs.STEPS * config.batch_size * config.model.block_size
    assert exercises.STEPS == runs.STEPS and config.batch_size == exercises.BATCH_SIZE
    assert exercises.tokens_and_epochs()[0] == tokens
    for words in (
        f"takes {runs.STEPS:,} steps with {config.batch_size} windows of",
        f"saw {tokens:,} tokens",
        f"{config.eval_iters * config.batch_size} windows of it",
    ):
        assert words in prose
    assert prose.count(f"in {runs.SHORT:,} steps") >= 1 and f"{runs.SHORT:,} steps, AdamW" in prose
    assert "--dtype=float32" in runs.ADAMW and "--dtype=float32" in runs.MUON  # numbers quoted here
    rows = (1000 - 65) * config.model.n_embd  # of TinyShakespeare's two vocabularies
    assert f"{rows:,} more parameters" in prose
    assert runs.COMPARED == runs.STEPS // 12 and "first twelfth of your run" in prose
    assert config.warmup_iters == runs.STEPS // 24 and "a twenty-fourth of the steps" in prose
    assert config.min_lr == pytest.approx(config.learning_rate / 20)
    assert "a twentieth\nof its peak" in prose


def test_numbers_of_the_ablations() -> None:
    measured = json.loads((LESSONS / "2_measured.json").read_text())
    ablations, text = importlib.import_module("ablations"), cells("markdown")["ablations-read"]
    assert measured["steps"] == ablations.STEPS and tuple(measured["seeds"]) == ablations.SEEDS
    for quoted in re.findall(r"(\d\.\d{3}) to (\d\.\d{3})", text):
        spans = {
            (f"{min(run['val_losses']):.3f}", f"{max(run['val_losses']):.3f}")
            for run in measured["runs"]
        }
        assert quoted in spans
    of = {(run["peak"], run["arm"]): np.mean(run["val_losses"]) for run in measured["runs"]}
    differences = {f"{abs(loss - of[peak, 'all three']):.3f}" for (peak, _), loss in of.items()}
    for quoted in re.findall(r"by (\d\.\d{3})", text):
        assert quoted in differences


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=NEEDS)
def test_the_bigram_model_of_tinyshakespeare(parts_2: ModuleType) -> None:
    """Counted another way: by sorting the pairs."""
    text = SHAKESPEARE.read_text()
    characters = sorted(set(text))
    tokens = np.array([characters.index(c) for c in text])
    train, val = np.split(tokens, [int(0.9 * len(tokens))])
    V = len(characters)
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    flat = np.ones(V * V)
    flat[pairs] += counts
    table = flat.reshape(V, V)
    table /= table.sum(axis=1, keepdims=True)
    train_loss, val_loss = (-np.log(table[x[:-1], x[1:]]).mean() for x in (train, val))
    prose = " ".join("\n".join(cells("markdown").values()).split())
    assert f"bigram model's {val_loss:.2f}" in prose
    assert f"(bigram: {val_loss:.2f} against {train_loss:.2f})" in prose
    assert f"{len(train):,} training tokens" in prose


def test_the_page_ends_where_its_text_says() -> None:
    """The page is a run at full length, of which the suite repeats a quick one only."""
    page = (ROOT / "docs" / "lessons" / "2_pretrain.md").read_text(encoding="utf-8")
    shown = "\n".join(line for line in page.splitlines() if line.startswith("    "))
    (loss, below), *_ = re.findall(r"final validation loss ([\d.]+), ([\d.]+) below bigram", shown)
    share = re.findall(r"step +\d+: val loss [\d.]+, (\d+)% of the words are real", shown)[-1]
    assert float(below) >= 0.3 and int(share) >= 60, (loss, below, share)
    (muon,) = re.findall(r"validation loss: Muon ([\d.]+) after", shown)
    (per_token,) = re.findall(r"loss per token +[\d.]+ +([\d.]+)", shown)
    (per_character,) = re.findall(r"loss per character +[\d.]+ +([\d.]+)", shown)
    assert f"Muon ended at {muon} after 700 steps, AdamW at {loss} after 1,800" in page
    assert f"({per_token} instead of {muon})" in page
    assert f"{per_character} instead of {muon}" in page
