"""Section 3: what sixteen bits do to real gradients, and what a loss scale saves.

B rows, T time, N = B*T, V vocabulary.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gptjax import model
from gptjax.config import GPTConfig, TrainConfig
from gptjax.loss import loss_fn, token_losses
from gptjax.training.optimizer import make_optimizer, make_schedule
from scale.measuring import Measured, batch, characters, replace, train

FORMATS = ("float32", "bfloat16", "float16")


def scaled_gradient(
    cfg: GPTConfig, params: model.Params, windows_BT: Array, scale: Array | float
) -> tuple[Array, model.Params]:
    """The loss, and its gradient computed `scale` times as large and then divided by it."""

    def scaled_loss(params: model.Params) -> tuple[Array, Array]:
        loss = loss_fn(cfg, params, windows_BT)
        return loss * scale, loss

    grads, loss = jax.grad(scaled_loss, has_aux=True)(params)
    return loss, jax.tree.map(lambda g: g / scale, grads)


def adjust_scale(scale: float, streak: int, finite: bool, patience: int) -> tuple[float, int]:
    """The next loss scale, and how many steps in a row were finite with it."""
    if not finite:  # this step was skipped
        return scale / 2, 0
    if streak + 1 == patience:  # try whether there is room for more
        return scale * 2, 0
    return scale, streak + 1


def make_float16_step(config: TrainConfig) -> tuple[Any, Any]:
    """A jitted step in float16, and the parameters and moments before the first one."""
    cfg, optimizer = replace(config.model, dtype="float16"), make_optimizer(config)

    @jax.jit
    def step(state: Any, windows_BT: Array, scale: float) -> Any:
        params, opt_state = state
        loss, grads = scaled_gradient(cfg, params, windows_BT, scale)
        finite = jnp.isfinite(optax.tree.norm(grads))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), opt_state
        return loss, finite, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)

    params = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(config.seed))
    return step, (params, jax.jit(optimizer.init)(params))


def train_in_float16(
    step: Any, state: Any, windows: list[np.ndarray], scale: float, patience: int
) -> tuple[list[float], list[float]]:
    """Losses and loss scales of all steps; with `patience` 0 the scale stays as it is."""
    streak, losses, scales = 0, [], []
    for windows_BT in windows:
        loss, finite, state = step(state, windows_BT, scale)
        losses.append(float(loss))
        scales.append(scale)
        if patience:
            scale, streak = adjust_scale(scale, streak, bool(finite), patience)
    return losses, scales


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree in one float64 array."""
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def count_until_stall(dtype: str) -> int:
    """How far counting by ones gets; 2**24 in float32 is not waited for."""

    def add_one(total: Array, _: None) -> tuple[Array, None]:
        return total + jnp.ones((), dtype), None

    return int(jax.lax.scan(add_one, jnp.zeros((), dtype), length=5000)[0])


