"""What a run survives, each fault done to a real process. The long ones: pytest -m slow."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.checkpoints.steps import (
    checkpoint_folder,
    quarantined,
    read_meta,
    saved_steps,
    step_folder,
)
from gptjax.errors import CheckpointError, UsageError
from gptjax.training import resume_check

from .conftest import ROOT, TINY, digest, run
from .test_checkpoint import flip

slow = pytest.mark.slow
Environment = dict[str, str]
# What compiles in half the time, for tests that need programs of their own.
PLAIN = ("--dropout=0", "--optimizer=adamw", "--n_layer=1", "--sample_interval=0")


@pytest.fixture
def out(tmp_path: Path, folder: Path, whole: str) -> Path:
    """A copy of the finished run."""
    shutil.copytree(folder / "whole", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> tuple[str, ...]:
    """Flags of the undisturbed run, in a folder of its own."""
    return (*TINY, f"--dataset={folder}/corpus.txt", f"--out_dir={tmp_path}/out")


def resume(environment: Environment, out: Path, *argv: str, expect: int = 0) -> Any:
    return run(
        environment, "train.py", f"--out_dir={out}", "--init_from=resume", *argv, expect=expect
    )


def newest(out: Path) -> int:
    return saved_steps(out)[-1]


def logged_losses(out: Path) -> np.ndarray:
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if "loss" in line])


# ---- Death ---------------------------------------------------------------------------------------


def test_an_error_in_the_loop_leaves_the_save_under_way(
    environment: Environment, start: tuple[str, ...], tmp_path: Path, whole: str
) -> None:
    done = run({**environment, "GPTJAX_FAULT": "raise@22"}, "train.py", *start, expect=65)
    assert done.stderr.splitlines()[-1] == "error: GPTJAX_FAULT: the data of step 22"
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
        process = subprocess.Popen(
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


@slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "share"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)]
)
def test_signals_at_random_moments(
    environment: Environment, folder: Path, tmp_path: Path, number: signal.Signals, share: int
) -> None:
    """Signal after signal, run after run; each run ends in the undisturbed run's bits.

    Every second process waits for its checkpoints; of its steps, a kill takes one interval at most.
    GPTJAX_KILLS=40 pytest -m slow -k signals_at takes 10 minutes on 2 cores.
    """
    times = max(1, int(os.environ.get("GPTJAX_KILLS", "12")) // share)
    data = (*LONG, f"--dataset={folder}/corpus.txt")
    began = time.monotonic()
    argv = [*data, f"--out_dir={tmp_path}/warm", "--stop_step=1"]  # compiles
    run(environment, "train.py", *argv)
    starting = time.monotonic() - began
    began = time.monotonic()
    expected = digest(run(environment, "train.py", *data, f"--out_dir={tmp_path}/ref").stdout)
    whole = time.monotonic() - began
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
    for _ in range(6):
        process = subprocess.Popen(
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
    assert "saved step 20, as --stop_step=20 says" in done.stdout
    assert digest(resume(environment, tmp_path / "out").stdout) == digest(whole)


def test_two_runs_in_one_folder(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *start, "--max_iters=100000"],
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


# ---- Damage and change ---------------------------------------------------------------------------


@slow
def test_a_flipped_bit_costs_one_interval(environment: Environment, out: Path, whole: str) -> None:
    step = step_folder(out, 40)
    flip(max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    done = resume(environment, out)
    assert re.search(r"warning: cannot use step 40 .*sha256 .*; moved to quar", done.stdout)
    assert "resuming at step 30" in done.stdout
    assert digest(done.stdout) == digest(whole)


@slow
def test_an_incomplete_copy_costs_one_interval(
    environment: Environment, out: Path, whole: str
) -> None:
    """Every second file of the newest step is missing (F14)."""
    step = step_folder(out, 40)
    for path in sorted(path for path in step.rglob("*") if path.is_file())[::2]:
        path.unlink()
    done = resume(environment, out)
    assert "warning: cannot use step 40" in done.stdout and "resuming at step 30" in done.stdout
    assert digest(done.stdout) == digest(whole)


@slow
def test_strangers_in_the_folder_and_wrong_clocks(
    environment: Environment, out: Path, tmp_path: Path, whole: str
) -> None:
    """Steps are known by their number, whatever lies beside them and whatever the clock said."""
    steps = checkpoint_folder(out)
    for name in ("999", "nan", "35.orbax-checkpoint-tmp"):
        (steps / name).mkdir()
    (steps / "notes.txt").write_text("mine")
    shutil.rmtree(steps / "40")
    for number, path in enumerate(sorted(steps.iterdir())):  # the older, the newer by its date
        os.utime(path, (2**31 - 10**6 * number, 2**31 - 10**6 * number))
    done = resume({**environment, "TZ": "Pacific/Kiritimati"}, out)
    assert "999 is empty; moved to quarantine-999" in done.stdout
    assert "resuming at step 30" in done.stdout and newest(out) == 40
    assert digest(done.stdout) == digest(whole)
    assert (steps / "notes.txt").read_text() == "mine"


@slow
def test_nothing_whole_never_starts_anew(environment: Environment, out: Path) -> None:
    for step in saved_steps(out):
        shutil.rmtree(step_folder(out, step) / "params")
    for _ in range(2):
        for how in ("--init_from=auto", "--init_from=scratch"):
            done = run(
                environment,
                "train.py",
                f"--out_dir={out}",
                how,
                expect=2 if "scratch" in how and saved_steps(out) else 75,
            )
            assert "error: " in done.stderr


@slow
def test_back_to_an_older_step(environment: Environment, out: Path, whole: str) -> None:
    done = resume(environment, out, "--resume_step=30")
    assert "step 40 is set aside as aside-40" in done.stdout
    assert digest(done.stdout) == digest(whole)
    assert saved_steps(out) == [30, 40] or saved_steps(out) == [20, 30, 40]
    refused = resume(environment, out, "--resume_step=33", expect=2)
    assert "--resume_step=33: must be one of" in refused.stderr


@slow
def test_another_corpus_is_refused(environment: Environment, out: Path, tmp_path: Path) -> None:
    text = "the cat sat on the mat and the dog ran to the cat\n" * 60
    (tmp_path / "longer.txt").write_text(text + "the cat\n")
    argv = (f"--dataset={tmp_path}/longer.txt", "--max_iters=41")
    refused = resume(environment, out, *argv, expect=2)
    assert "the checkpoint has another data; leave it" in refused.stderr
    done = resume(environment, out, *argv, "--allow_change=data")
    assert "resuming with another data" in done.stdout and "after 41 steps" in done.stdout


@slow
def test_settings_of_another_experiment_are_refused(environment: Environment, out: Path) -> None:
    """And those that only say how to go on are not (F17)."""
    for flags in (
        ("--n_layer=3", "--n_head=1", "--optimizer=adamw"),
        ("--seed=7", "--batch_size=4", "--gradient_accumulation_steps=2"),
        ("--dtype=bfloat16", "--dropout=0.2"),
    ):
        refused = resume(environment, out, *flags, "--max_iters=41", expect=2)
        for flag in flags:
            assert f" {flag[2:].partition('=')[0]}=" in refused.stderr, flag
    argv = ("--learning_rate=1e-3", "--eval_iters=1", "--beta2=0.9", "--max_iters=41")
    done = resume(environment, out, *argv)
    for text in ("learning_rate=0.001, it was 0.003", "eval_iters=1", "beta2=0.9"):
        assert f"resuming with {text}" in done.stdout


@slow
def test_a_token_file_that_grew_is_refused(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    """F29, for a folder of .bin files."""
    tokens = np.random.default_rng(0).integers(0, 256, 4000).astype("<u2")
    tokens.tofile(tmp_path / "train.bin")
    tokens[:500].tofile(tmp_path / "val.bin")
    argv = (*start, *PLAIN, f"--dataset={tmp_path}", "--tokenizer=byte")
    run(environment, "train.py", *argv, "--stop_step=10")
    with (tmp_path / "train.bin").open("ab") as file:
        file.write(b"\0\0")
    refused = resume(environment, tmp_path / "out", expect=2)
    assert "the checkpoint has another data; leave it" in refused.stderr
    done = resume(environment, tmp_path / "out", "--allow_change=data")
    assert "resuming with another data" in done.stdout


@slow
def test_devices_and_accumulation_read_the_same_tokens(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    """The loss of each step says so, also where a run is resumed with more devices (F31)."""
    expected = None
    for number, (devices, passes) in enumerate(((1, 1), (2, 1), (8, 1), (1, 2), (2, 4))):
        out, flags = tmp_path / str(number), f"--xla_force_host_platform_device_count={devices}"
        argv = [*start, *PLAIN, f"--out_dir={out}", "--log_interval=1"]
        argv += [f"--gradient_accumulation_steps={passes}", f"--batch_size={8 // passes}"]
        if devices > 1:
            run(environment, "train.py", *argv, "--stop_step=7")
            argv += ["--init_from=resume"]
        run({**environment, "XLA_FLAGS": flags}, "train.py", *argv, "--stop_step=13")
        losses = logged_losses(out)
        expected = losses if expected is None else expected
        assert len(losses) == 13
        ok = np.abs(losses - expected).max() <= 1e-5
        assert ok, (devices, passes, losses - expected)


@slow
def test_other_numbers_of_devices(
    environment: Environment, start: tuple[str, ...], tmp_path: Path, folder: Path, whole: str
) -> None:
    """8 -> 1, 1 -> 8 and 8 -> 2 devices: the loss of every step as without the change."""

    def on(devices: int) -> Environment:
        return {**environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}

    expected = logged_losses(folder / "whole")
    for before, after in ((8, 1), (1, 8), (8, 2)):
        out = tmp_path / f"{before}-{after}"
        argv = [arg for arg in start if not arg.startswith("--out_dir")]
        run(on(before), "train.py", *argv, f"--out_dir={out}", "--stop_step=20")
        done = resume(on(after), out)
        assert f"resuming with devices {after} x cpu, it was {before} x cpu" in done.stdout
        found = logged_losses(out)
        ok = np.abs(found - expected).max() <= 1e-5 and abs(found[4] - expected[4]) <= 1e-6
        assert ok, np.abs(found - expected)
    refused = resume(on(3), out, expect=2)
    assert "must be divisible by 3 devices; take 6 or 9" in refused.stderr


# ---- Numbers -------------------------------------------------------------------------------------


def test_a_nan_is_skipped_written_down_and_replayed(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    out, faulty = tmp_path / "out", {**environment, "GPTJAX_FAULT": "nan_grad@12"}
    start = (*start, *PLAIN)
    done = run(faulty, "train.py", *start, "--stop_step=15")
    assert "step 12 skipped: loss nan, grad norm nan" in done.stdout
    record = json.loads((out / "bad_steps" / "12.json").read_text())
    assert record["loss"] == "nan" and len(record["rows"]) == 8
    replayed = run(
        faulty, "train.py", f"--out_dir={out}", f"--replay={out}/bad_steps/12.json"
    ).stdout
    assert "step 12: the same tokens" in replayed and "loss nan, recorded nan" in replayed
    assert saved_steps(out) == [10, 15]
    # With the same fault a resumed run ends as an undisturbed one.
    ended = digest(resume(faulty, out).stdout)
    argv = [arg for arg in start if not arg.startswith("--out_dir")]
    whole = run(faulty, "train.py", *argv, f"--out_dir={tmp_path}/one").stdout
    assert ended == digest(whole)


@slow
def test_too_many_nans_end_the_run(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    faulty = {**environment, "GPTJAX_FAULT": "nan_grad@17-99"}
    done = run(faulty, "train.py", *start, *PLAIN, expect=76)
    assert "the last 10 steps up to 26 had to be skipped" in done.stderr
    assert "the last good checkpoint is step 20" in done.stderr
    assert digest(resume(environment, tmp_path / "out").stdout)


@slow
def test_a_spike_is_skipped_once_the_window_is_full(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    """And a run that is stopped before it and resumed ends as an undisturbed one (F23, F24)."""
    faulty = {**environment, "GPTJAX_FAULT": "spike@150"}
    argv = [arg for arg in start if not arg.startswith("--out_dir")]
    argv += [*PLAIN, "--max_iters=160", "--skip_spikes=8", "--eval_interval=80"]
    whole = run(faulty, "train.py", *argv, f"--out_dir={tmp_path}/one").stdout
    assert "step 150 skipped: loss " in whole and whole.count("skipped: loss") == 1
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    assert [r["skipped"] for r in map(json.loads, lines) if "skipped" in r][-1] == 1
    run(faulty, "train.py", *argv, f"--out_dir={tmp_path}/two", "--stop_step=145")
    assert digest(resume(faulty, tmp_path / "two").stdout) == digest(whole)


@slow
def test_a_signal_on_a_step_with_an_evaluation(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    """Stopped before it is evaluated, a step has no loss, least of all an older one's (F03)."""
    every_step = ("--eval_interval=1", "--max_iters=4000")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *start, *PLAIN, *every_step],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(process, "step 15/")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "after SIGTERM" in said
    step = newest(tmp_path / "out")
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    evaluated = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert read_meta(tmp_path / "out", step)["val_loss"] == evaluated.get(step)


