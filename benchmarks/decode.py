"""Decoding, gptjax against transformers: `python -m benchmarks.decode`.

Greedy, random weights, of GPT-2 124M on a GPU and of 6 layers, 384 wide, on a CPU, or of
`--preset=gpt2_xl`. Before anything is timed, the tokens of the cached decoder, and of the one that
is a single kernel where that runs, are compared with those of the model without a cache. The
roofline is the time in which the device can read the weights and the caches once, at the bandwidth
of a copy that is measured first; of a text it is that of its middle. Recomputed is a pass over the
whole context for each token. `--quick` has one round of fewer tokens, `--peer` transformers (with a
static cache and torch.compile on a GPU), with the same weights and prompts.

B rows, T time.
"""

import argparse
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import allocator, decoding, fused, model, sampling
from gptjax.config import GPTConfig, SampleConfig
from gptjax.conversion import huggingface
from gptjax.kv_cache import make_cache
from gptjax.presets import PRESETS

GREEDY = SampleConfig(temperature=0)
LARGEST_GAP = 0.1  # of the largest logit; bfloat16 had 0.03 in GPT-2 small


def fastest(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some calls that end when their result is there; one compiles."""
    run()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def bandwidth(rounds: int) -> float:
    """Bytes per second that a copy reads and writes."""
    x = jnp.ones((64 if jax.default_backend() == "cpu" else 1024) * 2**20 // 4)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / fastest(lambda: copy(x).block_until_ready(), rounds)


def make_prompts(cfg: GPTConfig, rows: int) -> list[list[int]]:
    """Eight tokens of each row."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, 8))
    return [[int(i) for i in row] for row in tokens]


def draw(cfg: GPTConfig, decoder: model.Params, rows: int, n: int) -> tuple[np.ndarray, float]:
    """The next n tokens of each row, and the seconds until the first of them."""
    began, first, pieces = time.perf_counter(), 0.0, []
    prompts = make_prompts(cfg, rows)
    for piece in sampling.generate(cfg, decoder, prompts, GREEDY, max_new_tokens=n):
        first = first or time.perf_counter() - began
        pieces.append(piece)
    return np.concatenate(pieces, axis=1), first


def check(cfg: GPTConfig, params: model.Params, decoder: model.Params, rows: int, n: int) -> str:
    """Compare the tokens of some rows with the likeliest of one float32 pass over their texts.

    They may differ where two logits are nearly equal, by more in deep models of random weights.
    With its positions off by one a decoder chose tokens that were 94 to 113 % behind.
    """
    new, _ = draw(cfg, decoder, rows, n)
    text = np.concatenate([np.array(make_prompts(cfg, rows)), new], axis=1)
    reference = dataclasses.replace(cfg, dtype="float32", attention="xla", kernels="off", unroll=1)
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(model.forward, static_argnums=0)
        logits = forward(reference, params, text[:, :-1])[0][:, 7:]
    chosen = np.take_along_axis(np.asarray(logits), new[..., None], axis=-1)[..., 0]
    best = np.asarray(logits.max(axis=-1))
    behind = float(np.max((best - chosen) / np.abs(best)))
    assert behind < LARGEST_GAP, f"the decoder says something else: {behind:.0%} behind the best"
    different = int(np.sum(chosen < best))
    return (
        f"of {new.size} greedy tokens {different} differ from those without a cache, by at most "
        f"{behind:.2%} of the largest logit"
    )


def time_step(cfg: GPTConfig, decoder: model.Params, rows: int, size: int, rounds: int) -> float:
    """Seconds of a token of all rows, with a full cache of this size."""
    n, keys = sampling.chunk_size(), jax.random.split(jax.random.key(0), rows)
    prompts = np.zeros((rows, 64), np.int32)
    lengths = np.full(rows, 64, np.int32)
    start = decoding.prefill(cfg, GREEDY, 128, decoder, prompts, lengths, keys, np.int32(0), None)
    cache = make_cache(cfg, rows, size)
    fill = jax.jit(lambda x: jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype))
    filled = cache._replace(k=tuple(map(fill, cache.k)), v=tuple(map(fill, cache.v)))
    state = start._replace(cache=filled)
    length_B = jnp.full(rows, max(size - n, 0))

    def run() -> None:
        nonlocal state
        cache = state.cache._replace(length_B=length_B + 0)  # decode donates it
        state, new, _ = decoding.decode(cfg, GREEDY, n, decoder, state._replace(cache=cache), keys)
        new.block_until_ready()

    return fastest(run, rounds) / n


def time_prefill(cfg: GPTConfig, decoder: model.Params, rows: int, T: int, rounds: int) -> float:
    """Seconds to read prompts of T tokens."""
    keys, length = jax.random.split(jax.random.key(0), rows), np.full(rows, T, np.int32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, T), dtype=np.int32)
    read = (tokens, length, keys, np.int32(0), None)
    return fastest(
        lambda: decoding.prefill(cfg, GREEDY, T, decoder, *read).token_B.block_until_ready(), rounds
    )


