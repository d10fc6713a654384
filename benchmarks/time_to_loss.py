"""Seconds from the command to a validation loss, `python train.py` against nanoGPT's recipe.

`python -m benchmarks.time_to_loss` runs a preset of gptjax until an evaluation is at most the loss
that nanoGPT reached, then nanoGPT's recipe on the PyTorch twin, each twice: with an empty compile
cache, and with the one that its first run has filled. The recipe is what nanoGPT's train.py does:
its settings, random windows copied from pinned memory, autocast to bfloat16, torch.compile, fused
AdamW, evaluations of both splits and a checkpoint whenever validation improves. Both see the same
text; gptjax is judged by the whole validation split, the recipe by random windows of it.

`--race=novels` trains GPT-2 124M. It takes 48 million tokens of GPT-2's vocabulary, `train.bin` and
`val.bin` in the folder that `--dataset` names.
"""

import argparse
import dataclasses
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config import GPTConfig, TrainConfig
from gptjax.presets import PRESETS


class Race(NamedTuple):
    """Who runs for which loss."""

    target: float  # the best of nanoGPT in its README, or at the end of its run on an H200
    ours: dict[str, list[str]]  # the name of a row -> arguments of train.py
    recipe: TrainConfig  # nanoGPT's


RACES = {
    "shakespeare_char": Race(
        1.4697,
        {
            "shakespeare_char": ["shakespeare_char"],
            "shakespeare_char_fast": ["shakespeare_char_fast"],
        },
        dataclasses.replace(PRESETS["shakespeare_char"], eval_iters=200),
    ),
    "novels": Race(
        4.344,
        {
            "gpt2_fast, batch 16": [
                *("gpt2_fast", "--batch_size=16", "--gradient_accumulation_steps=1"),
                *("--max_iters=1000", "--muon_learning_rate=0.014", "--learning_rate=1.4e-3"),
                *("--eval_interval=100", "--eval_iters=0", "--bias=False"),
                *("--sample_interval=0", "--checkpoint_interval=0"),
            ],
        },
        TrainConfig(
            tokenizer="gpt2",
            model=GPTConfig(bias=False),
            max_iters=700,
            batch_size=64,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            min_lr=1e-4,
            eval_interval=100,
            eval_iters=10,
        ),
    ),
}


def run_recipe(config: TrainConfig, dataset: str, tokenizer_dir: str, out_dir: Path) -> None:
    """Train the twin by nanoGPT's recipe, and print its evaluations."""
    import torch

    from gptjax.data.datasets import load_dataset
    from tests.torch_gpt import MeanLoss, TorchGPT, make_adamw

    cfg, warmup = config.model, config.warmup_iters
    torch.manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    data = load_dataset(
        dataset, block_size=cfg.block_size, tokenizer=config.tokenizer, tokenizer_dir=tokenizer_dir
    )
    splits = {"train": data.train[0], "val": data.val[0]}
    twin = TorchGPT(dataclasses.replace(cfg, vocab_size=data.tokenizer.n_vocab)).to(device)
    for name, parameter in twin.named_parameters():
        if name.endswith("proj.weight"):
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * cfg.n_layer))
    adamw, loss_of = make_adamw(twin, config), torch.compile(MeanLoss(twin))

    def rate(step: int) -> float:
        """A straight line, then half a cosine; JAX's would wake JAX on the GPU."""
        if step < warmup:
            return config.learning_rate * (step + 1) / (warmup + 1)
        cosine = math.cos(math.pi * (step - warmup) / (config.max_iters - warmup))
        return config.min_lr + (config.learning_rate - config.min_lr) * (1 + cosine) / 2

    def draw(split: str) -> torch.Tensor:
        """Random windows (B, T+1), on the device."""
        tokens, rng = splits[split], np.random.default_rng(int(torch.randint(2**31, ())))
        starts = rng.integers(0, len(tokens) - cfg.block_size, config.batch_size)
        windows = np.stack([tokens[i : i + cfg.block_size + 1] for i in starts]).astype(np.int64)
        batch = torch.from_numpy(windows)
        return batch.pin_memory().to(device, non_blocking=True) if device == "cuda" else batch

    @torch.no_grad()
    def evaluate(split: str) -> float:
        twin.eval()
        losses = []
        for _ in range(config.eval_iters):
            with torch.autocast(device, torch.bfloat16):
                losses.append(loss_of(draw(split)).item())
        twin.train()
        return float(np.mean(losses))

    best, passes, windows = math.inf, config.gradient_accumulation_steps, draw("train")
    for step in range(config.max_iters + 1):
        if step % config.eval_interval == 0:
            losses = {split: evaluate(split) for split in splits}
            print(f"step {step}: val loss {losses['val']:.4f}", flush=True)
            if losses["val"] < best and step:
                state = {"model": twin.state_dict(), "optimizer": adamw.state_dict()}
                torch.save(state, out_dir / "ckpt.pt")
            best = min(best, losses["val"])
        if step == config.max_iters:
            return
        for group in adamw.param_groups:
            group["lr"] = rate(step)
        for _ in range(passes):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(windows) / passes
            windows = draw("train")  # while the GPU is at work
            loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), config.grad_clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if step % config.log_interval == 0:
            print(f"iter {step}: loss {loss.item() * passes:.4f}", flush=True)


