"""What a researcher imports from gptjax, and what that import does to the process: nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax
import sample
from gptjax.terminal import cli

IMPORT = """
import os, signal, sys
sys.platform = "win32"  # where the programs refuse to run, and an import does not
modules, environment, path = set(sys.modules), dict(os.environ), list(sys.path)
import gptjax
found = {name.partition(".")[0] for name in set(sys.modules) - modules}
assert found - set(sys.stdlib_module_names) == {"gptjax"}, found
assert "ctypes" not in sys.modules  # by which the allocator is set
assert dict(os.environ) == environment and sys.path == path
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


def test_the_import_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", gptjax.__all__)
def test_a_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(gptjax, name)
    assert value is not None and name in dir(gptjax)
    assert name.isupper() or value.__doc__


def test_a_type_checker_sees_the_same_names() -> None:
    tree = ast.parse(Path(gptjax.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = [(alias, node.module) for node in imports for alias in node.names]
    ours = [(alias, module) for alias, module in seen if module and module.startswith("gptjax.")]
    assert {alias.asname: module for alias, module in ours} == gptjax.HOMES
    assert all(alias.name == alias.asname for alias, _ in ours)  # "as" makes it an export
    assert (Path(gptjax.__file__).parent / "py.typed").is_file()


def test_another_name_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        gptjax.generat  # type: ignore[attr-defined]  # noqa: B018


FAULTS = """
import resource
from gptjax import allocator
allocator.{}()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    b"x" * (8 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told what to do")
def test_freed_memory_is_kept_and_returned() -> None:
    """8 MB are 2048 pages: fetched once, or 50 times."""
    pages = {}
    for name in ("keep_freed_memory", "return_freed_memory"):
        command = [sys.executable, "-c", FAULTS.format(name)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        pages[name] = int(subprocess.check_output(command, env=environment))
    assert pages["keep_freed_memory"] < 3 * 2048
    assert pages["return_freed_memory"] > 40 * 2048


LARGE_PAGES = """
import re
from pathlib import Path
from gptjax import allocator
allocator.keep_freed_memory()
block = b"x" * (200 * 2**20)
print(re.search(r"AnonHugePages: +([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not KERNEL.exists() or "[never]" in KERNEL.read_text(), reason="the kernel has no large pages"
)
def test_memory_comes_in_large_pages() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LARGE_PAGES]
    # Of 200 MB; none without the allocator. Fragmented memory may give less: 158 MB were seen.
    assert int(subprocess.check_output(command, env=environment)) >= 20 * 1024


LIMITED = """
import resource
from pathlib import Path
from gptjax import allocator
def size():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
before = size()
resource.setrlimit(resource.RLIMIT_AS, (before + 6 * 2**30, resource.RLIM_INFINITY))
allocator.keep_freed_memory()
print(size() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told what to do")
def test_a_limit_of_addresses_is_left_to_the_rest() -> None:
    """Else threads have none for their stacks, and the process hangs where it starts one."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LIMITED]
    assert int(subprocess.check_output(command, env=environment)) < 2**30


def test_windows_is_told_what_to_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.run(sample.main, []) == 2
    said = capsys.readouterr().err
    assert "WSL2" in said and said.count("\n") == 1
