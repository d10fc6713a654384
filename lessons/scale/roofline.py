"""Section 2: the rates that operations of GPT-2 reach, and the machine's two ceilings.

N tokens, D width, F MLP, V vocabulary, H heads, T query time, S context time, K head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gptjax import functions
from gptjax.config import TrainConfig
from gptjax.training.metrics import PEAK_FLOPS
from gptjax.training.optimizer import make_optimizer
from scale.measuring import Measured, fastest

MEMORY_BANDWIDTH = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12}  # byte/s; SXM, data sheets


class Operation(NamedTuple):
    """What is timed."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    flops: int
    numbers: int  # read and written, of 4 bytes each


def measure(quick: bool) -> Measured:
    """FLOP/s and FLOPs per byte of GPT-2's operations, in float32, and the two ceilings.

    FLOPs count an elementary function as one. Bytes count each input and output once.
    """
    D, F, V = (64, 256, 512) if quick else (768, 3072, 50304)
    many, few = (512, 128) if quick else (32768, 4096)  # tokens: many are 100 MB, beyond any cache
    heads, T, K = (2, 64, 16) if quick else (24, 1024, 64)
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape)

    wte_VD, x_ND, y_ND = normal(V, D), normal(many, D), normal(many, D)
    x_NF, scores_NT, q_HTK = normal(many // 2, F), normal(heads * T, T), normal(heads, T, K)
    tokens_N = jax.random.randint(next(keys), (many,), 0, V)
    config = TrainConfig(grad_clip=0, warmup_iters=0)
    adamw = make_optimizer(config)
    params, grads = ({"kernel": normal(64 if quick else 4096, 4096)} for _ in range(2))
    moments = jax.jit(adamw.init)(params)

    def update(params: Any, grads: Any, moments: Any) -> Any:
        updates, moments = adamw.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    def product(a: Array, b: Array) -> Array:
        return a @ b

    def logits(x_ND: Array, wte_VD: Array) -> Array:
        return jnp.einsum("ND,VD->NV", x_ND, wte_VD)

    def scores(q_HTK: Array, k_HSK: Array) -> Array:
        return jnp.einsum("HTK,HSK->HTS", q_HTK, k_HSK)

    def embed(wte_VD: Array, tokens_N: Array, wpe_ND: Array) -> Array:
        return wte_VD[tokens_N] + wpe_ND

    def normalize(x_ND: Array) -> Array:
        return functions.layer_norm(x_ND, jnp.ones(D))

    def head(n: int) -> Operation:
        return Operation(logits, (x_ND[:n], wte_VD), 2 * n * D * V, n * D + D * V + n * V)

    size, c_fc_DF = many * D, normal(D, F)
    k_HSK, kernel, weights = normal(heads, T, K), params["kernel"].size, scores_NT.size
    operations = {
        f"c_fc, {few} tokens": Operation(
            product, (x_ND[:few], c_fc_DF), 2 * few * D * F, few * D + D * F + few * F
        ),
        "head, 1 token": head(1),
        "head, 16 tokens": head(16),
        "head, 128 tokens": head(128),
        "scores q kᵀ": Operation(
            scores, (q_HTK, k_HSK), 2 * heads * T * T * K, heads * (2 * T * K + T * T)
        ),
        "softmax": Operation(jax.nn.softmax, (scores_NT,), 5 * weights, 2 * weights),
        "GELU": Operation(functions.gelu_tanh, (x_NF,), 9 * x_NF.size, 2 * x_NF.size),
        "LayerNorm": Operation(normalize, (x_ND,), 5 * size, 2 * size),
        "residual add": Operation(jnp.add, (x_ND, y_ND), size, 3 * size),
        "embedding": Operation(embed, (wte_VD, tokens_N, y_ND), size, 3 * size + many),
        "AdamW": Operation(update, (params, grads, moments), 16 * kernel, 7 * kernel),
    }
    edge = 256 if quick else 3072
    square, long = normal(edge, edge), normal(256 if quick else 2**26)  # 256 MB
    calls = {
        name: functools.partial(jax.jit(operation.function), *operation.args)
        for name, operation in operations.items()
    }
    calls["matmul"] = functools.partial(jax.jit(product), square, square)
    calls["copy"] = functools.partial(jax.jit(lambda x: x + 1), long)
    seconds = fastest(calls, 2 if quick else 7)
    points: list[Measured] = [
        {
            "operation": name,
            "flops": flops,
            "bytes": 4 * numbers,
            "intensity": flops / numbers / 4,
            "gflops": flops / seconds[name] / 1e9,
            "ms": 1e3 * seconds[name],
        }
        for name, (_, _, flops, numbers) in operations.items()
    ]
    # No operation is faster than the ceilings: where one was, it is the better measurement.
    gbytes = [8 * long.size / seconds["copy"] / 1e9, *(p["bytes"] / p["ms"] / 1e6 for p in points)]
    gflops = [2 * edge**3 / seconds["matmul"] / 1e9, *(p["gflops"] for p in points)]
    return {"gflops": max(gflops), "gbytes": max(gbytes), "points": points}


def gpu_intensity(point: Measured) -> float:
    """In bfloat16, which has half the bytes; the optimizer's state stays float32."""
    return float(point["intensity"] * (1 if point["operation"] == "AdamW" else 2))


def table(measured: Measured) -> str:
    """Each operation here, and the share of a GPU's peak that its intensity allows there."""
    m = measured["roofline"]
    head = "| operation | FLOPs a byte | ms | GFLOP/s | GB/s | "
    lines = [head + " | ".join(MEMORY_BANDWIDTH) + " |", "|---" * (5 + len(MEMORY_BANDWIDTH)) + "|"]
    for p in m["points"]:
        here = f"{p['intensity']:.2f} | {p['ms']:.1f} | {p['gflops']:.1f} | "
        here += f"{p['bytes'] / p['ms'] / 1e6:.1f}"
        there = []
        for name, bandwidth in MEMORY_BANDWIDTH.items():
            share = min(1, gpu_intensity(p) * bandwidth / PEAK_FLOPS[name])
            there.append(f"{share:.0%}" if share >= 0.1 else f"{share:.2%}")
        lines.append(f"| {p['operation']} | {here} | {' | '.join(there)} |")
    ridges = [f"{PEAK_FLOPS[n] / b:.0f} ({n})" for n, b in MEMORY_BANDWIDTH.items()]
    lines += [
        "",
        f"The ceilings of these {measured['machine']['cores']} cores: {m['gflops']:.0f} GFLOP/s in "
        f"a large matrix product, {m['gbytes']:.1f} GB/s in a large copy (or the best that any "
        f"operation reached, if that was more). They meet at "
        f"{m['gflops'] / m['gbytes']:.1f} FLOPs a byte; those of the GPUs at "
        f"{', '.join(ridges)}.",
    ]
    return "\n".join(lines)
