"""Section 1: what training must hold, by formula and as XLA says."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax import model
from gptjax.config import GPTConfig, TrainConfig
from scale.measuring import GPT2, Measured, fastest, make_step, replace, xla_memory


def activation_numbers(cfg: GPTConfig, scores_per_token: float = 0) -> int:
    """Numbers per token and block that the backward pass reads: 16 D, and scores if they are kept.

    ln_1's input and output 2 D, q k v 3 D, the mixed values D, ln_2's input and output 2 D, GELU's
    input and output 8 D.
    """
    return round(16 * cfg.n_embd + cfg.n_head * scores_per_token)


def account(cfg: GPTConfig, rows: int, number: int = 2) -> dict[str, float]:
    """Bytes of each part in training, with activations of `number` bytes and flash attention."""
    n = model.count_params(cfg)
    tokens = rows * cfg.block_size
    block = activation_numbers(cfg)
    return {
        "parameters": n,
        "weights": 4 * n,
        "gradients": 4 * n,
        "moments": 8 * n,
        "activations": number * tokens * cfg.n_layer * block,
        "activations_remat": number * tokens * (cfg.n_layer * cfg.n_embd + block),
        "logits": 2 * number * tokens * cfg.padded_vocab_size,  # and their gradient
        "kv_cache_row": 2 * number * cfg.n_layer * cfg.n_embd * cfg.block_size,
    }


def accounts() -> dict[str, dict[str, float]]:
    """Of GPT-2's four sizes, with 8 rows."""
    return {name: account(cfg, 8) for name, cfg in GPT2.items()}


def step_memory(cfg: GPTConfig, rows: int) -> Any:
    """What XLA says that a training step needs."""
    step, abstract = make_step(TrainConfig(model=cfg, batch_size=rows))
    windows = jax.ShapeDtypeStruct((1, 1, rows, cfg.block_size + 1), jnp.int32)
    return xla_memory(step, abstract, windows)


def step_call(cfg: GPTConfig, rows: int) -> Callable[[], Array]:
    """A call that trains one step."""
    step, shapes = make_step(TrainConfig(model=cfg, batch_size=rows))
    windows = np.zeros((1, 1, rows, cfg.block_size + 1), np.int32)
    states = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)]  # as fast as any other

    def run() -> Array:
        state, metrics = step(states.pop(), windows)
        states.append(state)
        return metrics["loss"]

    return run


def measure(quick: bool) -> Measured:
    """What XLA says of a small model's step, and its time with remat and without."""
    width, context, vocab = (32, 64, 64) if quick else (256, 256, 2048)
    depths, rows = ((1, 2), (1, 2)) if quick else ((4, 8), (8, 32))
    shape: dict[str, Any] = {
        "n_head": 4,
        "n_embd": width,
        "block_size": context,
        "vocab_size": vocab,
        "bias": False,
    }
    small = model.resolve(GPTConfig(**shape, unroll=1))
    unrolled = replace(small, n_layer=depths[0], unroll=depths[0])
    cases = [
        (replace(small, n_layer=depth, remat=remat), batch_size)
        for remat in (False, True)
        for depth in depths
        for batch_size in rows
    ]
    todo = {*cases, *((replace(unrolled, remat=remat), rows[0]) for remat in (False, True))}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of it is compiling
        said = dict(zip(todo, pool.map(lambda case: step_memory(*case), todo), strict=True))
    temporaries = {case: memory.temp_size_in_bytes for case, memory in said.items()}

    def kept(remat: bool) -> float:
        """Numbers per token and block: how much faster memory grows by row in a deeper model."""
        by_row = []
        for depth in depths:
            cfg = replace(small, n_layer=depth, remat=remat)
            few, many = (temporaries[cfg, batch_size] for batch_size in rows)
            by_row.append((many - few) / (rows[1] - rows[0]))
        return (by_row[1] - by_row[0]) / (depths[1] - depths[0]) / 4 / context

    # attend_xla works in blocks of a quarter of the context, but at least 64 queries
    scores = context * (5 / 8 if context >= 256 else 1)
    calls = {
        name: step_call(replace(small, n_layer=depths[1], remat=remat), rows[0])
        for name, remat in (("without", False), ("with", True))
    }
    return {
        "small": {**shape, "depths": depths, "batch": rows},
        "steps": [
            {
                "layers": cfg.n_layer,
                "rows": batch_size,
                "remat": cfg.remat,
                "state": 12 * model.count_params(cfg),
                "arguments": said[cfg, batch_size].argument_size_in_bytes,
                "temporaries": temporaries[cfg, batch_size],
            }
            for cfg, batch_size in cases
        ],
        "kept": {
            "measured": kept(remat=False),
            "formula": activation_numbers(small, scores),
            # as jax.ad_checkpoint.print_saved_residuals lists them
            "detailed": activation_numbers(small, 3.25 * scores),
        },
        "remat": {"measured": kept(remat=True), "formula": width},
        "unrolled": {
            "without": temporaries[unrolled, rows[0]],
            "with": temporaries[replace(unrolled, remat=True), rows[0]],
        },
        "seconds": fastest(calls, 2 if quick else 5),
    }


