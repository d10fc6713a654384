"""Measure what warmup, cosine and clipping are worth in lesson 2: `python lessons/ablations.py`.

Every arm is one run for each of three seeds, which changes the parameters and the windows. Writes
2_measured.json; the arms of one seed have the same start and the same windows.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import allocator, loss, model
from gptjax.config import GPTConfig, TrainConfig
from gptjax.data import batches
from gptjax.data.datasets import load_dataset
from gptjax.training import optimizer

MEASURED = Path(__file__).resolve().parent / "2_measured.json"
SEEDS = (1, 2, 3)
STEPS, BATCH_SIZE, BLOCK_SIZE = 400, 8, 64
DAMAGED = 300  # the step whose windows are random tokens, in the arms that say so
PEAKS = (3e-3, 1e-2)
ARMS: dict[str, dict[str, Any]] = {
    "all three": {},
    "no warmup": {"warmup_iters": 0},
    "no cosine": {"schedule": "constant"},
    "no clipping": {"grad_clip": 0.0},
}


def make_config(peak: float, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        max_iters=STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=peak,
        min_lr=peak / 10,
        warmup_iters=STEPS // 16,
        optimizer="adamw",
        schedule="cosine",
    )
    return replace(base, **changes)


def run(cfg: GPTConfig, config: TrainConfig, data: Any, damage: bool) -> list[float]:
    """The validation loss at the end, for each seed."""
    optimize = optimizer.make_optimizer(config)
    loss_fn = functools.partial(loss.loss_fn, cfg)

    @jax.jit
    def step(params: Any, state: Any, windows: Any) -> tuple[Any, Any]:
        updates, state = optimize.update(jax.grad(loss_fn)(params, windows), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    validate = jax.jit(loss_fn)
    starts = batches.eval_windows(data.val, BLOCK_SIZE, 320)
    val_windows = batches.read_windows(data.val, starts, BLOCK_SIZE, cfg.vocab_size)
    found = []
    for seed in SEEDS:
        params = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(seed))
        state = optimize.init(params)
        for i in range(config.max_iters):
            of = {"seed": seed, "step": i, "batch_size": BATCH_SIZE, "block_size": BLOCK_SIZE}
            windows = batches.sample_batch(data.train, n_vocab=cfg.vocab_size, **of)
            if damage and i == DAMAGED:
                rng = np.random.default_rng(seed)
                windows = rng.integers(cfg.vocab_size, size=windows.shape, dtype=np.int32)
            params, state = step(params, state, windows)
        found.append(round(float(validate(params, val_windows)), 4))
    return found


def main() -> None:
    allocator.keep_freed_memory()
    data = load_dataset("tinyshakespeare", block_size=BLOCK_SIZE, tokenizer="char")
    cfg = model.resolve(
        GPTConfig(
            n_layer=3,
            n_head=4,
            n_embd=96,
            block_size=BLOCK_SIZE,
            vocab_size=data.tokenizer.n_vocab,
            vocab_multiple=1,
        )
    )
    rows = []
    for peak in PEAKS:
        arms = [(name, False, changes) for name, changes in ARMS.items()]
        arms += [
            (f"{name}, one damaged batch", True, ARMS[name])
            for name in ("all three", "no clipping")
        ]
        for name, damage, changes in arms:
            losses = run(cfg, make_config(peak, **changes), data, damage)
            rows.append({"peak": peak, "arm": name, "val_losses": losses})
            print(peak, name, losses, flush=True)
    settings = {"seeds": SEEDS, "steps": STEPS, "layers": cfg.n_layer, "width": cfg.n_embd}
    MEASURED.write_text(json.dumps({**settings, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