@slow
def test_a_tuned_run_is_resumed_and_replayed(
    environment: Environment, folder: Path, whole: str, tmp_path: Path
) -> None:
    """Its tokenizer is its source's, not its text's; before a checkpoint it is its source."""
    (tmp_path / "small.txt").write_text("the cat sat on the cat\n" * 60)
    argv = (*TINY, f"--dataset={tmp_path}/small.txt", f"--init_from={folder}/whole")
    out = tmp_path / "out"
    faulty = {**environment, "GPTJAX_FAULT": "nan_grad@3"}
    run(faulty, "train.py", *argv, f"--out_dir={out}", "--stop_step=20")
    done = resume(faulty, out, "--stop_step=30")
    assert "resuming at step 20" in done.stdout
    for step in saved_steps(out)[:-1]:
        shutil.rmtree(step_folder(out, step))
    replayed = run(
        environment, "train.py", f"--out_dir={out}", f"--replay={out}/bad_steps/3.json"
    ).stdout
    assert "step 3: the same tokens" in replayed
    loss = float(re.search(r"loss (\S+), recorded nan", replayed)[1])  # type: ignore[index]
    assert loss < 2.0  # a fresh model's is ln 14 = 2.6


@slow
def test_where_a_run_may_not_go(environment: Environment, out: Path) -> None:
    refused = resume(environment, out, "--max_iters=25", expect=2)
    assert "--max_iters=25: the run is at step 40 already" in refused.stderr
    refused = resume(environment, out, "--stop_step=10", expect=2)
    assert "--stop_step=10: the run is at step 40 already" in refused.stderr


