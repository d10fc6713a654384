"""The report of verify as one HTML file: a heat map of the blocks, and every number in tables.

The file needs no network and no script. A cell's colour says, on a log scale, how much of the
allowed difference is used up; its `title` has the numbers.
"""

import contextlib
import datetime
import html
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from gptjax.conversion import report
from gptjax.conversion.report import Compared, number, share
from gptjax.conversion.report_style import STYLE
from gptjax.conversion.verify import (
    HALF_TOLERANCE,
    KL_TOLERANCE,
    TOLERANCE,
    Check,
    first_failure,
)
from gptjax.errors import OutputError
from gptjax.files import replacing
from gptjax.settings import require

PACKAGES = ("gptjax", "jax", "transformers", "torch", "numpy")
LEVELS = (  # share of what is allowed, up to which a cell is of this class; what the legend says
    (0.0, "equal", "equal to the bit"),
    (1e-3, "low1", "up to 0.1 % of what is allowed"),
    (1e-2, "low2", "to 1 %"),
    (1e-1, "low3", "to 10 %"),
    (1.0, "low4", "to 100 %"),
    (1e1, "high1", "fails: up to 10 times"),
    (1e3, "high2", "up to 1000 times"),
    (float("inf"), "high3", "more, NaN, or bits that should be equal"),
)
HEAT_MAP = (
    "Both models computed the same tokens. Each cell is a part of a block. Its colour says how "
    "large the difference is there, in shares of what is allowed; a pointer on the cell shows the "
    "numbers."
)
PARTS = ("ln_1", "attn", "ln_2", "mlp")
OUTPUTS, WEIGHTS, GRADIENTS = "Outputs", "Weights", "Gradients"
Checks = Sequence[Check]


# ---- The file ------------------------------------------------------------------------------------


def refuse_page(path: Path) -> None:
    """Raise UsageError or OutputError if a page cannot be written there, before the long work."""
    plain = path.is_file() or not path.exists()
    require(plain, "html", path, "is no plain file; name one to write, such as report.html")
    if not path.parent.is_dir():
        raise OutputError(f"--html={path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"--html={path}: the folder cannot be written to; take another")


def write_page(path: Path, compared: Compared) -> None:
    """Write the page, whole or not at all.

    Raises:
        OutputError: the folder cannot be written to.
    """
    page = render(compared, datetime.datetime.now().astimezone())
    try:
        with replacing(path) as file:
            file.write(page.encode(errors="replace"))
    except PermissionError as error:
        raise OutputError(f"--html={path}: cannot be written: {error.strerror}") from error


def render(compared: Compared, when: datetime.datetime) -> str:
    """Return the page; every text in it that came from elsewhere is escaped."""
    checks = compared.checks
    parting = report.parting(checks)
    verdict = f'<p class="verdict {"bad" if parting else "good"}">{text(report.total(checks))}.'
    verdict += f" {text(parting)}</p>" if parting else "</p>"
    title = f"{compared.ours}, compared with {compared.theirs}"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f"<h1>{text(compared.ours)}</h1>",
            f'<p class="against">compared with {text(compared.theirs)}</p>',
            verdict,
            "<h2>Where the models differ</h2>",
            f"<p>{HEAT_MAP}</p>",
            heat_map(checks),
            "<h2>The parts of the computation</h2>",
            summary(checks),
            "<h2>What was compared</h2>",
            facts(compared, when),
            f"<details><summary>All {len(checks)} comparisons</summary>",
            every(checks),
            "</details>\n</main>\n</body>\n</html>\n",
        ]
    )


def text(value: object) -> str:
    """Return a text escaped for HTML, also within quotes."""
    return html.escape(str(value), quote=True)


