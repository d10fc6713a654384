"""The settings of a run: those of a preset or of the run that is resumed, changed by flags."""

import contextlib
import dataclasses
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from gptjax import files, programs
from gptjax.config import TrainConfig
from gptjax.config_file import load_config
from gptjax.errors import UsageError
from gptjax.precision import cpu_computes_bfloat16
from gptjax.presets import PRESETS
from gptjax.settings import fields_of, names, once
from gptjax.terminal import flags, output
from gptjax.terminal.nanogpt_flags import config_file_problem
from gptjax.training.adapt import adapt_preset, keep_batch
from gptjax.training.origin import with_architecture_of


def read_settings(argv: list[str]) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the settings, and the values of the flags that were given.

    Flags count over the preset that a first word names, which is quickstart_bf16 without one where
    the CPU computes in it and quickstart elsewhere; on resume, over the settings that the run was
    started with.

    Raises:
        UsageError: a flag or the preset is unknown, or a value does not fit.
    """
    preset, named = "quickstart", bool(argv) and not argv[0].startswith("-")
    if named:
        preset, *argv = argv
    if preset not in PRESETS:
        problem = config_file_problem(preset)
        raise UsageError(problem or f"unknown preset {preset}: must be one of {', '.join(PRESETS)}")
    about = f"Train a GPT. A first word picks a preset: {', '.join(PRESETS)}."
    fast = not named and cpu_computes_bfloat16()
    config = PRESETS["quickstart_bf16" if fast else preset]
    prog = f"{programs.command('train.py')} [PRESET]"
    given = flags.read(argv, config, about, prog)
    if fast and not in_bfloat16(given):
        config = PRESETS["quickstart"]
    run_dir = files.expand(given.get("out_dir") or config.out_dir)
    settings = settings_to_go_on(run_dir, given.get("init_from"), given.get("replay"))
    if settings is not None:
        fresh = {name: getattr(config, name) for name in names(TrainConfig, once)}
        config = keep_batch(dataclasses.replace(load_config(settings), **fresh), given)
    else:
        source = given.get("init_from", config.init_from)
        config = with_shape_of(config, str(files.expand(source)))
        config, notes = adapt_preset(config, given)
        for note in notes:
            output.note(note)
    with name_settings(settings, given):
        return flags.apply(config, given), given


def in_bfloat16(given: dict[str, Any]) -> bool:
    """Return whether a CPU that computes bfloat16 would train in it with these flags."""
    asked = given.get("dtype", "auto"), given.get("kernels", "auto")
    return asked in (("auto", "auto"), ("bfloat16", "auto"))


@contextlib.contextmanager
def name_settings(settings: Path | None, given: Container[str]) -> Iterator[None]:
    """Add to a refusal of a setting without a flag that it comes from the run that is resumed.

    Args:
        settings: that run's config.json; None if no run is resumed.
        given: the flags.
    """
    try:
        yield
    except UsageError as error:
        flag, fields = re.match(r"--(\w+)", str(error)), fields_of(TrainConfig)
        if settings is None or flag is None or flag[1] in given or flag[1] not in fields:
            raise
        where = f"{flag[0]} comes from {settings}"
        if fields[flag[1]].metadata["path"]:
            where += (
                ", and a path counts from where the run was started: go there, or pass the flag"
            )
        raise UsageError(f"{error} ({where})") from error


def settings_to_go_on(run_dir: Path, init_from: str | None, replay: str | None) -> Path | None:
    """Return the config.json of the run that is resumed in this folder, None if none is."""
    path = run_dir / "config.json"
    return path if path.is_file() and (init_from in ("resume", "auto") or replay) else None


def with_shape_of(config: TrainConfig, init_from: str) -> TrainConfig:
    """Return the settings with the model in another run's folder, except its context length.

    So that flags are checked against the model that there will be, not the preset's.
    """
    path = Path(init_from)
    if not (path / "checkpoints").is_dir() or not (path / "config.json").is_file():
        return config
    theirs = load_config(path / "config.json").model
    theirs = dataclasses.replace(theirs, block_size=config.model.block_size)
    return dataclasses.replace(config, model=with_architecture_of(config.model, theirs))
