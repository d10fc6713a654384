"""The figures of lesson 3, drawn from what was measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scale.colours import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from scale.explained import tiles, triangle
from scale.law_figures import budget, isoflop
from scale.measuring import Measured
from scale.memory import accounts
from scale.roofline_figure import roofline


def memory(_: Measured, figure: Figure) -> None:
    """Stacked bars: what training of each size needs, without and with remat."""
    axes = figure.add_subplot()
    parts = [
        ("weights", "weights", BLUE),
        ("gradients", "gradients", SKY),
        ("moments", "Adam's moments", GREEN),
        ("activations", "activations", ORANGE),
        ("logits", "logits and their gradient", PURPLE),
    ]
    models = list(accounts().values())
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
    axes.set_title("Memory of a training step of GPT-2's four sizes")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.83))


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
    axes.set_xlabel("size of the gradient, as a power of two (log2)")
    axes.set_ylabel("% of the gradients per power of two")
    axes.set_title("Gradients of a small model after 200 steps, and where float16 ends")
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
    left.set(xlabel="loss scale, as a power of two (log2)", ylabel="relative error of the gradient",
             title="A fixed scale")  # fmt: skip
    left.grid(alpha=0.3)
    low, high = left.get_ylim()
    left.set_ylim(low, 10 * high)  # room for the legend
    left.legend(fontsize=9, loc="upper left", frameon=False)
    right.step(range(len(p["trace"])), p["trace"], where="post", color=BLUE)
    right.set(xlabel="step", ylabel="loss scale, as a power of two (log2)", title="A dynamic scale")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
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
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.minorticks_off()
    axes.set(xlabel="tokens of context", ylabel="milliseconds per new token",
             title="A new token, with the KV cache and without")  # fmt: skip
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
    left.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
    right.set_yticks([10, 100], ["10", "100"])
    left.set(xlabel="tokens T", ylabel="memory beside the inputs, MB", title="Memory")
    right.set(xlabel="tokens T", ylabel="milliseconds on two CPU cores", title="Time")
    left.legend(frameon=False)


def ticks(axes: Axes, x: list[int]) -> None:
    """Label these lengths and no others."""
    axes.set_xticks(x, [str(n) for n in x])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(alpha=0.3)


FIGURES: dict[str, Callable[[Measured, Figure], None]] = {
    "memory": memory,
    "roofline": roofline,
    "gradients": gradients,
    "loss_scale": loss_scale,
    "kv_cache": kv_cache,
    "triangle": triangle,
    "tiles": tiles,
    "flash": flash,
    "isoflop": isoflop,
    "budget": budget,
}


SIZES = {"roofline": (12.5, 5.5), "triangle": (10, 3.8), "tiles": (9, 4.2)}  # in inches


def draw(measured: Measured, folder: Path) -> None:
    """All of them, as PNGs of 100 dots an inch."""
    for name, paint in FIGURES.items():
        figure = Figure(figsize=SIZES.get(name, (8, 4.5)), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        paint(measured, figure)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
