"""The training runs that lesson 2 makes by train.py, and the model that lesson 4 loads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from gptjax.config import TrainConfig
from gptjax.config_file import load_config
from gptjax.conversion import hub
from gptjax.model import count_params
from gptjax.presets import PRESETS
from gptjax.terminal import flags
from gptjax.training import metrics

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "out" / "lessons"
QUICK = os.environ.get("GPTJAX_LESSONS") == "quick"  # short runs, for a test that all cells run
STEPS = 48 if QUICK else 1800  # of the run by the student's own code
SHORT = 24 if QUICK else 700  # of those under Muon
TUNING = 12 if QUICK else 120  # of the model that has read novels
COMPARED = STEPS // 12  # steps that train.py repeats under AdamW
BPE = FOLDER / "bpe-1000"

MODEL = ("--n_layer=3", "--n_head=4", "--n_embd=128", "--block_size=64", "--bias=True")
FLOAT32 = "--dtype=float32"  # on every machine, for the numbers that the lesson quotes
BATCHES = ("--batch_size=8", "--log_interval=1", "--sample_interval=0", "--checkpoint_interval=0")
RATES = ("--learning_rate=3e-3", "--min_lr=1.5e-4")
CHARACTERS = ("--dataset=auto", "--tokenizer=char")
ADAMW = (
    *MODEL,
    FLOAT32,
    *CHARACTERS,
    *BATCHES,
    *RATES,
    *("--optimizer=adamw", f"--max_iters={STEPS}", f"--warmup_iters={STEPS // 24}"),
    *("--eval_interval=0", "--eval_iters=40"),
)
MUON = (
    *MODEL,
    FLOAT32,
    *BATCHES,
    *RATES,
    *("--optimizer=muon", f"--max_iters={SHORT}", f"--warmup_iters={SHORT // 12}"),
    *(f"--eval_interval={SHORT // 2}", "--eval_iters=0"),
)
TUNED = (
    *("--init_from=novels", "--dataset=auto", FLOAT32, "--block_size=128", "--batch_size=4"),
    *("--optimizer=adamw", f"--max_iters={TUNING}", f"--warmup_iters={TUNING // 12}"),
    *("--learning_rate=1e-3", "--min_lr=1e-4", f"--eval_interval={TUNING}", "--eval_iters=20"),
    *("--log_interval=20", "--sample_interval=0", "--checkpoint_interval=0"),
)
RUNS = {
    "adamw": (*ADAMW, f"--stop_step={COMPARED}"),
    "muon": (*MUON, *CHARACTERS),
    "bpe": (*MUON, f"--dataset={BPE.relative_to(ROOT)}"),
    "tuned": TUNED,
}
SPEAKING = ROOT / "gptjax" / "models" / "novels"  # Hugging Face's folder of a small model


def published() -> Path:
    """The folder of the model that lesson 4 loads: of $GPTJAX_GPT2_DIR, or the small one.

    The variable has a folder, or a name on the Hub such as gpt2, which is downloaded once.
    """
    named = os.environ.get("GPTJAX_GPT2_DIR", "")
    if not named or Path(named).is_dir():
        return Path(named or SPEAKING).resolve()
    return hub.download_model(named, ["model.safetensors"])


def settings() -> TrainConfig:
    """What `train.py` makes of the flags of the run under AdamW, over its default preset."""
    return flags.parse(list(ADAMW), PRESETS["quickstart"], "")


def program(*argv: str, shows: str = "") -> None:
    """Run a program of gptjax and print its lines; of those of steps, what matches `shows`."""
    env = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # Jupyter's
    command = [sys.executable, *argv]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as p:
        assert p.stdout is not None
        for line in p.stdout:
            if not line.startswith("step ") or re.search(shows, line):
                print(line.replace(f"{ROOT}/", ""), end="")
    if p.returncode:
        raise RuntimeError(f"{argv[0]} ended with {p.returncode}")


def train(name: str) -> None:
    """`python train.py` with the flags of a run, anew."""
    run = FOLDER / name
    shutil.rmtree(run, ignore_errors=True)
    print("python train.py", *RUNS[name])
    every = rf"^step \d*{'0' if QUICK else '[05]00'}/"
    program(str(ROOT / "train.py"), *RUNS[name], f"--out_dir={run}", shows=every)


def tokenize() -> None:
    """Make a byte-level BPE of the text that all runs read, and its tokens."""
    shutil.rmtree(BPE, ignore_errors=True)
    print(f"gptjax tokenize auto --vocab_size=1000 --out_dir={BPE.relative_to(ROOT)}")
    program("-m", "gptjax", "tokenize", "auto", "--vocab_size=1000", f"--out_dir={BPE}")


def losses(name: str) -> tuple[np.ndarray, list[int], list[float], float]:
    """Training losses of a run, steps and losses of its validations, and its seconds."""
    records = metrics.read_metrics(FOLDER / name / "metrics.jsonl")
    val = {r["step"]: loss for r in records if (loss := r.get("val_loss")) is not None}
    seconds = max(r["seconds"] for r in records if "seconds" in r)
    return np.array([r["loss"] for r in records if "loss" in r]), [*val], [*val.values()], seconds


def parameters(name: str) -> int:
    """How many parameters the model of a run has."""
    return count_params(load_config(FOLDER / name / "config.json").model)


def sample(name: str, n_tokens: int = 400) -> str:
    """Four texts by `python sample.py` from a run."""
    argv = [f"--out_dir={FOLDER / name}", f"--max_new_tokens={n_tokens}", "--num_samples=4"]
    command = [sys.executable, "sample.py", *argv, "--temperature=0.7", "--start=The ", FLOAT32]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
