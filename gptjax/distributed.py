"""Several processes as one run: found from flags or the launcher's variables, stopped together."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import TrainConfig
from gptjax.errors import UsageError
from gptjax.sharding import replicated


class Cluster(NamedTuple):
    """The arguments of jax.distributed.initialize; it finds out what is None."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None


def find_cluster(config: TrainConfig, environment: Mapping[str, str]) -> Cluster | None:
    """Return the processes of this run; None if this one is alone.

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
                "give all three: HOST:PORT of process 0, the number of processes, and the number "
                "of this one, from 0"
            )
        return Cluster(address, int(count), int(index))
    if environment.get("TORCHELASTIC_RUN_ID"):
        raise UsageError(
            "this process was started by torchrun: start `python train.py` once on each host "
            "instead; JAX uses all GPUs of a host by itself"
        )
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("OMPI_COMM_WORLD_SIZE", "1")
    return Cluster(None, None, None) if tasks not in ("0", "1") else None


def start(config: TrainConfig) -> None:
    """Join the other processes, if there are any; call it before JAX looks for devices.

    Raises:
        UsageError: the flags or variables that describe them are incomplete.
        RuntimeError: they cannot be reached.
    """
    cluster = find_cluster(config, os.environ)
    if cluster is not None:
        jax.distributed.initialize(
            *cluster, heartbeat_timeout_seconds=config.heartbeat_timeout, initialization_timeout=300
        )


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
