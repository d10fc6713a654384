"""One training step, gptjax against its PyTorch twin: `python -m benchmarks.training_step`.

Every side runs in a process of its own, in turn, for several rounds; the table shows the median of
the rounds' medians, and the fastest step of all, in ms. Both sides compute the same: AdamW,
clipping, no dropout, no biases; float32 on CPU (but where bf16 is said), bfloat16 on GPU.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from gptjax.config import GPTConfig, TrainConfig

SHAPES = {  # device -> name -> layers, heads, width, context, vocabulary; batch size; steps timed
    "cpu": {
        "4 layers, 128 wide, context 64, batch 12": ((4, 4, 128, 64, 65), 12, 150),
        "6 layers, 384 wide, context 256, batch 8": ((6, 6, 384, 256, 65), 8, 10),
    },
    "gpu": {
        "GPT-2 124M, context 1024, batch 32": ((12, 12, 768, 1024, 50257), 32, 40),
        "GPT-2 124M, context 1024, batch 64": ((12, 12, 768, 1024, 50257), 64, 20),
    },
}
SIDES = {
    "cpu": ("gptjax", "torch eager", "torch.compile", "torch bf16 autocast"),
    "gpu": ("gptjax", "torch.compile, bf16 autocast"),
}


def make_config(device: str, shape: str) -> tuple[TrainConfig, int, int]:
    """Settings, batch size and steps of a shape."""
    (n_layer, n_head, n_embd, block_size, vocab_size), batch_size, steps = SHAPES[device][shape]
    multiple = 1 if vocab_size < 128 else 128
    model = GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size, multiple, bias=False)
    return TrainConfig(model=model, batch_size=batch_size), batch_size, steps


def make_gptjax_step(config: TrainConfig) -> Callable[[np.ndarray], None]:
    """A function that takes one step on windows (B, T+1) and returns when it is done."""

    import jax

    from gptjax import allocator, model, sharding
    from gptjax.training.step import abstract_state, init_state, make_train_step

    allocator.keep_freed_memory()
    config = dataclasses.replace(config, model=model.resolve(config.model))
    mesh = sharding.make_mesh(jax.devices()[:1])
    abstract = abstract_state(config, mesh)
    state, train_step = init_state(config, abstract), make_train_step(config, abstract)

    def step(windows: np.ndarray) -> None:
        nonlocal state
        state, metrics = train_step(state, sharding.place(windows[None, None], mesh, axis=2))
        jax.block_until_ready((state, metrics))

    return step


def make_torch_step(config: TrainConfig, device: str, side: str) -> Callable[[np.ndarray], None]:
    """The same with the twin."""
    import torch

    from tests import torch_gpt

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    name = "cuda" if device == "gpu" else "cpu"
    twin = torch_gpt.TorchGPT(config.model).to(name)
    adamw = torch_gpt.make_adamw(twin, config)
    compiled = "compile" in side
    loss = torch.compile(torch_gpt.mean_loss) if compiled else torch_gpt.mean_loss

    def step(windows: np.ndarray) -> None:
        batch = torch.from_numpy(windows).to(name, non_blocking=True)
        with torch.autocast(name, torch.bfloat16, enabled="bf16" in side):
            torch_gpt.train_step(twin, adamw, batch, config.grad_clip, loss).item()

    return step


def time_side(device: str, side: str, shape: str) -> list[float]:
    """Milliseconds of each step after the first five."""
    config, batch_size, steps = make_config(device, shape)
    rng = np.random.default_rng(0)
    size = (batch_size, config.model.block_size + 1)
    dtype = np.int32 if side == "gptjax" else np.int64
    batches = [rng.integers(0, config.model.vocab_size, size).astype(dtype) for _ in range(8)]
    step = make_gptjax_step(config) if side == "gptjax" else make_torch_step(config, device, side)
    times = []
    for i in range(steps + 5):
        began = time.perf_counter()
        step(batches[i % 8])
        times.append(1e3 * (time.perf_counter() - began))
    return times[5:]


def main() -> None:
    """Run all sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=SHAPES, default="cpu", help="gpu: one NVIDIA GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help="run this side alone, print its times")
    parser.add_argument("--shape")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(time_side(args.device, args.side, args.shape)))
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch"))
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {platform.machine()}, {versions}, {args.rounds} rounds")
    sides = SIDES[args.device]
    for shape in SHAPES[args.device]:
        times: dict[str, list[list[float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                command = [sys.executable, "-m", "benchmarks.training_step"]
                command += ["--device", args.device, "--side", side, "--shape", shape]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                times[side].append(json.loads(done.stdout.splitlines()[-1]))
        config, batch_size, _ = make_config(args.device, shape)
        tokens = batch_size * config.model.block_size
        medians = {s: statistics.median(map(statistics.median, t)) for s, t in times.items()}
        print(f"\n| {shape} | median ms | fastest ms | tokens/s | gptjax is ... times as fast |")
        print("|---|---|---|---|---|")
        for side, median in medians.items():
            fastest, ratio = min(map(min, times[side])), median / medians["gptjax"]
            rate = 1e3 * tokens / median
            print(f"| {side} | {median:.1f} | {fastest:.1f} | {rate:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
