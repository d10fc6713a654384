"""GitHub's workflow runs `.ci/run`, and nothing that a machine without GitHub would not run."""

import re
import subprocess

import pytest

from .helpers import ROOT, need

SCRIPT = ROOT / ".ci" / "run"
CHECKS = {"lint", "quickstart", "tests", "slow"}


def test_the_workflow_calls_the_script_and_nothing_else() -> None:
    yaml = need("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    variables = set(job["steps"][-1]["env"]) - {"JAX_PLATFORMS"}
    read = set(re.findall(r"\$\{(\w+):-", SCRIPT.read_text()))
    assert variables | {"PYTHON"} == read

    matrix = job["strategy"]["matrix"]
    runs = [*matrix["include"], *({"checks": checks} for checks in matrix["checks"])]
    assert {word for run in runs for word in run["checks"].split()} == CHECKS
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert matrix["python"] == supported
    oldest = [run["python"] for run in runs if run.get("resolution") == "lowest"]
    assert oldest == supported[:1]


def test_the_script_has_every_check_and_parses() -> None:
    text = SCRIPT.read_text()
    assert set(re.findall(r'== \*" (\w+) "\*', text)) == CHECKS
    assert f"${{CHECKS:-{' '.join(['lint', 'quickstart', 'tests', 'slow'])}}}" in text
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("name", ["pytest", "mypy", "ruff"])
def test_the_tools_are_in_the_dev_extra(name: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'^    "{name}\W', text, re.MULTILINE)
