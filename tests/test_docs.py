"""The pages name files that are there."""

import re
from pathlib import Path

import pytest

from .helpers import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
PAGES += (ROOT / "lessons").glob("*.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    ours = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in ours if not (page.parent / link).exists()] == []
