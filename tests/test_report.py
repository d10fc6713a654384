"""The report of verify: a page that fits a screen, and an HTML file that stands alone."""

import datetime
import html.parser
import math
from pathlib import Path

import pytest

import convert_gpt2
from gptjax.conversion import report, report_html, verify
from gptjax.conversion.report import Compared
from gptjax.conversion.verify import Check
from gptjax.errors import OutputError, UsageError
from gptjax.terminal import cli

from .helpers import tiny

NAME = "out/<b>\"a\"&'b'"  # whatever a folder may be called
PARTS = ("ln_1", "attn", "ln_2", "mlp")
VOID = {"meta"}  # elements that have no end


def checks_of(n_layer: int, changes: dict[str, Check] | None = None) -> list[Check]:
    """Every comparison of a model with so many blocks, in verify's order; all hold."""
    paths = verify.our_paths(tiny(n_layer=n_layer))
    checks = [Check("tensor", name, (8, 8), 0.0, 0.0, path) for name, path in paths.items()]
    checks.append(Check("tensor", "lm_head.weight", (8, 8), 0.0, 0.0, "wte/embedding"))
    names = [f"h.{i}{part}" for i in range(n_layer) for part in (*(f".{p}" for p in PARTS), "")]
    checks += [
        Check("activation", name, (2, 64, 8), 1.2e-6, 1e-4)
        for name in ["embeddings", *names, "ln_f"]
    ]
    checks += [
        Check("logits", "largest difference", (2, 64, 61), 2e-6, 1e-4),
        Check("logits", "KL per token", (2, 64), 1e-12, 1e-6),
    ]
    checks += [Check("gradient", name, (8, 8), 1e-9, 1e-6, path) for name, path in paths.items()]
    checks.append(Check("tokens", "greedy continuation", (20,), 0, 0.0))
    checks.append(Check("logits", verify.BFLOAT16, (2, 64, 61), 0.1, 0.2))
    return [(changes or {}).get(f"{check.group} {check.name}", check) for check in checks]


def shown(
    checks: list[Check], capsys: pytest.CaptureFixture[str], verbose: bool = False
) -> list[str]:
    convert_gpt2.show(Compared("a run", "a source", ("a note",), checks), verbose)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


