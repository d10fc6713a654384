"""--batch_size=auto: what compiling says a step needs, and the largest size by it."""

import dataclasses
from pathlib import Path

import jax
import pytest

from gptjax import sharding
from gptjax.config import TrainConfig
from gptjax.errors import OutOfMemoryError, UsageError
from gptjax.memory import tree_bytes
from gptjax.training import auto_batch
from gptjax.training.auto_batch import largest_batch, size_below, step_bytes, try_sizes
from gptjax.training.run_settings import read_settings
from gptjax.training.start import open_run
from gptjax.training.step import abstract_state

from .helpers import tiny

ONE = sharding.make_mesh(jax.devices()[:1])
CONFIG = TrainConfig(model=tiny(n_layer=1), batch_size=0, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("size", "n_devices", "rows", "allowed"),
    [
        *((0, 1, 0, 1), (3.9, 1, 0, 2), (7, 1, 0, 4), (15, 1, 0, 8), (23, 1, 0, 16)),
        *((50, 4, 0, 32), (31, 4, 0, 16), (5, 4, 0, 4), (1e12, 1, 512, 512), (100, 1, 512, 64)),
        *((100, 1, 480, 96), (100, 8, 480, 96), (100, 16, 480, 96), (20, 16, 480, 16)),
    ],
)
def test_which_sizes_are_allowed(size: float, n_devices: int, rows: int, allowed: int) -> None:
    assert size_below(size, n_devices, rows) == allowed


@pytest.mark.parametrize("rows", [0, 512])
@pytest.mark.parametrize("n_devices", [1, 4])
@pytest.mark.parametrize("fixed", [1, 20, 50, 75])
@pytest.mark.parametrize("plateau", [0, 8, 40])
@pytest.mark.parametrize("row", [0.05, 0.3, 1.1, 7])
def test_few_trials_find_the_largest(
    row: float, plateau: int, fixed: int, n_devices: int, rows: int
) -> None:
    """Gigabytes: what grows with the batch is hidden by another need until `plateau` rows."""
    limit = 80 * 10**9
    tried: list[int] = []

    def needed(size: int) -> int:
        tried.append(size)
        each = max(size / n_devices, plateau + size / n_devices / 100)
        return int((fixed + row * each) * 10**9)

    def allowed(size: float) -> int:
        return size_below(size, n_devices, rows)

    found = try_sizes(needed, limit, allowed, 4 * n_devices)
    assert len(tried) == len(set(tried)) <= auto_batch.TRIALS
    possible = {allowed(size) for size in range(1, 8000)}
    largest = max((size for size in possible if needed(size) <= limit), default=0)
    answer = max((size for size, count in found.items() if count <= limit), default=0)
    assert largest / 2 <= answer <= largest


def test_the_answer_is_what_compiling_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one of two devices, with as many passes as the run will take."""
    monkeypatch.setattr(auto_batch, "CPU_TOKENS", 16 * 16)
    mesh = sharding.make_mesh(jax.devices()[:2])
    needed = step_bytes(dataclasses.replace(CONFIG, batch_size=16), mesh)
    state = abstract_state(CONFIG, mesh)
    logits = 8 * 16 * CONFIG.model.padded_vocab_size * 4
    assert needed >= tree_bytes(state) + tree_bytes(state.params) + logits  # and gradients
    for count, size in ((needed + 1, 16), (needed - 1, 8)):
        memory = int(count / (1 - auto_batch.FREE))
        monkeypatch.setattr(auto_batch, "device_memory", lambda memory=memory: memory)
        found, said = largest_batch(CONFIG, mesh)
        assert found == size and f"{memory / 1e9:.1f} GB" in said


def test_one_sequence_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "device_memory", lambda: 2**20)
    monkeypatch.setattr(auto_batch, "step_bytes", lambda config, mesh: 2**20)
    with pytest.raises(OutOfMemoryError, match=r"batch_size=1, .*--remat"):
        largest_batch(CONFIG, ONE, rows=2)


def test_memory_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "allowed_memory", lambda: 16 * 2**30)
    assert auto_batch.device_memory() == 2 * 2**30  # of 8 emulated devices
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UsageError, match="--batch_size=auto"):
        auto_batch.device_memory()


@pytest.mark.usefixtures("restore_process")
def test_a_run_stores_the_number_that_was_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And evaluates as the preset does; the second time no flag asks for it."""
    monkeypatch.setattr(auto_batch, "CPU_TOKENS", 80)  # 5 windows on each of 8 devices
    argv = ["--n_layer=1", "--n_embd=16", "--n_head=1", "--block_size=16", "--optimizer=adamw"]
    argv += [f"--dataset={folder}/corpus.txt", f"--out_dir={tmp_path}", "--batch_size=auto"]
    for tokens, size, passes in ((0, 32, 1), (96 * 16, 32, 3), (80 * 16, 40, 2)):
        config, given = read_settings([*argv, f"--batch_tokens={tokens}"])
        run = open_run(config, tmp_path, given)
        for settings in (run.config, run.stored):
            found = settings.batch_size, settings.gradient_accumulation_steps
            assert (*found, settings.eval_batch_size) == (size, passes, 8)
        assert run.record["settings"]["batch_size"] == size
