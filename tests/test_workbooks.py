"""The workbooks are those of the notebooks, and grading knows right, wrong and empty apart."""

import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from .helpers import ROOT

LESSONS = ROOT / "lessons"
sys.path.insert(0, str(LESSONS))  # as a reader's kernel has it
parts: Any = importlib.import_module("parts")
seats: Any = importlib.import_module("seats")
grade: Any = importlib.import_module("grade")
workbooks: Any = importlib.import_module("workbooks")
NAMES = list(parts.all_parts())


@pytest.fixture(autouse=True)
def with_a_readers_jax() -> Iterator[None]:
    """Which adds a bias (D,) to (B, T, D) without a word; the suite's own refuses that."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def solved() -> ModuleType:
    return parts.load_module(parts.SOLVED, "my_gpt")


def test_committed_workbooks_and_solved_functions_are_the_notebooks(tmp_path: Path) -> None:
    workbooks.write_all(tmp_path / "workbooks", tmp_path / "my_gpt.py")
    made = sorted((tmp_path / "workbooks").iterdir())
    assert [p.name for p in made] == sorted(p.name for p in workbooks.WORKBOOKS.glob("*.ipynb"))
    for path in made:
        assert path.read_text() == (workbooks.WORKBOOKS / path.name).read_text(), path.name
    assert (tmp_path / "my_gpt.py").read_text() == parts.SOLVED.read_text()


@pytest.mark.parametrize("path", workbooks.sources(), ids=lambda path: path.stem)
def test_each_blank_is_a_part_that_is_checked_and_saved(path: Path) -> None:
    source, workbook = (
        "\n".join(
            cell.source
            for cell in nbformat.read(file, as_version=4).cells
            if cell.cell_type == "code"
        )
        for file in (path, workbooks.WORKBOOKS / path.name)
    )
    tree, names = ast.parse(workbook), list(parts.all_parts(int(path.name[0])))
    blank = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and isinstance(node.body[-1], ast.Raise)
        and ast.get_docstring(node)
    ]
    assert blank == names, "every blank is a part, in this order, and has a docstring"
    assert re.findall(r'check_part\("(\w+)"', source) == names
    assert "SOLUTION" not in workbook and source.count("### BEGIN") == len(names)
    save = source[source.index("save_parts(") :]
    assert set(names) <= set(re.findall(r'"(\w+)": \1', save))


@pytest.mark.parametrize("name", NAMES)
def test_right_wrong_and_empty_are_told_apart(
    name: str, solved: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    part = parts.all_parts()[name]

    def said(function: Any) -> str:
        parts.check_part(name, function)
        return capsys.readouterr().out

    def empty(*_: Any) -> Any:
        raise NotImplementedError("write this")

    assert said(getattr(solved, name)).startswith(f"{name}: right")
    assert said(empty) == f"{name}: not written yet\n"
    wrong = said(part.mistake)
    assert part.hint in wrong and ": right" not in wrong
    assert re.search(r"expected|shape|differs|raised|entries", wrong), wrong
    parts.check_part(name, empty, show=True)
    answer = capsys.readouterr().out
    assert f"def {name}(" in answer and part.why in answer


def test_a_bug_is_told_with_its_error_and_a_call_of_a_blank_by_its_name() -> None:
    def no_bias(p: Any, x: Any) -> Any:
        return x @ p["weight"]

    said = parts.grade("linear", no_bias).said
    assert "raised KeyError: 'weight', in the line `" in said and '["weight"]' in said
    rows = [[s <= t for s in range(6)] for t in range(6)]
    assert "is a list, expected an array" in parts.grade("causal_mask", lambda T: rows).said
    assert parts.grade("gelu", lambda x: None).said.startswith("not written yet")

    def gelu(x: Any) -> Any:
        raise NotImplementedError("write this")

    verdict = parts.grade("mlp", lambda p, x: gelu(x))
    assert verdict.said == "needs gelu, which is not written yet" and not verdict.is_right


def test_a_function_is_not_blamed_for_one_that_it_calls(solved: ModuleType) -> None:
    written: dict[str, Any] = {"jnp": jnp}
    code = """
