"""Measure, draw and write down what lesson 3 says: `python lessons/scaling.py`."""

import argparse
import inspect
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from scale import cache, flash, isoflop, law, memory, precision, roofline, utilisation
from scale.figures import FIGURES, draw
from scale.measuring import Measured

from gptjax import allocator

LESSONS = Path(__file__).resolve().parent
TEXT, MEASURED = LESSONS / "3_scaling.md", LESSONS / "3_measured.json"

MEASUREMENTS: dict[str, Callable[[bool], Measured]] = {
    "memory": memory.measure,
    "roofline": roofline.measure,
    "precision": precision.measure,
    "cache": cache.measure,
    "flash": flash.measure,
    "isoflop": isoflop.measure,
}
BLOCKS: dict[str, Callable[[Measured], str]] = {
    "memory": memory.parts_table,
    "xla": memory.xla_table,
    "roofline": roofline.table,
    "mfu": utilisation.table,
    "precision": precision.formats_table,
    "scale": precision.scale_table,
    "float16": utilisation.formats_table,
    "cache": cache.table,
    "online": flash.online_table,
    "flash": flash.table,
    "law": law.demand_table,
    "budget": law.budget_table,
    "isoflop": isoflop.table,
}
SOURCES: dict[str, Callable[..., Any]] = {
    "adjust_scale": precision.adjust_scale,
    "online_softmax": flash.online_softmax,
    "blocked_attention": flash.blocked_attention,
}


def machine() -> dict[str, Any]:
    """Where and with what was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name\t: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    packages = {name: version(name) for name in ("jax", "flax", "optax", "numpy")}
    cpu = names[0] if names else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **packages}


def rounded(tree: Any) -> Any:
    """Floats to five digits: more says nothing, and reads badly."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f"{tree:.5g}") if isinstance(tree, float) else tree


def filled(text: str, measured: Measured) -> str:
    """The lesson's text with every block between its markers made anew."""
    blocks = {name: block(measured) for name, block in BLOCKS.items()}
    for name, function in SOURCES.items():
        blocks[name] = f"```python\n{inspect.getsource(function)}```"
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, n = re.subn(pattern, lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)  # noqa: B023
        assert n == 1, f"{n} blocks {name} in the text"
    return text


def main() -> int:
    """Measure, draw, write; or only a part of it."""
    allocator.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(MEASUREMENTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into a temporary folder")
    parser.add_argument("--write", action="store_true", help="draw and write without measuring")
    parser.add_argument("--check", action="store_true", help="1 if text and 3_measured.json differ")
    args = parser.parse_args()
    if args.quick:
        jax.config.update("jax_disable_most_optimizations", True)  # most of its time is compiling
    text = TEXT.read_text(encoding="utf-8")
    measured = json.loads(MEASURED.read_text()) if MEASURED.is_file() and not args.quick else {}
    if args.check:
        figures = set(re.findall(r"figures/(\w+)\.png", text))
        missing = [name for name in FIGURES if not (LESSONS / f"figures/{name}.png").is_file()]
        same = filled(text, measured) == text
        if not same or missing or figures != set(FIGURES):
            print(f"text as measured: {same}; no picture: {missing}; shown: {sorted(figures)}")
            return 1
        return 0
    if not args.write:
        for name in args.sections or MEASUREMENTS:
            began = time.perf_counter()
            measured[name] = rounded(MEASUREMENTS[name](args.quick))
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            if not args.quick:
                MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
        measured["machine"] = machine()
        to_do = sorted(set(MEASUREMENTS) - set(measured))
        if to_do:
            print(f"not measured yet: {', '.join(to_do)}")
            return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if args.quick else LESSONS
        (folder / "figures").mkdir(exist_ok=True)
        (folder / MEASURED.name).write_text(json.dumps(measured, indent=1) + "\n")
        (folder / TEXT.name).write_text(filled(text, measured), encoding="utf-8")
        draw(measured, folder / "figures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
