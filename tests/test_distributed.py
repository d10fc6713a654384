"""Which processes are one run, by flags and by the variables of launchers."""

from typing import Any

import pytest

from gptjax.config import TrainConfig
from gptjax.distributed import Cluster, find_cluster
from gptjax.errors import UsageError

FLAGS = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "other:2",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}
JAX_ASKS = Cluster(None, None, None)


@pytest.mark.parametrize(
    ("flags", "environment", "cluster"),
    [
        ({}, {}, None),
        (FLAGS, {}, Cluster("host:1", 4, 3)),
        ({}, VARIABLES, Cluster("other:2", 2, 0)),
        (FLAGS, VARIABLES, Cluster("host:1", 4, 3)),  # flags count first
        ({"process_id": 1}, VARIABLES, Cluster("other:2", 2, 1)),
        ({}, {**VARIABLES, "JAX_NUM_PROCESSES": "1"}, None),
        ({}, {"SLURM_STEP_NUM_TASKS": "8"}, JAX_ASKS),
        ({}, {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, {"SLURM_NTASKS": "8"}, None),  # in a batch script, not under srun
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, JAX_ASKS),
        ({"distributed": "off", **FLAGS}, VARIABLES, None),
    ],
)
def test_who_belongs_together(
    flags: dict[str, Any], environment: dict[str, str], cluster: Cluster | None
) -> None:
    assert find_cluster(TrainConfig(**flags), environment) == cluster


@pytest.mark.parametrize(
    "changes",
    [
        {"coordinator_address": ""},
        {"coordinator_address": "host"},
        {"num_processes": 0},
        {"process_id": -1},
        {"process_id": 4},
    ],
)
def test_a_part_of_it_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give all three"):
        find_cluster(TrainConfig(**{**FLAGS, **changes}), {})


def test_torchrun_is_told_how_to_start() -> None:
    with pytest.raises(UsageError, match="started by torchrun"):
        find_cluster(TrainConfig(), {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"})
