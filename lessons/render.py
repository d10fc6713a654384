"""Run every notebook from a clean kernel and write it as a page: `python lessons/render.py`.

A page is Markdown, with its pictures in a folder beside it, for readers of the repository and for
`mkdocs build` alike. Lesson 3, which is Markdown already, is copied. `1 4` renders these alone.
"""

import argparse
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

LESSONS = Path(__file__).resolve().parent
NOTEBOOKS = sorted(LESSONS.glob("*.ipynb"))
TEXTS = sorted(LESSONS.glob("[0-9]_*.md"))
LINK = re.compile(r"(!?\[[^\]\n]*\])\(([^)\s#:]+)")


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of its cells; CellExecutionError if one of them raises."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    return NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()


def write_page(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write the executed notebook as Markdown, its pictures to the folder NAME_files beside it."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relocate(cell.source, path.parent)
        else:
            cell["outputs"] = joined(cell.get("outputs", []))
    pictures = f"{path.stem}_files"
    shutil.rmtree(path.parent / pictures, ignore_errors=True)
    exporter = MarkdownExporter()
    text, made = exporter.from_notebook_node(notebook, {"output_files_dir": pictures})
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, data in made["outputs"].items():
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_bytes(data)
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    path.write_text(text.strip() + "\n", encoding="utf-8")


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What a cell printed piece by piece as one output, without blank lines between the pieces.

    Paths are those from the root of the repository.
    """
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = output.text.replace(f"{LESSONS.parent}/", "")
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def relocate(text: str, folder: Path) -> str:
    """Mend the links of a lesson for a page in another folder; pictures are copied there."""

    def mended(link: re.Match[str]) -> str:
        label, target = link.groups()
        source = LESSONS / target
        if not source.exists():
            return link[0]
        if label.startswith("!"):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / target)
            return link[0]
        if source.parent == LESSONS and re.match(r"\d_.*\.(ipynb|md)$", target):
            return f"{label}({source.stem}.md"
        return f"{label}({os.path.relpath(source.resolve(), folder.resolve())}"

    return LINK.sub(mended, text)


def main() -> None:
    """Run and render all of them, or those with these numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = LESSONS.parent / "docs" / "lessons"
    parser.add_argument("numbers", nargs="*", help="lessons to render, such as 1 4; none = all")
    parser.add_argument("--out_dir", type=Path, default=default, help="default: docs/lessons")
    args = parser.parse_args()
    # The notebooks save what is written in them: not over what a reader has written.
    os.environ.setdefault("GPTJAX_MY_GPT", str(Path(tempfile.mkdtemp()) / "my_gpt.py"))
    for path in sorted([*NOTEBOOKS, *TEXTS]):
        if args.numbers and path.name[0] not in args.numbers:
            continue
        began = time.monotonic()
        page = args.out_dir / f"{path.stem}.md"
        if path in TEXTS:
            args.out_dir.mkdir(parents=True, exist_ok=True)
            page.write_text(relocate(path.read_text(encoding="utf-8"), args.out_dir))
        else:
            write_page(execute(path), page)
        print(f"{page} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