def parts_table(_: Measured) -> str:
    """The parts of GPT-2's four sizes, in GB."""
    lines = [
        "| | parameters | weights | gradients | moments | activations | ... with remat | logits "
        "| sum | ... with remat | KV cache of a row |",
        "|---" * 11 + "|",
    ]
    for model_name, m in accounts().items():
        state = m["weights"] + m["gradients"] + m["moments"] + m["logits"]
        parts = ["weights", "gradients", "moments", "activations", "activations_remat", "logits"]
        sums = [state + m["activations"], state + m["activations_remat"]]
        cells = [f"{x / 1e9:.1f}" for x in [*(m[part] for part in parts), *sums]]
        name = f"`{model_name}` | {m['parameters'] / 1e6:,.0f} M"
        lines.append(f"| {name} | {' | '.join(cells)} | {m['kv_cache_row'] / 1e6:.0f} MB |")
    return "\n".join(lines)


def xla_table(measured: Measured) -> str:
    """What XLA says of the small model's step."""
    m = measured["memory"]
    small = m["small"]
    lines = [
        "| layers | rows | remat | 12 bytes a parameter | arguments | temporaries |",
        "|---|---|---|---|---|---|",
    ]
    for s in m["steps"]:
        mega = [f"{s[part] / 1e6:.1f} MB" for part in ("state", "arguments", "temporaries")]
        yes = "on" if s["remat"] else "off"
        lines.append(f"| {s['layers']} | {s['rows']} | {yes} | {' | '.join(mega)} |")
    kept, remat, seconds, unrolled = m["kept"], m["remat"], m["seconds"], m["unrolled"]
    lines += [
        "",
        f"Width {small['n_embd']}, {small['n_head']} heads, context {small['block_size']}, "
        f"{small['vocab_size']:,} tokens, float32, `--unroll=1`. From the differences between rows "
        "and between depths follow the numbers that each block keeps for each token: "
        f"**{kept['measured']:,.0f}** without remat and **{remat['measured']:,.0f}** with it. The "
        f"formula, with the attention weights that the CPU stores, says {kept['formula']:,} and "
        f"{remat['formula']:,}. JAX keeps more than that: of the softmax not one array but three "
        "(scores, exponentials, quotients) and a mask of a byte. Counted in, that makes "
        f"{kept['detailed']:,}. The step of "
        f"{small['depths'][1]} "
        f"layers and {small['batch'][0]} rows took {1e3 * seconds['without']:.0f} ms without remat "
        f"and {1e3 * seconds['with']:.0f} ms with it: "
        f"{seconds['with'] / seconds['without']:.2f} times as long.",
        "",
        f"With all layers unrolled (`--unroll=0`, the default) the same step of "
        f"{small['depths'][0]} layers needs {unrolled['without'] / 1e6:.1f} MB of temporaries "
        f"without remat and {unrolled['with'] / 1e6:.1f} MB with it.",
    ]
    return "\n".join(lines)
