"""Figures of section 6: curves of equal compute, measured and by a published fit."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptjax import model
from scale.colours import BLUE, GREEN, GREY, ORANGE, RED
from scale.law import BESIROGLU, HOFFMANN, at_budget, day_flops
from scale.measuring import GPT2, Measured


def short(n: float) -> str:
    """A number of parameters, in a few characters."""
    if n >= 1e9:
        return f"{n / 1e9:.2g} B"
    return f"{n / 1e6:.0f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"


def axis_of_sizes(axes: Axes, sizes: list[float]) -> None:
    """A logarithmic axis with these sizes and no others."""
    axes.set_xscale("log")
    axes.set_xticks(sizes, [short(n) for n in sizes])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.set_xlabel("parameters N")
    axes.grid(alpha=0.3)


def isoflop(m: Measured, figure: Figure) -> None:
    """The models that were trained here, a curve for each budget."""
    axes, curves = figure.add_subplot(), m["isoflop"]["curves"]
    for curve, color, marker in zip(curves, (BLUE, GREEN, ORANGE), "os^", strict=False):
        points, best = curve["points"], curve["best"]
        n = [p["parameters"] for p in points]
        axes.plot(n, [p["loss"] for p in points], f"{marker}-", color=color,
                  label=f"{curve['flops'] / 1e12:.1f} x 10^12 FLOPs")  # fmt: skip
        axes.plot(best["parameters"], best["loss"], "*", color=RED, markersize=14)
    axes.plot([], [], "*", color=RED, markersize=12, label="lowest point of a parabola")
    axis_of_sizes(axes, sorted({p["parameters"] for curve in curves for p in curve["points"]}))
    axes.set_ylabel("validation loss (nats per character)")
    axes.set_title("Measured on two CPU cores: for each budget one size is best")
    axes.legend(frameon=False, loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend


def budget(_: Measured, figure: Figure) -> None:
    """The loss that a day on 8 H100s buys, by size, as Besiroglu's fit says."""
    axes, flops = figure.add_subplot(), day_flops()
    x = np.geomspace(8e7, 1e10, 200)
    axes.plot(x, [BESIROGLU.loss(n, flops / 6 / n) for n in x], color=GREY)
    sizes = {name: float(model.count_params(cfg)) for name, cfg in GPT2.items()}
    for name, n in sizes.items():
        tokens = flops / 6 / n
        loss = BESIROGLU.loss(n, tokens)
        axes.plot(n, loss, "o", color=BLUE)
        axes.annotate(
            f"{name}\n{tokens / 1e9:,.0f} B tokens",
            (n, loss),
            (6, 22 if name == "gpt2_xl" else 10),
            textcoords="offset points",
            fontsize=9,
        )
    lowest = BESIROGLU.loss(*at_budget(BESIROGLU, flops))
    for name, fit, color in (
        ("20 tokens a parameter", None, GREEN),
        ("Hoffmann's fit", HOFFMANN, RED),
    ):
        n = at_budget(fit, flops)[0]
        axes.plot(
            [n, n], [lowest - 0.06, BESIROGLU.loss(n, flops / 6 / n)], color=color, linestyle="--"
        )
        axes.text(n, lowest - 0.065, name, color=color, fontsize=9, va="top",
                  ha="left" if fit is None else "right")  # fmt: skip
    axis_of_sizes(axes, [*sizes.values(), 5e9, 1e10])
    axes.set_ylim(lowest - 0.1, None)
    axes.set_ylabel("loss by Besiroglu's fit (nats per token)")
    axes.set_title("A day on 8 H100s, spent on models of different size")
