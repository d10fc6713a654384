"""What saving costs: `python -m benchmarks.checkpointing [quickstart] [gpt2]`.

For each preset the time of a save until it is on disk, the part of it that hashes and writes meta,
and how much longer 400 training steps take with a save each 100 (quickstart only).
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import allocator, model, sharding
from gptjax.checkpoints.hashes import json_sha256, leaf_digests
from gptjax.checkpoints.save import Saver
from gptjax.presets import PRESETS
from gptjax.training.step import TrainState, abstract_state, init_state, make_train_step

ROUNDS, STEPS, INTERVAL = 5, 400, 100


def make(preset: str) -> tuple[TrainState, Callable[..., Any], Any]:
    """The state of a preset, its training step, and windows to train on."""
    config = PRESETS[preset]
    vocab_size = 65 if preset == "quickstart" else config.model.vocab_size
    cfg = model.resolve(dataclasses.replace(config.model, vocab_size=vocab_size))
    config = dataclasses.replace(config, model=cfg)
    mesh = sharding.make_mesh(jax.devices()[:1])
    abstract = abstract_state(config, mesh)
    state, step = init_state(config, abstract), make_train_step(config, abstract)
    shape = (1, 1, config.batch_size, cfg.block_size + 1)
    windows = np.random.default_rng(0).integers(0, cfg.vocab_size, shape).astype(np.int32)
    return state, step, sharding.place(windows, mesh, axis=2)


def time_save(state: TrainState) -> tuple[float, float]:
    """Seconds of a save until it is on disk, and of its digests and meta."""
    extra = {"opt_state": state.opt_state, "guard": state.guard}
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder))
        began = time.perf_counter()
        saver.save(1, state.params, extra, {"val_loss": None})
        saver.settle()
        whole = time.perf_counter() - began
        saver.close()
    began = time.perf_counter()
    json_sha256(leaf_digests({"params": state.params, "extra": extra}))
    return whole, time.perf_counter() - began


def time_steps(
    state: TrainState, step: Callable[..., Any], windows: Any, interval: int
) -> tuple[TrainState, float]:
    """Seconds of the steps, with a save each `interval` of them (0 = never)."""
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), keep=2) as saver:
        began = time.perf_counter()
        for i in range(1, STEPS + 1):
            state, metrics = step(state, windows)
            float(metrics["loss"][0])
            if interval and i % interval == 0:
                extra = {"opt_state": state.opt_state, "guard": state.guard}
                saver.save(i, state.params, extra, {"val_loss": None})
        seconds = time.perf_counter() - began
    return state, seconds


def main() -> None:
    """Print a line per measurement."""
    allocator.keep_freed_memory()
    for preset in sys.argv[1:] or ["quickstart"]:
        state, step, windows = make(preset)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        time_save(state)
        saves = [time_save(state) for _ in range(ROUNDS)]
        whole, digests = (statistics.median(column) for column in zip(*saves, strict=True))
        print(
            f"{preset}: state of {size / 1e6:.1f} MB, save {1e3 * whole:.0f} ms, digests and meta "
            f"{1e3 * digests:.1f} ms: {digests / whole:.1%}"
        )
        if preset == "quickstart":
            state, _ = time_steps(state, step, windows, INTERVAL)
            ratios = []
            for _ in range(ROUNDS):
                state, plain = time_steps(state, step, windows, 0)
                state, saving = time_steps(state, step, windows, INTERVAL)
                ratios.append(saving / plain - 1)
                print(f"{STEPS} steps {plain:.2f} s, with {STEPS // INTERVAL} saves {saving:.2f} s")
            print(f"time lost to saving: {statistics.median(ratios):.1%} (median)")


if __name__ == "__main__":
    main()
