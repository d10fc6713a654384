"""Losses that are NaN or jump, planted in real runs: skipped, written down, replayed."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.checkpoints.steps import read_meta, saved_steps, step_folder
from gptjax.training import replay

from .helpers import (
    PLAIN,
    ROOT,
    TINY,
    Environment,
    digest,
    newest,
    resume,
    run,
    start_process,
    wait_for,
)

slow = pytest.mark.slow


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
    process = start_process(
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


def test_small_norms_keep_their_exponent() -> None:
    assert [replay.show(norm) for norm in (3.2e-7, 0.25, 12.0, "nan")] == [
        *("3.2e-07", "0.25", "12", "nan")
    ]
