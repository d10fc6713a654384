"""The measurements of a run: utilisation of the device, metrics.jsonl, the plot of the losses."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Required, TypedDict, cast

import numpy as np

from gptjax.config import GPTConfig
from gptjax.errors import plural
from gptjax.files import append_line, replacing
from gptjax.model import count_params

# Device -> dense FLOP/s in half precision with float32 accumulation, from the makers' data sheets.
# A name is a whole one: an RTX 4070 Ti, or a part (MIG) of an A100, is another device.
PEAK_FLOPS = {
    "H100": 989e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H800 PCIE": 756e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "A100 PCIE": 312e12,
    "A800": 312e12,
    "A800 PCIE": 312e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 ADA GENERATION": 364.2e12,
    "RTX 3070": 40.6e12,
    "RTX 3080": 59.5e12,
    "RTX 3090": 71e12,
    "RTX 3090 TI": 80e12,
    "RTX 4070": 58.3e12,
    "RTX 4070 TI": 80.2e12,
    "RTX 4080": 97.5e12,
    "RTX 4080 SUPER": 104.4e12,
    "RTX 4090": 165.2e12,
    "RTX 5070": 61.7e12,
    "RTX 5070 TI": 87.9e12,
    "RTX 5080": 112.6e12,
    "RTX 5090": 209.5e12,
    "TPU V4": 275e12,
    "TPU V5 LITE": 197e12,
    "TPU V5E": 197e12,
    "TPU V5": 459e12,
    "TPU V5P": 459e12,
    "TPU V6 LITE": 918e12,
    "TPU V6E": 918e12,
}
# The same for GPUs below compute capability 8.0, which have float16 only. A Quadro RTX 6000 is not
# here: the one without a fan has the same name and another peak.
FLOAT16_ONLY = {
    "V100": 125e12,
    "V100 PCIE": 112e12,
    "V100S PCIE": 130e12,
    "T4": 65e12,
    "TITAN RTX": 130.5e12,
    "RTX 2070": 29.9e12,
    "RTX 2080": 40.3e12,
    "RTX 2080 SUPER": 44.6e12,
    "RTX 2080 TI": 53.8e12,
}
# Words of a name that do not change what a device of the table computes.
NO_MATTER = {"NVIDIA", "GEFORCE", "TESLA", "SXM", "SXM2", "SXM3", "SXM4", "SXM5"}
NO_MATTER |= {"HBM2", "HBM2E", "HBM3", "HBM3E"}
NO_MATTER |= {"16GB", "32GB", "40GB", "80GB", "120GB", "141GB", "144G", "480GB"}


def flops_per_token(cfg: GPTConfig) -> int:
    """Return the training FLOPs of a token: 6N + 12LHQT, forward and backward.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, as nanoGPT counts it (attention not halved for
    causality, activation recomputation not counted).
    """
    n = count_params(cfg, without=("wpe",) if cfg.tie_head else ("wpe", "wte"))
    return 6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of one device; None where unknown, as in float32.

    Nor is it known in bfloat16 where the device has none, and computes in float32 instead.
    """
    peaks = {"float16": PEAK_FLOPS | FLOAT16_ONLY, "bfloat16": PEAK_FLOPS}.get(dtype, {})
    words = re.split(r"[\s-]+", device_kind.upper())
    return peaks.get(" ".join(word for word in words if word not in NO_MATTER))


class Record(TypedDict, total=False):
    """A line of metrics.jsonl, of training or of an evaluation; None stands for the unknown."""

    step: Required[int]
    loss: float | None  # nats per token
    grad_norm: float | None
    skipped: int
    learning_rate: float
    loss_scale: float  # in float16
    good_steps: int  # in a row with this scale
    tokens_per_second: int | None
    seconds: float  # since the run began
    mfu: float | None
    val_loss: float | None


