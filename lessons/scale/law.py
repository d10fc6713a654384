"""Section 6: what Chinchilla's law asks of GPT-2's sizes, and a small experiment of its kind."""

import functools
import math
import time

import jax
import numpy as np

from gptjax import model
from gptjax.config import GPTConfig, TrainConfig
from gptjax.data import batches
from gptjax.loss import window_losses
from gptjax.training.metrics import PEAK_FLOPS, flops_per_token
from scale.measuring import GPT2, Measured, characters, replace, train

CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
MFU = 0.4


def chinchilla_loss(n: float, d: float) -> float:
    """Loss in nats of n parameters after d tokens (Hoffmann et al. 2022, equation 10)."""
    c = CHINCHILLA
    return c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]


def demand(name: str, cfg: GPTConfig) -> dict[str, float | str]:
    """What the law asks for: 20 tokens a parameter."""
    n = model.count_params(cfg)
    tokens = 20 * n
    return {
        "model": name,
        "parameters": n,
        "tokens": tokens,
        "flops": 6 * n * tokens,
        "hours": 6 * n * tokens / (MFU * PEAK_FLOPS["H100"]) / 3600,
        "exact_hours": flops_per_token(cfg) * tokens / (MFU * PEAK_FLOPS["H100"]) / 3600,
        "loss": chinchilla_loss(n, tokens),
    }


def measure(quick: bool) -> Measured:
    """The validation loss of growing models after the same characters."""
    shapes = [(1, 16), (2, 24), (2, 48), (3, 64), (4, 96)]  # layers, width
    shapes, steps, context, rows = (shapes[:2], 20, 16, 4) if quick else (shapes, 1500, 64, 16)
    data = characters(context)
    points = []
    for layers, width in shapes:
        shape = GPTConfig(
            n_layer=layers, n_head=2, n_embd=width, block_size=context, bias=False, unroll=1
        )
        vocab = {"vocab_size": data.tokenizer.n_vocab, "vocab_multiple": 1}
        cfg = model.resolve(replace(shape, **vocab))
        config = TrainConfig(
            model=cfg,
            batch_size=rows,
            max_iters=steps,
            warmup_iters=steps // 10,
            learning_rate=3e-3,
            min_lr=3e-4,
        )
        began = time.perf_counter()
        state, losses = train(config, data)
        starts = batches.eval_windows(data.val, context, 4 if quick else 512)
        windows = batches.read_windows(data.val, starts, context, cfg.vocab_size)
        loss = jax.jit(functools.partial(window_losses, cfg))(state.params, windows).mean()
        points.append(
            {
                "layers": layers,
                "width": width,
                "parameters": model.count_params(cfg),
                "loss": float(loss),
                "train_loss": float(np.mean(losses[-20:])),
                "seconds": time.perf_counter() - began,
            }
        )
    x = np.log([p["parameters"] for p in points])
    y = np.log([p["loss"] for p in points])
    slope, intercept = np.polyfit(x, y, 1)
    worst = float(np.abs(np.exp(y - slope * x - intercept) - 1).max())
    return {
        "gpt2": [demand(name, cfg) for name, cfg in GPT2.items()],
        "points": points,
        "tokens": steps * rows * context,
        "text": len(data.train[0]),
        "fit": {"exponent": -float(slope), "factor": math.exp(intercept), "worst": worst},
    }


def demand_table(measured: Measured) -> str:
    """Compute-optimal training of GPT-2's sizes."""
    lines = [
        "| | parameters N | tokens D = 20 N | FLOPs 6 N D | H100 hours | ... with attention "
        "| loss by the fit |",
        "|---" * 7 + "|",
    ]
    for p in measured["law"]["gpt2"]:
        lines.append(
            f"| `{p['model']}` | {p['parameters'] / 1e6:,.0f} M | {p['tokens'] / 1e9:.1f} B "
            f"| {p['flops']:.1e} | {p['hours']:,.1f} | {p['exact_hours']:,.1f} | {p['loss']:.2f} |"
        )
    return "\n".join(lines)


def points_table(measured: Measured) -> str:
    """The models that were trained here."""
    m = measured["law"]
    lines = [
        "| layers, width | parameters | validation loss | power law | training loss | seconds |",
        "|---" * 6 + "|",
    ]
    fit = m["fit"]
    for p in m["points"]:
        predicted = fit["factor"] * p["parameters"] ** -fit["exponent"]
        lines.append(
            f"| {p['layers']}, {p['width']} | {p['parameters']:,} | {p['loss']:.3f} "
            f"| {predicted:.3f} | {p['train_loss']:.3f} | {p['seconds']:.0f} |"
        )
    lines += [
        "",
        f"Each saw {m['tokens'] / 1e6:.2f} million characters, which is "
        f"{m['tokens'] / m['text']:.1f} times the training text. The fitted line is "
        f"L = {fit['factor']:.2f} N^-{fit['exponent']:.3f}; no point is further than "
        f"{fit['worst']:.1%} from it.",
    ]
    return "\n".join(lines)
