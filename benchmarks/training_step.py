"""One training step, gptjax against its PyTorch twin: `python -m benchmarks.training_step`.

Every side runs in a process of its own, in turn, for several rounds; the table shows the median of
the rounds' medians, and the fastest of all, in ms a step. On a GPU ten steps are started before the
loss of the last is waited for, as training does. All sides compute the same: AdamW, clipping, no
dropout, biases only with `--bias`; on a CPU float32, unless the side's name says otherwise, and
"gptjax" chooses its type; bfloat16 on GPU. gptjax's sides begin with the same parameters, so that
their losses must agree.

With `--gpus=4` each GPU takes the batch of the shape: gptjax's share it as `--mesh` says, the
twin's by DistributedDataParallel, a process for each. Both may take nearly all of their memory.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from gptjax.config import GPTConfig, TrainConfig

SHAPES = {  # device -> name -> layers, heads, width, context, vocabulary; batch size; steps timed
    "cpu": {
        "4 layers, 128 wide, context 64, batch 12": ((4, 4, 128, 64, 65), 12, 150),
        "6 layers, 384 wide, context 256, batch 8": ((6, 6, 384, 256, 65), 8, 10),
    },
    "gpu": {
        "GPT-2 124M, context 1024, batch 32": ((12, 12, 768, 1024, 50257), 32, 40),
        "GPT-2 124M, context 1024, batch 64": ((12, 12, 768, 1024, 50257), 64, 40),
        "GPT-2 XL 1.6B, context 1024, batch 8": ((48, 25, 1600, 1024, 50257), 8, 20),
    },
}
# Steps that are started before one is waited for. nanoGPT waits for each tenth, and train.py does
# not wait before the next call's steps are under way.
STARTED = {"cpu": 1, "gpu": 10}
RANK = int(os.environ.get("RANK", "0"))  # of the twin's processes, as torch.distributed.run says
SIDES = {
    "cpu": ("gptjax", "gptjax float32", "torch eager", "torch.compile", "torch bf16 autocast"),
    "gpu": (
        *("gptjax", "gptjax --kernels=off"),
        *("torch.compile, bf16 autocast", "torch.compile with CUDA graphs, bf16 autocast"),
    ),
}
LARGEST_DIFFERENCE = 0.01  # of gptjax's losses after all steps, as a share; 0.004 were seen


def make_config(device: str, shape: str, bias: bool) -> tuple[TrainConfig, int, int]:
    """Settings, batch size and steps of a shape."""
    (n_layer, n_head, n_embd, block_size, vocab_size), batch_size, steps = SHAPES[device][shape]
    multiple = 1 if vocab_size < 128 else 128
    model = GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size, multiple, bias=bias)
    return TrainConfig(model=model, batch_size=batch_size), batch_size, steps


def make_gptjax_step(config: TrainConfig, gpus: int) -> Callable[[np.ndarray], Any]:
    """A function that starts a step on windows (B, T+1) and returns its loss.

    The loss's `item` waits for the step.
    """

    import jax

    from gptjax import allocator, model, sharding
    from gptjax.config import parse_mesh
    from gptjax.training.step import abstract_state, init_state, make_train_step

    allocator.keep_freed_memory()
    config = dataclasses.replace(config, model=model.resolve(config.model, training=True))
    mesh = sharding.make_mesh(jax.devices()[:gpus], parse_mesh(config.mesh))
    abstract = abstract_state(config, mesh)
    state, train_step = init_state(config, abstract), make_train_step(config, abstract)

    def step(windows: np.ndarray) -> Any:
        nonlocal state
        state, metrics = train_step(state, sharding.place(windows[None, None], mesh, axis=2))
        return metrics["loss"]

    return step


def make_torch_step(
    config: TrainConfig, device: str, side: str, gpus: int
) -> Callable[[np.ndarray], Any]:
    """The same with the twin; of `gpus` processes, each its own GPU's part."""
    import torch

    from tests import torch_gpt

    torch.set_num_threads(len(os.sched_getaffinity(0)) // gpus)
    name = "cuda" if device == "gpu" else "cpu"
    if gpus > 1:
        torch.cuda.set_device(RANK)
        torch.distributed.init_process_group("nccl")
    twin = torch_gpt.TorchGPT(config.model).to(name)
    adamw = torch_gpt.make_adamw(twin, config)
    loss: torch.nn.Module = torch_gpt.MeanLoss(twin)
    if "compile" in side:
        loss.compile(mode="reduce-overhead" if "graphs" in side else None)
    if gpus > 1:
        loss = torch.nn.parallel.DistributedDataParallel(
            loss, device_ids=[RANK], gradient_as_bucket_view=True
        )

    def step(windows: np.ndarray) -> Any:
        batch = torch.from_numpy(windows).to(name, non_blocking=True)
        with torch.autocast(name, torch.bfloat16, enabled="bf16" in side):
            # A copy, since CUDA graphs write the next loss over it.
            return torch_gpt.train_step(loss, adamw, batch, config.grad_clip).clone()

    return step


def time_side(
    device: str, side: str, shape: str, bias: bool, gpus: int, mesh: str
) -> tuple[list[float], float]:
    """Milliseconds a step, after the first five, and the last one's loss."""
    config, batch_size, steps = make_config(device, shape, bias)
    ours = side.startswith("gptjax")
    if "float32" in side:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, dtype="float32")
        )
    if ours:
        batch_size *= gpus
        cfg = dataclasses.replace(config.model, kernels="off" if "off" in side else "auto")
        config = dataclasses.replace(config, model=cfg, batch_size=batch_size, mesh=mesh)
    rng = np.random.default_rng(RANK)
    size = (batch_size, config.model.block_size + 1)
    dtype = np.int32 if ours else np.int64
    batches = [rng.integers(0, config.model.vocab_size, size).astype(dtype) for _ in range(8)]
    step = make_gptjax_step(config, gpus) if ours else make_torch_step(config, device, side, gpus)
    for i in range(5):
        step(batches[i]).item()
    times, loss, started = [], math.nan, STARTED[device]
    for first in range(5, 5 + steps, started):
        began = time.perf_counter()
        for i in range(first, first + started):
            result = step(batches[i % 8])
        loss = result.item()
        times.append(1e3 * (time.perf_counter() - began) / started)
    return times, loss


