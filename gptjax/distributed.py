"""Several processes as one run: found from flags or the launcher's variables, stopped together."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import TrainConfig
from gptjax.errors import UsageError
from gptjax.sharding import batch_sharding, replicated


class Cluster(NamedTuple):
    """What jax.distributed.initialize needs; None is for it to find out."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None


def find_cluster(config: TrainConfig, environment: Mapping[str, str]) -> Cluster | None:
    """The processes of this run; None if this one is alone.

    Flags count first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which any
    launcher can set (Kubernetes, a shell), then the variables of SLURM's srun and OpenMPI's mpirun,
    which JAX reads itself.

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
    if count == "1":
        return None
    if address or count or index:
        whole = ":" in address and count.isdecimal() and index.isdecimal()
        if not (whole and int(index) < int(count)):
            raise UsageError(
                f"--coordinator_address={address} --num_processes={count} --process_id={index}: "
                "give all three, HOST:PORT of process 0, their count and this one's number from 0"
            )
        return Cluster(address, int(count), int(index))
    if environment.get("TORCHELASTIC_RUN_ID"):
        raise UsageError(
            "started by torchrun: start `python train.py` once on each host instead, JAX takes all "
            "GPUs of a host by itself"
        )
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("OMPI_COMM_WORLD_SIZE", "1")
    return Cluster(None, None, None) if tasks not in ("0", "1") else None


def start(config: TrainConfig) -> None:
    """Join the other processes, if there are any; must come before JAX looks for devices.

    Raises:
        UsageError: what is said about them is incomplete.
        RuntimeError: they cannot be reached.
    """
    cluster = find_cluster(config, os.environ)
    if cluster is not None:
        jax.distributed.initialize(
            *cluster, heartbeat_timeout_seconds=config.heartbeat_timeout, initialization_timeout=300
        )


def make_any_process(mesh: Mesh) -> Callable[[bool], Any]:
    """A function (mine) -> an array, on its way, that is true if it is true in any process.

    All processes must call it equally often. They read the same answer, so that all of them stop
    at the same step although only one was told to.
    """
    n_local = len(mesh.local_devices)
    sharding = batch_sharding(mesh, axis=0)
    largest = jax.jit(jnp.max, in_shardings=sharding, out_shardings=replicated(mesh))

    def any_process(mine: bool) -> Any:
        votes = np.full(n_local, mine, np.int32)
        return largest(jax.make_array_from_process_local_data(sharding, votes))

    return any_process