def linear(p, x): return x @ p["kernel"]
def gelu(x): return x
def mlp(p, x): return (lambda y: linear(p["c_proj"], gelu(y)))(linear(p["c_fc"], x))
"""
    exec(code, written)
    said = parts.grade("mlp", written["mlp"]).said
    assert said == "calls linear, which is not right yet: mend that first"
    written["linear"] = solved.linear
    assert parts.grade("mlp", written["mlp"]).said.startswith("calls gelu,")
    written["gelu"] = solved.gelu
    assert parts.grade("mlp", written["mlp"]).is_right


def test_wrong_shapes_and_nan_are_told() -> None:
    assert "shape (5,), expected (3, 5)" in parts.grade("softmax", lambda x: x[0]).said
    assert "is nan, expected" in parts.grade("gelu", lambda x: x * np.nan).said


# ---- my_gpt.py -----------------------------------------------------------------------------------

NOTEBOOK = '''
import math

import jax.numpy as jnp
import numpy as np
from functools import partial

SCALE = 0.5
x = np.zeros(3)


def half(x):
    return SCALE * x


def gelu(x):
    """Any shape."""
    ### BEGIN SOLUTION
    return half(x) * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ### END SOLUTION


def mlp(p, x):
    return my_gpt.linear(p["c_proj"], gelu(my_gpt.linear(p["c_fc"], x)))


def head(params, x_BTD):
    raise NotImplementedError("write this")
'''


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of a notebook."""
    path = tmp_path / "cells.py"
    path.write_text(NOTEBOOK)
    space: dict[str, Any] = {"__name__": "__main__", "my_gpt": None}
    exec(compile(NOTEBOOK, str(path), "exec"), space)
    return space


