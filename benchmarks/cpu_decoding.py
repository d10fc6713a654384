"""Cached decoding on CPU against recomputing the context: `python -m benchmarks.cpu_decoding`.

The model of the preset shakespeare_char (6 layers, 384 wide), random weights, one row, greedy, at
256 tokens of context. Recomputing is a jitted forward pass over the context for each token.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import gptjax  # noqa: F401

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

from gptjax import model, sampling
from gptjax.config import SampleConfig
from gptjax.presets import PRESETS

CONTEXT = 256
STEPS = 16


def median_ms(run: Callable[[], object], repeats: int = 15) -> float:
    """Of a call that ends when its result is there; the first call compiles."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    preset = PRESETS["shakespeare_char"].model
    cfg = model.resolve(dataclasses.replace(preset, vocab_size=65, dropout=0.0, block_size=CONTEXT))
    params = model.init_params(cfg, jax.random.key(0))
    decoder = model.prepare_for_decoding(cfg, params)
    tokens = np.random.default_rng(0).integers(0, 65, (1, CONTEXT)).astype(np.int32)
    forward = jax.jit(
        lambda params, tokens: jnp.argmax(model.forward(cfg, params, tokens)[0][:, -1])
    )
    recompute = median_ms(lambda: forward(params, tokens).block_until_ready())

    keys = jax.random.split(jax.random.key(0), 1)
    how = SampleConfig(temperature=0)
    length = np.array([CONTEXT - STEPS], np.int32)  # so that the last step fills the context
    prompt = tokens[:, : CONTEXT - STEPS]

    def prefill() -> sampling.DecoderState:
        state = sampling.prefill(
            cfg, how, CONTEXT, decoder, prompt, length, keys, np.int32(0), None
        )
        return jax.block_until_ready(state)

    states = iter([prefill() for _ in range(17)])  # decode donates its state
    decode = median_ms(
        lambda: sampling.decode(cfg, how, STEPS, decoder, next(states), keys)[1].block_until_ready()
    )
    print(f"{os.cpu_count()} cores, {platform.machine()}, jax {version('jax')}\n")
    print("| at 256 tokens of context | ms per token | tokens/s |\n|---|---|---|")
    print(f"| recomputed | {recompute:.2f} | {1e3 / recompute:.0f} |")
    print(f"| cached | {decode / STEPS:.2f} | {1e3 * STEPS / decode:.0f} |")
    print(f"\ncached is {recompute * STEPS / decode:.1f} times as fast")


if __name__ == "__main__":
    main()