def test_resume_check_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: a run that ends elsewhere when it was stopped."""
    leaf = {"shape": [1], "dtype": "float32", "sha256": "a"}
    metas = iter(
        [{"leaves": {"params/x": leaf}}, {"leaves": {"params/x": {**leaf, "sha256": "b"}}}]
    )
    monkeypatch.setattr(resume_check, "train", lambda script, argv: None)
    monkeypatch.setattr(resume_check, "read_meta", lambda path, step: next(metas))
    with pytest.raises(CheckpointError, match="params/x has sha256 a, wanted is b"):
        resume_check.resume_check(ROOT / "train.py", [], 40)
    with pytest.raises(UsageError, match="at least 2"):
        resume_check.resume_check(ROOT / "train.py", [], 1)


@slow
def test_resume_check(environment: Environment, start: tuple[str, ...]) -> None:
    as_users = {**environment, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = run(as_users, "train.py", *start, "--resume_check")
    assert "40 steps, and 20 + resume + 20: all " in done.stdout
    assert "arrays are equal to the bit" in done.stdout


# ---- Memory and disk -----------------------------------------------------------------------------


@slow
def test_too_little_memory_is_explained(environment: Environment, start: tuple[str, ...]) -> None:
    command = ["prlimit", "--as=8000000000", sys.executable, str(ROOT / "train.py"), *start]
    done = subprocess.run(
        [*command, "--n_embd=16384", "--n_layer=4", "--force"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 71, done.stderr[-2000:]
    assert "n_embd=16384; lower --batch_size" in done.stderr.splitlines()[-1]


def in_small_disk(megabytes: int, script: str, environment: Environment) -> Any:
    """Run a shell script as root of a namespace where /mnt is a disk of this size."""
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs /mnt && {script}"
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", mount], env=environment, capture_output=True, text=True
    )


can_mount = subprocess.run(
    ["unshare", "-rm", "bash", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"], capture_output=True
)
needs_mount = pytest.mark.skipif(
    can_mount.returncode != 0,
    reason="mounting a small disk is not allowed here; run pytest -m slow as root, or where "
    "`unshare -rm mount -t tmpfs tmpfs /mnt` works",
)


@slow
@needs_mount
def test_a_full_disk(environment: Environment, folder: Path) -> None:
    """Saves fail, are tried again, and end the run; what was saved goes on once there is room."""
    train = (
        f"{sys.executable} {ROOT}/train.py {' '.join([*TINY, *PLAIN])} "
        f"--dataset={folder}/corpus.txt --n_layer=2 --n_embd=256 --n_head=2 --out_dir=/mnt/out"
    )
    # A step takes 19 MB: the disk holds one.
    refused = in_small_disk(24, train, environment)
    assert refused.returncode == 74, refused.stderr
    assert re.search(r"4 x .* need .* more, .* are free", refused.stderr)
    script = (
        f"{train} --force; echo ended $?; ls /mnt/out/checkpoints; mount -o remount,size=300m /mnt "
        f"&& {sys.executable} {ROOT}/train.py --out_dir=/mnt/out --init_from=resume"
    )
    done = in_small_disk(24, script, environment)
    assert "step 20 was not saved" in done.stdout and "MB are free" in done.stdout, done.stdout
    assert "step 40 was not saved" in done.stderr and "ended 74" in done.stdout, done.stderr
    # What orbax's threads wrote after the end, the next start removes.
    left = r"ended 74\n10\n(40\.orbax-checkpoint-tmp\n)?resum"
    assert re.search(left, done.stdout), done.stdout
    assert "resuming at step 10" in done.stdout and done.returncode == 0, done.stderr
    whole = in_small_disk(300, train, environment)
    assert digest(done.stdout) == digest(whole.stdout)


@slow
@needs_mount
def test_a_disk_that_cannot_be_written(environment: Environment, folder: Path) -> None:
    train = f"{sys.executable} {ROOT}/train.py --dataset={folder}/corpus.txt --out_dir=/mnt/out"
    done = in_small_disk(8, f"mount -o remount,ro /mnt && {train}", environment)
    assert done.returncode == 73 and "cannot write to --out_dir=/mnt/out" in done.stderr


@slow
def test_a_file_is_no_folder(environment: Environment, tmp_path: Path) -> None:
    """Said before anything is read or compiled (F09)."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        refused = run(environment, "train.py", f"--out_dir={path}", expect=73)
        assert f"cannot write to --out_dir={path}" in refused.stderr and refused.stdout == ""