class Outcome(NamedTuple):
    """Of a run: its first evaluation, and the first at the target, else the best."""

    first: float  # seconds from the command
    seconds: float
    step: int
    loss: float


def time_run(command: list[str], target: float, caches: Path) -> Outcome:
    """Run until the target, or five evaluations without a better one; caches are in `caches`."""
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
    }
    began, best, worse = time.monotonic(), None, 0
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"step (\d+): val loss ([\d.]+)", line):
                seconds, loss = time.monotonic() - began, float(found[2])
                best = best or Outcome(seconds, seconds, 0, loss)
                worse += 1
                if loss < best.loss:
                    best, worse = Outcome(best.first, seconds, int(found[1]), loss), 0
                if loss <= target or worse == 5:
                    break
        process.kill()
    if best is None:
        raise SystemExit(f"{' '.join(command)} ended without an evaluation")
    return best


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--race", choices=RACES, default="shakespeare_char")
    parser.add_argument("--dataset", default="tinyshakespeare", help="text file, folder or name")
    parser.add_argument("--tokenizer_dir", default="", help="as train.py takes it")
    parser.add_argument("--target", type=float, help="another loss")
    parser.add_argument("--once", action="store_true", help="with an empty cache only")
    parser.add_argument("--as_peer", metavar="DIR", help="run nanoGPT's recipe alone")
    args = parser.parse_args()
    race = RACES[args.race]
    if args.as_peer:
        run_recipe(race.recipe, args.dataset, args.tokenizer_dir, Path(args.as_peer))
        return
    target = args.target or race.target
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch"))
    asked = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    device = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    print(f"{platform.machine()}, {device}, {versions}")
    text = [f"--dataset={args.dataset}"]
    text += [f"--tokenizer_dir={args.tokenizer_dir}"] if args.tokenizer_dir else []
    train = str(Path(__file__).parent.parent / "train.py")
    print(f"\n| to val loss {target}, or the best | cache | s to step 0 | s | step | val loss |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        commands = {name: [train, *flags] for name, flags in race.ours.items()}
        peer = ["-m", "benchmarks.time_to_loss", f"--race={args.race}", f"--as_peer={folder}"]
        commands["nanoGPT's recipe in PyTorch"] = peer
        for i, (name, command) in enumerate(commands.items()):
            caches = Path(folder) / f"caches-{i}"
            for cache in ("empty",) if args.once else ("empty", "full"):
                out = [f"--out_dir={tempfile.mkdtemp(dir=folder)}", f"--compile_cache={caches}"]
                out = [] if command is peer else out
                run = time_run([*command, *text, *out], target, caches)
                print(f"| {name} | {cache} | {run.first:.1f} | {run.seconds:.1f} ", end="")
                print(f"| {run.step} | {run.loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
