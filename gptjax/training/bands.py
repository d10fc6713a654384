"""The validation losses to expect of each preset, and where those of a run lie beside them."""

from pathlib import Path
from typing import NamedTuple

from gptjax.config import TrainConfig
from gptjax.data.datasets import Dataset
from gptjax.presets import PRESETS
from gptjax.settings import architecture, experiment, flatten, names, run, state
from gptjax.training.adapt import step_rows


class Band(NamedTuple):
    """The losses between which a run of a preset should be at some steps, in nats per token."""

    preset: str
    dataset: str  # its name as the log shows it
    tokenizer: str  # its kind
    origin: str  # how the losses are known: measured, published or extrapolated
    losses: tuple[tuple[int, float, float], ...]  # step, least and greatest loss; by step


OPENAIS = (
    "extrapolated: no such run is published; OpenAI's model of this size has the upper loss on "
    "OpenWebText by nanoGPT's README"
)
BANDS = (
    Band(
        "quickstart",
        "tinyshakespeare",
        "char",
        "measured with 3 seeds on a CPU",
        ((325, 2.14, 2.26), (650, 1.91, 2.02), (975, 1.74, 1.84), (1300, 1.66, 1.74)),
    ),
    Band(
        "quickstart_bf16",
        "tinyshakespeare",
        "char",
        "measured with one seed on a CPU",
        ((325, 2.07, 2.20), (650, 1.80, 1.91), (975, 1.67, 1.78), (1300, 1.58, 1.66)),
    ),
    Band(
        "shakespeare_char",
        "tinyshakespeare",
        "char",
        "measured with 2 seeds on one H100",
        (
            *((250, 2.03, 2.14), (500, 1.66, 1.76), (750, 1.54, 1.62), (1000, 1.48, 1.54)),
            *((1500, 1.44, 1.49), (2000, 1.42, 1.48), (3000, 1.46, 1.56)),
            *((4000, 1.55, 1.70), (5000, 1.60, 1.80)),  # it overfits
        ),
    ),
    Band(
        "shakespeare_char_fast",
        "tinyshakespeare",
        "char",
        "measured with one seed on one H100",
        ((600, 1.50, 1.61), (960, 1.43, 1.51), (1200, 1.40, 1.48)),
    ),
    Band(
        "gpt2",
        "data/openwebtext",
        "gpt2",
        "published: nanoGPT's README ends near 2.85; the steps before are extrapolated",
        ((2000, 3.4, 4.2), (20_000, 2.95, 3.25), (600_000, 2.78, 2.92)),
    ),
    Band(
        "gpt2_fast",
        "data/fineweb10B",
        "gpt2",
        "extrapolated from Muon's published runs with rotary positions, and llm.c's with AdamW",
        ((1000, 3.6, 4.1), (3500, 3.3, 3.75), (7000, 3.22, 3.36)),
    ),
    Band(
        "gpt2_medium",
        "data/openwebtext",
        "gpt2",
        OPENAIS,
        ((20_000, 2.6, 3.2), (600_000, 2.45, 2.84)),
    ),
    Band(
        "gpt2_large",
        "data/openwebtext",
        "gpt2",
        OPENAIS,
        ((20_000, 2.45, 3.2), (600_000, 2.25, 2.67)),
    ),
    Band(
        "gpt2_xl",
        "data/openwebtext",
        "gpt2",
        OPENAIS,
        ((20_000, 2.35, 3.2), (600_000, 2.1, 2.54)),
    ),
)

# What may differ from the preset's: the losses stay within the band whatever it is.
FREE = {
    *("vocab_size", "vocab_multiple", "dtype", "reduce_dtype", "attention", "unroll", "remat"),
    *("kernels", "cache"),
    *("seed", "batch_size", "gradient_accumulation_steps", "decode_errors", "allow_special"),
    *("loss_scale", "loss_scale_growth_interval", "skip_spikes", "max_skips"),
    *("eval_interval", "eval_batch_size", "log_interval", "loss_axis"),
    *("sample_interval", "sample_tokens", "checkpoint_interval", "keep_checkpoints"),
    *("mesh", "steps_per_dispatch"),
}
DECIDING = set(names(TrainConfig, architecture, state, experiment, run)) - FREE
DECIDING |= {"val_dataset", "val_fraction"}


def data_name(name: str) -> str:
    """Return the last part of the name of a data set, whose folder may be anywhere."""
    return Path(name.removesuffix("/*.bin")).name


def find_band(config: TrainConfig, dataset: Dataset) -> Band | None:
    """Return the band of the preset that a run is: its settings, its data, from the beginning.

    Args:
        config: the settings of the run, with the batch as it is on this machine.
        dataset: what it is trained on.

    Returns:
        None where a setting that decides the losses is not the preset's, or no band is known.
    """
    settings, rows = flatten(config), config.batch_size * config.gradient_accumulation_steps
    for band in BANDS:
        preset = PRESETS[band.preset]
        same = {name: flatten(preset)[name] for name in DECIDING}.items() <= settings.items()
        data = (data_name(dataset.name), dataset.tokenizer.kind)
        fresh = config.init_from in ("scratch", "auto")
        known = (data_name(band.dataset), band.tokenizer)
        if same and data == known and fresh and rows == step_rows(preset, ()):
            return band
    return None


def expected(band: Band, step: int) -> tuple[float, float] | None:
    """Return the least and greatest loss after `step` steps; None before the first that is known.

    Between two steps that are known it is the least and the greatest of both.
    """
    after = [losses for losses in band.losses if losses[0] >= step][:1]
    before = [losses for losses in band.losses if losses[0] <= step][-1:]
    if not (before and after):
        return None
    return min(low for _, low, _ in before + after), max(high for *_, high in before + after)


def place(band: Band, step: int, val_loss: float) -> str:
    """Return "above", "below" or "in" for a loss after `step` steps; "" where none is known."""
    found = expected(band, step)
    if found is None:
        return ""
    low, high = found
    return "below" if val_loss < low else "in" if val_loss <= high else "above"  # above: NaN too


def remark(band: Band, step: int, val_loss: float, where: str) -> str:
    """Return the line about a loss that is in its band, or has left it.

    Args:
        band: the band.
        step: steps done.
        val_loss: after them.
        where: as of `place`, but not "".
    """
    losses = expected(band, step)
    assert losses is not None
    about = {
        "above": "; is the data whole, and has anything been changed in the code?",
        "below": "; is text of the validation split in the training data?",
        "in": "",
    }
    return (
        f"step {step}: val loss {val_loss:.4f} is {where} the band of {band.preset}, "
        f"{losses[0]:g} to {losses[1]:g} ({band.origin}){about[where]}"
    )
