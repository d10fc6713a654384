"""One training step on CPU, gptjax against its PyTorch twin: `python -m benchmarks.cpu_training`.

Every side runs in a process of its own, in turn, for several rounds; the table shows the median of
the rounds' medians, and the fastest step of all, in ms. Both sides compute the same: float32 (but
where bf16 is said), AdamW, clipping, no dropout, no biases, 65 characters.
"""

import argparse
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

SHAPES = {  # name -> model, batch size, steps timed
    "4 layers, 128 wide, context 64, batch 12": ((4, 4, 128, 64), 12, 150),
    "6 layers, 384 wide, context 256, batch 8": ((6, 6, 384, 256), 8, 10),
}
SIDES = ("gptjax", "torch eager", "torch.compile", "torch bf16 autocast")


def make_config(shape: str) -> tuple[TrainConfig, int, int]:
    """Settings, batch size and steps of a shape."""
    (n_layer, n_head, n_embd, block_size), batch_size, steps = SHAPES[shape]
    model = GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size=65, vocab_multiple=1)
    model = GPTConfig(**{**vars(model), "bias": False})
    return TrainConfig(model=model, batch_size=batch_size), batch_size, steps


def make_gptjax_step(config: TrainConfig) -> Callable[[np.ndarray], None]:
    """A function that takes one step on windows (B, T+1) and returns when it is done."""
    import functools

    import gptjax  # noqa: F401

    # isort: split
    import jax

    from gptjax import model, optimizer, sharding, training

    cfg = model.resolve(config.model)
    mesh = sharding.make_mesh()
    tx = optimizer.make_optimizer(config)
    init = functools.partial(training.init_state, cfg, tx)
    shardings = sharding.tree_shardings(mesh, "data", jax.eval_shape(init, jax.random.key(0)))
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    train_step = training.make_train_step(cfg, tx, mesh, shardings, seed=0)

    def step(windows: np.ndarray) -> None:
        nonlocal state
        state, metrics = train_step(state, sharding.place(windows[None, None], mesh, axis=2))
        jax.block_until_ready((state, metrics))

    return step


def make_torch_step(config: TrainConfig, side: str) -> Callable[[np.ndarray], None]:
    """The same with the twin."""
    import torch

    from benchmarks.torch_gpt import TorchGPT, make_adamw, train_step

    torch.set_num_threads(os.cpu_count() or 1)
    twin = TorchGPT(config.model)
    adamw = make_adamw(twin, config)
    model = torch.compile(twin) if side == "torch.compile" else twin

    def step(windows: np.ndarray) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in side):
            train_step(model, adamw, torch.from_numpy(windows), config.grad_clip).item()

    return step


def time_side(side: str, shape: str) -> list[float]:
    """Milliseconds of each step after the first three."""
    config, batch_size, steps = make_config(shape)
    rng = np.random.default_rng(0)
    size = (batch_size, config.model.block_size + 1)
    batches = [rng.integers(0, 65, size).astype(np.int32) for _ in range(8)]
    if side == "gptjax":
        step = make_gptjax_step(config)
    else:
        batches = [batch.astype(np.int64) for batch in batches]
        step = make_torch_step(config, side)
    times = []
    for i in range(steps + 3):
        began = time.perf_counter()
        step(batches[i % 8])
        times.append(1e3 * (time.perf_counter() - began))
    return times[3:]


def main() -> None:
    """Run all sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="run this side alone, print its times")
    parser.add_argument("--shape", choices=SHAPES)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(time_side(args.side, args.shape)))
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch"))
    print(f"{os.cpu_count()} cores, {platform.machine()}, {versions}, {args.rounds} rounds")
    for shape in SHAPES:
        times: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                command = [sys.executable, "-m", "benchmarks.cpu_training"]
                command += ["--side", side, "--shape", shape]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                times[side].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"\n| {shape} | median ms | fastest ms | gptjax is ... times as fast |")
        print("|---|---|---|---|")
        medians = {s: statistics.median(map(statistics.median, t)) for s, t in times.items()}
        for side, median in medians.items():
            fastest = min(map(min, times[side]))
            print(f"| {side} | {median:.1f} | {fastest:.1f} | {median / medians['gptjax']:.2f} |")


if __name__ == "__main__":
    main()