def test_functions_are_saved_with_what_they_use(
    notebook: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my_gpt.py"
    parts.save_parts(1, {name: notebook[name] for name in ("gelu", "mlp")}, file)
    assert "not written" not in capsys.readouterr().out
    text = file.read_text()
    assert "import math\n" in text and "SCALE = 0.5" in text and "def half(" in text
    assert "partial" not in text and "import numpy" not in text, "only what is used"
    assert "SOLUTION" not in text and "my_gpt." not in text
    parts.save_parts(4, {"gelu": notebook["gelu"]}, file)
    assert file.read_text().count("# ---- Lesson ") == len({1, 4} | known_before(4))
    mine = parts.load_module(file, "of_test")
    assert parts.grade("gelu", mine.gelu).is_right

    parts.save_parts(1, {name: notebook[name] for name in ("gelu", "head")}, file)
    assert "1 of them are not written yet: head\n" in capsys.readouterr().out

    notebook["mlp"].__globals__["gelu"] = np.zeros(3)
    capsys.readouterr()
    parts.save_parts(1, {"mlp": notebook["mlp"]}, file)
    assert capsys.readouterr().out.startswith("not saved: gelu is a ndarray")


def known_before(number: int) -> set[int]:
    return {n for n in parts.NUMBERS if n < number and parts.all_parts(n)}


def test_a_my_gpt_that_is_wrong_or_missing_gives_way_to_the_solved_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my_gpt.py"
    monkeypatch.setattr(parts, "MY_GPT", file)
    monkeypatch.setattr(parts, "grades", lambda module, *_: iter([("gelu", wrong(module))]))

    def wrong(module: ModuleType) -> Any:
        return parts.grade("gelu", module.gelu)

    def loaded() -> tuple[bool, str]:
        module = parts.load_my_gpt()
        return Path(module.__file__ or "") == file, capsys.readouterr().out

    assert loaded() == (False, "no my_gpt.py here yet: taking the solved one, solved/my_gpt.py\n")
    text = parts.SOLVED.read_text()
    file.write_text(text)
    assert loaded()[0]
    file.write_text(text.replace("0.044715", "0.05"))
    is_mine, said = loaded()
    assert not is_mine and "my_gpt.py: gelu: case 1" in said
    file.write_text("def gelu(")
    is_mine, said = loaded()
    assert not is_mine and "SyntaxError" in said


# ---- grade.py ------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model for the limits that compiles quickly."""
    cfg = dataclasses.replace(grade.CFG, n_layer=1)
    monkeypatch.setattr(grade, "CFG", cfg)


def test_the_table_is_all_right_and_limits_follow(
    solved: ModuleType, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = parts.Verdict(True, True, "right")
    monkeypatch.setattr(parts, "grades", lambda mine: iter([(name, right) for name in NAMES]))
    monkeypatch.setattr(grade, "judge_step", lambda mine: right)
    found = grade.judge_all(solved)
    assert [name for name, _ in found][: len(NAMES)] == NAMES
    assert found[-1][0] == "time and memory of generate" and found[-1][1].is_right, found[-1]


@pytest.mark.slow
def test_a_sampler_without_a_cache_is_too_slow(solved: ModuleType, small: None) -> None:
    def generate(
        params: Any, tokens_T: Any, length: int, n_new: int, key: Any, *how: Any
    ) -> jax.Array:
        """Reads the whole text for each token."""
        text_S = jnp.pad(tokens_T, (0, n_new))

        def step(text_S: jax.Array, t: jax.Array) -> Any:
            logits_BTV = solved.forward(params, text_S[None], *how[2:])
            token = solved.draw(key, logits_BTV[0, t - 1], *how[:2])
            return text_S.at[t].set(token), token

        return jax.lax.scan(step, text_S, length + jnp.arange(n_new))[1]

    slow = ModuleType("slow")
    slow.__dict__["generate"] = generate
    verdict = grade.judge_sampler(slow)
    assert not verdict.is_right and "too slow or too large" in verdict.said, verdict


@pytest.mark.slow
def test_a_training_step_that_works_in_vain_is_too_slow(solved: ModuleType, small: None) -> None:
    def train_step(loss_fn: Any, state: Any, *rest: Any) -> Any:
        """Takes thirteen steps instead of one."""

        def again(i: int, found: Any) -> Any:
            return solved.train_step(loss_fn, found[0], *rest)

        said = solved.train_step(loss_fn, state, *rest)
        return jax.lax.fori_loop(0, 12, again, said)

    slow = ModuleType("slow")
    slow.__dict__.update({**solved.__dict__, "train_step": train_step})
    verdict = grade.judge_step(slow)
    assert not verdict.is_right and "too slow or too large" in verdict.said, verdict
    verdict = grade.judge_step(solved)
    assert verdict.is_right, verdict


def test_a_wrong_function_stops_the_program_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my_gpt.py"
    file.write_text(parts.SOLVED.read_text().replace("0.044715", "0.05"))
    grades = parts.grades

    def up_to_gelu(mine: ModuleType) -> Any:
        for name, verdict in grades(mine):
            yield name, verdict
            if name == "gelu":
                return

    monkeypatch.setattr(parts, "grades", up_to_gelu)
    monkeypatch.setattr(grade.cli, "use_compile_cache", lambda folder: None)
    assert grade.main([str(file), "train.py", f"--out_dir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("train.py was not run. gelu: case 1") and "0.044715" in said
    assert not (tmp_path / "run").exists()
    assert grade.main([str(file)]) == 1
    assert "gelu" in capsys.readouterr().out


def test_every_part_has_a_seat_or_is_graded_only() -> None:
    """The table in lessons/README.md says the same."""
    only_graded = {"init_params", "bigram_log_probs", "windows_of", "train_step"}
    assert set(NAMES) <= set(seats.SEATS) | only_graded
    assert len(seats.SEATS) >= 20
    readme = (LESSONS / "README.md").read_text()
    for name in {*NAMES, *seats.SEATS}:
        row = next((line for line in readme.splitlines() if line.startswith(f"| `{name}` ")), "")
        assert row and (f"`{seats.SEATS[name]}`" if name in seats.SEATS else "graded") in row, name
    for name, part in parts.all_parts().items():
        tolerance = f"{part.tolerance:g}".replace("e-0", "e-")
        assert re.search(rf"^\| `{name}` .*, {re.escape(tolerance)}[ ;]", readme, re.MULTILINE), (
            name
        )


FLAGS = (
    *("--max_iters=12", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32"),
    *("--batch_size=4", "--tokenizer=byte", "--eval_interval=0", "--log_interval=1"),
    *("--sample_interval=0", "--checkpoint_interval=0", "--warmup_iters=4", "--seed=3"),
)


# Programs one after the other in one process; their output is split by lines of their names.
DRIVER = """
import importlib, json, sys
sys.path.insert(0, "lessons")
import grade, parts, seats
if sys.argv[1] == "mine":
    seats.take_seats(parts.load_module(parts.SOLVED, "my_gpt"))
for name, argv in json.loads(sys.argv[2]):
    print(f"\\n== {name}", flush=True)
    program = importlib.import_module(f"gptjax.programs.{name}")
    assert grade.cli.run(program.main, argv) == 0, name
"""


@pytest.mark.slow
def test_programs_with_the_students_functions_do_what_they_do_without(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text() * 3)
    switches = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = {**os.environ, **switches, "GPTJAX_CACHE": str(tmp_path / "cache")}
    metrics = importlib.import_module("gptjax.training.metrics")

    def run(whose: str) -> tuple[np.ndarray, list[str]]:
        """The losses of train.py, and what each program printed."""
        out_dir = f"--out_dir={tmp_path / whose}"
        programs: list[tuple[str, list[str]]] = [
            ("train", [*seats.FLAGS, *FLAGS, f"--dataset={text}", out_dir]),
            ("sample", [out_dir, "--max_new_tokens=20", "--start=The ", "--top_k=40"]),
            ("convert_gpt2", ["verify", "--self_test", "--size=tiny"]),
            ("sample", ["--init_from=novels", "--max_new_tokens=20", "--start=It was"]),
        ]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, whose, json.dumps(programs)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=env,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said = re.split(r"^== \w+\n", done.stdout, flags=re.MULTILINE)[1:]
        records = metrics.read_metrics(tmp_path / whose / "metrics.jsonl")
        losses = np.array([record["loss"] for record in records if "loss" in record])
        return losses, said

    (ours, our_text), (theirs, their_text) = run("mine"), run("theirs")
    assert len(ours) == 12
    difference = float(np.abs(ours - theirs).max())
    assert difference <= 1e-5, difference
    training, sampled, verified, spoken = zip(our_text, their_text, strict=True)
    assert sampled[0] == sampled[1] != ""
    assert spoken[0] == spoken[1] != ""
    assert "comparisons hold" in verified[0]
    digests = [re.findall(r"state sha256=\w+", text) for text in training]
    assert digests[0] != digests[1], "the student's functions round otherwise, so they did run"


def test_a_cell_that_needs_an_empty_function_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    unwritten: Any = importlib.import_module("unwritten")
    shell = InteractiveShell()
    shell.set_custom_exc((Exception,), unwritten.explain)

    def said(cell: str) -> str:
        shell.run_cell(cell)
        return str(capsys.readouterr().out)

    assert said('def gelu(x):\n    raise NotImplementedError("write this")') == ""
    told = said("y = gelu(1)")
    assert told == (
        "This cell needs `gelu`, which is not written yet. Write it, and run this again.\n"
    )
    above = "A cell above stopped because `gelu` is not written yet: go on there.\n"
    for cell, kind in (("y", "NameError"), ("{}['k']", "KeyError")):
        told = said(cell)
        assert kind in told and told.endswith(above) and "Traceback" not in told
    said("def gelu(x):\n    return x")
    assert said("y = gelu(1)") == ""
    for cell in ("unknown", "{}['k']"):
        told = said(cell)
        assert "Traceback" in told and "above" not in told, told


@pytest.mark.slow
def test_a_blank_workbook_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")  # as a reader has it
    monkeypatch.setenv("GPTJAX_LESSONS", "quick")
    monkeypatch.setenv("GPTJAX_MY_GPT", str(tmp_path / "my_gpt.py"))
    notebook = nbformat.read(workbooks.WORKBOOKS / "1_build_the_model.ipynb", as_version=4)
    NotebookClient(
        notebook,
        timeout=120,
        allow_errors=True,
        resources={"metadata": {"path": str(workbooks.WORKBOOKS)}},
    ).execute()
    stopped = 0
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        said = "".join(output.get("text", "") for output in outputs)
        told = re.search(r"(This cell needs|A cell above stopped because) `", said)
        stopped += told is not None
        if any(output.output_type == "error" for output in outputs):
            assert told, cell.source
    assert stopped >= 15
