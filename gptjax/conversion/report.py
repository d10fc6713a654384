"""What verify found, as a page for people and as JSON for programs."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from gptjax.conversion.verify import (
    BLOCK,
    EMBEDDINGS,
    GRADIENTS,
    GREEDY,
    HALF,
    HEAD_PART,
    LOGITS,
    Check,
    first_failure,
    place,
)

MOST = 24  # lines of blocks, so that the page fits a screen; more blocks share lines
TITLES = {
    EMBEDDINGS: "embeddings",
    HEAD_PART: "LayerNorm and head",
    LOGITS: "logits",
    HALF: "logits in bfloat16",
    GRADIENTS: "gradients",
    GREEDY: "greedy text",
}
HEADER = ("part", "hold", "difference", "allowed", "at")


class Compared(NamedTuple):
    """Two models, and every comparison of them."""

    ours: str
    theirs: str
    notes: tuple[str, ...]  # sentences on how they were compared
    checks: list[Check]
    files: tuple[tuple[str, str], ...] = ()  # name and sha256 of each file of theirs


class Part(NamedTuple):
    """The comparisons of a part of the computation: the embeddings, a few blocks, the logits ..."""

    title: str
    checks: list[Check]

    @property
    def held(self) -> str:
        """Return how many of the comparisons hold."""
        return f"{sum(check.ok for check in self.checks)} of {len(self.checks)}"

    @property
    def at(self) -> Check:
        """Return the first comparison that fails, or the one that comes nearest to it."""
        return first_failure(self.checks) or worst(self.checks)

    @property
    def row(self) -> list[str]:
        """Return the line of the page, under `HEADER`."""
        at = self.at
        return [self.title, self.held, number(at.difference), number(at.allowed), at.name]


def number(value: float) -> str:
    """Return a number with two digits."""
    return f"{value:.2g}"


def share(check: Check) -> float:
    """Return the difference in units of what is allowed; of what must be equal, infinity or 0."""
    if check.allowed == 0:
        return math.inf if check.difference != 0 else 0.0
    return check.difference / check.allowed


def worst(checks: list[Check]) -> Check:
    """Return the check that is farthest from what is allowed, or comes nearest to it.

    Of two that are equally near, such as a difference and the same in other units, the larger.
    """
    return max(checks, key=lambda check: (not check.ok, round(share(check), 6), check.allowed))


def block_count(checks: Sequence[Check]) -> int:
    """Return how many blocks the model has."""
    return max((block + 1 for part, block in map(place, checks) if part == BLOCK), default=0)


def parts(checks: list[Check], most: int = MOST) -> list[Part]:
    """Return the parts of the computation in order, the blocks on `most` lines or fewer."""
    together = max(1, -(-block_count(checks) // most))
    found: dict[tuple[int, int], list[Check]] = {}
    for check in checks:
        part, block = place(check)
        found.setdefault((part, block // together), []).append(check)
    return [Part(title(members), members) for _, members in sorted(found.items())]


def title(checks: list[Check]) -> str:
    """Return what a part is called: block 3, or blocks 4 to 5."""
    part, first = min(map(place, checks))
    if part != BLOCK:
        return TITLES[part]
    _, last = max(map(place, checks))
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def parting(checks: list[Check]) -> str:
    """Return a sentence on the first comparison that fails; "" if all hold."""
    first = first_failure(checks)
    if first is None:
        return ""
    ours = f" (in gptjax {first.ours})" if first.ours else ""
    return (
        f"The models part first in {title([first])}, at {first.group} {first.name}{ours}: the "
        f"difference is {number(first.difference)}, allowed is {number(first.allowed)}."
    )


def total(checks: list[Check]) -> str:
    """Return how many comparisons hold."""
    return f"{sum(check.ok for check in checks)} of {len(checks)} comparisons hold"


def to_json(checks: list[Check]) -> str:
    """Return the report as JSON text, with every comparison."""
    report = [{**check._asdict(), "ok": check.ok} for check in checks]
    for entry in report:  # JSON has no NaN
        for key in ("difference", "allowed"):
            entry[key] = entry[key] if math.isfinite(entry[key]) else None
    first = first_failure(checks)
    at = None if first is None else f"{first.group} {first.name}"
    return json.dumps({"ok": first is None, "first_difference": at, "checks": report})
