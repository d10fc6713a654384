"""What every measurement of lesson 3 needs.

B rows, T time.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gptjax import sharding
from gptjax.config import GPTConfig, TrainConfig
from gptjax.data import batches
from gptjax.data.datasets import Dataset, load_dataset
from gptjax.presets import PRESETS
from gptjax.training.step import TrainState, abstract_state, init_state, make_train_step

GPT2 = {name: PRESETS[name].model for name in ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")}
Measured = dict[str, Any]


def fastest(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call, the least of `rounds` interleaved ones; the first call compiles."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def xla_memory(function: Any, *args: Any) -> Any:
    """What XLA says a jitted function needs: bytes of arguments, results and temporaries.

    Buffers are assigned before LLVM makes machine code, so that its optimisations may be off.
    """
    fast: Any = {"xla_backend_optimization_level": 0}
    return function.lower(*args).compile(compiler_options=fast).memory_analysis()


def characters(block_size: int) -> Dataset:
    """Python's own documentation, character by character: it needs no network."""
    return load_dataset("pydocs", tokenizer="char", block_size=block_size)


def batch(data: Dataset, config: TrainConfig, step: int) -> np.ndarray:
    """The windows (B, T+1) of a step."""
    cfg = config.model
    sizes = {"batch_size": config.batch_size, "block_size": cfg.block_size}
    return batches.sample_batch(data.train, n_vocab=cfg.vocab_size, seed=0, step=step, **sizes)


def make_step(config: TrainConfig) -> tuple[Callable[..., Any], TrainState]:
    """gptjax's training step on one device, and the shapes of its state."""
    abstract = abstract_state(config, sharding.make_mesh(jax.devices()[:1]))
    return make_train_step(config, abstract), abstract


def train(config: TrainConfig, data: Dataset) -> tuple[TrainState, list[float]]:
    """The state after all steps, and their losses."""
    step, abstract = make_step(config)
    state, losses = init_state(config, abstract), []
    for i in range(config.max_iters):
        state, metrics = step(state, batch(data, config, i)[None, None])
        losses.append(metrics["loss"])
    return state, [float(loss[0]) for loss in losses]


def replace(cfg: GPTConfig, **settings: Any) -> GPTConfig:
    """`cfg` with other settings."""
    return GPTConfig(**{**vars(cfg), **settings})
