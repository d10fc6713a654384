"""What several test files use that is no fixture."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest

from gptjax import model
from gptjax.checkpoints.steps import saved_steps
from gptjax.config import GPTConfig
from gptjax.settings import fields_of

ROOT = Path(__file__).parent.parent
Environment = dict[str, str]


# ---- Models --------------------------------------------------------------------------------------


def tiny(**changes: object) -> GPTConfig:
    """A model of 2 layers that compiles in a second, without any "auto"."""
    fields = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "vocab_size": 61,
        "vocab_multiple": 8,
    }
    return model.resolve(GPTConfig(**{**fields, **changes}))  # type: ignore[arg-type]


BYTES = tiny(vocab_size=256, vocab_multiple=128)  # over bytes


def other_values(name: str, cfg: GPTConfig) -> list[Any]:
    """Return what a setting of the model may be besides what it is: every other choice, or more."""
    kind, value = fields_of(GPTConfig)[name].type, getattr(cfg, name)
    choices = (True, False) if kind is bool else get_args(kind)
    return [choice for choice in choices if choice != value] if choices else [2 * value]


init_params = jax.jit(model.init_params, static_argnums=0)  # one compilation, not one an operation


@functools.partial(jax.jit, static_argnums=(0, 2))
def scaled_params(cfg: GPTConfig, key: jax.Array, scale: float = 8.0) -> model.Params:
    """Random parameters so large that small mistakes show; biases and LayerNorms perturbed."""
    params = model.init_params(cfg, key)
    leaves, treedef = jax.tree.flatten_with_path(params)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))

    def change(path: object, leaf: jax.Array, key: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")  # type: ignore[arg-type]
        if name.endswith(("kernel", "embedding")):
            return leaf * scale
        return leaf + 0.2 * jax.random.normal(key, leaf.shape)

    changed = [change(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, changed)


def same_structure(a: object, b: object) -> bool:
    """Return whether two trees have the same containers and keys, whatever their leaves."""
    structures: list[object] = [jax.tree.structure(tree) for tree in (a, b)]
    return structures[0] == structures[1]


def count_programs(jitted: Any) -> int:
    """Return how many programs JAX has compiled of a jitted function, whose type does not say."""
    count: int = jitted._cache_size()
    return count


def need(name: str) -> Any:
    """A package that only some tests use; where it is missing, they are skipped."""
    return pytest.importorskip(name, reason=f"needs {name}: pip install -e '.[dev]'")


# ---- The scripts, as processes -------------------------------------------------------------------

TINY = (
    *("--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=8"),
    *("--max_iters=40", "--warmup_iters=4", "--learning_rate=3e-3", "--dropout=0.1"),
    *("--eval_interval=20", "--eval_iters=2", "--log_interval=5", "--checkpoint_interval=10"),
    *("--sample_interval=20", "--sample_tokens=20"),
)


STARTED: list[tuple[subprocess.Popen[Any], Path | None]] = []
WITH_STACKS = """
import faulthandler, runpy, sys
faulthandler.enable(open(sys.argv[1], "w"))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_process(
    command: Sequence[str], stacks: Path | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start a process that ends with its test; one that hangs says where, see `end_processes`.

    Args:
        command: the words of the command.
        stacks: a file for the stacks of a Python script whose standard error nobody reads.
        options: of subprocess.Popen.
    """
    if stacks is not None:
        command = [command[0], "-c", WITH_STACKS, str(stacks), *command[1:]]
        options = {"cwd": ROOT, **options}
    else:
        options["env"] = {**(options.get("env") or os.environ), "PYTHONFAULTHANDLER": "1"}
    with default_signals():
        process = subprocess.Popen(command, **options)
    STARTED.append((process, stacks))
    return process


@contextlib.contextmanager
def default_signals() -> Iterator[None]:
    """Let what starts in this block not inherit that we ignore SIGHUP or SIGINT.

    As nohup, and a shell that puts a job in the background, have it; train.py heeds that.
    """
    ours = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGINT)}
    ignored = [number for number, handler in ours.items() if handler == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def end_processes() -> list[str]:
    """End what `start_process` started; return of each that still ran where it was."""
    left = []
    while STARTED:
        process, stacks = STARTED.pop()
        if process.poll() is None:
            left.append(f"{process.args!r}\n{threads_of(process.pid)}\n{abort(process)}")
            if stacks is not None and stacks.is_file():
                left.append(stacks.read_text())
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what it never read
                    stream.close()
    return left


def threads_of(pid: int) -> str:
    """Return what each thread of a process waits for in Linux's kernel: a syscall, a function."""
    lines = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            names = ("comm", "wchan", "syscall")
            lines.append(" ".join((thread / name).read_text().strip() for name in names))
    return "\n".join(lines)


def abort(process: subprocess.Popen[Any]) -> str:
    """End a process that hangs; return the rest of its output, with the stacks of its threads."""
    process.send_signal(signal.SIGABRT)
    try:
        ends = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "it does not react to SIGABRT"
    return "\n".join(end if isinstance(end, str) else end.decode() for end in ends if end)


def run(
    environment: Environment, script: str, *argv: str, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a script as a process that must end with this exit code."""
    process = start_process(
        [sys.executable, str(ROOT / script), *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(end_processes()))
    assert process.returncode == expect, said[1]
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def digest(output: str) -> str:
    """Return the state sha256 that a finished run printed."""
    found = re.search(r"state sha256=(\w{64})", output)
    assert found, output
    return found[1]


# What compiles in half the time, for tests that need programs of their own.
PLAIN = ("--dropout=0", "--optimizer=adamw", "--n_layer=1", "--sample_interval=0")
# Runs a shell script where /mnt is a disk of so many megabytes, with more variables.
SmallDisk = Callable[..., "subprocess.CompletedProcess[str]"]


def resume(
    environment: Environment, out: Path, *argv: str, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    """Go on with a run."""
    argv = (f"--out_dir={out}", "--init_from=resume", *argv)
    return run(environment, "train.py", *argv, expect=expect)


def on_devices(environment: Environment, count: int) -> Environment:
    """Return the environment with so many emulated devices."""
    flags = f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return {**environment, "XLA_FLAGS": flags}


def newest(out: Path) -> int:
    """Return the last step that a run saved."""
    return saved_steps(out)[-1]


def logged_losses(out: Path) -> np.ndarray:
    """Return the training losses that a run logged."""
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if "loss" in line])


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read what a process prints until a line has this text."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text}")
