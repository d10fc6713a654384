"""Several processes as one run: found from flags or from what started them, stopped together."""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import TrainConfig
from gptjax.errors import UsageError, first_line
from gptjax.kernels import cuda
from gptjax.sharding import all_agree, replicated


class Cluster(NamedTuple):
    """The arguments of jax.distributed.initialize; it finds out what is None."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = ()  # of the GPUs that are visible; () = all


# What srun and mpirun tell each process: how many there are, and which of them it is.
LAUNCHERS = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)


def find_cluster(config: TrainConfig, environment: Mapping[str, str]) -> Cluster | None:
    """Return the processes of this run; None if this one is alone.

    Flags count first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which any
    launcher can set (Kubernetes, a shell). Then JAX asks its surroundings, where they announce
    others: SLURM's srun and Open MPI's mpirun by their variables, the hosts of a TPU slice by
    variables (GKE) or Google's metadata server, an indexed Job of Kubernetes by its API. Nothing
    else is asked: without a TPU or such a variable, the start needs no network and does not wait. A
    lone host of a TPU may become a cluster of one. What concerns TPUs has not run on any; the tests
    set its variables and answer its requests.

    Raises:
        UsageError: only a part of it is given, or torchrun started this process.
    """
    if config.distributed == "off":
        return None
    count_flag = str(config.num_processes or "")
    index_flag = "" if config.process_id < 0 else str(config.process_id)
    given = (config.coordinator_address, count_flag, index_flag)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (
        flag or environment.get(name, "") for flag, name in zip(given, names, strict=True)
    )
    launched = ((environment.get(size, "1"), environment.get(i, "")) for size, i in LAUNCHERS)
    tasks, task = next((told for told in launched if told[0] not in ("0", "1")), ("", ""))
    if address and not (count or index):
        count, index = tasks, task
    if count == "1":
        return None
    if address or count or index:
        whole = ":" in address and count.isdecimal() and index.isdecimal()
        if not (whole and int(index) < int(count)):
            raise UsageError(
                f"--coordinator_address={address} --num_processes={count} --process_id={index}: "
                "give all three: HOST:PORT of process 0, the number of processes, and the number "
                "of this one, from 0"
            )
        return Cluster(address, int(count), int(index), local_devices(environment))
    if environment.get("TORCHELASTIC_RUN_ID"):
        raise UsageError(
            "this process was started by torchrun: start `python train.py` once on each host "
            "instead; JAX uses all GPUs of a host by itself"
        )
    if tasks:
        return Cluster(local_device_ids=local_devices(environment))
    # JAX takes the TPU first where it sees chips and has libtpu; it sees chips in /sys.
    on_tpu = (jax.config.values["jax_platforms"] or "").startswith("tpu")
    others = tpu_has_hosts(environment) if on_tpu else in_kubernetes_job(environment)
    return Cluster() if others else None


def local_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return which of the visible GPUs this process takes; () = all, None = JAX decides.

    JAX by itself gives every task of srun and mpirun the one GPU that has its number on the host:
    too few for a task that is alone there, and none where the launcher shows each task its own.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x3),4
    n_tasks = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node)
        for _ in range(int(times or 1))
    ]
    names = ("SLURM_NODEID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_SIZE")
    node, task, n_local = (environment.get(name, "") for name in names)
    if node.isdecimal() and int(node) < len(n_tasks):
        n_local = str(n_tasks[int(node)])
    elif n_local:
        task = environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "")
    elif not task:
        return ()  # no launcher that gives a host several processes
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    n_visible = sum(gpu not in ("", "-1") for gpu in visible.split(","))
    if n_local == "1" or n_visible == 1:
        return ()
    if not (n_local.isdecimal() and task.isdecimal() and n_visible) or n_visible % int(n_local):
        return None
    share = n_visible // int(n_local)
    return tuple(range(int(task) * share, (int(task) + 1) * share))


def tpu_has_hosts(environment: Mapping[str, str]) -> bool:
    """Return whether JAX shall look for other hosts of the TPU that it has seen."""
    lists = (environment.get(f"TPU_{name}") for name in ("PROCESS_ADDRESSES", "WORKER_HOSTNAMES"))
    hosts = next((hosts for hosts in lists if hosts is not None), None)
    if hosts is not None:
        return "," in hosts or environment.get("MEGASCALE_NUM_SLICES", "1") not in ("", "0", "1")
    return "TPU_SKIP_MDS_QUERY" not in environment  # JAX sets it too, where there are no chips


def in_kubernetes_job(environment: Mapping[str, str]) -> bool:
    """Return whether JAX shall ask Kubernetes for the other pods of an indexed Job.

    Raises:
        UsageError: it needs a package for that, which is missing.
    """
    index = environment.get("JOB_COMPLETION_INDEX")
    if index is None or "KUBERNETES_SERVICE_HOST" not in environment:
        return False
    if importlib.util.find_spec("kubernetes") is None:
        raise UsageError(
            f"JOB_COMPLETION_INDEX={index}: this is pod {index} of a Job; pip install 'jax[k8s]' "
            "to find the others, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID "
            "as examples/kubernetes.yaml does, or take --distributed=off to run alone"
        )
    return True


def start(config: TrainConfig) -> None:
    """Join the other processes, if there are any; call it before JAX looks for devices.

    Raises:
        UsageError: what describes them is incomplete.
        RuntimeError: they cannot be reached.
    """
    cluster = find_cluster(config, os.environ)
    if cluster is None:
        return
    try:
        jax.distributed.initialize(
            **cluster._asdict(),
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            initialization_timeout=300,
        )
    except jax.errors.JaxRuntimeError:
        raise
    except (ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"cannot find the other processes of this run ({first_line(error)}): give "
            "--coordinator_address, --num_processes and --process_id, or take --distributed=off "
            "to run alone"
        ) from error


def agree_on_kernels() -> None:
    """Leave all kernels off unless every process of the run can run them; all call it together.

    Else processes would compile different programs, and wait for each other in vain.
    """
    some_gpu = jax.process_count() > 1 and cuda.capability() is not None
    if some_gpu and not all_agree(not cuda.refusal()):
        cuda.elsewhere[:] = ["another process of this run cannot run them"]
        cuda.available.cache_clear()


class StopVote:
    """A vote of all processes of a run, so that a signal stops them after the same step."""

    def __init__(self, signals: list[int], mesh: Mesh, alone: bool | None = None) -> None:
        """Take the list that signals are added to, and the devices of all processes.

        `alone`: no other process has a vote; None finds out.
        """
        self.signals, self.n_local = signals, len(mesh.local_devices)
        self.alone = jax.process_count() == 1 if alone is None else alone
        self.sharding = NamedSharding(mesh, P(mesh.axis_names))
        self.largest = jax.jit(jnp.max, in_shardings=self.sharding, out_shardings=replicated(mesh))
        self.votes: list[jax.Array] = []  # cast and not counted yet, oldest first
        self.told = False  # by a signal to any process, and known to all of them

    def at_once(self) -> bool:
        """Return whether to stop even within an evaluation; several processes must finish it."""
        return self.alone and bool(self.signals)

    def cast(self) -> None:
        """Send this process's vote to all, once after each call of the step in every process."""
        if not self.alone:
            votes = np.full(self.n_local, bool(self.signals), np.int32)
            vote = self.largest(jax.make_array_from_process_local_data(self.sharding, votes))
            self.votes.append(vote)

    def count(self) -> bool:
        """Return whether to stop after the present step.

        Alone that is when a signal came. Else it is when the vote of the step before the present
        one, which is done, was for it: all processes read the same, and none waits for a step.
        """
        while len(self.votes) > 1:
            self.told = bool(self.votes.pop(0)) or self.told
        return self.told or self.at_once()
