"""The figures of lesson 3, drawn from what was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe & Ito 2008: told apart in print and by the colour-blind
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#666666"
Measured = dict[str, Any]


def memory(m: Measured, figure: Figure) -> None:
    """Stacked bars: what training of each size needs, without and with remat."""
    axes = figure.add_subplot()
    parts = [
        ("weights", "weights", BLUE),
        ("gradients", "gradients", SKY),
        ("moments", "Adam's moments", GREEN),
        ("activations", "activations", ORANGE),
        ("logits", "logits and their gradient", PURPLE),
    ]
    models = m["memory"]["gpt2"]
    for remat in (False, True):
        at = np.arange(len(models)) + (0.2 if remat else -0.2)
        bottom = np.zeros(len(models))
        for part, label, color in parts:
            key = "activations_remat" if remat and part == "activations" else part
            heights = np.array([model[key] for model in models]) / 1e9
            name = None if remat else label
            axes.bar(at, heights, 0.36, bottom, color=color, edgecolor="white", label=name)
            bottom += heights
        for x, top in zip(at, bottom, strict=True):
            axes.text(x, top + 1, f"{top:.0f}\n{'remat' if remat else 'plain'}", ha="center")
    for size, name in ((80, "A100 or H100, 80 GB"), (24, "RTX 4090, 24 GB")):
        axes.axhline(size, color=GREY, linewidth=1, linestyle="--")
        axes.text(-0.42, size + 1, name, color=GREY)
    axes.set_xticks(range(len(models)), [f"{x['parameters'] / 1e6:,.0f} M" for x in models])
    axes.set(xlabel="parameters of GPT-2", ylabel="GB in training, 8 rows of 1024 tokens")
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.83))


def roofline(m: Measured, figure: Figure) -> None:
    """Each operation below the machine's two ceilings."""
    axes, r = figure.add_subplot(), m["roofline"]
    points = sorted(r["points"], key=lambda p: p["gflops"])
    low, high = 0.5 * points[0]["gflops"], 2 * max(points[-1]["gflops"], r["gflops"])
    x = np.geomspace(0.05, 3000, 200)
    axes.loglog(x, np.minimum(r["gflops"], x * r["gbytes"]), color=GREY, linewidth=2)
    axes.text(700, r["gflops"] * 1.1, f"{r['gflops']:.0f} GFLOP/s", color=GREY)
    axes.text(0.9, r["gbytes"] * 1.25, f"{r['gbytes']:.0f} GB/s", color=GREY, ha="right")
    line = 10 ** (np.log10(high / low) / 24)  # the height of a label
    for left, right in ((0, 0.3), (0.3, 4)):  # labels stand beside a group, one above the other
        group = [p for p in points if left <= p["intensity"] < right]
        column = 1.6 * max(p["intensity"] for p in group)
        heights = [p["gflops"] for p in group]
        for _ in range(100):
            for i in range(1, len(group)):
                gap = heights[i] / heights[i - 1] / line
                if gap < 1:
                    heights[i - 1] *= gap**0.5
                    heights[i] /= gap**0.5
        for p, height in zip(group, heights, strict=True):
            label(axes, p, (column, height), {"va": "center"})
    products = sorted((p for p in points if p["intensity"] >= 4), key=lambda p: p["intensity"])
    height = high
    for p in products:  # each label lower than the one to its left
        height = min(height / line**1.2, p["gflops"] / line**1.5)
        label(axes, p, (1.3 * p["intensity"], height), {"va": "top"})
    axes.plot([], [], "o", color=BLUE, label="matrix products")
    axes.plot([], [], "o", color=ORANGE, label="everything else")
    axes.set(xlabel="arithmetic intensity (FLOPs per byte)", ylabel="GFLOP/s reached")
    axes.set_xlim(0.05, 3000)
    axes.set_ylim(low, high)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")


def label(axes: Axes, point: Measured, place: tuple[float, float], how: dict[str, Any]) -> None:
    """A dot, and its name at a place, with a line between the two."""
    at = point["intensity"], point["gflops"]
    is_product = point["operation"].startswith(("c_fc", "head", "scores"))
    axes.plot(*at, "o", color=BLUE if is_product else ORANGE)
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    axes.annotate(point["operation"], at, place, fontsize=9, arrowprops=line, **how)


def gradients(m: Measured, figure: Figure) -> None:
    """How large gradients are, and where float16 ends."""
    axes = figure.add_subplot()
    h = m["precision"]["histogram"]
    for (name, label), color in zip(
        (("parameters", "of the parameters"), ("logits", "of the logits")),
        (BLUE, ORANGE),
        strict=True,
    ):
        bins, shares = np.array(h[name]).T
        axes.step([*bins, bins[-1] + 1], 100 * np.array([*shares, shares[-1]]), where="post",
                  color=color, label=f"gradients {label}", linewidth=2)  # fmt: skip
    top = 1.3 * axes.get_ylim()[1]
    axes.set_ylim(0, top)
    for power, name in ((-14, "smallest normal\n2^-14"), (-24, "smallest\n2^-24")):
        axes.axvline(power, color=GREY, linestyle="--", linewidth=1)
        axes.text(power + 0.4, 0.88 * top, f"float16's {name}", color=GREY, fontsize=9)
    low = axes.get_xlim()[0]
    axes.axvspan(low, -25, color=RED, alpha=0.12, linewidth=0)
    axes.text(-25.3, 0.78 * top, "becomes 0", color=RED, ha="right")
    axes.set_xlim(low, max(2, axes.get_xlim()[1]))
    axes.set(xlabel="log2 of the gradient's size", ylabel="% of the gradients per power of two")
    axes.legend(frameon=False, loc="center right", fontsize=9)


