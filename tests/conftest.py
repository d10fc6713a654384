"""What all tests share: 8 emulated CPU devices, caches of their own, and fixtures."""

import os
import shutil
import signal
import subprocess

from . import XLA_FLAGS

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from gptjax import allocator, model
from gptjax.conversion import huggingface
from gptjax.terminal import cli

from .helpers import BYTES, TINY, Environment, SmallDisk, end_processes, run, scaled_params

allocator.keep_freed_memory()
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same program anew, with new functions: a cache for the session.
if "GPTJAX_TESTS_COMPILED" not in os.environ:  # xdist's workers take that of the first process
    COMPILED = tempfile.TemporaryDirectory()
    os.environ["GPTJAX_TESTS_COMPILED"] = COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["GPTJAX_TESTS_COMPILED"])
# Half of the time went into optimising programs that run once.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


LIMIT = 300.0  # seconds of a test that says nothing else, as in pyproject.toml


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longest, so that the last worker is not alone for long."""

    def limit(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return mark.args[0] if mark else LIMIT

    items.sort(key=limit, reverse=True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders for caches, so that no test reads or writes the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_caches(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gptjax and tiktoken use those."""
    monkeypatch.setenv("GPTJAX_CACHE", str(cache / "gptjax"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache / "tiktoken"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there: no network


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A process that outlives its test hangs, or would disturb the next one."""
    yield
    if left := end_processes():
        pytest.fail("left running:\n" + "\n".join(left), pytrace=False)


@pytest.fixture
def restore_process() -> Iterator[None]:
    """The scripts set signal handlers and jax's cache for their own process."""
    handlers = {number: signal.getsignal(number) for number in cli.stop_signals()}
    compiled = jax.config.values["jax_compilation_cache_dir"]
    signal.set_wakeup_fd(-1)  # a run that a fixture trained would end this process at two Ctrl-C
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    jax.config.update("jax_compilation_cache_dir", compiled)


@pytest.fixture(scope="session")
def params() -> model.Params:
    """The parameters of a random model over bytes."""
    return jax.device_get(scaled_params(BYTES, jax.random.key(1)))


@pytest.fixture
def hf(tmp_path: Path, params: model.Params) -> Path:
    """A folder in Hugging Face's format with that model, and without a tokenizer."""
    (tmp_path / "hf").mkdir()
    huggingface.write_folder(tmp_path / "hf", BYTES, params, None)
    return tmp_path / "hf"


# ---- The scripts, as processes -------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripts")
    (path / "corpus.txt").write_text("the cat sat on the mat and the dog ran to the cat\n" * 60)
    return path


@pytest.fixture(scope="session")
def environment() -> Environment:
    """One device, the tests' cache, two threads at most whatever the machine."""
    return {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # a first start takes 16 s, not 28
        "XLA_FLAGS": XLA_FLAGS,
        "JAX_PLATFORMS": "cpu",
        "NPROC": "2",
        "GPTJAX_CACHE": os.environ["GPTJAX_TESTS_COMPILED"],
    }


@pytest.fixture(scope="session")
def whole(folder: Path, environment: Environment) -> str:
    """What an undisturbed run prints."""
    argv = (*TINY, f"--dataset={folder}/corpus.txt", f"--out_dir={folder}/whole")
    return run(environment, "train.py", *argv).stdout


@pytest.fixture
def out(tmp_path: Path, folder: Path, whole: str) -> Path:
    """Return a copy of the finished run."""
    shutil.copytree(folder / "whole", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> tuple[str, ...]:
    """Return the flags of the undisturbed run, in a folder of its own."""
    return (*TINY, f"--dataset={folder}/corpus.txt", f"--out_dir={tmp_path}/out")


@pytest.fixture(scope="session")
def small_disk(environment: Environment) -> SmallDisk:
    """Return a function that runs a shell script where /mnt is a disk of so many megabytes."""

    def run_there(
        megabytes: int, script: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        mount = f"mount -t tmpfs -o size={megabytes}m tmpfs /mnt && {script}"
        return subprocess.run(  # as root of a namespace of its own
            ["unshare", "-rm", "bash", "-c", mount],
            env=environment | variables,
            capture_output=True,
            text=True,
        )

    if shutil.which("unshare") is None or run_there(1, "true").returncode != 0:
        pytest.skip(
            "mounting a small disk is not allowed here; run pytest -m slow as root, or where "
            "`unshare -rm mount -t tmpfs tmpfs /mnt` works"
        )
    return run_there
