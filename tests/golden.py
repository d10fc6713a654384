"""The losses of a small run, and the file that keeps them: `python -m tests.golden` writes it.

One file for each minor version of JAX, whose random numbers and sums may change with it.
"""

import json
import os
import tempfile
from pathlib import Path

import jax

import train
from gptjax.terminal import cli

FOLDER = Path(__file__).parent / "golden"
STEPS = 50
# All that computes takes part: dropout, biases, warmup, clipping, accumulation, weight decay.
FLAGS = (
    *("--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--dropout=0.1"),
    *("--dtype=float32", "--tokenizer=byte", "--batch_size=8", "--gradient_accumulation_steps=2"),
    *("--optimizer=adamw", "--learning_rate=1e-2", "--min_lr=1e-3", "--warmup_iters=10"),
    *(f"--max_iters={STEPS}", "--weight_decay=0.1", "--grad_clip=1.0", "--log_interval=1"),
    *("--beta2=0.95", "--seed=1337", "--schedule=cosine", "--bias=True"),
    *("--eval_interval=0", "--sample_interval=0", "--checkpoint_interval=0"),
    *("--eval_iters=1", "--sample_tokens=0", "--compile_cache=off"),
)


def text() -> str:
    """Return 4096 letters by a rule: behind each stands one of three."""
    at, letters = 1, []
    for i in range(4096):
        at = (5 * at + i * i // 64 % 3) % 26
        letters.append(chr(ord("a") + at))
    return "".join(letters)


def losses(folder: Path) -> list[float]:
    """Train in this folder; return the loss of every step."""
    (folder / "golden.txt").write_text(text())
    argv = [f"--dataset={folder}/golden.txt", f"--out_dir={folder}/out", *FLAGS]
    assert cli.run(train.main, argv) == 0
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def file_of(version: str) -> Path:
    """Return the file for a version of JAX, whether it is there or not."""
    major, minor = version.split(".")[:2]
    return FOLDER / f"jax-{major}.{minor}.json"


def main() -> None:
    """Write the file of the JAX that is installed."""
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder))
    path = file_of(jax.__version__)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([round(loss, 6) for loss in found]) + "\n")
    print(f"wrote {path}: {found[0]:.4f} ... {found[-1]:.4f}")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
