"""Cached decoding against recomputing the context: `python -m benchmarks.decoding`.

Greedy, random weights, with a full context at the end. On CPU the model of the preset
shakespeare_char (6 layers, 384 wide), on GPU and TPU GPT-2 124M. Recomputing is a jitted forward
pass over the context for each token.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import allocator, decoding, model
from gptjax.config import GPTConfig, SampleConfig
from gptjax.presets import PRESETS

STEPS = 16  # tokens per timed call


def median_ms(run: Callable[[], object], repeats: int = 15) -> float:
    """Of a call that ends when its result is there; the first call compiles."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def time_batch(cfg: GPTConfig, params: model.Params, rows: int) -> tuple[float, float]:
    """Milliseconds per token, of all rows at once: recomputed, and cached."""
    decoder = model.prepare_for_decoding(cfg, params)
    context = cfg.block_size
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, context)).astype(np.int32)

    def last_tokens(params: model.Params, tokens: jax.Array) -> jax.Array:
        x_BTD, _ = model.hidden_states(cfg, params, tokens)
        return jnp.argmax(model.head(cfg, params, x_BTD[:, -1]), axis=1)

    forward = jax.jit(last_tokens)
    recompute = median_ms(lambda: forward(params, tokens).block_until_ready())

    keys = jax.random.split(jax.random.key(0), rows)
    how = SampleConfig(temperature=0)
    length = np.full(rows, context - STEPS, np.int32)  # so that the last step fills the context
    prompt = tokens[:, : context - STEPS]

    def prefill() -> decoding.DecoderState:
        state = decoding.prefill(
            cfg, how, context, decoder, prompt, length, keys, np.int32(0), None
        )
        return jax.block_until_ready(state)

    states = iter([prefill() for _ in range(16)])  # decode donates its state
    decode = median_ms(
        lambda: decoding.decode(cfg, how, STEPS, decoder, next(states), keys)[1].block_until_ready()
    )
    return recompute, decode / STEPS


def main() -> None:
    """Print the table."""
    allocator.keep_freed_memory()
    device = jax.devices()[0]
    small = dataclasses.replace(PRESETS["shakespeare_char"].model, vocab_size=65, dropout=0.0)
    cfg = model.resolve(small if device.platform == "cpu" else GPTConfig())
    params = model.init_params(cfg, jax.random.key(0))
    print(f"{os.cpu_count()} cores, {device.device_kind}, {cfg.dtype}, jax {version('jax')}\n")
    print(f"| at {cfg.block_size} tokens of context | ms per token | tokens/s | times as fast |")
    print("|---|---|---|---|")
    for rows in (1,) if device.platform == "cpu" else (1, 64):
        recompute, cached = time_batch(cfg, params, rows)
        for name, ms in (("recomputed", recompute), ("cached", cached)):
            print(
                f"| {name}, {rows} rows | {ms:.2f} | {1e3 * rows / ms:.0f} | {recompute / ms:.1f} |"
            )


if __name__ == "__main__":
    main()