def loss_scale(m: Measured, figure: Figure) -> None:
    """The gradient's error against a fixed scale; a dynamic scale on its way."""
    p = m["precision"]
    left, right = figure.subplots(1, 2)
    powers = [s["power"] for s in p["scales"]]
    known = [(s["power"], s["error"]) for s in p["scales"] if s["error"] is not None]
    left.semilogy(*np.array(known).T, "o-", color=BLUE, label="float16")
    left.axhline(p["bfloat16_error"], color=ORANGE, linestyle="--", label="bfloat16, no scale")
    overflow = [s["power"] for s in p["scales"] if s["error"] is None]
    if overflow:
        left.axvspan(overflow[0] - 1, powers[-1] + 1, color=RED, alpha=0.12, linewidth=0)
        middle = (overflow[0] + powers[-1]) / 2
        left.text(middle, 0.45, "overflow", color=RED, rotation=90, ha="center", va="center",
                  transform=left.get_xaxis_transform())  # fmt: skip
    left.set(xlabel="log2 of the loss scale", ylabel="relative error of the gradient")
    left.grid(alpha=0.3)
    low, high = left.get_ylim()
    left.set_ylim(low, 10 * high)  # room for the legend
    left.legend(fontsize=9, loc="upper right")
    right.step(range(len(p["trace"])), p["trace"], where="post", color=BLUE)
    right.set(xlabel="step", ylabel="log2 of the dynamic loss scale")
    right.grid(alpha=0.3)


def kv_cache(m: Measured, figure: Figure) -> None:
    """Time per token, with the cache and without."""
    axes, rows = figure.add_subplot(), m["cache"]["rows"]
    x = [r["context"] for r in rows]
    for key, label, color, marker in (
        ("recomputed_ms", "all tokens computed again", ORANGE, "s-"),
        ("cached_ms", "with the KV cache", BLUE, "o-"),
    ):
        axes.loglog(x, [r[key] for r in rows], marker, color=color, label=label)
    axes.set_xticks(x, x)
    axes.minorticks_off()
    axes.set(xlabel="tokens of context", ylabel="ms per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def flash(m: Measured, figure: Figure) -> None:
    """Memory and time of attention, forward and backward."""
    left, right = figure.subplots(1, 2)
    rows = m["flash"]["rows"]
    for name, label, color, marker in (
        ("naive", "naive", ORANGE, "s-"),
        ("gptjax", "gptjax's attend_xla", GREEN, "^-"),
        ("blocked", "blocked", BLUE, "o-"),
    ):
        left.loglog([r["T"] for r in rows], [r["bytes"][name] / 1e6 for r in rows], marker,
                    color=color, label=label)  # fmt: skip
        timed = [r for r in rows if r["ms"]]
        right.loglog([r["T"] for r in timed], [r["ms"][name] for r in timed], marker, color=color)
    ticks(left, [r["T"] for r in rows])
    ticks(right, [r["T"] for r in rows if r["ms"]])
    left.set(xlabel="T (tokens)", ylabel="temporaries, MB")
    right.set(xlabel="T (tokens)", ylabel="ms on the CPU")
    left.legend(frameon=False)


def ticks(axes: Axes, x: list[int]) -> None:
    """Label these lengths and no others."""
    axes.set_xticks(x, [str(n) for n in x])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(alpha=0.3)


def scaling_law(m: Measured, figure: Figure) -> None:
    """Loss against parameters, and the fitted line."""
    axes, points, fit = figure.add_subplot(), m["law"]["points"], m["law"]["fit"]
    n = np.array([p["parameters"] for p in points])
    x = np.geomspace(n.min() / 1.5, n.max() * 1.5, 50)
    label = f"{fit['factor']:.2f} N^-{fit['exponent']:.3f}"
    axes.loglog(x, fit["factor"] * x ** -fit["exponent"], "--", color=GREY, label=label)
    axes.loglog(n, [p["loss"] for p in points], "o", color=BLUE, label="measured, validation")
    axes.set(xlabel="parameters N", ylabel="loss (nats per character)")
    losses = [p["loss"] for p in points]
    marks = np.round(np.linspace(min(losses), max(losses), 5), 2)
    axes.set_yticks(marks, [f"{y:.2f}" for y in marks])
    axes.tick_params(axis="y", which="minor", left=False, labelleft=False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


FIGURES: dict[str, Callable[[Measured, Figure], None]] = {
    "memory": memory,
    "roofline": roofline,
    "gradients": gradients,
    "loss_scale": loss_scale,
    "kv_cache": kv_cache,
    "flash": flash,
    "scaling_law": scaling_law,
}


def draw(measured: Measured, folder: Path) -> None:
    """All of them, as PNGs of 800 x 450."""
    for name, paint in FIGURES.items():
        figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        paint(measured, figure)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
