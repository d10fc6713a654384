"""Section 6: models of growing size, each trained with the same compute.

K steps of a call, B rows, T time.
"""

import functools
import math
import sysconfig
import time
from pathlib import Path

import jax
import numpy as np

from gptjax import model
from gptjax.config import GPTConfig, TrainConfig
from gptjax.data import batches
from gptjax.loss import window_losses
from gptjax.training.metrics import flops_per_token
from gptjax.training.step import init_state
from scale.measuring import Measured, make_step, replace

# Layers and width of each model
SHAPES = [(1, 8), (1, 16), (1, 20), (1, 24), (2, 24), (2, 32), (2, 48), (3, 64), (4, 96)]
BUDGETS = [1e11, 4e11, 1.6e12]  # FLOPs
LEAST_STEPS, ROWS, CONTEXT = 100, 8, 64
LEFT_OUT = {"site-packages", "test", "tests", "idlelib"}


def library_source() -> tuple[np.ndarray, np.ndarray, int]:
    """The source of Python's standard library as ids of characters: training, validation, kinds.

    It is on every machine, needs no network, and is long enough to read nothing twice.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [
        path.read_bytes().decode("ascii", "ignore").encode()
        for path in sorted(folder.rglob("*.py"))
        if not LEFT_OUT & set(path.relative_to(folder).parts)
    ]
    kinds, ids = np.unique(np.frombuffer(b"".join(texts), np.uint8), return_inverse=True)
    parts = np.split(ids.astype(np.uint16), np.cumsum([len(text) for text in texts])[:-1])
    validation = [part for i, part in enumerate(parts) if i % 10 == 0]
    training = [part for i, part in enumerate(parts) if i % 10]
    return np.concatenate(training), np.concatenate(validation), len(kinds)


def make_config(cfg: GPTConfig, steps: int) -> TrainConfig:
    """AdamW with a schedule of its own for each length; wide models take smaller steps."""
    rate = 3e-3 * min(1, 64 / cfg.n_embd)
    return TrainConfig(
        model=cfg,
        batch_size=ROWS,
        max_iters=steps,
        warmup_iters=steps // 10,
        learning_rate=rate,
        min_lr=rate / 10,
    )


def final_loss(config: TrainConfig, train: np.ndarray, val: np.ndarray, windows: int) -> float:
    """The validation loss of a model after all steps, K of them in a call."""
    cfg, K = config.model, 20
    step, abstract = make_step(config)
    state = init_state(config, abstract)
    sizes = {"batch_size": ROWS, "block_size": CONTEXT, "n_vocab": cfg.vocab_size, "seed": 0}
    for first in range(0, config.max_iters, K):
        calls = [batches.sample_batch([train], step=first + i, **sizes) for i in range(K)]
        state, _ = step(state, np.stack(calls)[:, None])
    starts = batches.eval_windows([val], CONTEXT, windows)
    windows_BT = batches.read_windows([val], starts, CONTEXT, cfg.vocab_size)
    return float(jax.jit(functools.partial(window_losses, cfg))(state.params, windows_BT).mean())


def measure(quick: bool) -> Measured:
    """Validation losses of models that take the same FLOPs, for three budgets."""
    train, val, kinds = library_source()
    curves = []
    for budget in [1e8] if quick else BUDGETS:
        points = []
        for layers, width in SHAPES[:3] if quick else SHAPES:
            shape = GPTConfig(
                n_layer=layers, n_head=2, n_embd=width, block_size=CONTEXT, bias=False, unroll=1
            )
            cfg = model.resolve(replace(shape, vocab_size=kinds, vocab_multiple=1))
            steps = 20 * max(1, int(budget / flops_per_token(cfg) / ROWS / CONTEXT / 20))
            tokens = steps * ROWS * CONTEXT
            if not quick and (steps < LEAST_STEPS or tokens > len(train)):
                continue
            began = time.perf_counter()
            loss = final_loss(make_config(cfg, steps), train, val, 8 if quick else 4096)
            points.append(
                {
                    "layers": layers,
                    "width": width,
                    "parameters": model.count_params(cfg),
                    "tokens": tokens,
                    "loss": loss,
                    "seconds": time.perf_counter() - began,
                }
            )
            print(budget, points[-1], flush=True)
        curves.append({"flops": budget, "points": points, "best": lowest(points)})
    return {"text": len(train), "kinds": kinds, "curves": curves}


def lowest(points: list[Measured]) -> Measured:
    """The lowest point of the parabola through loss against log N, and the three that it takes."""
    at = int(np.argmin([p["loss"] for p in points]))
    first = min(max(at - 1, 0), len(points) - 3)
    near = points[first : first + 3]
    x = np.log([p["parameters"] for p in near])
    a, b, c = np.polyfit(x, [p["loss"] for p in near], 2)
    n = float(np.exp(-b / (2 * a)))
    return {"parameters": n, "loss": float(c - b * b / (4 * a)), "inside": 0 < at < len(points) - 1}


def table(measured: Measured) -> str:
    """The models that were trained, and the best size for each budget."""
    m = measured["isoflop"]
    curves = m["curves"]
    budgets = [f"{curve['flops'] / 1e12:.1f} x 10^12" for curve in curves]
    lines = [
        "| layers, width | parameters | " + " | ".join(f"{b} FLOPs" for b in budgets) + " |",
        "|---" * (2 + len(curves)) + "|",
    ]
    shapes = {(p["layers"], p["width"]): p["parameters"] for c in curves for p in c["points"]}
    for (layers, width), n in sorted(shapes.items(), key=lambda item: item[1]):
        cells = []
        for curve in curves:
            here = [p for p in curve["points"] if p["parameters"] == n]
            cells.append(f"{here[0]['loss']:.3f}" if here else "")
        lines.append(f"| {layers}, {width} | {n:,} | {' | '.join(cells)} |")
    best = [curve["best"] for curve in curves]
    shown = " | ".join(f"{b['parameters'] / 1e3:.1f} k, {b['loss']:.3f}" for b in best)
    lines.append(f"| lowest point | | {shown} |")
    read = max(p["tokens"] for curve in curves for p in curve["points"])
    lines += [
        "",
        "Validation loss in nats per character. The runs saw up to "
        f"{read / 1e6:.1f} of the {m['text'] / 1e6:.1f} million characters of training text, so "
        "none of it was read twice. From the first to the last budget, "
        f"{curves[-1]['flops'] / curves[0]['flops']:.0f} times the compute, the best size grew "
        f"{best[-1]['parameters'] / best[0]['parameters']:.1f} times: as C^"
        f"{exponent(m):.2f}.",
    ]
    return "\n".join(lines)


def exponent(m: Measured) -> float:
    """How the best size grows with compute, by a straight line through the logarithms."""
    if len(m["curves"]) < 2:  # a quick run
        return math.nan
    x = np.log([curve["flops"] for curve in m["curves"]])
    y = np.log([curve["best"]["parameters"] for curve in m["curves"]])
    return float(np.polyfit(x, y, 1)[0])
