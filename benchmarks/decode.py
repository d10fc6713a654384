"""Decoding, gptjax against transformers: `python -m benchmarks.decode`.

Random weights, of GPT-2 124M on a GPU and of 6 layers, 384 wide, on a CPU, or of
`--preset=gpt2_xl`; greedy, or with `--drawn` at temperature 1. The texts of the cached decoder, and
of the one that is a single kernel where that runs, are judged by the model without a cache, in
float32: greedy tokens have to be the likeliest, drawn ones as likely as its probabilities say. The
roofline is the time in which the device can read the weights and the caches once, at the bandwidth
of a copy that is measured first; of a text it is that of its middle. Recomputed is a pass over the
whole context for each token. `--quick` has one round of fewer tokens, `--peer` transformers (with a
static cache and torch.compile on a GPU), with the same weights and prompts.

B rows, T time.
"""

import argparse
import dataclasses
import functools
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

GREEDY, DRAWN = SampleConfig(temperature=0), SampleConfig(temperature=1, top_k=0)
LARGEST_GAP = 0.1  # of the largest logit; bfloat16 had 0.03 in GPT-2 small
LARGEST_SCORE = 5.0  # standard deviations from what the probabilities make of a drawn text
MOST_READ = 2**17  # tokens of prompts: the reference's scores of more may not fit into 80 GB
AT_ONCE = 8  # rows that are judged at a time: their logits take 0.2 GB each


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


def draw(
    cfg: GPTConfig, decoder: model.Params, how: SampleConfig, rows: int, n: int
) -> tuple[np.ndarray, float]:
    """The next n tokens of each row, and the seconds until the first of them."""
    began, first, pieces = time.perf_counter(), 0.0, []
    prompts = make_prompts(cfg, rows)
    for piece in sampling.generate(cfg, decoder, prompts, how, max_new_tokens=n):
        first = first or time.perf_counter() - began
        pieces.append(piece)
    return np.concatenate(pieces, axis=1), first


@functools.partial(jax.jit, static_argnames=("cfg", "start"))
def judge(cfg: GPTConfig, params: model.Params, text: jax.Array, start: int) -> jax.Array:
    """What the model without a cache makes of the tokens of some texts from place `start` on.

    (4, rows, tokens): the logit of each, the largest logit, the token's log-probability less its
    mean under the model's distribution, and the variance of that.
    """
    logits = model.forward(cfg, params, text[:, :-1])[0][:, start - 1 :, : cfg.vocab_size]
    logs, p = jax.nn.log_softmax(logits), jax.nn.softmax(logits)
    mean = (p * logs).sum(axis=-1)
    variance = (p * jnp.square(logs - mean[..., None])).sum(axis=-1)
    chosen, log = (
        jnp.take_along_axis(x, text[:, start:, None], axis=-1)[..., 0] for x in (logits, logs)
    )
    return jnp.stack([chosen, logits.max(axis=-1), log - mean, variance])


def check(
    cfg: GPTConfig,
    params: model.Params,
    how: SampleConfig,
    prompts: list[list[int]],
    new: np.ndarray,
) -> str:
    """Judge the tokens that continue some prompts by one float32 pass over their texts.

    Greedy tokens may differ where two logits are nearly equal, by more in deep models of random
    weights. With its positions off by one a decoder chose tokens that were 94 to 113 % behind.
    """
    text, rows = np.concatenate([np.array(prompts), new], axis=1), len(prompts)
    reference = dataclasses.replace(cfg, dtype="float32", attention="xla", kernels="off", unroll=1)
    with jax.default_matmul_precision("highest"):
        parts = [text[i : i + AT_ONCE] for i in range(0, rows, AT_ONCE)]
        filled = [np.resize(part, (AT_ONCE, text.shape[1])) for part in parts]
        found = [np.asarray(judge(reference, params, part, len(prompts[0]))) for part in filled]
    chosen, best, surprise, variance = np.concatenate(found, axis=1)[:, :rows]
    if how.temperature > 0:
        assert how == DRAWN, "only greedy texts and those of the model's own probabilities"
        score = float(surprise.sum() / np.sqrt(variance.sum()))
        assert abs(score) < LARGEST_SCORE, f"drawn from something else: {score:.1f} deviations"
        return f"{score:+.1f}"
    behind = float(np.max((best - chosen) / np.abs(best)))
    assert behind < LARGEST_GAP, f"the decoder says something else: {behind:.0%} behind the best"
    return f"{int(np.sum(chosen < best))} of {new.size}, {behind:.1%}"


def time_step(cfg: GPTConfig, decoder: model.Params, rows: int, size: int, rounds: int) -> float:
    """Seconds of a greedy token of all rows, with a cache of this size that is full at the end.

    Where `decoder` has the kernel's weights, the kernel is timed, else plain JAX.
    """
    n, keys = sampling.chunk_size(), jax.random.split(jax.random.key(0), rows)
    prompts = np.zeros((rows, 64), np.int32)
    lengths, packed = np.full(rows, 64, np.int32), decoder.get("kernel")
    plain = fused.without_kernel(decoder)
    start = decoding.prefill(cfg, GREEDY, 128, plain, prompts, lengths, keys, np.int32(0), None)
    cache = make_cache(cfg, rows, size)
    fill = jax.jit(lambda x: jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype))
    filled = cache._replace(k=tuple(map(fill, cache.k)), v=tuple(map(fill, cache.v)))
    state = start._replace(cache=filled if packed is None else fused.stack_cache(cfg, filled))
    length_B = jnp.full(rows, max(size - n, 0))

    def run() -> None:
        nonlocal state
        cache = state.cache._replace(length_B=length_B + 0)  # decode donates it
        now = state._replace(cache=cache)
        if packed is None:
            state, new, _ = decoding.decode(cfg, GREEDY, n, plain, now, keys)
        else:
            state, new, _ = fused.decode(cfg, GREEDY, n, packed, now, keys)
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