def main() -> None:
    """Run all sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=SHAPES, default="cpu", help="gpu: NVIDIA GPUs")
    parser.add_argument("--gpus", type=int, default=1, help="as many share a step")
    parser.add_argument("--mesh", default="data", help="how gptjax's share it; see train.py --help")
    parser.add_argument("--bias", action="store_true", help="biases everywhere, as GPT-2 has them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--shape", action="append", help="time these alone, by a part of their name"
    )
    parser.add_argument("--side", help="run this side alone, print its times and loss")
    args = parser.parse_args()
    asked = args.shape or [""]
    shapes = [name for name in SHAPES[args.device] if any(part in name for part in asked)]
    if args.side:
        times_and_loss = time_side(
            args.device, args.side, shapes[0], args.bias, args.gpus, args.mesh
        )
        if RANK == 0:
            print(json.dumps(times_and_loss))
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch"))
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {platform.machine()}, {versions}, {args.rounds} rounds")
    # JAX alone would take 3/4 of a GPU's memory, PyTorch takes all.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    sides = SIDES[args.device]
    for shape in shapes:
        times: dict[str, list[list[float]]] = {side: [] for side in sides}
        losses: dict[str, float] = {}
        for _ in range(args.rounds):
            for side in sides:
                command = [sys.executable, "-m"]
                if args.gpus > 1 and not side.startswith("gptjax"):
                    command += ["torch.distributed.run", f"--nproc-per-node={args.gpus}", "-m"]
                command += ["benchmarks.training_step", f"--device={args.device}", f"--side={side}"]
                command += [f"--shape={shape}", f"--gpus={args.gpus}", f"--mesh={args.mesh}"]
                command += ["--bias"] if args.bias else []
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True, env=environment
                )
                steps, losses[side] = json.loads(done.stdout.splitlines()[-1])
                times[side].append(steps)
        config, batch_size, _ = make_config(args.device, shape, args.bias)
        tokens = args.gpus * batch_size * config.model.block_size
        medians = {s: statistics.median(map(statistics.median, t)) for s, t in times.items()}
        where = f"{shape} on each of {args.gpus} GPUs, {args.mesh}" if args.gpus > 1 else shape
        print(
            f"\n| {where} | median ms | fastest ms | tokens/s | gptjax is ... times as fast", end=""
        )
        print(" | loss of the last step |\n|---|---|---|---|---|---|")
        for side, median in medians.items():
            fastest, ratio = min(map(min, times[side])), median / medians["gptjax"]
            rate = 1e3 * tokens / median
            row = f"| {side} | {median:.1f} | {fastest:.1f} | {rate:,.0f} | {ratio:.2f} |"
            print(f"{row} {losses[side]:.3f} |", flush=True)
        ours = [loss for side, loss in losses.items() if side.startswith("gptjax")]
        assert max(ours) < (1 + LARGEST_DIFFERENCE) * min(ours), f"gptjax's losses differ: {losses}"


if __name__ == "__main__":
    main()