# ---- Several processes ---------------------------------------------------------------------------


def on_loopback(environment: Environment, count: int) -> Environment:
    """What `count` processes of one run on this host have in common."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return {**environment, **own, "NPROC": "1"}


def start_processes(
    environment: Environment, count: int, argv: tuple[str, ...]
) -> list[subprocess.Popen[str]]:
    """`count` processes of one run on this host, over the loopback network."""
    shared = on_loopback(environment, count)
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *argv],
            env={**shared, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


@slow
@needs_mount
def test_a_full_disk_ends_all_processes(environment: Environment, folder: Path) -> None:
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
    done = in_small_disk(24, script, on_loopback(environment, 2))
    assert re.search(r"ended 74\npeer [1-9]\d*\n10\n$", done.stdout), (done.stdout, done.stderr)
    assert "step 20 was not saved: the disk is full" in done.stderr


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text}")


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
@pytest.mark.parametrize("count", [2, 4])
def test_processes_compute_what_one_does(
    environment: Environment, start: tuple[str, ...], tmp_path: Path, whole: str, count: int
) -> None:
    processes = start_processes(environment, count, start)
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, ends
    said = [line for end in ends[1:] for line in end[0].splitlines()]
    assert all(line.startswith("[Gloo]") for line in said), said  # else one of them speaks
    found, expected = (re.findall(r"val loss (\S+), best", text) for text in (ends[0][0], whole))
    assert len(found) == len(expected) == 3
    ok = np.abs(np.subtract([float(x) for x in found], [float(x) for x in expected])).max() <= 1e-3
    assert ok


@slow
def test_srun_s_variables_are_enough(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    common = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    common |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "NPROC": "1"}
    processes = [
        subprocess.Popen(
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
