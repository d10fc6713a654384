"""Imports point down the house, as ARCHITECTURE.md draws it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

FLOORS = [
    {"errors"},
    {"config", "tokenizer", "attention", "kv_cache", "functions", "loss", "sharding", "files"}
    | {"tf_checkpoint", "digests", "guard", "faults", "fields", "memory", "signatures"}
    | {"step_files", "nanogpt_flags", "file_kinds"},
    {
        "presets",
        "model",
        "batches",
        "resume",
        "bad_steps",
        "distributed",
        "text",
        "token_files",
        "dataset_files",
        "optimizer",
        "checkpoint",
        "metrics",
    }
    | {"gpt2_tensors", "torch_file", "new_folder", "output", "adapt", "flags"},
    {"data", "training", "sampling", "run_folder", "evaluation", "resume_check", "saving"}
    | {"source_tokenizer", "reference"}
    | {f"formats.{name}" for name in ("huggingface", "hub", "openai", "nanogpt", "llmc", "gguf")},
    {"cli", "console", "convert", "verify", "run_checks"},
    {"start", "replay"},
    {"train", "sample", "convert_gpt2", "commands.doctor", "commands.evaluate"},
    {"__main__"},
]
ONLY = {
    "flax": {"model"},
    "optax": {"optimizer", "training"},
    "orbax": {"checkpoint", "saving", "step_files"},
    "tyro": {"flags"},
    "rich": {"console"},
    "matplotlib": {"metrics"},
    "tiktoken": {"tokenizer"},
    "torch": {"torch_file", "reference"},
    "transformers": {"reference"},
    "huggingface_hub": {"formats.hub"},
    "safetensors": {"formats.huggingface"},
    "gguf": {"formats.gguf"},
    "pickle": set(),
    "yaml": set(),
}
PACKAGE = ROOT / "gptjax"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}
FILES |= {name: ROOT / f"{name}.py" for name in ("train", "sample", "convert_gpt2")}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules of gptjax, and top-level packages, that a file imports anywhere in it."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "gptjax" and rest:
                first, _, rest = rest.partition(".")
                inside = (PACKAGE / first).is_dir()
                own.add(f"{first}.{rest.partition('.')[0]}" if inside else first)
            else:
                others.add(package)
    return own, others


def test_every_file_has_a_floor() -> None:
    assert set().union(*FLOORS) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name: str) -> None:
    own, others = imports(FILES[name])
    floor = next(i for i, files in enumerate(FLOORS) if name in files)
    below = set().union(*FLOORS[:floor])
    assert own <= below, f"{name} may import {sorted(below)}"
    for package, allowed in ONLY.items():
        assert package not in others or name in allowed, f"{name} imports {package}"


def test_nothing_runs_code_from_files() -> None:
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), name


def test_import_is_silent_and_without_warnings() -> None:
    code = "import gptjax.data, gptjax.sampling, gptjax.training, gptjax.config"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