def measure(quick: bool) -> Measured:
    """Real gradients of a small trained model in float16 and bfloat16."""
    context, width, steps = (32, 32, 30) if quick else (64, 128, 200)
    data = characters(context)
    shape = GPTConfig(n_layer=2, n_head=4, n_embd=width, block_size=context, bias=False, unroll=1)
    cfg = model.resolve(replace(shape, vocab_size=data.tokenizer.n_vocab))
    config = TrainConfig(
        model=cfg,
        batch_size=16,
        max_iters=steps,
        warmup_iters=steps // 10,
        learning_rate=3e-3,
        min_lr=3e-4,
    )
    state, losses = train(config, data)
    params = state.params
    windows = batch(data, config, steps)

    def loss_of_logits(logits_NV: Array) -> Array:
        return token_losses(logits_NV, jnp.asarray(windows[:, 1:]).reshape(-1)).mean()

    logits, _ = jax.jit(functools.partial(model.forward, cfg))(params, windows[:, :-1])
    of_logits = flat(jax.jit(jax.grad(loss_of_logits))(logits.reshape(-1, logits.shape[-1])))
    gradient = jax.jit(scaled_gradient, static_argnums=0)
    exact = flat(gradient(cfg, params, windows, 1.0)[1])
    histogram = {}
    for name, numbers in (("parameters", exact), ("logits", of_logits)):
        powers = np.floor(np.log2(np.abs(numbers[numbers != 0])))
        bins, counts = np.unique(np.clip(powers, -50, 0), return_counts=True)
        histogram[name] = [
            [int(b), float(c / counts.sum())] for b, c in zip(bins, counts, strict=True)
        ]

    def lost(numbers: np.ndarray, dtype: str) -> float:
        numbers = numbers[numbers != 0]
        return float(np.mean(numbers.astype(np.float32).astype(jnp.dtype(dtype)) == 0))

    half = replace(cfg, dtype="float16")
    scales = []
    for power in range(-16, 33, 16 if quick else 4):
        found = flat(gradient(half, params, windows, 2.0**power)[1])
        finite = bool(np.isfinite(found).all())
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact) if finite else None
        zeros = float(np.mean(found[exact != 0] == 0))
        infinite = float(np.mean(~np.isfinite(found)))
        scales.append({"power": power, "error": error, "zeros": zeros, "not_finite": infinite})
    brain = flat(gradient(replace(cfg, dtype="bfloat16"), params, windows, 1.0)[1])

    # The last update that AdamW made, added to parameters of either format
    optimizer = make_optimizer(config)
    grads = gradient(cfg, params, windows, 1.0)[1]
    updates, _ = jax.jit(optimizer.update)(grads, state.opt_state, params)
    middle = make_schedule(config)(steps // 2) / make_schedule(config)(steps)
    weights, moves = flat(params), flat(updates) * float(middle)
    formats = []
    for dtype in FORMATS:
        info = jnp.finfo(dtype)
        kept = weights.astype(jnp.dtype(dtype))
        moved = (kept.astype(np.float64) + moves).astype(jnp.dtype(dtype))
        formats.append(
            {
                "format": dtype,
                "exponent_bits": int(info.nexp),
                "mantissa_bits": int(info.nmant),
                "largest": float(info.max),
                "smallest_normal": float(info.tiny),
                "count": count_until_stall(dtype),
                "lost_parameters": lost(exact, dtype),
                "lost_logits": lost(of_logits, dtype),
                "updates_without_effect": float(np.mean((kept == moved)[moves != 0])),
            }
        )
    step, start = make_float16_step(config)
    seen = [batch(data, config, i) for i in range(steps)]
    dynamic, trace = train_in_float16(step, start, seen, 2.0**32, 3 if quick else 20)
    fixed, _ = train_in_float16(step, start, seen, 1.0, 0)
    tiny, _ = train_in_float16(step, start, seen, 2.0**-12, 0)
    last = 10
    return {
        "shape": {"layers": 2, "width": width, "context": context, "steps": steps, "rows": 16},
        "histogram": histogram,
        "scales": scales,
        "bfloat16_error": float(np.linalg.norm(brain - exact) / np.linalg.norm(exact)),
        "formats": formats,
        "trace": [math.log2(scale) for scale in trace],
        "losses": {
            "float32": float(np.mean(losses[-last:])),
            "float16, dynamic scale": float(np.mean(dynamic[-last:])),
            "float16, no scale": float(np.mean(fixed[-last:])),
            "float16, scale 2^-12": float(np.mean(tiny[-last:])),
        },
    }


def formats_table(measured: Measured) -> str:
    """The three formats, and what they do to this model's numbers."""
    m = measured["precision"]
    lines = [
        "| | exponent, mantissa bits | largest | smallest normal | counting by ones stops at "
        "| parameter gradients that become 0 | logit gradients that become 0 "
        "| updates without effect |",
        "|---" * 8 + "|",
    ]
    for f in m["formats"]:
        count = "2^24" if f["format"] == "float32" else f"{f['count']:,}"
        shares = ("lost_parameters", "lost_logits", "updates_without_effect")
        lines.append(
            f"| {f['format']} | {f['exponent_bits']}, {f['mantissa_bits']} | {f['largest']:.3g} "
            f"| {f['smallest_normal']:.2g} | {count} | "
            + " | ".join(f"{f[share]:.1%}" for share in shares)
            + " |"
        )
    return "\n".join(lines)


def scale_table(measured: Measured) -> str:
    """The error of the float16 gradient against the loss scale, and the losses after training."""
    m = measured["precision"]
    lines = [
        "| loss scale | relative error of the gradient | zeros | infinite or NaN |",
        "|---|---|---|---|",
    ]
    for s in m["scales"]:
        error = "-" if s["error"] is None else f"{s['error']:.4f}"
        lines.append(f"| 2^{s['power']} | {error} | {s['zeros']:.1%} | {s['not_finite']:.1%} |")
    losses = "; ".join(f"{loss:.3f} in {how}" for how, loss in m["losses"].items())
    lines += [
        "",
        f"In bfloat16 without a scale the error is {m['bfloat16_error']:.4f}. The mean loss of the "
        f"last 10 of {len(m['trace'])} steps: {losses}. The dynamic scale starts at 2^32 and is "
        f"2^{m['trace'][-1]:.0f} at the end.",
    ]
    return "\n".join(lines)
