"""Utilisation by the published formula, records that survive a kill, a picture with both curves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.training import metrics


def test_flops_of_gpt2_small() -> None:
    found = metrics.flops_per_token(GPTConfig())
    assert found / 1e6 == pytest.approx(855, abs=1)  # MFLOP per token, nanoGPT's count


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L400", None),
        ("NVIDIA T400", None),
        ("NVIDIA T400 4GB", None),
        ("Quadro T400", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("Quadro RTX 6000", None),
        ("NVIDIA GeForce RTX 3080", 59.5e12),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3080 with Max-Q Design", None),
        ("NVIDIA GeForce RTX 4070", 58.3e12),
        ("NVIDIA GeForce RTX 4070 Ti", 80.2e12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None),
        ("NVIDIA GeForce RTX 4080 SUPER", 104.4e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA A100-SXM-64GB", None),  # one supercomputer's, with more multiprocessors
        ("GRID A100-10C", None),
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("", None),
        ("NVIDIA Z900", None),
    ],
)
def test_peaks(kind: str, peak: float | None) -> None:
    """Whole words count: a variant has a peak of its own, or none that is known."""
    assert metrics.peak_flops(kind, "bfloat16") == metrics.peak_flops(kind, "float16") == peak
    assert metrics.peak_flops(kind, "float32") is None


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-SXM3-32GB", 125e12),
        ("Tesla V100-PCIE-32GB", 112e12),
        ("Tesla V100S-PCIE-32GB", 130e12),
        ("Tesla V100-DGXS-32GB", None),
        ("NVIDIA GeForce RTX 2080 Ti", 53.8e12),
        ("NVIDIA GeForce RTX 2080 SUPER", 44.6e12),
        ("NVIDIA GeForce RTX 2080 Super with Max-Q Design", None),
        ("NVIDIA TITAN RTX", 130.5e12),
    ],
)
def test_peaks_of_devices_without_bfloat16(kind: str, peak: float | None) -> None:
    assert metrics.peak_flops(kind, "float16") == peak
    assert metrics.peak_flops(kind, "bfloat16") is metrics.peak_flops(kind, "float32") is None


def test_mfu_is_shown_where_the_peak_is_known() -> None:
    shown = []
    for peak in (None, 56.0):
        recorder = metrics.Recorder(tokens_per_step=7, flops_per_token=2.0, peak=peak)
        recorder.add(1.0)
        record = recorder.record(0, 0.1, 1.0)
        shown.append(("mfu" in record, metrics.describe(record).get("mfu")))
        shown.append(("mfu" in record, metrics.describe(record | {"mfu": 0.414}).get("mfu")))
    assert shown == [(False, None), (False, "41.4%"), (True, "-"), (True, "41.4%")]


def test_pace_of_steps_that_arrive_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps a call: one compiled, one ran meanwhile, one took 10 s less 5 s of pause."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    recorder = metrics.Recorder(tokens_per_step=7, flops_per_token=2.0, peak=56.0)
    paces = []
    for now[0] in (100.0, 100.1, 110.1):
        recorder.arrive(10)
        for _ in range(2):
            for _ in range(5):
                recorder.add(1.0)
            record = recorder.record(0, 0.1, 1.0)
            paces.append((record["tokens_per_second"], record["mfu"]))
        if now[0] > 100.0:
            recorder.pause(5.0)
    assert paces == [(None, None)] * 4 + [(14, 0.5)] * 2


def test_records_of_steps_taken_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(4):
        metrics.append_metrics(path, {"step": step, "val_loss": 2.0})
        metrics.append_metrics(path, {"step": step, "loss": 2.0})
    with path.open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    assert len(metrics.read_metrics(path)) == 8
    metrics.drop_metrics_from(path, 2)
    left = [(r["step"], "val_loss" in r) for r in metrics.read_metrics(path)]
    assert left == [(0, True), (0, False), (1, True), (1, False), (2, True)]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_picture_shows_both_losses(tmp_path: Path, scale: str) -> None:
    from matplotlib.image import imread

    path = tmp_path / "loss.png"
    train: list[metrics.Record] = [{"step": i, "loss": 4 / (i + 1)} for i in range(50)]
    val: list[metrics.Record] = [{"step": i, "val_loss": 4.5 / (i + 1)} for i in (0, 25, 49)]
    blank = []
    for records in ([], train, train + val):
        metrics.draw_losses(records, path, scale, 65)
        pixels = imread(path)[..., :3]
        blue = (pixels[..., 2] > pixels[..., 0] + 0.3).sum()
        red = (pixels[..., 0] > pixels[..., 2] + 0.3).sum()
        blank.append((blue > 300, red > 300))
    assert blank == [(False, False), (True, False), (True, True)]
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_picture_has_ln_v_as_a_line_and_evaluations_as_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    records: list[metrics.Record] = [{"step": 1, "loss": 4.0}, {"step": 1, "val_loss": 3.9}]
    metrics.draw_losses(records, tmp_path / "loss.png", "linear", 65)
    train, val, start = drawn[0].axes[0].lines
    assert (train.get_linestyle(), val.get_linestyle(), val.get_marker()) == ("-", "None", "o")
    assert np.allclose(np.array(start.get_ydata(), float), np.log(65))
    assert [text.get_text()[:5] for text in drawn[0].legends[0].get_texts()][2] == "ln 65"


def test_binned_curve_neither_lags_nor_loses_mass() -> None:
    points = np.column_stack([np.arange(1000.0), np.arange(1000.0) * 2 + 1])
    binned = metrics.bin_means(points)
    assert binned.shape == (200, 2)
    assert binned[:, 1] == pytest.approx(binned[:, 0] * 2 + 1)
    assert binned.mean(axis=0) == pytest.approx(points.mean(axis=0))
    assert metrics.bin_means(points[:7]) == pytest.approx(points[:7])


def test_a_record_is_a_line_of_json(tmp_path: Path) -> None:
    metrics.append_metrics(tmp_path / "m", {"step": 1, "mfu": None})
    assert json.loads((tmp_path / "m").read_text()) == {"step": 1, "mfu": None}


BROKEN = {
    "cut short, then one more": (b'{"step": 2, "lo{"step": 3, "loss": 1.0}\n', 1),
    "a blank line": (b"\n", 1),
    "NUL bytes": (b"\0" * 50 + b"\n", 1),
    "no UTF-8": (b"\xff\xfe\n\xff\n", 2),
    "other JSON": (b'[1]\n3\nnull\n{"a": 1}\n{"step": "4"}\n{"step": 4, "loss": "x"}\n', 6),
    "too deep": (b"[" * 100_000 + b"\n", 1),
    "cut short at the end": (b'{"step": 2, "lo', 0),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_skipped_and_counted(name: str, tmp_path: Path) -> None:
    """What a disk that was full for seconds, or a crash, may leave; then the run goes on."""
    broken, count = BROKEN[name]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + broken)
    metrics.append_metrics(path, {"step": 5, "loss": 1.5})
    said: list[str] = []
    assert [r["step"] for r in metrics.read_metrics(path, said.append)] == [1, 5]
    if name == "cut short at the end":  # it is in the middle now
        count = 1
    assert [line for line in said if f"skipped {count} line" in line] == said != []
    metrics.draw_losses(metrics.read_metrics(path), tmp_path / "loss.png", "linear", 65)
    metrics.drop_metrics_from(path, 5, said.append)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n' and len(said) == 2


def test_a_last_line_that_a_kill_cut_short_is_no_news(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    said: list[str] = []
    assert len(metrics.read_metrics(path, said.append)) == 1 and said == []


def test_a_picture_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "loss.png"
    path.write_bytes(b"older")

    def fill(figure: Figure, file: Any, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill)
    with pytest.raises(OSError, match="No space"):
        metrics.draw_losses([], path, "linear", 65)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"] and path.read_bytes() == b"older"
