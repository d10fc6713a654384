"""`gptjax NAME` is the script of that name, from a checkout and from a wheel in an empty folder."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gptjax import programs
from gptjax.__main__ import COMMANDS, dispatch

from .helpers import PLAIN, ROOT, TINY, digest, need, run

TINY_RUN = (*TINY, *PLAIN, "--max_iters=6", "--sample_tokens=5")


HELP = {  # what is typed -> the usage that --help and -h begin with
    "train": "python train.py [PRESET] [--flags]",
    "sample": "python sample.py [--flags]",
    "convert": "python convert_gpt2.py import SOURCE --out_dir=RUN",
    "convert import": "python convert_gpt2.py import SOURCE [--flags]",
    "convert export": "python convert_gpt2.py export RUN [--flags]",
    "convert verify": "python convert_gpt2.py verify RUN [--flags]",
    "evaluate": "gptjax evaluate RUN [--flags]",
    "tokenize": "gptjax tokenize TEXT [--flags]",
    "doctor": "gptjax doctor [RUN] [--flags]",
}


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("typed", HELP)
def test_a_command_says_how_it_is_typed(
    typed: str, flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    try:
        code = dispatch([*typed.split(), flag])
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    assert code == 0
    assert capsys.readouterr().out.splitlines()[0] == f"usage: {HELP[typed]}"


def test_every_command_has_help() -> None:
    assert {typed.split()[0] for typed in HELP} == set(COMMANDS)


@pytest.mark.parametrize("script", programs.NAMES)
def test_a_command_is_the_script(script: str) -> None:
    module = importlib.import_module(COMMANDS[programs.NAMES[script]][0])
    assert module.__file__ is not None and Path(module.__file__).samefile(ROOT / script)


def test_the_wheel_gets_the_scripts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried == {name: f"gptjax/programs/{name}" for name in programs.NAMES}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel in it, without what it depends on."""
    need("hatchling")
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, f"--wheel-dir={place}"], check=True)
    (wheel,) = place.glob("*.whl")
    install = [*pip, "install", str(wheel), "--no-deps", "--no-index", f"--target={place}/site"]
    subprocess.run(install, check=True)
    return place / "site"


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder(
    installed: Path, environment: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    path = f"{installed}/bin{os.pathsep}{os.environ['PATH']}"
    alone = {**environment, "PATH": path, "PYTHONPATH": str(installed)}

    def shell(line: str) -> str:
        """Return what a command prints."""
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=alone, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import gptjax, sys; sys.stdout.write(gptjax.__file__)"
    assert shell(f"{sys.executable} -c {shlex.quote(where)}").startswith(str(installed))
    assert (installed / "gptjax" / "py.typed").is_file()
    said = shell("gptjax sample --init_from=novels --start=She --max_new_tokens=5")
    assert said.startswith("She")
    data = f"--dataset={folder}/corpus.txt"
    trained = shell(shlex.join(["gptjax", "train", *TINY_RUN, data, "--out_dir=it's out"]))
    script = run(environment, "train.py", *TINY_RUN, data, f"--out_dir={tmp_path}/script")
    assert digest(trained) == digest(script.stdout)
    (following,) = re.findall(r"^next: (gptjax sample .*)", trained, re.MULTILINE)
    assert len(shell(f"{following} --start=the --max_new_tokens=5")) == len("the") + 5 + 1
    shell('gptjax convert export "it\'s out" --out_dir=hf')
    imported = shell("gptjax convert import hf --out_dir=back")
    (verify,) = re.findall(r"^  or: (gptjax convert verify .*)", imported, re.MULTILINE)
    assert json.loads(shell(f"{verify} --json"))["ok"]
    assert json.loads(shell("gptjax convert verify --self_test --size=tiny --json"))["ok"]
    assert json.loads(shell("gptjax doctor back --json"))
    equal = shell(shlex.join(["gptjax", "train", *TINY_RUN, data, "--resume_check"]))
    assert "arrays are equal" in equal