def time_recomputed(cfg: GPTConfig, params: model.Params, rows: int, T: int, rounds: int) -> float:
    """Seconds of a token of all rows without a cache, after T - 1 others."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, T), dtype=np.int32)

    def last_tokens(params: model.Params, tokens_BT: jax.Array) -> jax.Array:
        x_BTD, _ = model.hidden_states(cfg, params, tokens_BT)
        return jnp.argmax(model.head(cfg, params, x_BTD[:, -1]), axis=1)

    forward = jax.jit(last_tokens)
    return fastest(lambda: forward(params, tokens).block_until_ready(), rounds)


def time_peer(cfg: GPTConfig, params: model.Params, rows: int, n: int, rounds: int) -> float:
    """Seconds in which transformers draws n tokens of each row, with the same weights."""
    import torch
    from transformers import GPT2LMHeadModel

    gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        huggingface.write_folder(Path(folder), cfg, jax.device_get(params), None)
        twin = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16 if gpu else None)
    twin = twin.eval().to("cuda" if gpu else "cpu")
    prompts = torch.tensor(make_prompts(cfg, rows), device=twin.device)
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if gpu:
        how["cache_implementation"] = "static"  # with it, generate compiles the forward pass

    def run() -> None:
        twin.generate(prompts, max_new_tokens=n, min_new_tokens=n, **how).cpu()

    with torch.no_grad():
        return fastest(run, rounds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="whose model is timed")
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--contexts", type=int, nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    allocator.keep_freed_memory()
    cpu = jax.default_backend() == "cpu"
    preset = args.preset or ("shakespeare_char" if cpu else "gpt2")
    vocab_size = 65 if preset.startswith("shakespeare_char") else GPTConfig().vocab_size
    timed = dataclasses.replace(PRESETS[preset].model, vocab_size=vocab_size, dropout=0.0)
    cfg = model.resolve(timed)
    n, rounds = (40 if args.quick else 200 if cpu else 500), (1 if args.quick else 4)
    all_rows = args.rows or ([1] if cpu else [1, 64] if args.quick else [1, 8, 64, 256])
    contexts = [c for c in (128, 256, 512, 1024) if c <= cfg.block_size]
    contexts = args.contexts or contexts or [cfg.block_size]
    contexts = contexts[-1:] if args.quick else contexts
    params = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    # Of the first weights one token is said for ever; of larger ones bfloat16 says another text.
    scale = 55 / math.sqrt(cfg.n_embd)  # 2.0 for GPT-2 small, 1.4 for XL
    params = jax.tree.map(lambda p: scale * p if p.ndim > 1 else p, params)
    decoder = model.prepare_for_decoding(cfg, params)
    with_kernel = fused.with_kernel(cfg, decoder)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
    rate = bandwidth(10)

    def share(rows: int, context: int, seconds: float) -> str:
        """Of the roofline, where a token of all rows takes so long."""
        caches = 2 * cfg.n_layer * rows * context * cfg.n_embd * jnp.dtype(cfg.dtype).itemsize
        return f"{(weights + caches) / rate / seconds:.0%}"

    device = jax.devices()[0].device_kind
    print(f"{os.cpu_count()} cores, {device}, {cfg.dtype}, jax {version('jax')}")
    print(f"a copy: {rate / 1e9:.0f} GB/s; weights: {weights / 1e6:.0f} MB")
    print(check(cfg, params, decoder, 2, n), flush=True)
    if "kernel" in with_kernel:
        rows = min(2, fused.most_rows(cfg))
        print(f"by the kernel: {check(cfg, params, with_kernel, rows, n)}", flush=True)

    def time_text(decoder: model.Params, rows: int) -> str:
        """Tokens/s of texts of n tokens, and their share of the roofline."""
        seconds = fastest(lambda: draw(cfg, decoder, rows, n), rounds)
        return f"{rows * n / seconds:,.0f} | {share(rows, n // 2, seconds / n)}"

    print(
        f"\n| rows | ms to the first token | tokens/s of {n} tokens | roofline "
        "| by the kernel | roofline | transformers |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for rows in all_rows:
        plain = time_text(decoder, rows)
        _, first = draw(cfg, decoder, rows, n)
        kernel, theirs = "- | -", "-"
        if "kernel" in with_kernel and fused.takes(cfg, rows):
            kernel = time_text(with_kernel, rows)
        if args.peer:
            theirs = f"{rows * n / time_peer(cfg, params, rows, n, rounds):,.0f}"
        print(f"| {rows} | {1e3 * first:.1f} | {plain} | {kernel} | {theirs} |", flush=True)

    print(
        "\n| rows | context | ms to read it | ms a token | tokens/s | roofline | recomputed, ms |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for rows in all_rows:
        for context in contexts:
            step = time_step(cfg, decoder, rows, context, rounds)
            read, again = (
                (
                    time_prefill(cfg, decoder, rows, context, rounds),
                    time_recomputed(cfg, params, rows, context, rounds),
                )
                if rows <= 64
                else (math.nan, math.nan)
            )
            print(
                f"| {rows} | {context} | {1e3 * read:.1f} | {1e3 * step:.3f} | {rows / step:,.0f} "
                f"| {share(rows, context, step)} | {1e3 * again:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