class Recorder:
    """A collector of single steps' losses, of which it makes the records of metrics.jsonl."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float | None) -> None:
        """Take the work of a step, and the peak FLOP/s of all devices together, None if unknown."""
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak = peak
        self.losses: list[float] = []
        self.began = self.since = time.monotonic()  # since: when the last call was done
        self.calls = 0  # that are done
        self.step_seconds: float | None = None  # of the call whose steps are being added
        self.timed, self.elapsed = 0, 0.0  # steps of known duration since the last record

    def pause(self, seconds: float) -> None:
        """Leave these seconds out of the time of training."""
        self.since += seconds

    def arrive(self, steps: int) -> None:
        """Record that a call of so many steps is done; `add` then takes the steps one by one.

        They arrive together: each took its share of the time since the last call was done. Of the
        first two calls it is not known: a GPU may have finished both before the program that
        compiled the first one looked, and then the second would seem to take no time.
        """
        now = time.monotonic()
        self.step_seconds = (now - self.since) / steps if self.calls > 1 else None
        self.since, self.calls = now, self.calls + 1

    def add(self, loss: float) -> None:
        """Add the loss of one more step."""
        self.losses.append(loss)
        if self.step_seconds is not None:
            self.timed += 1
            self.elapsed += self.step_seconds

    def record(self, step: int, learning_rate: float, grad_norm: float, skipped: int = 0) -> Record:
        """Return the record of the steps since the last one, which end with `step`."""
        finite = [loss for loss in self.losses if np.isfinite(loss)]
        mean_loss = float(np.mean(finite)) if finite else None  # JSON knows no NaN
        pace = self.timed * self.tokens_per_step / self.elapsed if self.timed else None
        record: Record = {
            "step": step,
            "loss": mean_loss,
            "grad_norm": grad_norm if np.isfinite(grad_norm) else None,
            "skipped": skipped,
            "learning_rate": learning_rate,
            "tokens_per_second": None if pace is None else round(pace),
            "seconds": round(time.monotonic() - self.began, 2),
        }
        if self.peak is not None:
            record["mfu"] = None if pace is None else pace * self.flops_per_token / self.peak
        self.losses, self.timed, self.elapsed = [], 0, 0.0
        return record


def append_metrics(path: Path, record: Record) -> None:
    """Append a line of JSON; None stands for what is not known."""
    append_line(path, json.dumps(record))


def describe(record: Record) -> dict[str, str]:
    """Return a record's numbers as text by name, the important ones first."""
    pace, mfu = record["tokens_per_second"], record.get("mfu")
    shown = {
        "loss": "-" if record["loss"] is None else f"{record['loss']:.4f}",
        "lr": f"{record['learning_rate']:.2e}",
        "tok/s": "-" if pace is None else f"{pace:,}",
    }
    return shown | ({"mfu": "-" if mfu is None else f"{mfu:.1%}"} if "mfu" in record else {})


def read_metrics(path: Path, notify: Callable[[str], None] = lambda line: None) -> list[Record]:
    """Return all records of metrics.jsonl; `notify` is told how many lines were skipped, if any.

    A full disk or a crash may leave a blank line, NUL bytes or a part of a record anywhere. The
    last line, which a kill may have cut short, is not counted.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = [parse_record(line) for line in lines]
    skipped = sum(record is None for record in records[:-1])
    if skipped:
        what = plural(skipped, "line that is no record", "lines that are no records")
        notify(f"warning: skipped {skipped} {what} ({path})")
    return [record for record in records if record is not None]


def parse_record(line: bytes) -> Record | None:
    """Return the record in a line, None if it has no step or a loss that is not a number."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    losses = (record.get(name) for name in ("loss", "val_loss"))
    numbers = all(x is None or type(x) in (int, float) for x in losses)
    return cast(Record, record) if numbers else None


def drop_metrics_from(
    path: Path, step: int, notify: Callable[[str], None] = lambda line: None
) -> None:
    """Remove the records from `step` on, because a resumed run takes these steps again."""
    kept = [
        record
        for record in read_metrics(path, notify)
        if record["step"] < step or (record["step"] == step and "val_loss" in record)
    ]
    with replacing(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


def draw_losses(records: list[Record], path: Path, scale: str, n_vocab: int) -> None:
    """Draw train and validation loss over the steps into a PNG file, which is replaced whole.

    Args:
        records: the lines of metrics.jsonl.
        path: the file.
        scale: of the loss, linear or log.
        n_vocab: tokens of the vocabulary. ln(n_vocab) is the loss of a model that takes them all
            for equally likely, where a run begins.
    """
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s that --help need not pay
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    val = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if train:
        axes.plot(*bin_means(np.array(train)).T, color="tab:blue", linewidth=1.5, label="training")
    if val:
        label = f"validation, {val[-1][1]:.3f} at the end"
        axes.plot(*np.array(val).T, "o", color="tab:red", markersize=5, label=label)
    if train or val:
        label = f"ln {n_vocab:,}: all tokens equally likely"
        axes.axhline(np.log(n_vocab), color="gray", linestyle="--", linewidth=1, label=label)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    title = "Training and validation loss" if val else "Training loss"
    axes.set(title=title, xlabel="optimizer steps", ylabel="loss (nats per token)", yscale=scale)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for set_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_format(ticker.FormatStrFormatter("%g"))  # 3, not 3 x 10^0
    axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def bin_means(points: np.ndarray, bins: int = 200) -> np.ndarray:
    """Return means of neighbouring (step, loss) points, `bins` at most: less noise, and no lag."""
    return np.array([part.mean(axis=0) for part in np.array_split(points, min(bins, len(points)))])
