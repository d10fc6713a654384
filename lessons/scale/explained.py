"""Figures of lesson 3 that explain an idea; nothing in them is measured."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from scale.colours import BLUE, GREY, ORANGE, SKY
from scale.flash import SCORES, TILE, VALUES, online_softmax
from scale.measuring import Measured

PROMPT, NEW = 4, 5  # tokens in the picture of the cache


def cell(axes: Axes, column: float, row: float, color: str, text: str = "") -> None:
    """A square of a grid, counted from the top left."""
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=2))
    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9)


def grid(axes: Axes, columns: int, rows: int) -> None:
    """Axes for so many squares, the first row at the top."""
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    axes.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def triangle(_: Measured, figure: Figure) -> None:
    """Which positions pass through the model for each new token, without and with the cache."""
    steps = range(NEW)
    panels = figure.subplots(1, 2)
    for axes, cached in zip(panels, (False, True), strict=True):
        count = 0
        for step in steps:
            for position in range(PROMPT + step):
                is_new = step == 0 or position == PROMPT + step - 1
                computed = is_new or not cached
                count += computed
                cell(axes, position, step, ORANGE if computed else SKY)
        grid(axes, PROMPT + NEW - 1, NEW)
        title = "With the KV cache" if cached else "Without a cache"
        axes.set_title(f"{title}: {count} positions computed")
        axes.set_xlabel("position in the text")
        axes.set_xticks([i + 0.5 for i in range(PROMPT + NEW - 1)], range(1, PROMPT + NEW))
        names = [f"new token {i + 1}" for i in steps]
        if cached:
            names = [
                f"{name}\n({'prefill' if i == 0 else 'decode'})" for i, name in enumerate(names)
            ]
        axes.set_yticks([i + 0.5 for i in steps], names)
    figure.legend(
        handles=[
            Patch(color=ORANGE, label="computed by all layers"),
            Patch(color=SKY, label="keys and values read from the cache"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )


def tiles(_: Measured, figure: Figure) -> None:
    """Left: the scores in tiles. Right: the running weights of one query."""
    panels: Any = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    left, right = panels
    axes, n = left.subplots(), 4
    for i in range(n):
        for j in range(n):
            text = f"{j + 1}" if i == n - 1 else ""
            cell(axes, j, i, "#EEEEEE" if j > i else ORANGE if j == i else SKY, text)
    grid(axes, n, n)
    axes.set_title("Scores in tiles")
    axes.set_xticks([i + 0.5 for i in range(n)], [f"{i + 1}" for i in range(n)])
    axes.set_yticks([i + 0.5 for i in range(n)], [f"{i + 1}" for i in range(n)])
    axes.set(xlabel="tile of keys", ylabel="tile of queries")
    left.legend(
        handles=[
            Patch(color=SKY, label="all keys visible"),
            Patch(color=ORANGE, label="masked in part"),
            Patch(color="#EEEEEE", label="masked: never read"),
        ],
        loc="outside lower center",
        fontsize=9,
        frameon=False,
    )
    rows, history = right.subplots(3, 1, sharex=True), online_softmax(SCORES, VALUES, TILE)
    for i, (top, _shrink, total, _mixed) in enumerate(history):
        axes, seen = rows[i], (i + 1) * TILE
        weights = [math.exp(score - top) for score in SCORES[:seen]]
        old = seen - TILE
        bars(axes, weights, [SKY] * old + [ORANGE] * TILE)
        axes.set_title(f"after tile {i + 1}: e^(score - {top:.0f}), total {total:.3f}", fontsize=10)
    bars(rows[2], [math.exp(score - top) / total for score in SCORES], [BLUE] * len(SCORES))
    rows[2].set_title("divided by the total: the softmax", fontsize=10)
    names = [f"key {i + 1}\nscore {score:.0f}" for i, score in enumerate(SCORES)]
    rows[2].set_xticks(range(len(SCORES)), names)
    right.supylabel("weight", fontsize=10, color=GREY)


def bars(axes: Axes, heights: list[float], colors: list[str]) -> None:
    """Bars with their numbers above."""
    drawn = axes.bar(range(len(heights)), heights, 0.6, color=colors)
    axes.bar_label(drawn, [f"{height:.3f}" for height in heights], fontsize=9)
    axes.set(xlim=(-0.5, len(SCORES) - 0.5), ylim=(0, 1.35), yticks=[])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