def time_peer(
    cfg: GPTConfig, params: model.Params, how: SampleConfig, rows: int, n: int, rounds: int
) -> float:
    """Seconds in which transformers draws n tokens of each row, with the same weights."""
    import torch
    from transformers import GPT2LMHeadModel

    gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        huggingface.write_folder(Path(folder), cfg, jax.device_get(params), None)
        twin = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16 if gpu else None)
    twin = twin.eval().to("cuda" if gpu else "cpu")
    prompts = torch.tensor(make_prompts(cfg, rows), device=twin.device)
    asked: dict[str, Any] = {"do_sample": how == DRAWN, "pad_token_id": 0, "eos_token_id": None}
    if how == DRAWN:
        asked["top_k"] = 0
    if gpu:
        asked["cache_implementation"] = "static"  # with it, generate compiles the forward pass

    def run() -> None:
        twin.generate(prompts, max_new_tokens=n, min_new_tokens=n, **asked).cpu()

    with torch.no_grad():
        return fastest(run, rounds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="whose model is timed")
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--contexts", type=int, nargs="*", default=[])
    parser.add_argument("--drawn", action="store_true", help="draw at temperature 1")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    allocator.keep_freed_memory()
    how, name = (DRAWN, "drawn") if args.drawn else (GREEDY, "greedy")
    cpu = jax.default_backend() == "cpu"
    preset = args.preset or ("shakespeare_char" if cpu else "gpt2")
    vocab_size = 65 if preset.startswith("shakespeare_char") else GPTConfig().vocab_size
    timed = dataclasses.replace(PRESETS[preset].model, vocab_size=vocab_size, dropout=0.0)
    cfg = model.resolve(timed)
    n, rounds = (40 if args.quick else 200 if cpu else 500), (1 if args.quick else 4)
    n = min(n, cfg.block_size - 8)  # behind the prompt
    all_rows = args.rows or ([1] if cpu else [1, 64] if args.quick else [1, 8, 64, 256])
    contexts = [c for c in (128, 256, 512, 1024) if c <= cfg.block_size]
    contexts = args.contexts or contexts or [cfg.block_size]
    contexts = contexts[-1:] if args.quick else contexts
    params = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    # Of the first weights one token is said for ever; of larger ones bfloat16 says another text.
    scale = min(2.0, 55 / math.sqrt(cfg.n_embd))  # 2.0 up to GPT-2 small, 1.4 for XL
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

    def time_text(decoder: model.Params, rows: int) -> str:
        """Tokens/s of texts of n tokens, their share of the roofline, and what float32 says."""
        new, _ = draw(cfg, decoder, how, rows, n)
        verdict = check(cfg, params, how, make_prompts(cfg, rows), new)
        seconds = fastest(lambda: draw(cfg, decoder, how, rows, n), rounds)
        return f"{rows * n / seconds:,.0f} | {share(rows, n // 2, seconds / n)} | {verdict}"

    others = (
        "deviations from float32" if args.drawn else "not the likeliest in float32, behind it by"
    )
    print(
        f"\n| {preset}, rows | ms to the first token | tokens/s of {n} {name} tokens | roofline "
        f"| {others} | by the fused decoder | roofline | {others} | transformers |"
    )
    print("|---" * 9 + "|", flush=True)
    for rows in all_rows:
        plain = time_text(decoder, rows)
        _, first = draw(cfg, decoder, how, rows, n)
        kernel, theirs = "| | ", ""
        if "kernel" in with_kernel and fused.takes(cfg, rows):
            kernel = time_text(with_kernel, rows)
        if args.peer:
            theirs = f"{rows * n / time_peer(cfg, params, how, rows, n, rounds):,.0f}"
        print(f"| {rows} | {1e3 * first:.1f} | {plain} | {kernel} | {theirs} |", flush=True)

    print(
        "\n| rows | context | ms to read it | ms a token | tokens/s | roofline "
        "| ms by the fused decoder | roofline | recomputed, ms |"
    )
    print("|---" * 9 + "|", flush=True)
    for rows in all_rows:
        for context in contexts:
            step, kernel = time_step(cfg, decoder, rows, context, rounds), "| "
            held = context - sampling.chunk_size() // 2  # on average
            if "kernel" in with_kernel and fused.takes(cfg, rows):
                fast = time_step(cfg, with_kernel, rows, context, rounds)
                kernel = f"{1e3 * fast:.3f} | {share(rows, held, fast)}"
            read, again = "", ""
            if rows * context <= MOST_READ:
                read = f"{1e3 * time_prefill(cfg, decoder, rows, context, rounds):.1f}"
                again = f"{1e3 * time_recomputed(cfg, params, rows, context, rounds):.1f}"
            print(
                f"| {rows} | {context} | {read} | {1e3 * step:.3f} | {rows / step:,.0f} "
                f"| {share(rows, held, step)} | {kernel} | {again} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
