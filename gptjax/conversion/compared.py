"""A run compared with a source, or a random model with itself: what `verify` does, as functions."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from gptjax.conversion.common_rows import common_rows, cut_reference
from gptjax.conversion.reference import how_read, load_reference, write_random_model
from gptjax.conversion.report import Compared
from gptjax.conversion.sources import SourceConfig, load_run_or_own, open_source
from gptjax.conversion.tensors import Source, read_params
from gptjax.conversion.verify import check_sizes, verify
from gptjax.files import file_sha256
from gptjax.presets import PRESETS
from gptjax.settings import require


def compare_run(
    run_dir: str,
    which: str,
    against: str,
    config: SourceConfig,
    *,
    resized: bool = False,
    hashes: bool = False,
) -> Compared:
    """Compare the model of a run with a source, by transformers.

    Args:
        run_dir: the run folder, or the name of a model that comes with gptjax.
        which: its step, as `load_run` takes it.
        against: the source, as `open_source` takes it.
        config: how to open the source.
        resized: whether to compare what both have, if only the numbers of tokens and positions
            differ.
        hashes: whether to compute the sha256 of the source's files.

    Raises:
        UsageError, DataError, CheckpointError: the run or the source cannot be read, or they have
            different architectures.
    """
    source = open_to_compare(against, config)
    run = load_run_or_own(Path(run_dir), which)
    check_sizes(run.config.model, source, resized)
    ours = common_rows(run.config.model, run.params, source.cfg)
    reference = load_reference(source)
    if ours.note:
        cut_reference(reference, ours.cfg)
    notes = tuple(filter(None, (how_read(source), source.assumed, *source.notes, ours.note)))
    checks = verify(ours.cfg, ours.params, reference)
    digests = sha256_of(source) if hashes else ()
    return Compared(f"{run_dir}, step {run.step}", against, notes, checks, digests)


def open_to_compare(against: str, config: SourceConfig) -> Source:
    """Open a source; let go what it holds in memory: the reference reads it a second time."""
    return open_source(against, config)._replace(read=unread)


def unread(name: str) -> np.ndarray:
    """Stand for the importer's reading, which is not asked for."""
    raise AssertionError(f"{name} is read by the reference")


def compare_random(size: str, config: SourceConfig, *, hashes: bool = False) -> Compared:
    """Compare a model of this size with random weights, written and read as any source.

    Raises:
        UsageError: there is no such size.
    """
    sizes = {name: preset.model for name, preset in PRESETS.items() if name != "finetune_gpt2"}
    sizes["tiny"] = dataclasses.replace(sizes["quickstart"], n_layer=2, vocab_size=256)
    sizes["distilgpt2"] = dataclasses.replace(sizes["gpt2"], n_layer=6)
    name = size.replace("-", "_")  # as Hugging Face writes them
    require(name in sizes, "size", size, f"must be one of {', '.join(sizes)}")
    cfg = dataclasses.replace(sizes[name], bias=True)
    if config.activation != "auto":
        cfg = dataclasses.replace(cfg, activation=config.activation)
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(cfg, Path(folder))
        source = open_source(folder, config)
        params, reference = read_params(source), load_reference(source)
        digests = sha256_of(source) if hashes else ()
        checks = verify(source.cfg, params, reference)
    ours, theirs = f"gptjax's model of the size {size}", "random weights that transformers wrote"
    return Compared(ours, theirs, (how_read(source),), checks, digests)


def sha256_of(source: Source) -> tuple[tuple[str, str], ...]:
    """Return name and sha256 of each file of a source's weights."""
    return tuple((path.name, file_sha256(path)) for path in source.files)
