"""The training run that lesson 2 makes and lesson 4 takes up."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gptjax.config import TrainConfig
from gptjax.presets import PRESETS
from gptjax.terminal import flags

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "out" / "lessons" / "pretrain"
STEPS = 800
FLAGS = (
    *("--n_layer=3", "--n_head=4", "--n_embd=96", "--block_size=64", "--bias=True"),
    *("--dataset=auto", "--tokenizer=char", f"--max_iters={STEPS}", "--batch_size=8"),
    *("--optimizer=adamw", "--learning_rate=3e-3", "--min_lr=3e-4", "--warmup_iters=50"),
    *("--eval_interval=200", "--eval_iters=20", "--log_interval=1", "--sample_interval=0"),
    "--checkpoint_interval=0",
)


def settings() -> TrainConfig:
    """What `train.py` makes of these flags, over its default preset."""
    return flags.parse(TrainConfig, list(FLAGS), PRESETS["quickstart"], "")


def train(run: Path = RUN) -> None:
    """`python train.py` with these flags, its output shown; does nothing if it was done before."""
    if (run / "checkpoints" / str(STEPS)).is_dir():
        print(f"{run.relative_to(ROOT)} is there already")
        return
    shutil.rmtree(run, ignore_errors=True)  # a run that was broken off
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS, f"--out_dir={run}"]
    print("python train.py", *FLAGS)
    env = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # Jupyter's
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as p:
        assert p.stdout is not None
        for line in p.stdout:
            step = re.match(r"step (\d+)/", line)
            if step is None or int(step[1]) % 200 == 0:
                print(line.replace(f"{ROOT}/", ""), end="")
    if p.returncode:
        raise RuntimeError(f"train.py ended with {p.returncode}")
