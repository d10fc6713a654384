"""Runs that are killed, stopped or raise an error, as real processes: none loses what it saved."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from gptjax.checkpoints.steps import checkpoint_folder, quarantined, saved_steps

from .helpers import PLAIN, ROOT, Environment, digest, newest, resume, run, start_process

slow = pytest.mark.slow


def test_an_error_in_the_loop_leaves_the_save_under_way(
    environment: Environment, start: tuple[str, ...], tmp_path: Path, whole: str
) -> None:
    done = run({**environment, "GPTJAX_FAULT": "raise@22"}, "train.py", *start, expect=65)
    assert done.stderr.splitlines()[-1] == "error: GPTJAX_FAULT: the data of step 22 fails"
    assert newest(tmp_path / "out") == 20
    assert digest(resume(environment, tmp_path / "out").stdout) == digest(whole)


def test_a_kill_costs_no_checkpoint_that_was_waited_for(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    """The first step after a save; unless it is waited for, that save is on its way then."""
    faulty = {**environment, "GPTJAX_FAULT": "kill@21"}
    argv = (*start, *PLAIN, "--wait_for_checkpoints")
    run(faulty, "train.py", *argv, expect=-signal.SIGKILL)
    assert newest(tmp_path / "out") == 20


LONG = (
    *("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=8", "--batch_size=4"),
    *("--max_iters=600", "--eval_interval=200", "--eval_iters=1", "--sample_interval=200"),
    *("--sample_tokens=20", "--log_interval=1", "--checkpoint_interval=50", "--optimizer=adamw"),
)


def disturb(
    environment: Environment, argv: list[str], number: int, log: Path, seconds: float, since: str
) -> tuple[int, int, str]:
    """Start, send a signal so long after `since` is printed.

    Returns the exit code, the last step printed, and all output.
    """
    with log.open("w") as output:
        process = start_process(
            [sys.executable, str(ROOT / "train.py"), *argv, "--init_from=auto"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    while since not in log.read_text() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    code, printed = process.wait(timeout=120), log.read_text()
    steps = re.findall(r"^step (\d+)/", printed, re.MULTILINE)
    return code, int(steps[-1]) if steps else 0, printed


class Undisturbed(NamedTuple):
    """A run of LONG from its start to its end."""

    argv: tuple[str, ...]
    starting: float  # seconds to its first step, compiled then
    whole: float  # seconds to its end
    sha256: str


@pytest.fixture(scope="module")
def undisturbed(
    environment: Environment, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    argv, path = (*LONG, f"--dataset={folder}/corpus.txt"), tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    run(environment, "train.py", *argv, f"--out_dir={path}/warm", "--stop_step=1")  # compiles
    starting = time.monotonic() - began
    began = time.monotonic()
    said = run(environment, "train.py", *argv, f"--out_dir={path}/whole").stdout
    return Undisturbed(argv, starting, time.monotonic() - began, digest(said))


@slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "share"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)]
)
def test_signals_at_random_moments(
    environment: Environment,
    undisturbed: Undisturbed,
    tmp_path: Path,
    number: signal.Signals,
    share: int,
) -> None:
    """Signal after signal, run after run; each run ends in the undisturbed run's bits.

    Every second process waits for its checkpoints; of its steps, a kill takes one interval at most.
    GPTJAX_KILLS=40 pytest -m slow -k signals_at takes 10 minutes on 2 cores.
    """
    times = max(1, int(os.environ.get("GPTJAX_KILLS", "8")) // share)
    data, starting, whole, expected = undisturbed
    rng, sent, runs, reacted = random.Random(int(number)), 0, 0, 0
    lost: dict[bool, list[int]] = {True: [0], False: [0]}  # by whether it waited
    while sent < times:
        out = tmp_path / f"run{runs}"
        runs += 1
        while sent < times:
            before = newest(out) if saved_steps(out) else 0
            # Every fourth while it starts, the others while it trains.
            since, most = ("", starting) if sent % 4 == 0 else (" | loss ", 0.25 * whole)
            waits = sent % 2 == 1
            argv = [*data, f"--out_dir={out}", f"--wait_for_checkpoints={waits}"]
            seconds = rng.uniform(0, most)
            code, step, printed = disturb(
                environment, argv, number, tmp_path / "log", seconds, since
            )
            after = newest(out) if saved_steps(out) else 0
            assert after >= before, printed
            if "state sha256=" in printed:  # it was done before the signal came
                break
            sent += 1
            if number == signal.SIGKILL:
                lost[waits].append(step - after if step else 0)
                reacted += step > 0
            elif "parameters" in printed:  # it had begun; before that there is nothing to save
                assert code == 128 + number, printed
                saved = re.search(r"saved step (\d+) after " + number.name, printed)
                assert saved and int(saved[1]) == after, printed
                reacted += 1
        if "state sha256=" not in printed:
            argv = [*data, f"--out_dir={out}", "--init_from=auto"]
            printed = run(environment, "train.py", *argv).stdout
        assert digest(printed) == expected
        assert list(checkpoint_folder(out).glob("*tmp*")) == []
        assert quarantined(out) == []
    assert reacted >= times // 2
    assert max(lost[True]) <= 50
    assert max(lost[False]) <= 2 * 50  # what was done while the save was on its way is lost too
    print(f"{number.name}: {sent} signals, {reacted} while training, {runs} runs, lost {lost}")


@slow
def test_killed_inside_the_save(
    environment: Environment, start: tuple[str, ...], tmp_path: Path, whole: str
) -> None:
    """kill -9 as soon as a temporary folder is seen; the torn step is never chosen."""
    out, torn = tmp_path / "out", 0
    for _ in range(4):
        process = start_process(
            [
                sys.executable,
                str(ROOT / "train.py"),
                *start,
                "--init_from=auto",
                "--checkpoint_interval=1",
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        until = (saved_steps(out) or [0])[-1] + 2
        while process.poll() is None:
            tmp = list(checkpoint_folder(out).glob("*.orbax-checkpoint-tmp"))
            if tmp and int(tmp[0].name.partition(".")[0]) >= until:
                process.kill()
                process.wait()
                torn += tmp[0].exists()
    assert torn >= 1
    done = run(environment, "train.py", *start, "--init_from=auto", "--checkpoint_interval=1")
    assert digest(done.stdout) == digest(whole)
    assert list(checkpoint_folder(out).glob("*tmp*")) == []


@slow
def test_a_stop_on_a_step_that_is_saved_anyway(
    environment: Environment, start: tuple[str, ...], tmp_path: Path, whole: str
) -> None:
    done = run(environment, "train.py", *start, "--stop_step=20")
    assert "saved step 20, as --stop_step=20" in done.stdout
    assert digest(resume(environment, tmp_path / "out").stdout) == digest(whole)


def test_two_runs_in_one_folder(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    # However long the first runs, step 1 is still to come when it is killed.
    unsaved = ("--max_iters=100000", "--checkpoint_interval=0")
    first = start_process(
        [sys.executable, str(ROOT / "train.py"), *start, *unsaved],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None and "parameters" in first.stdout.readline()
    second = run(environment, "train.py", *start, "--init_from=auto", expect=73)
    assert f"is in use by process {first.pid} on {socket.gethostname()}" in second.stderr
    first.kill()
    first.communicate()
    run(environment, "train.py", *start, "--init_from=auto", "--stop_step=1")  # the lock is free
