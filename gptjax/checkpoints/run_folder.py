"""A run folder: its settings, its tokenizer and the parameters of one of its steps."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from gptjax.config import GPTConfig, TrainConfig
from gptjax.config_file import load_config
from gptjax.errors import UsageError
from gptjax.model import Params, param_shapes
from gptjax.sharding import abstract_tree
from gptjax.tokenizer import Tokenizer, load_tokenizer


class Run(NamedTuple):
    """A trained model; `config.model` has the vocabulary's true size."""

    config: TrainConfig
    tokenizer: Tokenizer
    params: Params
    step: int
    folder: Path | None = None  # None: it was read from another format


Opened = Callable[[GPTConfig, Tokenizer], object]


def load_run(run_dir: Path, which: str = "best", opened: Opened = lambda *known: None) -> Run:
    """Load the parameters of the best, the latest or a numbered step, without its optimizer state.

    Args:
        run_dir: the run folder.
        which: best, latest or a number.
        opened: is told the model and the tokenizer, before the parameters are read.

    Raises:
        UsageError: the folder is not a run's, or has no such step.
        CheckpointError, DataError: what it holds cannot be read.
    """
    # Orbax takes a fifth of the time in which sample.py is imported: only who reads a run waits.
    from gptjax.checkpoints.restore import restore_params
    from gptjax.checkpoints.steps import best_step, require_steps

    if not (run_dir / "config.json").is_file():
        raise UsageError(f"{run_dir} is not a run folder: it has no config.json")
    config = load_config(run_dir / "config.json")
    saved = require_steps(run_dir)
    if which == "best":
        step = best_step(run_dir)
    elif which == "latest":
        step = saved[-1]
    elif re.fullmatch(r"\d+", which) and int(which) in saved:
        step = int(which)
    else:
        raise UsageError(f"--checkpoint={which}: must be best, latest or one of {saved}")
    tokenizer = load_tokenizer(run_dir)
    opened(config.model, tokenizer)
    shapes = param_shapes(config.model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = abstract_tree(shapes, jax.tree.map(lambda _: here, shapes))
    params = restore_params(run_dir, step, target)
    return Run(config, tokenizer, params, step, run_dir)
