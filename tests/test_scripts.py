"""The scripts as people use them: processes, signals, a run that is stopped and taken up again."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .helpers import ROOT, TINY, digest, run, start_process


def test_a_run_leaves_what_it_promises(folder: Path, whole: str) -> None:
    out = folder / "whole"
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "loss.png",
        "samples.txt",
        "checkpoints",
        ".lock",
    }
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    val = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    assert sorted(val) == [0, 20, 40]
    assert val[40] < val[0] - 0.5
    assert [r["step"] for r in records if "loss" in r] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert (out / "samples.txt").read_text().count("---- sample after") == 3
    assert f"val loss {val[40]:.4f} after 40 steps" in whole
    assert f"python sample.py --out_dir={out}" in whole
    assert "mfu" not in whole and not any("mfu" in r for r in records)  # a CPU has no known peak


def test_stopped_and_resumed_is_undisturbed(
    folder: Path, environment: dict[str, str], whole: str
) -> None:
    out = folder / "resumed"
    start = (f"--dataset={folder}/corpus.txt", f"--out_dir={out}")
    stopped = start_process(
        [sys.executable, str(ROOT / "train.py"), *TINY, *start, "--init_from=auto"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert stopped.stdout is not None
    printed = ""
    while "step 10/40" not in printed:
        line = stopped.stdout.readline()
        assert line, printed
        printed += line
    stopped.send_signal(signal.SIGTERM)
    printed += stopped.communicate(timeout=120)[0]
    if stopped.returncode == 0:
        pytest.skip("the run ended before the signal came; run it again on a quiet machine")
    assert stopped.returncode == 128 + signal.SIGTERM
    saved = re.search(r"saved step (\d+) after SIGTERM", printed)
    assert saved and (out / "checkpoints" / saved[1]).is_dir()
    resumed = run(environment, "train.py", f"--out_dir={out}", "--init_from=auto").stdout
    assert f"resuming at step {saved[1]}" in resumed
    assert digest(resumed) == digest(whole)


def test_a_run_is_never_overwritten(folder: Path, environment: dict[str, str], whole: str) -> None:
    argv = (*TINY, f"--dataset={folder}/corpus.txt", f"--out_dir={folder}/whole")
    refused = run(environment, "train.py", *argv, expect=2)
    assert "holds a run up to step 40" in refused.stderr


def test_another_shape_is_refused_on_resume(
    folder: Path, environment: dict[str, str], whole: str
) -> None:
    argv = (f"--out_dir={folder}/whole", "--init_from=resume", "--n_head=1")
    refused = run(environment, "train.py", *argv, expect=2)
    assert "the checkpoint has n_head=2, you asked for 1" in refused.stderr


def test_the_trained_model_speaks_its_corpus(
    folder: Path, environment: dict[str, str], whole: str
) -> None:
    argv = (f"--out_dir={folder}/whole", "--start=the ", "--temperature=0", "--max_new_tokens=40")
    began = time.monotonic()
    first, second = (run(environment, "sample.py", *argv).stdout for _ in range(2))
    assert time.monotonic() - began < 60
    assert first == second
    assert first.startswith("the ") and len(first) == 45
    words = first.split()[1:-1]
    assert set(words) & {"the", "cat", "sat", "on", "mat", "and", "dog", "ran", "to"}


def test_parameters_of_another_run_and_a_shorter_context(
    folder: Path, environment: dict[str, str], whole: str
) -> None:
    argv = [*TINY, f"--dataset={folder}/corpus.txt", f"--out_dir={folder}/tuned", "--block_size=8"]
    argv += ["--stop_step=1", "--dropout=0", "--optimizer=adamw", "--sample_interval=0"]
    output = run(environment, "train.py", *argv, f"--init_from={folder}/whole").stdout
    first = re.search(r"step 0: val loss (\S+),", output)
    scratch = re.search(r"step 0: val loss (\S+),", whole)
    assert first and scratch and float(first[1]) < float(scratch[1]) - 0.5
    assert json.loads((folder / "tuned" / "config.json").read_text())["model"]["block_size"] == 8


def test_a_sample_is_drawn_once(folder: Path, environment: dict[str, str], whole: str) -> None:
    """Also where the run was stopped and resumed just after it, and nothing was evaluated."""
    out = f"--out_dir={folder}/sampled"
    argv = [*TINY, f"--dataset={folder}/corpus.txt", out, "--eval_interval=0"]
    run(environment, "train.py", *argv, "--stop_step=20")
    run(environment, "train.py", out, "--init_from=resume", "--stop_step=21")
    said = (folder / "sampled" / "samples.txt").read_text()
    assert said.count("---- sample after 20 steps") == 1
