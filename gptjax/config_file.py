"""config.json: the settings of a run as they are stored, perhaps by an older version."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gptjax.config import TrainConfig
from gptjax.errors import UsageError
from gptjax.settings import change, fields_of, require

# A setting's name in older versions -> its name today, "" where there is none any more. If another
# setting has the name today, the type of the value tells which of the two it is.
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
    fields = fields_of(config)
    older = {name: field.metadata["older"] for name, field in fields.items()}

    def today(name: str, value: object) -> str:
        is_new = name in fields and is_of_type(fields[name].type, value)
        return name if is_new else RENAMED.get(name, name)

    found = older | {today(name, value): value for name, value in stored.items()}
    return {name: value for name, value in found.items() if name}


def is_of_type(kind: Any, value: object) -> bool:
    """Return whether a stored value is of a setting's type; an int will do for a float."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) in (kind, int if kind is float else kind)


def check_types(config: Any, values: Mapping[str, object]) -> None:
    """Raise UsageError unless these are settings of the config, and of their types."""
    fields = fields_of(config)
    for name, value in values.items():
        require(name in fields, name, repr(value), "this version has no such setting")
        kind = fields[name].type
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        rule = f"one of {', '.join(choices)}" if choices else kind.__name__
        require(is_of_type(kind, value), name, repr(value), f"must be {rule}")
