"""A program that starts soon: CUDA beside the imports, and no collections of garbage in them."""

import ast
import gc
import importlib
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from gptjax import quick_start
from gptjax.distributed import LAUNCHERS

from .helpers import ROOT

SEEN_BY_A_PROGRAM = """
import gc, sys
import gptjax.quick_start
assert not gc.isenabled()
assert not {"jax", "numpy"} & set(sys.modules), "something large was imported before"
gptjax.quick_start.imported()
assert gc.isenabled() and gc.get_freeze_count()
"""


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import gptjax.quick_start; interrupt()", -signal.SIGINT, ""),
        ("import gptjax.quick_start as q; q.imported(); interrupt()", -signal.SIGINT, "Keyboard"),
        ("signal.signal(2, signal.SIG_IGN); import gptjax.quick_start as q; interrupt()", 0, ""),
        ("Thread(target=lambda: __import__('gptjax.quick_start')).start()", 0, ""),
    ],
)
def test_ctrl_c(program: str, code: int, said: str) -> None:
    """No traceback while modules are imported; nothing at all in a background job."""
    start = (
        "import os, signal; from threading import Thread; "
        "signal.signal(2, signal.default_int_handler); "
        "interrupt = lambda: os.kill(os.getpid(), signal.SIGINT); "
    )
    done = subprocess.run(
        [sys.executable, "-c", start + program], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code
    assert (said in done.stderr) if said else not done.stderr


class Driver:
    """A CUDA driver that notes what is called, and answers `answer`."""

    def __init__(self, answer: int) -> None:
        self.answer, self.calls = answer, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*args: object) -> int:
            self.calls.append(name)
            return self.answer

        return call


@pytest.mark.parametrize(
    ("platforms", "plugin", "expected"),
    [
        (None, True, True),
        ("", True, True),
        ("cuda,cpu", True, True),
        ("gpu", True, True),
        ("cpu", True, False),
        ("tpu,cpu", True, False),
        (None, False, False),
        ("cuda", False, False),
    ],
)
def test_looks_for_gpus(
    platforms: str | None, plugin: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    found = ModuleSpec("jax_plugins", None) if plugin else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert quick_start.looks_for_gpus() == expected


@pytest.mark.parametrize(
    ("variables", "words", "expected"),
    [
        ({}, ["train.py", "--max_iters=5"], True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, [], True),
        ({"SLURM_STEP_NUM_TASKS": "8"}, [], False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, [], False),
        ({"JAX_NUM_PROCESSES": "4"}, [], False),
        ({}, ["train.py", "--num_processes=2"], False),
        ({}, ["train.py", "--num-processes", "2"], False),
        ({}, ["train.py", "--resume_check=True"], False),
        ({}, ["train.py", "--resume_check=False"], True),
        ({}, ["train.py", "--help"], False),
    ],
)
def test_one_of_several_processes_leaves_the_first_gpu_alone(
    variables: dict[str, str],
    words: list[str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", words)
    assert quick_start.is_alone() == expected


def test_all_launchers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module imports nothing, so it has a list of its own."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    for name in ("JAX_NUM_PROCESSES", *(size for size, _ in LAUNCHERS)):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            assert not quick_start.is_alone(), name


def test_cuda_starts_up_to_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    drivers = {0: Driver(0), 100: Driver(100)}  # 100: no GPU
    for answer, driver in drivers.items():
        monkeypatch.setattr("ctypes.CDLL", lambda name, answer=answer: drivers[answer])
        quick_start.start_cuda()
        assert driver.calls[:1] == ["cuInit"]
    assert drivers[0].calls[-1] == "cuDevicePrimaryCtxRetain"
    assert drivers[100].calls == ["cuInit"]

    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_driver)
    quick_start.start_cuda()


@pytest.mark.parametrize("program", ["sample.py", "train.py"])
def test_a_program_imports_it_first_and_ends_it_after_the_imports(program: str) -> None:
    body = ast.parse((ROOT / program).read_text(encoding="utf-8")).body
    imports = [i for i, node in enumerate(body) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert ast.unparse(body[imports[0]]) == "import gptjax.quick_start"
    assert ast.unparse(body[imports[-1] + 1]) == "gptjax.quick_start.imported()"
    subprocess.run([sys.executable, "-c", SEEN_BY_A_PROGRAM], cwd=ROOT, check=True)
    importlib.import_module(program[:-3])
    assert gc.isenabled()
