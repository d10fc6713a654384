"""What a run measures: utilisation of the device, metrics.jsonl, the picture of the losses."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import GPTConfig

# Part of the device's name -> dense FLOP/s in bfloat16 (float16 on T4) with float32 accumulation,
# from the makers' data sheets. The first match counts, so longer names stand before shorter ones.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
    "RTX 3070": 40.6e12,
    "RTX 3080": 59.5e12,
    "RTX 3090": 71e12,
    "RTX 4070": 58.3e12,
    "RTX 4080": 97.5e12,
    "RTX 4090": 165.2e12,
    "RTX 5080": 112.6e12,
    "RTX 5090": 209.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def flops_per_token(cfg: GPTConfig, n_params: int) -> int:
    """Training FLOPs per token, forward and backward: 6N + 12LHQT without position embeddings.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, as nanoGPT counts it (attention not halved for
    causality, activation recomputation not counted).
    """
    n = n_params - cfg.block_size * cfg.n_embd
    return 6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device, None where unknown (the table holds half precision only)."""
    if dtype == "float32":
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Add a line of JSON; None stands for what is not known."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def drop_metrics_from(path: Path, step: int) -> None:
    """Forget what was recorded from `step` on, because a resumed run takes these steps again."""
    kept = [
        record
        for record in read_metrics(path)
        if record["step"] < step or (record["step"] == step and "val_loss" in record)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))


def draw_losses(records: list[dict[str, Any]], path: Path, scale: str) -> None:
    """Draw train and validation loss over the steps; the file is replaced whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s that --help need not pay
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    val = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if train:
        steps, losses = np.array(train).T
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.5, label="train (smoothed)")
    if val:
        label = f"validation ({val[-1][1]:.3f} at the end)"
        axes.plot(*np.array(val).T, color="tab:red", marker="o", markersize=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_yscale(scale)
    axes.grid(alpha=0.3, which="both")
    if train or val:
        axes.legend(frameon=False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)


def smooth(values: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """Exponential moving average without the bias towards the first value."""
    average, total, out = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        out[i] = average / total
    return out
