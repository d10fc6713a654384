"""Run every notebook from a clean kernel and write it as a page: `python lessons/render.py`."""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

LESSONS = Path(__file__).resolve().parent
NOTEBOOKS = sorted(LESSONS.glob("*.ipynb"))


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of its cells; CellExecutionError if one of them raises."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    return NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()


def write_page(notebook: nbformat.NotebookNode, path: Path) -> None:
    """The executed notebook as HTML."""
    html, _ = HTMLExporter().from_notebook_node(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def main() -> None:
    """Run and render all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = LESSONS.parent / "docs" / "lessons"
    parser.add_argument("--out_dir", type=Path, default=default, help="default: docs/lessons")
    out_dir = parser.parse_args().out_dir
    for path in NOTEBOOKS:
        began = time.monotonic()
        page = out_dir / f"{path.stem}.html"
        write_page(execute(path), page)
        print(f"{page} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
