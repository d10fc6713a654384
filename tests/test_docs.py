"""The pages name files that are there, and their code runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import ROOT, Environment

FOLDERS = (".", "docs", "docs/howto", "docs/live", "benchmarks", "lessons")
PAGES = [page for folder in FOLDERS for page in (ROOT / folder).glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith(("http:", "https:")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Return what the headings of a page are called in links, on GitHub and on the site."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_row_of_the_checkpoints_page_names_its_test() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.splitlines() if re.match(r"\| (?!source|tokenizer \||format)", line)
    ]
    assert len(rows) >= 20
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)`", row.rsplit("|", 2)[1])
        assert tests and all((ROOT / "tests" / test).is_file() for test in tests), row


@pytest.mark.slow
def test_the_code_of_the_readme_runs(environment: Environment, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    (tmp_path / "readme.py").write_text("".join(blocks) + "assert logits.shape == (1, 50304)\n")
    env = environment | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, env=env, check=True, timeout=240)
