"""What a device holds under each layout: `python -m benchmarks.layouts`.

The step is compiled for 8 emulated devices, and not run. `--n_layer`, `--n_embd`, `--n_head` and
`--batch_size` choose the model.
"""

import argparse
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from gptjax.config import GPTConfig, TrainConfig, parse_mesh
from gptjax.model import count_params
from gptjax.sharding import make_mesh
from gptjax.training.step import abstract_state, make_train_step

MESHES = {
    "one device": ("data", 1),
    "data:8": ("data:8", 8),
    "zero1:8": ("zero1:8", 8),
    "fsdp:8": ("fsdp:8", 8),
    "data:2,fsdp:4": ("data:2,fsdp:4", 8),
    "tensor:4": ("tensor:4", 4),
    "data:2,tensor:4": ("data:2,tensor:4", 8),
    "fsdp:2,tensor:4": ("fsdp:2,tensor:4", 8),
}


def measure(cfg: GPTConfig, mesh: str, devices: int, batch_size: int) -> tuple[float, float]:
    """GB that a device holds between steps, and those that it needs beside them in a step."""
    config = TrainConfig(model=cfg, mesh=mesh, batch_size=batch_size, warmup_iters=0)
    abstract = abstract_state(config, make_mesh(jax.devices()[:devices], parse_mesh(mesh)))
    windows = jax.ShapeDtypeStruct((1, 1, batch_size, cfg.block_size + 1), np.int32)
    step: jax.stages.Wrapped = make_train_step(config, abstract)  # type: ignore[assignment]
    memory = step.lower(abstract, windows).compile().memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("n_layer", 12), ("n_head", 12), ("n_embd", 768), ("batch_size", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    cfg = GPTConfig(
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=args.n_embd,
        dtype="float32",
        attention="xla",
        unroll=1,  # compiles in seconds; what is held between steps is the same
    )
    print(f"{count_params(cfg):,} parameters, {args.batch_size} sequences in all, float32\n")
    print("| mesh | state, GB | of one device's | beside it in a step, GB |\n|---|---|---|---|")
    whole = None
    for name, (mesh, devices) in MESHES.items():
        held, temporary = measure(cfg, mesh, devices, args.batch_size)
        whole = whole or held
        print(f"| `{name}` | {held:.3f} | {held / whole:.3f} | {temporary:.2f} |", flush=True)


if __name__ == "__main__":
    main()
