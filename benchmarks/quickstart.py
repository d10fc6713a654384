"""`python train.py` against nanoGPT's CPU recipe: `python -m benchmarks.quickstart`.

The recipe (4 layers, 128 wide, context 64, batch 12, 2000 iterations of AdamW at 1e-3, in nanoGPT's
README) runs on the PyTorch twin, eager; both sides see TinyShakespeare and are judged by the mean
loss over the whole validation split. Seconds count from the start of the process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gptjax.config import GPTConfig, TrainConfig
from gptjax.data import batches
from gptjax.data.datasets import load_dataset
from gptjax.training.optimizer import make_schedule
from tests.torch_gpt import MeanLoss, TorchGPT, make_adamw, train_step


def run_recipe(dataset: str) -> tuple[float, float]:
    """Validation loss and seconds of nanoGPT's recipe on the twin."""
    import torch

    began = time.monotonic()
    model = GPTConfig(4, 4, 128, 64, vocab_size=65, vocab_multiple=1)
    model = GPTConfig(**{**vars(model), "bias": False})
    config = TrainConfig(model=model, max_iters=2000, learning_rate=1e-3, min_lr=1e-4, beta2=0.99)
    schedule = [float(rate) for rate in map(make_schedule(config), range(config.max_iters))]
    data = load_dataset(dataset, block_size=model.block_size)
    twin = TorchGPT(model)
    adamw, loss = make_adamw(twin, config), MeanLoss(twin)
    for step in range(config.max_iters):
        for group in adamw.param_groups:
            group["lr"] = schedule[step]
        windows = batches.sample_batch(
            data.train, seed=1337, step=step, batch_size=12, block_size=64, n_vocab=65
        )
        train_step(loss, adamw, torch.from_numpy(windows.astype(np.int64)), config.grad_clip)
    starts = batches.eval_windows(data.val, model.block_size)
    val = torch.from_numpy(
        batches.read_windows(data.val, starts, model.block_size, 65).astype(np.int64)
    )
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(twin(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten())
            for w in val.split(len(val) // 10)
        ]
    return float(np.mean(losses)), time.monotonic() - began


def main() -> None:
    """Run both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="tinyshakespeare", help="the name or the text file")
    dataset = parser.parse_args().dataset
    train = Path(__file__).parent.parent / "train.py"
    with tempfile.TemporaryDirectory() as out:
        began = time.monotonic()
        command = [sys.executable, str(train), f"--dataset={dataset}", f"--out_dir={out}"]
        subprocess.run([*command, f"--compile_cache={out}/xla"], check=True)
        seconds = time.monotonic() - began
        records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    ours = [r["val_loss"] for r in records if r.get("val_loss")][-1]
    theirs, their_seconds = run_recipe(dataset)
    print("\n| | validation loss | seconds |\n|---|---|---|")
    print(f"| python train.py | {ours:.3f} | {seconds:.0f} |")
    print(f"| nanoGPT's CPU recipe in PyTorch | {theirs:.3f} | {their_seconds:.0f} |")


if __name__ == "__main__":
    main()
