"""The settings of a run: a preset, or those of the run that goes on, and the flags over them."""

import dataclasses
from typing import Any

from gptjax import files
from gptjax.config import TrainConfig
from gptjax.config_file import load_config
from gptjax.errors import UsageError
from gptjax.presets import PRESETS
from gptjax.settings import names, once
from gptjax.terminal import flags, output
from gptjax.terminal.nanogpt_flags import config_file_problem
from gptjax.training.adapt import adapt_preset
from gptjax.training.start import name_settings, settings_to_go_on, with_shape_of


def read_settings(argv: list[str]) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the settings, and the flags that were given with their values.

    Flags count over the preset that a first word names; on resume, over the settings that the run
    was started with.

    Raises:
        UsageError: a flag or the preset is unknown, or a value does not fit.
    """
    preset = "quickstart"
    if argv and not argv[0].startswith("-"):
        preset, *argv = argv
    if preset not in PRESETS:
        problem = config_file_problem(preset)
        raise UsageError(problem or f"unknown preset {preset}: there are {', '.join(PRESETS)}")
    about = f"Train a GPT. A first word picks a preset: {', '.join(PRESETS)}."
    config = PRESETS[preset]
    given = flags.read(TrainConfig, argv, config, about)
    run_dir = files.expand(given.get("out_dir") or config.out_dir)
    settings = settings_to_go_on(run_dir, given.get("init_from"), given.get("replay"))
    if settings is not None:
        fresh = {name: getattr(config, name) for name in names(TrainConfig, once)}
        config = dataclasses.replace(load_config(settings), **fresh)
    else:
        source = given.get("init_from", config.init_from)
        config = with_shape_of(config, str(files.expand(source)))
        config, notes = adapt_preset(config, given)
        for note in notes:
            output.note(note)
    with name_settings(settings, given):
        return flags.apply(config, given), given