def table(name: str, header: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    """Return a table of texts; rows with True are marked as failed."""
    lines = [f'<div class="wide"><table class="{name}">\n<thead><tr>']
    lines += [f'<th scope="col">{text(column)}</th>' for column in header]
    lines.append("</tr></thead>\n<tbody>")
    for row, bad in rows:
        cells = "".join(f"<td>{text(cell)}</td>" for cell in row)
        lines.append(f'<tr class="bad">{cells}</tr>' if bad else f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


# ---- The heat map --------------------------------------------------------------------------------


def heat_map(checks: Checks) -> str:
    """Return blocks by parts: a panel each for outputs, weights and gradients, and the legend."""
    count = report.block_count(checks)
    by_name = {(check.group, check.name): check for check in checks}
    first = first_failure(list(checks))

    def named(group: str, *names: str) -> list[Check]:
        return [by_name[group, name] for name in names if (group, name) in by_name]

    def inside(group: str, start: str) -> list[Check]:
        return [
            c for (kind, name), c in by_name.items() if kind == group and name.startswith(start)
        ]

    def tall(rows: int, found: list[Check]) -> str:
        return cell(found, first, f' rowspan="{rows}"')

    logits = named("logits", "largest difference")
    body = []
    for panel, group in ((OUTPUTS, "activation"), (WEIGHTS, "tensor"), (GRADIENTS, "gradient")):
        body.append(f'<tbody>\n<tr><th class="panel" colspan="{count + 4}">{panel}</th></tr>')
        outputs = panel == OUTPUTS
        rows = [*PARTS, "output"] if outputs else [*PARTS]
        for at, part in enumerate(rows):
            cells = []
            for block in range(count):
                name = f"h.{block}" if part == "output" else f"h.{block}.{part}"
                found = named(group, name) if outputs else inside(group, f"{name}.")
                cells.append(cell(found, first))
            if at == 0:
                around = [
                    named(group, "wte.weight", "wpe.weight", "embeddings"),
                    named(group, "ln_f", "ln_f.weight", "ln_f.bias"),
                    logits if outputs else named(group, "lm_head.weight"),
                ]
                left, *right = (tall(len(rows), found) for found in around)
                cells = [left, *cells, *right]
            body.append(f'<tr><th scope="row">{part}</th>{"".join(cells)}</tr>')
        body.append("</tbody>")
    step = 1 if count <= 16 else 5 if count <= 60 else 10  # so that they fit 400 pixels
    numbers = [f'<th scope="col">{b if b % step == 0 else ""}</th>' for b in range(count)]
    ends = [f'<th scope="col"><span>{end}</span></th>' for end in ("embeddings", "ln_f", "head")]
    width = f"max-width: {6 + 2.6 * (count + 3):.1f}rem; min-width: {4 + 0.5 * (count + 3):.1f}rem"
    return "\n".join(
        [
            f'<div class="wide"><table class="heat" style="{width}">',
            f"<thead><tr><th>block</th>{ends[0]}{''.join(numbers)}{''.join(ends[1:])}</tr></thead>",
            *body,
            "</table></div>",
            legend(),
        ]
    )


def cell(found: list[Check], first: Check | None, attributes: str = "") -> str:
    """Return a cell of the heat map, coloured by the worst of its checks."""
    if not found:
        return f'<td class="none"{attributes}></td>'
    worst = report.worst(found)
    marks = " first" if first is not None and first in found else ""
    said = "\n".join(describe(check) for check in found)
    sign = "" if worst.ok else "&times;"
    return f'<td class="{level(worst)}{marks}"{attributes} title="{text(said)}">{sign}</td>'


def level(check: Check) -> str:
    """Return the class of a check's colour."""
    if check.difference == 0 and check.ok:
        return "equal"
    used = share(check)
    if not check.ok:
        used = max(used, 1 + 1e-9) if used == used else float("inf")  # NaN is the worst
    return next(name for bound, name, _ in LEVELS[1:] if used <= bound)


def describe(check: Check) -> str:
    """Return the numbers of a check as a sentence."""
    used = f" ({percent(check)})" if percent(check) else ""
    return (
        f"{check.group} {check.name}: difference {number(check.difference)}, "
        f"allowed {number(check.allowed)}{used}"
    )


def percent(check: Check) -> str:
    """Return what share of the allowed difference is used, "" if that is no number."""
    used = share(check)
    if not math.isfinite(used) or not check.allowed:
        return ""
    return f"{100 * used:.2g} %" if used < 1 else f"{used:,.3g} times"


def legend() -> str:
    """Return what the colours mean."""
    items = [f'<li><i class="{name}"></i>{said}</li>' for _, name, said in LEVELS]
    items.append('<li><i class="equal first"></i>where the models part first</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


# ---- Tables --------------------------------------------------------------------------------------


def summary(checks: Checks) -> str:
    """Return the page of the terminal: a line for each part of the computation."""
    parts = report.parts(list(checks), most=10_000)
    rows = [([*part.row[:-1], percent(part.at), part.row[-1]], not part.at.ok) for part in parts]
    return table("numbers", [*report.HEADER[:-1], "of allowed", report.HEADER[-1]], rows)


def every(checks: Checks) -> str:
    """Return every comparison in the order of computation."""
    header = ["comparison", "name", "in gptjax", "shape", "difference", "allowed", ""]
    rows = []
    for part in report.parts(list(checks), most=10_000):
        for c in part.checks:
            shape = " x ".join(map(str, c.shape))
            numbers = [number(c.difference), number(c.allowed), "ok" if c.ok else "NO"]
            rows.append(([c.group, c.name, c.ours, shape, *numbers], not c.ok))
    return table("numbers all", header, rows)


def facts(compared: Compared, when: datetime.datetime) -> str:
    """Return what was compared with what, how, by which versions and when."""
    probe = next((c.shape for c in compared.checks if c.name == "embeddings"), (0, 0))
    rows = [
        ("gptjax", compared.ours),
        ("reference", f"{compared.theirs}, computed by transformers on PyTorch"),
        *(("reading", note) for note in compared.notes[:1]),
        *(("note", note) for note in compared.notes[1:]),
        *(("sha256", f"{digest}  {name}") for name, digest in compared.files),
        ("probe", f"{probe[0]} rows of {probe[1]} random tokens, the same in both; float32"),
        (
            "allowed",
            f"weights: no difference; outputs and logits: {TOLERANCE:g} of the largest value, at "
            f"least of 1; gradients: {TOLERANCE:g} of the largest; KL divergence: "
            f"{KL_TOLERANCE:g} nats per token; greedy text: the same tokens; logits in bfloat16: "
            f"{HALF_TOLERANCE:g} times PyTorch's own error",
        ),
        ("date", when.isoformat(sep=" ", timespec="seconds")),
        ("versions", versions()),
    ]
    pairs = [f"<dt>{text(name)}</dt><dd>{text(said)}</dd>" for name, said in rows]
    return "\n".join(['<dl class="facts">', *pairs, "</dl>"])


def versions() -> str:
    """Return the versions of Python and of the packages, and the device."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # in a bare checkout
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([*found, f"on {jax.devices()[0].device_kind}"])
