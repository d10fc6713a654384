"""Several processes as one run: they compute what one does, stop together and end together."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .helpers import (
    PLAIN,
    ROOT,
    TINY,
    Environment,
    SmallDisk,
    digest,
    logged_losses,
    newest,
    resume,
    run,
    start_process,
    wait_for,
)

slow = pytest.mark.slow


def on_loopback(environment: Environment, count: int) -> Environment:
    """What `count` processes of one run on this host have in common."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return {**environment, **own, "NPROC": "1"}


def start_processes(
    environment: Environment,
    count: int,
    argv: tuple[str, ...],
    program: tuple[str, ...] = (str(ROOT / "train.py"),),
) -> list[subprocess.Popen[str]]:
    """`count` processes of one run on this host, over the loopback network."""
    shared = on_loopback(environment, count)
    return [
        start_process(
            [sys.executable, *program, *argv],
            cwd=ROOT,
            env={**shared, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


@slow
def test_a_full_disk_ends_all_processes(
    small_disk: SmallDisk, environment: Environment, folder: Path
) -> None:
    """In orbax they would wait for each other for minutes."""
    train = (
        f"{sys.executable} {ROOT}/train.py {' '.join([*TINY, *PLAIN])} --force "
        f"--dataset={folder}/corpus.txt --n_layer=2 --n_embd=256 --n_head=2 --out_dir=/mnt/out "
        "--heartbeat_timeout=10"
    )
    script = (
        f"{{ JAX_PROCESS_ID=1 {train} > /dev/null 2>&1 & }}; JAX_PROCESS_ID=0 {train}; "
        "echo ended $?; wait $!; echo peer $?; ls /mnt/out/checkpoints"
    )
    done = small_disk(24, script, **on_loopback(environment, 2))
    assert re.search(r"ended 74\npeer [1-9]\d*\n10\n$", done.stdout), (done.stdout, done.stderr)
    assert "step 20 was not saved: the disk is full" in done.stderr


@slow
def test_processes_share_a_run_stop_together_and_go_on_in_another_number(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # Two; a signal to one of them stops both at the same step.
    processes = start_processes(environment, 2, (*start, *PLAIN, "--log_interval=1"))
    wait_for(processes[0], "step 5/40")
    processes[1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], ends
    saved = re.search(r"saved step (\d+) after SIGTERM", ends[0][0])
    assert saved and newest(out) == int(saved[1]) < 40
    # Four go on, and one of them dies: the others end, saying so.
    go_on = (f"--out_dir={out}", "--init_from=resume", "--max_iters=100000")
    short = (*go_on, "--lr_decay_iters=40", "--heartbeat_timeout=10")
    processes = start_processes(environment, 4, short)
    wait_for(processes[0], "step 60/")
    processes[3].kill()
    ends = [process.communicate(timeout=120) for process in processes]
    codes = [process.returncode for process in processes]
    assert codes[3] == -signal.SIGKILL and 0 not in codes[:3], ends
    # JAX may end one of the others first, by its heartbeat, when it hears of it (then with -6).
    assert codes[0] == 70 and "Traceback" not in ends[0][1], (codes, ends[0][1][-3000:])
    assert "another process of this run is gone" in ends[0][1], ends[0][1][-3000:]
    # One goes on alone.
    kept = newest(out)
    assert kept >= 40
    done = resume(environment, out, f"--max_iters={kept + 3}", "--lr_decay_iters=40")
    assert f"resuming at step {kept}" in done.stdout


@slow
@pytest.mark.parametrize(("count", "mesh"), [(2, "data"), (4, "zero1:2,tensor:2")])
def test_processes_compute_what_one_does(
    environment: Environment, start: tuple[str, ...], whole: str, count: int, mesh: str
) -> None:
    processes = start_processes(environment, count, (*start, f"--mesh={mesh}"))
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, ends
    said = [line for end in ends[1:] for line in end[0].splitlines()]
    assert all(line.startswith("[Gloo]") for line in said), said  # else one of them speaks
    found, expected = (re.findall(r"val loss (\S+), best", text) for text in (ends[0][0], whole))
    assert len(found) == len(expected) == 3
    difference = np.subtract([float(x) for x in found], [float(x) for x in expected])
    assert np.abs(difference).max() <= 1e-3


@slow
def test_processes_share_a_step_of_so_many_tokens(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    """Each of four takes a row of each pass; one alone takes two passes: the same loss at a step.

    So do two that go on with passes of another size, and with what one had computed.
    """
    argv = (*start, *PLAIN, "--dropout=0.1", "--log_interval=1", f"--batch_tokens={8 * 16}")
    argv = tuple(word for word in argv if not word.startswith(("--out_dir", "--batch_size")))
    alone = (*argv, "--batch_size=2", f"--out_dir={tmp_path}/alone")
    run(environment, "train.py", *alone)
    expected = logged_losses(tmp_path / "alone")
    four = (*argv, "--batch_size=4", f"--out_dir={tmp_path}/four", "--stop_step=20")
    two = (f"--out_dir={tmp_path}/four", "--init_from=resume", "--batch_size=8")
    for count, flags in ((4, four), (2, two)):
        processes = start_processes(environment, count, flags)
        ends = [process.communicate(timeout=240) for process in processes]
        assert [process.returncode for process in processes] == [0] * count, ends
    assert "resuming with gradient_accumulation_steps=1, it was 2" in ends[0][0]
    found = logged_losses(tmp_path / "four")
    assert len(found) == len(expected) == 40
    assert np.abs(found - expected).max() <= 1e-5, np.abs(found - expected)


KERNELS = """
import os, sys
from gptjax import distributed
from gptjax.config import TrainConfig
from gptjax.kernels import cuda, decode_attention

distributed.start(TrainConfig())
cuda.capability = lambda: (9, 0)
cuda.refusal_here = lambda: "" if os.environ["JAX_PROCESS_ID"] == "0" else sys.argv[1]
distributed.agree_on_kernels()
print(cuda.available(), not decode_attention.refusal(1, 64, "bfloat16"))
"""


@slow
@pytest.mark.parametrize(
    ("reason", "both"), [("", "True True"), ("NVRTC is missing", "False False")]
)
def test_processes_have_all_kernels_or_none(
    environment: Environment, reason: str, both: str
) -> None:
    """One cannot run them, if there is a reason; then none does, and each says why."""
    processes = start_processes(environment, 2, (reason,), ("-c", KERNELS))
    ends = [process.communicate(timeout=240) for process in processes]
    assert [end[0].splitlines()[-1] for end in ends] == [both, both], ends
    why = "kernels: plain JAX instead, because another process of this run cannot run them"
    assert (why in ends[0][1]) == bool(reason)


HOSTS = """
import os, sys
import jax
from jax._src.clusters import cloud_tpu_cluster, cluster

hosts = {"worker-network-endpoints": os.environ["HOSTS"], "tpu-env": "TYPE: 'v5litepod-16'"}
answers = {**hosts, "agent-worker-number": os.environ["HOST"]}
cloud_tpu_cluster.get_metadata = lambda key: (answers[key], 200)
cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = True
del os.environ["TPU_SKIP_MDS_QUERY"]
jax.config.update("jax_platforms", "tpu")

import train
from gptjax import distributed
from gptjax.terminal import cli

def start(config, start=distributed.start):
    start(config)
    jax.config.update("jax_platforms", "cpu")

distributed.start = start
sys.exit(cli.run(train.main, sys.argv[1:]))
"""


@slow
@pytest.mark.parametrize("count", [1, 2])
def test_hosts_of_a_tpu_slice_find_each_other(
    environment: Environment, start: tuple[str, ...], count: int
) -> None:
    """All but the TPU: Google's metadata server is faked, and the devices are CPUs."""
    address = on_loopback(environment, count)["JAX_COORDINATOR_ADDRESS"]
    common = {"JAX_COORDINATOR_PORT": address.partition(":")[2], "NPROC": "1"}
    common["HOSTS"] = ",".join(["127.0.0.1"] * count)
    processes = [
        start_process(
            [sys.executable, "-c", HOSTS, *start, *PLAIN],
            env={**environment, **common, "HOST": str(i)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, ends
    assert f"on {count} x cpu" in ends[0][0]


@slow
def test_processes_share_one_copy_of_the_state(
    environment: Environment, start: tuple[str, ...]
) -> None:
    """No process has a whole array: they gather it to sample, to save, and to print its sha256."""
    ends, start = [], (*start[:-1], *PLAIN, start[-1])
    for argv in ((*start, "--stop_step=20"), (start[-1], "--init_from=resume", "--stop_step=0")):
        processes = start_processes(environment, 2, (*argv, "--mesh=fsdp"))
        ends.append([process.communicate(timeout=240) for process in processes])
        assert [process.returncode for process in processes] == [0, 0], ends
    resumed = digest(ends[1][0][0])
    out = Path(start[-1].partition("=")[2])
    shutil.rmtree(out)
    processes = start_processes(environment, 2, (*start, "--mesh=fsdp"))
    whole = [process.communicate(timeout=240) for process in processes]
    assert digest(whole[0][0]) == resumed
    assert "---- sample after 40 steps" in whole[0][0]


@slow
def test_srun_s_variables_are_enough(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    common = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    common |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "NPROC": "1"}
    processes = [
        start_process(
            [sys.executable, str(ROOT / "train.py"), *start, *PLAIN],
            env={**environment, **common, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert "on 2 x cpu" in ends[0][0]
