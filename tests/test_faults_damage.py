"""A run folder that was damaged, moved or given other settings, and a run that goes on in it."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptjax.checkpoints.steps import checkpoint_folder, saved_steps, step_folder
from gptjax.errors import CheckpointError, UsageError
from gptjax.training import resume_check

from .helpers import (
    PLAIN,
    ROOT,
    Environment,
    digest,
    logged_losses,
    newest,
    on_devices,
    resume,
    run,
)
from .test_checkpoint import flip

slow = pytest.mark.slow


@slow
def test_a_flipped_bit_costs_one_interval(environment: Environment, out: Path, whole: str) -> None:
    step = step_folder(out, 40)
    flip(max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    done = resume(environment, out)
    assert re.search(r"warning: cannot use step 40 .* has sha256 .*; moved to quar", done.stdout)
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
    assert "the checkpoint has other data" in refused.stderr
    done = resume(environment, out, *argv, "--allow_change=data")
    assert "resuming with other data" in done.stdout and "after 41 steps" in done.stdout


@slow
def test_settings_of_another_experiment_are_refused(environment: Environment, out: Path) -> None:
    """And those that only say how to go on are not (F17)."""
    for flags in (
        ("--n_layer=3", "--n_head=1", "--optimizer=adamw"),
        ("--seed=7", "--batch_size=4", "--gradient_accumulation_steps=3"),
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
    assert "the checkpoint has other data" in refused.stderr
    done = resume(environment, tmp_path / "out", "--allow_change=data")
    assert "resuming with other data" in done.stdout


@slow
def test_devices_and_accumulation_read_the_same_tokens(
    environment: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    """The loss of each step says so, also where a run is resumed with more devices (F31)."""
    expected = None
    for number, (devices, passes) in enumerate(((1, 1), (8, 1), (2, 4))):
        out = tmp_path / str(number)
        argv = [*start, *PLAIN, f"--out_dir={out}", "--log_interval=1"]
        argv += [f"--gradient_accumulation_steps={passes}", f"--batch_size={8 // passes}"]
        if devices > 1:
            run(environment, "train.py", *argv, "--stop_step=7")
            argv += ["--init_from=resume"]
        run(on_devices(environment, devices), "train.py", *argv, "--stop_step=13")
        losses = logged_losses(out)
        expected = losses if expected is None else expected
        assert len(losses) == 13
        assert np.abs(losses - expected).max() <= 1e-5, (devices, passes, losses - expected)


@slow
def test_other_numbers_of_devices(
    environment: Environment, start: tuple[str, ...], tmp_path: Path, folder: Path, whole: str
) -> None:
    """8 -> 1 -> 8 -> 2 devices: the loss of every step as without the changes."""
    out, before = tmp_path / "out", 8
    run(on_devices(environment, before), "train.py", *start, "--stop_step=10")
    for after, stop in ((1, 20), (8, 30), (2, 0)):
        done = resume(on_devices(environment, after), out, f"--stop_step={stop}")
        assert f"resuming with devices {after} x cpu, it was {before} x cpu" in done.stdout
        before = after
    found, expected = logged_losses(out), logged_losses(folder / "whole")
    assert len(found) == len(expected) == 8
    assert np.abs(found - expected).max() <= 1e-5, np.abs(found - expected)
    refused = resume(on_devices(environment, 3), out, expect=2)
    assert "must be divisible by 3 devices; take 6 or 9" in refused.stderr


@slow
def test_where_a_run_may_not_go(environment: Environment, out: Path) -> None:
    refused = resume(environment, out, "--max_iters=25", expect=2)
    assert "--max_iters=25: the run has already reached step 40" in refused.stderr
    refused = resume(environment, out, "--stop_step=10", expect=2)
    assert "--stop_step=10: the run has already reached step 40" in refused.stderr


def test_resume_check_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: a run that ends elsewhere when it was stopped."""
    leaf = {"shape": [1], "dtype": "float32", "sha256": "a"}
    metas = iter(
        [{"leaves": {"params/x": leaf}}, {"leaves": {"params/x": {**leaf, "sha256": "b"}}}]
    )
    runs: list[list[str]] = []
    monkeypatch.setattr(resume_check, "train", lambda script, argv: runs.append(argv))
    monkeypatch.setattr(resume_check, "read_meta", lambda path, step: next(metas))
    with pytest.raises(CheckpointError, match="params/x has sha256"):
        resume_check.resume_check(ROOT / "train.py", ["--stop_step=5"], 40)
    assert [argv[-1] for argv in runs] == ["--stop_step=0", "--stop_step=20", "--stop_step=0"]
    with pytest.raises(UsageError, match="at least 2"):
        resume_check.resume_check(ROOT / "train.py", [], 1)


@slow
def test_resume_check(environment: Environment, start: tuple[str, ...]) -> None:
    as_users = {**environment, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = run(as_users, "train.py", *start, "--resume_check")
    assert "40 steps, and 20 + resume + 20: all " in done.stdout
    assert "arrays are equal" in done.stdout
