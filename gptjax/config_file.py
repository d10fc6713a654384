"""config.json: the settings of a run as they are stored, perhaps by an older version."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gptjax.config import TrainConfig
from gptjax.errors import UsageError
from gptjax.settings import change, fields_of, require

# A setting's name in older versions -> its name today, "" where there is none any more.
RENAMED = {"loss_scale": "loss_axis", "strategy": ""}


def to_json(config: TrainConfig) -> str:
    """Return the settings as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load_config(path: Path) -> TrainConfig:
    """Read the settings that `to_json` wrote, perhaps in an older version.

    Raises:
        UsageError: the file is missing, is not JSON, or holds settings that do not exist or are of
            another type.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(stored, dict) and isinstance(stored.get("model"), dict)):
            raise ValueError("they are not a run's; convert_gpt2.py import makes a run of a model")
        values = complete(TrainConfig, stored.pop("model") | stored)
        check_types(TrainConfig, values)
        return change(TrainConfig(), values)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"cannot read the settings ({path}): {error}") from error
    except RecursionError as error:
        raise UsageError(f"cannot read the settings ({path}): they are nested too deep") from error


def complete(config: Any, stored: Mapping[str, object]) -> dict[str, object]:
    """Return stored settings under today's names, older ones filled in where there were none.

    A setting that is newer than the run gets the value by which the run was computed.
    """
    older = {name: field.metadata["older"] for name, field in fields_of(config).items()}
    found = older | {RENAMED.get(name, name): value for name, value in stored.items()}
    return {name: value for name, value in found.items() if name}


def check_types(config: Any, values: Mapping[str, object]) -> None:
    """Raise UsageError unless these are settings of the config, and of their types."""
    fields = fields_of(config)
    for name, value in values.items():
        require(name in fields, name, repr(value), "this version has no such setting")
        kind = fields[name].type
        if get_origin(kind) is Literal:
            ok, rule = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
        else:  # an int will do for a float
            ok, rule = type(value) in (kind, int if kind is float else kind), kind.__name__
        require(ok, name, repr(value), f"must be {rule}")
