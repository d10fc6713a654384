"""How time and memory grow, beside the arithmetic: `python -m benchmarks.growth`.

A training step, reading a prompt that fills the context, and one token at its end, for one thing at
a time: tokens (rows of a batch), layers, width, and context at the same number of tokens. Time is
the fastest of several calls, memory what XLA says that the compiled program needs. Exponents are
those of a power of what grows, fitted to all sizes.
"""

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import allocator, decoding, model
from gptjax.config import GPTConfig, SampleConfig, TrainConfig
from gptjax.kv_cache import KVCache
from gptjax.sharding import make_mesh
from gptjax.training.metrics import flops_per_token
from gptjax.training.step import abstract_state, init_state, make_train_step

Shape = dict[str, int]
BASES: dict[str, Shape] = {
    "cpu": {"rows": 8, "layers": 4, "width": 128, "context": 128},
    "gpu": {"rows": 16, "layers": 12, "width": 768, "context": 1024},
}
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "rows": (2, 4, 8, 16),
        "layers": (2, 4, 8),
        "width": (64, 128, 256, 512),
        "context": (64, 128, 256, 512),
    },
    "gpu": {
        "rows": (4, 8, 16, 32),
        "layers": (6, 12, 24),
        "width": (384, 768, 1536),
        "context": (256, 512, 1024, 2048),
    },
}
HEAD_DIM = {"cpu": 32, "gpu": 64}
VOCAB = {"cpu": 256, "gpu": 50257}


class Cost(NamedTuple):
    """What a program takes: measured, and by arithmetic."""

    seconds: float
    work: float  # FLOPs; of one token the bytes that it reads
    memory: float  # bytes
    expected: float  # bytes


def make_model(device: str, shape: Shape) -> GPTConfig:
    """A model of this shape: float32 on a CPU, in a GPU's type and with its attention."""
    return model.resolve(
        GPTConfig(
            n_layer=shape["layers"],
            n_head=shape["width"] // HEAD_DIM[device],
            n_embd=shape["width"],
            block_size=shape["context"],
            vocab_size=VOCAB[device],
            bias=False,
        )
    )


