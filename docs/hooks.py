"""What `mkdocs build` adds: pages from elsewhere, settings, the live model, links and formulas."""

import html
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from gptjax.config import TrainConfig
from gptjax.sampler_config import SamplerConfig
from gptjax.settings import fields_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ELSEWHERE = {  # page of the site -> file of the repository
    "benchmarks.md": "benchmarks/README.md",
    "course.md": "lessons/README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LIVE = "live/model.bin"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[([](.*?)\\[])]</\1>', re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and those of the settings."""
    for page, path in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    for page, title, settings in (
        ("settings/train.md", "Settings of train.py", TrainConfig()),
        ("settings/sample.md", "Settings of sample.py", SamplerConfig()),
    ):
        files.append(File.generated(config, page, content=settings_page(title, settings)))
    if not files.get_file_from_path(LIVE):  # else a reader has put a model of his own there
        files.append(File.generated(config, LIVE, content=live_model()))
    return files


def live_model() -> bytes:
    """Return the file of the model on the live page, as docs/live/export.py writes it."""
    spec = importlib.util.spec_from_file_location("export", DOCS / "live" / "export.py")
    assert spec is not None and spec.loader is not None
    export = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export)
    return export.packed(export.load_model("novels"))


def settings_page(title: str, config: Any) -> str:
    """Return a page with each setting of a config, its default and its help."""
    lines = [f"# {title}", ""]
    if isinstance(config, TrainConfig):
        lines.append(
            "The defaults of `TrainConfig()`, which each preset changes. Without a preset "
            "`train.py` takes `quickstart`; `python train.py PRESET --help` shows what counts."
        )
    for name, field in fields_of(config).items():
        if field.metadata["section"]:
            lines += [
                "",
                f"## {field.metadata['section']}",
                "",
                "| flag | default | |",
                "|---|---|---|",
            ]
        default = "" if field.default == "" else f"`{field.default}`"
        help = re.sub(r"[|<*_]", lambda sign: f"&#{ord(sign[0])};", field.metadata["help"])
        lines.append(f"| `--{name}` | {default} | {help} |")
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their page, or else be plain text."""
    there = page.file.src_uri
    source = ROOT / ELSEWHERE[there] if there in ELSEWHERE else DOCS / there
    pages = {ROOT / path: DOCS / name for name, path in ELSEWHERE.items()}

    def mended(link: re.Match[str]) -> str:
        image, text, target, place = link.groups()
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists():
            return link[0]  # no link, or one that the strict build complains of
        path = pages.get(path, path)
        if not path.is_relative_to(DOCS):
            return text
        return f"{image}[{text}]({os.path.relpath(path, (DOCS / there).parent)}{place})"

    return LINK.sub(mended, markdown)


def on_page_content(page_html: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which browsers show without a script, a font or a network."""

    def as_mathml(formula: re.Match[str]) -> str:
        tag, latex = formula.groups()
        return str(convert(html.unescape(latex), display="block" if tag == "div" else "inline"))

    return FORMULA.sub(as_mathml, page_html)
