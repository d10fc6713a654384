"""What a process may have of memory, what does not fit, and what is said of too little."""

import os
import resource
from pathlib import Path

import jax
import numpy as np
import pytest

import sample
from gptjax import memory
from gptjax.config import TrainConfig
from gptjax.errors import DataError, OutOfMemoryError
from gptjax.terminal import cli
from gptjax.training import plan
from gptjax.training.run_settings import read_settings

from .helpers import tiny


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 4,000 bytes without any limit; the file that may hold a container's."""
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 1000}.get)
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "none", tmp_path / "limit"))
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(memory.resource, "getrlimit", lambda what: unlimited)
    return tmp_path / "limit"


def test_training_takes_most_of_a_gpu_unless_its_variable_says_how_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    environment = {name: "0.5"}
    monkeypatch.setattr(memory.os, "environ", environment)
    memory.take_gpu_memory()
    assert environment == {name: "0.5"}
    environment.clear()
    memory.take_gpu_memory()
    assert environment == {name: "0.92"}


def test_sampling_takes_a_gpus_memory_as_needed_unless_its_variable_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, restore_process: None
) -> None:
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.setenv(name, "true")
    memory.take_gpu_memory_as_needed()
    assert os.environ[name] == "true"
    os.environ.pop(name)  # what the program sets is undone with the value above
    # The program does it before it looks for the model, which is not there.
    assert cli.run(sample.main, ["--init_from=/none", "--compile_cache=off"]) == 2
    assert os.environ[name] == "false"


@pytest.mark.parametrize(
    ("flags", "as_needed"),
    [
        (["shakespeare_char"], True),
        (["shakespeare_char", "--init_from=auto"], True),
        (["shakespeare_char", "--batch_size=auto"], False),
        (["shakespeare_char", "--init_from=gpt2-xl"], False),  # whose size is not known yet
        (["gpt2"], False),
    ],
)
def test_a_run_takes_memory_as_needed_where_it_is_known_to_be_small(
    flags: list[str], as_needed: bool, tmp_path: Path
) -> None:
    config, _ = read_settings([*flags, f"--out_dir={tmp_path / 'out'}"])
    assert plan.needs_little_memory(config) == as_needed


def test_a_process_may_have_the_least_of_its_limits(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory.physical_memory() == memory.allowed_memory() == 4000
    for text, allowed in (("max\n", 4000), ("3000\n", 3000), ("9223372036854771712\n", 4000)):
        machine.write_text(text)
        assert memory.allowed_memory() == allowed
    machine.write_text("3000\n")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda what: (2000, 2000))
    assert memory.allowed_memory() == 2000 and memory.physical_memory() == 4000


def test_more_than_a_container_has_is_refused(machine: Path) -> None:
    memory.require_memory(3500, "this model")
    machine.write_text("3000\n")
    with pytest.raises(DataError, match="this process may use"):
        memory.require_memory(3500, "this model")


def test_a_state_that_cannot_fit_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = {"a": jax.ShapeDtypeStruct((30, 30), np.float32), "b": np.zeros(200, np.int16)}
    assert memory.tree_bytes(fits) == 4000
    memory.check_fits(fits)
    more = {**fits, "c": np.zeros((), np.int8)}
    with pytest.raises(MemoryError, match=r"take 0\.0 MB"):
        memory.check_fits(more)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    memory.check_fits(more)  # its memory is not the host's


@pytest.mark.parametrize(
    "error",
    [MemoryError("no\nroom"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")],
)
def test_too_little_memory_is_explained_in_a_line(error: Exception) -> None:
    config = TrainConfig(model=tiny(block_size=48), batch_size=96)
    explained = memory.explain(error, config)
    assert isinstance(explained, OutOfMemoryError) and "\n" not in str(explained)
    for part in (str(error).partition("\n")[0], "batch_size=96", "block_size=48", "--remat"):
        assert part in str(explained)


def test_other_errors_are_not_about_memory() -> None:
    for error in (RuntimeError("INTERNAL"), DataError("short"), OutOfMemoryError("known")):
        assert memory.explain(error, TrainConfig()) is None


def test_bytes_for_people() -> None:
    assert memory.megabytes(1_234_567_890) == "1,234.6 MB"
