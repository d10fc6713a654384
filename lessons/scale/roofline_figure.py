"""The figure of section 2: operations below this machine's roof, and below an H100's."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptjax.training.metrics import PEAK_FLOPS
from scale.colours import BLUE, GREEN, GREY, ORANGE
from scale.measuring import Measured
from scale.roofline import MEMORY_BANDWIDTH, gpu_intensity
from scale.utilisation import RUNS, generating, mfu

LEFT, RIGHT = 0.05, 30_000  # FLOPs per byte


def roofline(m: Measured, figure: Figure) -> None:
    """Left: measured here. Right: the same on the roof of an H100, and whole programs."""
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    r = m["roofline"]
    points = sorted(r["points"], key=lambda p: p["gflops"])
    low, high = 0.5 * points[0]["gflops"], 2.5 * max(points[-1]["gflops"], r["gflops"])
    left.set_ylim(low, high)
    roof(left, r["gflops"], r["gbytes"], f"{r['gflops']:.0f} GFLOP/s", f"{r['gbytes']:.0f} GB/s")
    line = 10 ** (np.log10(high / low) / 24)  # the height of a label
    for first, last in ((0, 0.3), (0.3, 4)):  # labels stand beside a group, one above the other
        group = [p for p in points if first <= p["intensity"] < last]
        column = 1.6 * max(p["intensity"] for p in group)
        heights = [p["gflops"] for p in group]
        for _ in range(100):
            for i in range(1, len(group)):
                gap = heights[i] / heights[i - 1] / line
                if gap < 1:
                    heights[i - 1] *= gap**0.5
                    heights[i] /= gap**0.5
        for p, height in zip(group, heights, strict=True):
            label(left, p, (column, height), "center")
    products = sorted((p for p in points if p["intensity"] >= 4), key=lambda p: p["intensity"])
    height = high
    for p in products:  # each label lower than the one to its left
        height = min(height / line**1.2, p["gflops"] / line**1.5)
        label(left, p, (1.3 * p["intensity"], height), "top")
    left.set(ylabel="GFLOP/s reached", title="Measured on two CPU cores, float32")
    h100(right, points)


def h100(axes: Axes, points: list[Measured]) -> None:
    """Where the operations could be at most on an H100, and where whole programs were."""
    peak, bandwidth = PEAK_FLOPS["H100"] / 1e9, MEMORY_BANDWIDTH["H100"] / 1e9
    axes.set_ylim(0.5 * LEFT * bandwidth, 2.5 * peak)
    roof(axes, peak, bandwidth, f"{peak / 1e3:.0f} TFLOP/s", f"{bandwidth / 1e3:.2f} TB/s")
    names: dict[float, list[str]] = {}  # of the operations at a place
    for p in points:
        x = gpu_intensity(p)
        axes.plot(x, min(peak, x * bandwidth), "o", color=BLUE if is_product(p) else ORANGE)
        names.setdefault(round(x, 1), []).append(p["operation"])
    for x, operations in names.items():
        at = x, min(peak, x * bandwidth)
        below = {"c_fc, 4096 tokens": 15, "head, 1 token": 11}.get(operations[0], 5)
        name = ", ".join(operations)
        axes.annotate(name, at, (8, -below), textcoords="offset points", fontsize=9)
    training = mfu(RUNS[0])
    axes.plot([RIGHT / 100, RIGHT], 2 * [training * peak], "--", color=GREEN, linewidth=1.5)
    level = f"training, {training:.0%} MFU"
    axes.text(RIGHT * 0.8, 0.68 * training * peak, level, fontsize=9, ha="right", va="top")
    for name, x, gflops, place in generating():
        axes.plot(x, gflops, "*", color=GREEN, markersize=11)
        axes.annotate(name, (x, gflops), place, textcoords="offset points", fontsize=9)
    axes.plot([], [], "o", color=BLUE, label="matrix products, at most")
    axes.plot([], [], "o", color=ORANGE, label="everything else, at most")
    axes.plot([], [], "*--", color=GREEN, markersize=11, label="GPT-2 124M, measured")
    axes.set(ylabel="GFLOP/s", title="One H100, bfloat16")
    axes.legend(frameon=False, loc="upper left", fontsize=9, bbox_to_anchor=(0, 0.92))


def roof(axes: Axes, gflops: float, gbytes: float, peak: str, slope: str) -> None:
    """The two ceilings of a machine, shaded by which of them an operation meets."""
    edge, bottom = gflops / gbytes, axes.get_ylim()[0]
    for x, color, name in (
        (np.geomspace(LEFT, edge, 50), ORANGE, "memory-bound"),
        (np.geomspace(edge, RIGHT, 50), BLUE, "compute-bound"),
    ):
        ceiling = np.minimum(gflops, x * gbytes)
        axes.fill_between(x, bottom, ceiling, color=color, alpha=0.1, linewidth=0)
        axes.plot(x, ceiling, color=GREY, linewidth=2)
        middle = np.sqrt(x[0] * x[-1])
        axes.text(middle, bottom * 1.15, name, color=color, weight="bold", ha="center")
    axes.text(RIGHT * 0.8, gflops * 1.12, peak, color=GREY, ha="right")
    x = np.sqrt(LEFT * edge)
    axes.text(0.8 * x, 1.2 * x * gbytes, slope, color=GREY, ha="right")
    axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
    border = f"{edge:.0f} FLOPs per byte "
    axes.text(edge, axes.get_ylim()[1] / 1.05, border, color=GREY, fontsize=9, ha="right", va="top")
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOPs per byte)")
    axes.set_xlim(LEFT, RIGHT)
    axes.grid(alpha=0.3)


def is_product(point: Measured) -> bool:
    return bool(point["operation"].startswith(("c_fc", "head", "scores")))


def label(axes: Axes, point: Measured, place: tuple[float, float], va: str) -> None:
    """A dot, and its name at a place, with a line between the two."""
    at = point["intensity"], point["gflops"]
    axes.plot(*at, "o", color=BLUE if is_product(point) else ORANGE)
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    axes.annotate(point["operation"], at, place, fontsize=9, arrowprops=line, va=va)
