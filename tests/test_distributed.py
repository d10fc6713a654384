"""Which processes are one run, by flags, by variables of launchers and by what JAX is told."""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from gptjax.config import TrainConfig
from gptjax.distributed import Cluster, find_cluster, local_devices, start
from gptjax.errors import UsageError

FLAGS = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "other:2",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}
JAX_ASKS = Cluster()
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "8"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}
SRUN |= {"SLURM_PROCID": "6", "SLURM_LOCALID": "2"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
JOB = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    ("flags", "environment", "cluster"),
    [
        ({}, {}, None),
        (FLAGS, {}, Cluster("host:1", 4, 3)),
        ({}, VARIABLES, Cluster("other:2", 2, 0)),
        (FLAGS, VARIABLES, Cluster("host:1", 4, 3)),  # flags count first
        ({"process_id": 1}, VARIABLES, Cluster("other:2", 2, 1)),
        ({}, {**VARIABLES, "JAX_NUM_PROCESSES": "1"}, None),
        ({}, SRUN, Cluster(local_device_ids=None)),
        ({}, {"SLURM_STEP_NUM_TASKS": "8"}, JAX_ASKS),
        ({}, {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, BATCH_SCRIPT, None),  # not under srun
        ({}, MPIRUN, JAX_ASKS),
        ({"coordinator_address": "host:1"}, MPIRUN, Cluster("host:1", 2, 1)),
        ({"coordinator_address": "host:1"}, SRUN, Cluster("host:1", 8, 6, None)),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod
        ({}, {"JOB_COMPLETION_INDEX": "3"}, None),
        ({}, {**JOB, **VARIABLES}, Cluster("other:2", 2, 0)),
        ({"distributed": "off"}, JOB, None),
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


# ---- The GPUs of a process


@pytest.mark.parametrize(
    ("environment", "visible", "found"),
    [
        ({}, "0,1,2,3", ()),
        (SRUN, "0,1,2,3", (2,)),
        (SRUN, "0,1,2,3,4,5,6,7", (4, 5)),
        (SRUN, "5", ()),  # srun --gpus-per-task=1 shows each task its own
        (SRUN, "", None),
        (SRUN, "0,1,2", None),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "7,1", "SLURM_LOCALID": "0"}, "0,1,2,3", ()),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, "", ()),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x3),4", "SLURM_NODEID": "3"}, "0,1,2,3", (2,)),
        ({**SRUN, "SLURM_NODEID": "5"}, "0,1,2,3", None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "0,1", (1,)),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "0,1", ()),
        ({**SRUN, "JAX_LOCAL_DEVICE_IDS": "0"}, "0,1,2,3", None),
    ],
    ids=str,
)
def test_which_gpus_a_process_takes(
    environment: dict[str, str], visible: str, found: tuple[int, ...] | None
) -> None:
    assert local_devices({**environment, "CUDA_VISIBLE_DEVICES": visible}) == found


# ---- What JAX finds where it is asked


def asked(
    cluster: Cluster | None, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, ...]:
    """Return what JAX makes of a cluster in this environment, before it connects."""
    assert cluster is not None
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    return detect(*cluster, None, 1)


def no_requests(key: str) -> tuple[str, int]:
    raise AssertionError(f"a request for {key}")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to Google's metadata server is an error."""
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", no_requests)


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch, no_network: None) -> Iterator[None]:
    """JAX has seen a TPU's chips when it was imported."""
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # set here, where there are no chips
    for module in (cloud_tpu_cluster, clusters.cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.1")
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", before)


def test_without_a_tpu_nothing_is_asked(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: no_requests("others"))
    for environment in ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, BATCH_SCRIPT):
        assert find_cluster(TrainConfig(), environment) is None
    start(TrainConfig())


GKE = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}
GKE |= {"MEGASCALE_COORDINATOR_ADDRESS": "s-0:80"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({**GKE, **SLICES}, ("s-0:8482", 6, 5)),
        (
            {**GKE, **SLICES, "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"},
            ("s-0:8482", 2, 1),
        ),
        (
            {**GKE, **SLICES, "TPU_WORKER_HOSTNAMES": "t-0", "TPU_WORKER_ID": "0"},
            ("s-0:8482", 3, 2),
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("tpu")
def test_hosts_of_a_tpu_that_variables_name(
    environment: dict[str, str], found: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = find_cluster(TrainConfig(), environment)
    assert asked(cluster, environment, monkeypatch) == (*found, ())


@pytest.mark.parametrize(
    "environment",
    [
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "localhost", **JOB},
        {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_PROCESS_ADDRESSES": "local"},
        {"TPU_SKIP_MDS_QUERY": "1"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("tpu")
def test_a_lone_host_of_a_tpu_asks_nobody(environment: dict[str, str]) -> None:
    assert find_cluster(TrainConfig(), environment) is None


@pytest.mark.parametrize("hosts", ["10.0.0.7", "10.0.0.7,10.0.0.8", "a:1:10.0.0.7,b:2:10.0.0.8"])
@pytest.mark.usefixtures("tpu")
def test_hosts_of_a_tpu_that_the_metadata_server_names(
    hosts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"worker-network-endpoints": hosts, "agent-worker-number": "0", "tpu-env": "X: '1'"}
    cluster = find_cluster(TrainConfig(), {})
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))
    found = asked(cluster, {}, monkeypatch)
    assert found == ("10.0.0.7:8482", len(hosts.split(",")), 0, ())


def test_tasks_of_srun(monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    cluster = find_cluster(TrainConfig(), {**SRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    found = asked(cluster, SRUN, monkeypatch)
    assert found[0].startswith("node3:") and found[1:] == (8, 6, (4, 5))


def test_pods_of_a_job(monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    """A standalone Job of 4, whose API is faked."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"JOB_COMPLETION_INDEX=3: .*jax\[k8s\]"):
        find_cluster(TrainConfig(), JOB)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "kubernetes" or None)
    cluster = find_cluster(TrainConfig(), JOB)
    k8s = clusters.K8sCluster
    job = SimpleNamespace(
        metadata=SimpleNamespace(name="gptjax", labels={}), spec=SimpleNamespace(parallelism=4)
    )
    answers: dict[str, Any] = {"is_env_present": True, "_job": job}
    answers["_controller"] = SimpleNamespace(kind="Job")
    answers["_pod"] = SimpleNamespace(spec=SimpleNamespace(subdomain="pods"))
    for name, answer in answers.items():
        monkeypatch.setattr(k8s, name, lambda answer=answer: answer)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.1")
    assert asked(cluster, JOB, monkeypatch) == ("gptjax-0.pods:55527", 4, 3, ())


@pytest.mark.parametrize(
    "error",
    [
        ValueError("coordinator_address should be defined."),
        KeyError("job-name"),
        ImportError("No module named 'requests'"),
        RuntimeError("403\nno permission"),
    ],
    ids=repr,
)
def test_what_jax_does_not_find_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**how: Any) -> None:
        raise error

    for name, value in MPIRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UsageError, match=r"--coordinator_address.*--distributed=off") as refused:
        start(TrainConfig())
    assert "\n" not in str(refused.value)
    error = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")  # they are known, but not there
    with pytest.raises(jax.errors.JaxRuntimeError):
        start(TrainConfig())
