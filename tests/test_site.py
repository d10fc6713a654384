"""The docs site builds without a warning or a network, and what its pages say can be typed."""

import base64
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

import convert_gpt2
from gptjax import model
from gptjax.commands import doctor, evaluate, tokenize
from gptjax.config import TrainConfig
from gptjax.conversion.sources import load_model
from gptjax.errors import UsageError
from gptjax.presets import PRESETS
from gptjax.sampler_config import SamplerConfig
from gptjax.terminal import flags
from gptjax.training.adapt import adapt_preset
from gptjax.training.bands import BANDS

from .helpers import ROOT, need
from .test_docs import test_a_link_leads_to_a_file as assert_links_lead_to_files
from .test_live_page import check_in_a_browser, find_browser

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FAQ = (DOCS / "faq.md").read_text(encoding="utf-8")
PROGRAM = re.compile(
    r"python (?:train|sample|convert_gpt2)\.py|gptjax (?:doctor|tokenize|evaluate)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built without a warning."""
    if not importlib.util.find_spec("mkdocs"):
        pytest.skip(
            "needs mkdocs: pip install -e '.[docs]', then pytest -m slow tests/test_site.py"
        )
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # an advertisement of its successor
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_asks_no_other_host(site: Path) -> None:
    built = sorted(site.rglob("*.html"))
    assert len(built) > len(PAGES)
    for page in built:
        assert asked_from_elsewhere(page.read_text(encoding="utf-8")) == [], page
        assert not re.search(r"arithmatex|\$\$|\\frac", page.read_text(encoding="utf-8")), page
    lesson = (site / "lessons" / "2_pretrain.html").read_text(encoding="utf-8")
    assert lesson.count("<math ") >= 5, "formulas are MathML"
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\W*(?:https?:)?//", style.read_text()), style
    live = {path.name: path.stat().st_size for path in (site / "live").iterdir()}
    assert live["model.bin"] > 1_000_000 and sum(live.values()) <= 8_000_000
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert any("KV cache" in entry["text"] for entry in index["docs"])


@pytest.mark.slow
def test_a_browser_shows_gptjaxs_logits_on_the_site(request: pytest.FixtureRequest) -> None:
    browser = find_browser()
    check_in_a_browser(browser, request.getfixturevalue("site"), "live/", load_model("novels"))


def asked_from_elsewhere(html: str) -> list[str]:
    """The addresses of other hosts from which a browser would take something for this page."""
    tags = re.findall(r"<(?:script|link|img|iframe|source|video|audio)\b[^>]*>", html)
    found = [
        address for tag in tags for address in re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", tag)
    ]
    return [address for address in found if re.match(r"(?:https?:)?//", address)]


def test_what_a_browser_takes_from_elsewhere_is_seen() -> None:
    script = '<script async src="https://cdn.example/x.js"></script>'
    assert asked_from_elsewhere(script + '<a href="https://example.org">') == [
        "https://cdn.example/x.js"
    ]
    font = '<link rel=stylesheet href=//fonts.example/css><img src="figures/x.png">'
    assert asked_from_elsewhere(font) == ["//fonts.example/css"]


def entries(nav: Any) -> list[str]:
    """The pages of a navigation, or of a part of it."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in entries(part)]


def test_every_page_is_in_the_navigation() -> None:
    nav = entries(need("yaml").safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(nav) == len(set(nav))
    made = [page for page in nav if f'"{page}"' in (DOCS / "hooks.py").read_text()]
    assert set(nav) - set(made) == {str(page.relative_to(DOCS)) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_to_files(page: Path) -> None:
    assert_links_lead_to_files(page)


def commands(text: str) -> list[str]:
    """The command lines in a page's blocks and in its running text."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(
        r"`((?:python|gptjax) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    found = [part for line in [*lines, *inline] for part in re.split(r"&&|\|", line)]
    return [line for line in found if PROGRAM.search(line)]


def parse(line: str) -> None:
    """Read a command line as its program would, up to what it finds on the disk."""
    words = shlex.split(line[PROGRAM.search(line).start() :], comments=True)  # type: ignore[union-attr]
    program, argv = words[1], words[2:]
    if "--help" in argv or (not argv and program != "train.py"):  # the name of a program
        return
    if program == "train.py":
        preset = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
        if preset not in PRESETS and preset != "PRESET":
            raise UsageError(f"no preset {preset}")
        config = PRESETS.get(preset, TrainConfig())
        given = flags.read(argv, config, "")
        flags.apply(adapt_preset(config, given)[0], given)
    elif program == "sample.py":
        flags.parse(argv, SamplerConfig(), "")
    elif program == "convert_gpt2.py":
        command = {
            "import": convert_gpt2.ImportConfig,
            "export": convert_gpt2.ExportConfig,
            "verify": convert_gpt2.VerifyConfig,
        }[argv.pop(0)]
        argv = argv[1:] if argv and not argv[0].startswith("-") else argv
        flags.parse(argv, command(), "")
    elif program == "doctor":
        argv = argv[1:] if argv and not argv[0].startswith("-") else argv
        flags.parse(argv, doctor.DoctorConfig(), "")
    else:
        {"evaluate": evaluate.parse, "tokenize": tokenize.parse}[program](argv)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_command_parses(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        try:
            parse(line)
        except (UsageError, KeyError, SystemExit) as error:
            raise AssertionError(f"{line}: {error}") from error


def test_a_command_that_does_not_parse_is_seen() -> None:
    assert sum(len(commands(page.read_text())) for page in PAGES) >= 70
    assert commands("`python train.py --x`\n```bash\npip x && python train.py\n```") == [
        " python train.py",
        "python train.py --x",
    ]
    wrong = ["train.py gpt3", "train.py --batchsize=3", "sample.py --temperature=-1"]
    for line in [f"python {wrong}" for wrong in wrong] + ["gptjax evaluate out --task=mmlu"]:
        with pytest.raises(UsageError):
            parse(line)


def test_every_question_is_answered() -> None:
    answers = re.split(r"^## .*\?$", FAQ, flags=re.MULTILINE)[1:]
    assert len(answers) == FAQ.count("\n## ") == 21
    assert min(len(answer.split()) for answer in answers) >= 15


def cells(text: str, first: str) -> list[list[str]]:
    """The cells of each row of a page's tables that begins with this text."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_numbers_of_the_questions_are_computed() -> None:
    speeds = [int(n.replace(",", "")) for n in re.findall(r"H100s?, ([\d,]+) tokens/s", FAQ)]
    assert len(speeds) == 2
    for preset in ("gpt2_fast", "gpt2"):
        row = next(row for row in cells(FAQ, f"`{preset}`") if "billion" in row[1])
        tokens = PRESETS[preset].max_iters * PRESETS[preset].batch_tokens
        assert float(row[1].split()[0]) == float(f"{tokens / 1e9:.3g}")
        for said, speed in zip(row[2:], speeds, strict=True):
            seconds = {"hours": 3600, "days": 86400}[said.split()[1]]
            assert said.split()[0] == f"{tokens / speed / seconds:.1f}"
    for preset in ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"):
        row = next(row for row in cells(FAQ, f"`{preset}`") if "billion" not in row[1])
        count = model.count_params(PRESETS[preset].model)
        assert row[1:3] == [f"{count:,}", f"{12 * count / 1e9:.2f}"]
    steps, ranges = cells(FAQ, "step")[0][1:], cells(FAQ, "validation loss")[0][1:]
    band = next(band for band in BANDS if band.preset == "quickstart")
    known = [(str(step), f"{low:.2f} to {high:.2f}") for step, low, high in band.losses]
    assert list(zip(steps, ranges, strict=True)) == known


def test_every_failure_names_its_test() -> None:
    table = (DOCS / "reliability.md").read_text().split("|---|---|---|---|\n")[1].split("\n\n")[0]
    for row in table.splitlines():
        tests = re.findall(r"`(test_\w+\.py)`", row.rsplit("|", 2)[1])
        assert tests and all((ROOT / "tests" / test).is_file() for test in tests), row


def test_a_notebook_becomes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "lessons"))
    render, v4 = importlib.import_module("render"), nbformat.v4
    links = (
        "[4](4_load_gpt2.ipynb) [train](../train.py) ![m](figures/memory.png) [x](https://x.org)"
    )
    picture = v4.new_output("display_data", {"image/png": base64.b64encode(b"PNG").decode()})
    said = [v4.new_output("stream", text=f"line {i}\n") for i in range(2)]
    code = v4.new_code_cell("f(1)", outputs=[*said, picture])
    page = tmp_path / "lessons" / "t.md"
    python = {"language_info": {"name": "python"}}
    cells = [v4.new_markdown_cell(links), code]
    render.write_page(v4.new_notebook(cells=cells, metadata=python), page)
    text = page.read_text()
    script = os.path.relpath(ROOT / "train.py", page.parent)
    assert f"[4](4_load_gpt2.md) [train]({script}) ![m](figures/memory.png) [x](https://" in text
    assert "```python\nf(1)\n```\n\n    line 0\n    line 1\n" in text
    (name,) = re.findall(r"!\[png\]\((t_files/.*)\)", text)
    assert (page.parent / name).read_bytes() == b"PNG"
    assert (page.parent / "figures" / "memory.png").is_file()


def test_a_lesson_s_page_is_that_of_its_source() -> None:
    """Else run `python lessons/render.py` again."""
    for page in sorted((DOCS / "lessons").glob("*.md")):
        text, lessons = page.read_text(encoding="utf-8"), ROOT / "lessons"
        if (lessons / page.name).exists():  # Markdown itself; links and pictures are mended
            source = (lessons / page.name).read_text(encoding="utf-8")
            told = [re.sub(r"\]\([^)]*\)", "", markdown) for markdown in (text, source)]
            assert told[0] == told[1], page
            continue
        notebook = nbformat.read(lessons / f"{page.stem}.ipynb", as_version=4)
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert [source for source in code if source.strip() not in text] == [], page