# ---- The page ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_layer", "lines"), [(2, 15), (12, 25), (24, 37), (36, 31), (48, 37)])
def test_the_page_fits_a_screen(
    n_layer: int, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    page = shown(checks_of(n_layer), capsys)
    assert len(page) == lines <= 40 and max(map(len, page)) <= 80
    assert page[-1] == f"{len(checks_of(n_layer))} of {len(checks_of(n_layer))} comparisons hold"


def test_the_page_is_in_the_order_of_computation(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [part.row for part in report.parts(checks_of(2))]
    assert [row[0] for row in rows] == [
        *("embeddings", "block 0", "block 1", "LayerNorm and head", "logits"),
        *("logits in bfloat16", "gradients", "greedy text"),
    ]
    assert [row[1] for row in rows] == [f"{n} of {n}" for n in (3, 17, 17, 4, 2, 1, 28, 1)]
    assert rows[1][2:] == ["1.2e-06", "0.0001", "h.0.ln_1"]
    assert sum(len(part.checks) for part in report.parts(checks_of(48))) == len(checks_of(48))


def test_blocks_that_share_a_line_show_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    near = Check("activation", "h.7.mlp", (2, 64, 8), 9e-5, 1e-4)
    page = shown(checks_of(48, {"activation h.7.mlp": near}), capsys)
    (line,) = (line for line in page if line.startswith("blocks 6 to 7"))
    assert line.split()[4:] == ["34", "of", "34", "9e-05", "0.0001", "h.7.mlp"]


def test_the_first_parting_is_the_first_in_the_order_of_computation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tensor of the head comes behind the block, although tensors are compared first."""
    checks = checks_of(
        12,
        {
            "tensor lm_head.weight": Check("tensor", "lm_head.weight", (8, 8), 0.1, 0.0),
            "activation h.7.attn": Check("activation", "h.7.attn", (2, 64, 8), math.nan, 1e-4),
            "gradient wte.weight": Check("gradient", "wte.weight", (8, 8), 1.0, 1e-6),
        },
    )
    first = verify.first_failure(checks)
    assert first is not None and first.name == "h.7.attn"
    page = " ".join(shown(checks, capsys))
    assert "part first in block 7, at activation h.7.attn: the difference is nan" in page
    assert f"{len(checks) - 3} of {len(checks)} comparisons hold" in page


def test_verbose_shows_every_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    checks = checks_of(48, {"tensor h.47.ln_1.bias": Check("tensor", "h.47.ln_1.bias", (), 1, 0)})
    lines = shown(checks, capsys, verbose=True)
    assert max(map(len, lines)) <= 80
    assert sum(line.endswith((" ok", " NO")) for line in lines) == len(checks)
    assert [line.split()[0] for line in lines if line.endswith(" NO")] == ["h.47.ln_1.bias"]


# ---- HTML ----------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """A page taken apart; each element must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    def said(self, *tags: str) -> str:
        return " ".join(data for tag, data in self.words if not tags or tag in tags)

    def titles(self) -> list[str]:
        return [attributes["title"] for _, attributes in self.seen if "title" in attributes]


WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


def page_of(checks: list[Check]) -> tuple[str, Page]:
    files = ((NAME, "ab" * 32),)
    text = report_html.render(Compared(NAME, "a source", ("a note", NAME), checks, files), WHEN)
    return text, Page(text)


@pytest.mark.parametrize("n_layer", [1, 2, 12, 48, 70])
def test_the_html_has_every_block_and_part(n_layer: int) -> None:
    checks = checks_of(n_layer)
    _, page = page_of(checks)
    titles = page.titles()
    assert len(titles) == n_layer * (5 + 4 + 4) + 3 + 3 + 2
    for check in checks:  # each has its numbers in the map, but for those of the whole model
        if check.group in ("tensor", "activation", "gradient"):
            said = f"{check.group} {check.name}: difference {check.difference:.2g}, allowed "
            assert sum(said in title for title in titles) == 1, check
    cells = page.said("td")
    assert all(check.name in cells and check.ours in cells for check in checks)
    widths = [
        int(attributes["colspan"]) for tag, attributes in page.seen if "colspan" in attributes
    ]
    assert widths == [n_layer + 4] * 3
    assert page.said("th").count("Weights") == 1


def test_the_html_stands_alone_and_escapes_names() -> None:
    text, page = page_of(checks_of(2))
    assert NAME not in text and "<b>" not in text and page.said("h1") == NAME
    assert page.said("title") == f"{NAME}, compared with a source"
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not any({"src", "href", "onclick"} & set(found) for _, found in page.seen)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "prefers-color-scheme: dark" in page.said("style")
    said = page.said()
    assert "ab" * 32 in said and "2026-01-02 03:04:05" in said and "transformers 5" in said
    assert "The models part" not in said


def test_the_colours_are_steps_of_what_is_allowed() -> None:
    levels = [
        (0.0, "equal"),
        *((5e-5, "low1"), (5e-3, "low2"), (5e-2, "low3"), (0.5, "low4"), (1.0, "low4")),
        *((2.0, "high1"), (500.0, "high2"), (5e4, "high3"), (math.nan, "high3")),
        (math.inf, "high3"),
    ]
    for used, expected in levels:
        assert report_html.level(Check("gradient", "x", (), used, 1.0)) == expected, used
    assert report_html.level(Check("tensor", "x", (), 1e-9, 0.0)) == "high3"  # not equal to the bit
    assert report_html.level(Check("logits", "x", (), 0.0, math.nan)) == "high3"


def test_a_failure_is_red_marked_and_named() -> None:
    wrong = {
        "tensor h.1.mlp.c_fc.weight": Check("tensor", "h.1.mlp.c_fc.weight", (8, 8), 0.1, 0.0),
        "activation h.1": Check("activation", "h.1", (2, 64, 8), math.nan, 1e-4),
    }
    _, page = page_of(checks_of(2, wrong))
    bad = [found for tag, found in page.seen if tag == "td" and "high3" in found.get("class", "")]
    assert len(bad) == 2 and page.said("td").count("\N{MULTIPLICATION SIGN}") == 2
    classes = {found.get("title", ""): found.get("class", "").split() for _, found in page.seen}
    (first,) = (title for title, names in classes.items() if title and "first" in names)
    assert "tensor h.1.mlp.c_fc.weight: difference 0.1" in first
    assert "part first in block 1, at tensor h.1.mlp.c_fc.weight" in page.said("p")


@pytest.mark.usefixtures("restore_process")
def test_the_command_writes_the_page_whole(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    argv = ["verify", "--self_test", "--size=tiny", f"--html={page}"]
    assert cli.run(convert_gpt2.main, argv) == 0
    assert "75 of 75 comparisons hold" in Page(page.read_text()).said("p")
    assert "model.safetensors" in Page(page.read_text()).said("dd")
    assert list(tmp_path.iterdir()) == [page]


def test_a_page_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/dev/full", str(tmp_path)):
        with pytest.raises(UsageError, match="--html="):
            report_html.refuse_page(Path(path))
    with pytest.raises(OutputError, match="no folder"):
        report_html.refuse_page(tmp_path / "none" / "a.html")
    old = tmp_path / "a.html"
    old.write_text("old")

    def full(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="Permission denied"):
        report_html.write_page(old, Compared("a", "b", ("c",), checks_of(1)))
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]
