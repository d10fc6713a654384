"""The losses that a preset's run should have, and what the log says of one that has others."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.config import TrainConfig
from gptjax.data.datasets import Dataset
from gptjax.presets import PRESETS
from gptjax.settings import fields_of, flatten
from gptjax.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.training import bands
from gptjax.training.adapt import fit_batch
from gptjax.training.bands import Band, expected, find_band, place
from gptjax.training.run_log import RunLog
from gptjax.training.run_settings import read_settings

SHAKESPEARE = Dataset(
    "tinyshakespeare", CharTokenizer("abc"), [np.zeros(4, np.uint16)], [np.zeros(4, np.uint16)]
)
BAND = Band("mine", "text", "char", "measured", ((10, 2.0, 3.0), (20, 1.5, 2.5), (30, 1.7, 2.6)))


def settings(folder: Path, *argv: str, devices: int = 1) -> TrainConfig:
    """Return what a run of these flags has, when its batch has been cut for the devices."""
    config, given = read_settings([*argv, f"--out_dir={folder / 'out'}"])
    return fit_batch(config, devices, given)[0]


@pytest.mark.parametrize("band", bands.BANDS, ids=lambda band: band.preset)
def test_a_band_is_of_a_preset_and_of_its_steps(band: Band) -> None:
    preset = PRESETS[band.preset]
    assert [b.preset for b in bands.BANDS].count(band.preset) == 1
    assert preset.dataset in (band.dataset, "auto") and preset.tokenizer in (band.tokenizer, "auto")
    steps = [step for step, _, _ in band.losses]
    assert steps == sorted(set(steps)) and steps[0] > 0 and steps[-1] == preset.max_iters
    assert all(0 < low < high for _, low, high in band.losses)
    for step in steps:  # so that it is compared there if nothing is changed
        assert step % preset.eval_interval == 0 or step == preset.max_iters
    assert band.origin.startswith(("measured", "published", "extrapolated"))


def test_every_preset_has_a_band_but_the_one_that_goes_on_with_any_model() -> None:
    assert {band.preset for band in bands.BANDS} == set(PRESETS) - {"finetune_gpt2"}


def test_settings_that_decide_nothing_exist() -> None:
    assert set(fields_of(TrainConfig)) >= bands.FREE
    assert not {"learning_rate", "n_layer", "dropout", "optimizer", "max_iters"} & bands.FREE


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("band", bands.BANDS, ids=lambda band: band.preset)
def test_a_run_of_a_preset_has_its_band_on_any_number_of_devices(
    band: Band, devices: int, tmp_path: Path
) -> None:
    tokenizer: Any = SHAKESPEARE.tokenizer if band.tokenizer == "char" else FakeGPT2()
    data = dataclasses.replace(SHAKESPEARE, name=band.dataset, tokenizer=tokenizer)
    found = find_band(settings(tmp_path, band.preset, devices=devices), data)
    assert found is not None and found.preset == band.preset


@pytest.mark.parametrize(
    "name", ["data/fineweb10B", "fineweb10B", "/mnt/fineweb10B", "data/fineweb10B/*.bin"]
)
def test_a_band_is_found_wherever_the_data_is(name: str, tmp_path: Path) -> None:
    tokenizer: Any = FakeGPT2()
    data = dataclasses.replace(SHAKESPEARE, name=name, tokenizer=tokenizer)
    assert find_band(settings(tmp_path, "gpt2_fast"), data) is not None
    other = dataclasses.replace(data, name=f"{name}/other")
    assert find_band(settings(tmp_path, "gpt2_fast"), other) is None


class FakeGPT2:
    kind = "gpt2"


@pytest.mark.parametrize(
    "same",
    [
        *("--seed=2", "--dtype=bfloat16", "--eval_interval=50", "--init_from=auto", "--unroll=1"),
        *("--kernels=off", "--cache=int8"),
    ],
)
def test_a_setting_that_decides_nothing_keeps_the_band(same: str, tmp_path: Path) -> None:
    assert find_band(settings(tmp_path, same), SHAKESPEARE) is not None


@pytest.mark.parametrize(
    "other",
    [
        *("--learning_rate=2e-3", "--batch_size=16", "--dropout=0.1", "--n_layer=2", "--bias=True"),
        *("--max_iters=600", "--optimizer=adamw", "--muon_qkv=whole", "--val_fraction=0.2"),
        "--zero_projections=True",
    ],
)
def test_another_experiment_has_no_band(other: str, tmp_path: Path) -> None:
    assert find_band(settings(tmp_path, other), SHAKESPEARE) is None


def test_other_data_or_another_model_to_begin_with_has_no_band(tmp_path: Path) -> None:
    config = settings(tmp_path)
    assert find_band(config, dataclasses.replace(SHAKESPEARE, name="pydocs")) is None
    assert find_band(config, dataclasses.replace(SHAKESPEARE, tokenizer=ByteTokenizer())) is None
    assert find_band(dataclasses.replace(config, init_from="out/other"), SHAKESPEARE) is None


def test_what_is_expected_between_known_steps() -> None:
    assert expected(BAND, 9) is None and expected(BAND, 31) is None
    assert expected(BAND, 20) == (1.5, 2.5)
    assert expected(BAND, 15) == (1.5, 3.0) and expected(BAND, 25) == (1.5, 2.6)
    losses = [1.4, 1.5, 2.5, 2.6, math.nan, math.inf]
    found = [place(BAND, 20, loss) for loss in losses]
    assert found == ["below", "in", "in", "above", "above", "above"]
    assert place(BAND, 0, 4.0) == ""


def test_the_log_says_when_a_run_leaves_its_band_once_and_that_it_ends_there() -> None:
    said: list[str] = []
    log: Any = object.__new__(RunLog)
    log.band, log.where, log.config = BAND, "", TrainConfig(max_iters=30, warmup_iters=0)
    log.note = said.append

    def lines(*losses: tuple[int, float]) -> list[str]:
        said.clear()
        for step, val_loss in losses:
            log._compare(step, val_loss)
        return [line.split(" the band")[0].split()[-1] for line in said]

    assert lines((0, 5.0), (10, 2.5), (20, 2.0), (30, 2.0)) == ["in"]
    assert lines((10, 3.5), (15, 3.4), (20, 2.6), (30, 2.0)) == ["above", "in"]
    assert lines((10, 3.5), (15, 2.9), (20, 2.6), (30, 1.0)) == ["above", "above", "below"]
    log.band = None
    assert lines((10, 3.5), (30, 2.0)) == []


def test_the_line_names_loss_band_preset_and_origin() -> None:
    line = bands.remark(BAND, 20, 2.6, "above")
    assert "\n" not in line
    assert all(part in line for part in ("step 20", "2.6000", "1.5 to 2.5", "mine", "(measured)"))


def test_every_setting_that_decides_is_compared() -> None:
    """A setting that is new counts as one that decides, unless FREE names it."""
    assert flatten(PRESETS["quickstart"]).keys() >= bands.DECIDING
    assert {"muon_momentum_warmup", "embedding_learning_rate", "block_size"} <= bands.DECIDING