def needed(compiled: Any) -> float:
    """Bytes that a compiled program needs, in all."""
    said = compiled.memory_analysis()
    inside = said.argument_size_in_bytes + said.output_size_in_bytes + said.temp_size_in_bytes
    return float(inside - said.alias_size_in_bytes)


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call, of at least three."""
    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def train(cfg: GPTConfig, rows: int, seconds: float) -> Cost:
    """One step of AdamW."""
    config = TrainConfig(model=cfg, batch_size=rows, warmup_iters=0)
    abstract = abstract_state(config, make_mesh(jax.devices()[:1], {"data": 1}))
    step: Any = make_train_step(config, abstract)
    shape = (1, 1, rows, cfg.block_size + 1)
    windows = np.random.default_rng(0).integers(0, cfg.vocab_size, shape).astype(np.int32)
    compiled = step.lower(abstract, windows).compile()
    state = init_state(config, abstract)

    def call() -> object:
        nonlocal state
        state, metrics = compiled(state, windows)
        return metrics["loss"]

    n, tokens, number = model.count_params(cfg), rows * cfg.block_size, np.dtype(cfg.dtype).itemsize
    # Weights, gradients and two moments; per token and layer 16 D and the scores of attention that
    # are kept (see lessons/scale/memory.py), the logits and their gradient.
    scores = 0.0
    if cfg.attention == "xla":
        scores = cfg.n_head * cfg.block_size * (5 / 8 if cfg.block_size >= 256 else 1)
    activations = number * tokens * cfg.n_layer * (16 * cfg.n_embd + scores)
    expected = 16 * n + activations + 8 * tokens * cfg.padded_vocab_size
    work = tokens * flops_per_token(cfg)
    return Cost(fastest(call, seconds), work, needed(compiled), expected)


def decoder_bytes(cfg: GPTConfig, rows: int) -> tuple[float, float]:
    """Bytes of the weights, and of the keys and values of a full context."""
    number = np.dtype(cfg.dtype).itemsize
    cache = 2 * number * cfg.n_layer * cfg.n_embd * rows * cfg.block_size
    return number * model.count_params(cfg), cache


def read_prompt(cfg: GPTConfig, params: model.Params, rows: int, seconds: float) -> Cost:
    """Prompts that fill the context, but for one token, into a new cache."""
    S, how = cfg.block_size, SampleConfig(temperature=0)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (rows, S)).astype(np.int32)
    keys, length = jax.random.split(jax.random.key(0), rows), np.full(rows, S - 1, np.int32)
    arguments = (params, tokens, length, keys, np.int32(0), None)
    compiled = decoding.prefill.lower(cfg, how, S, *arguments).compile()
    weights, cache = decoder_bytes(cfg, rows)
    inside = model.count_params(cfg, without=("wte", "wpe", "lm_head"))
    work = rows * S * (2 * inside + 4 * cfg.n_layer * S * cfg.n_embd)
    work += 2 * rows * cfg.padded_vocab_size * cfg.n_embd
    scores = 4.0 * rows * cfg.n_head * S * S
    seconds = fastest(lambda: compiled(*arguments).token_B, seconds)
    return Cost(seconds, work, needed(compiled), weights + cache + scores)


def draw_token(cfg: GPTConfig, params: model.Params, rows: int, seconds: float) -> Cost:
    """The token that fills the context of each row."""

    def one(params: model.Params, token_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        logits_BV, longer = decoding.token_logits(cfg, params, token_B, cache)
        return logits_BV.argmax(axis=1).astype(np.int32), longer.advance(-1)

    S, how = cfg.block_size, SampleConfig(temperature=0)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (rows, S)).astype(np.int32)
    keys, length = jax.random.split(jax.random.key(0), rows), np.full(rows, S - 1, np.int32)
    state = decoding.prefill(cfg, how, S, params, tokens, length, keys, np.int32(0), None)
    token_B, cache = state.token_B, state.cache
    jitted: Any = jax.jit(one, donate_argnums=2)
    compiled = jitted.lower(params, token_B, cache).compile()

    def call() -> object:
        nonlocal token_B, cache
        token_B, cache = compiled(params, token_B, cache)
        return token_B

    work = sum(decoder_bytes(cfg, rows))
    return Cost(fastest(call, seconds), work, needed(compiled), work)


def measure(device: str, shape: Shape, seconds: float) -> dict[str, Cost]:
    """The three programs of a shape."""
    cfg = make_model(device, shape)
    params = model.prepare_for_decoding(
        cfg, jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    )
    return {
        "step": train(cfg, shape["rows"], seconds),
        "prompt": read_prompt(cfg, params, shape["rows"], seconds),
        "token": draw_token(cfg, params, shape["rows"], seconds),
    }


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """The power of the sizes that fits the values best, in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    """Print the tables."""
    allocator.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grows", nargs="*", help="of rows, layers, width, context; default: all")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each number")
    args = parser.parse_args()
    device = "cpu" if jax.default_backend() == "cpu" else "gpu"
    base = BASES[device]
    dtype = make_model(device, base).dtype
    print(
        f"{jax.devices()[0].device_kind}, {dtype}, jax {version('jax')}; where it does not grow: "
        f"{', '.join(f'{name} {size}' for name, size in base.items())}\n"
    )
    rows = []
    for name in args.grows or base:
        sizes = SIZES[device][name]
        print(
            f"| {name} | program | ms | GFLOP; GB of a token | of them a second | MB | expected |"
        )
        print("|---|---|---|---|---|---|---|")
        costs: list[dict[str, Cost]] = []
        for size in sizes:
            shape = {**base, name: size}
            if name == "context":  # at the same number of tokens
                shape["rows"] = max(1, base["rows"] * base["context"] // size)
            costs.append(measure(device, shape, args.seconds))
            for program, cost in costs[-1].items():
                giga = (cost.work / 1e9, cost.work / 1e9 / cost.seconds)
                mega = (cost.memory / 1e6, cost.expected / 1e6)
                numbers = " | ".join(f"{n:.3g}" for n in (1e3 * cost.seconds, *giga, *mega))
                print(f"| {size} | {program} | {numbers} |", flush=True)
        print()
        for program in costs[0]:
            values = zip(*(cost[program] for cost in costs), strict=True)
            fitted = " | ".join(f"{exponent(sizes, list(part)):.2f}" for part in values)
            rows.append(f"| {name} | {program} | {fitted} |")
    print("| power of | program | time | FLOPs; bytes of a token | memory | expected |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
