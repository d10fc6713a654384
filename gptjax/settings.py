"""Declarations of settings: the role of each, its help text, its section in --help.

A config is a frozen dataclass, and `n_layer: int = architecture(12, "Number of blocks.")` is one of
its fields. Whatever treats settings in different ways asks for their roles, and keeps no list.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from gptjax.errors import UsageError

T = TypeVar("T")


class Role:
    """How resuming and --init_from treat a setting; called, it declares a field."""

    def __call__(
        self,
        default: T,
        help: str,
        *,
        section: str = "",
        older: T | None = None,
        path: bool = False,
        zero: str = "",
    ) -> T:
        """Declare a field.

        Args:
            default: its value where nothing else is said.
            help: whole sentences for --help, with the unit; the default is added there.
            section: the heading in --help that begins with this field; "" = that of the field
                before it.
            older: its value in runs that are older than the field; None = the default.
            path: whether it may hold the path of a file or folder.
            zero: a word of the command line that means 0.
        """
        older = default if older is None else older
        said = {"help": help, "section": section, "path": path, "zero": zero}
        metadata = {"role": self, "older": older, **said}
        return dataclasses.field(default=default, metadata=metadata)


# What the model is. It comes with the parameters, and must equal the checkpoint's.
architecture = Role()
# What else decides which arrays are saved. It must equal the checkpoint's.
state = Role()
# What makes a run another experiment. It changes on resume only by --allow_change.
experiment = Role()
# What may change on resume; the change is said.
run = Role()
# Where the tokens come from. On resume the tokens themselves are compared, not this.
source = Role()
# Where and how a run is started, on which its numbers do not depend. It is kept, never compared.
local = Role()
# What is said of one start, and does not hold for the next.
once = Role()


def fields_of(config: Any) -> dict[str, Any]:
    """Return the fields of a config or its class by name, including those of nested configs."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        inside = dataclasses.is_dataclass(field.type)
        found |= fields_of(field.type) if inside else {field.name: field}
    return found


def names(config: Any, *roles: Role) -> list[str]:
    """Return the names of the settings that have one of these roles."""
    fields = fields_of(config).items()
    return [name for name, field in fields if field.metadata["role"] in roles]


def flatten(config: Any) -> dict[str, Any]:
    """Return the values of all settings by name, including those of nested configs."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def change(config: T, values: Mapping[str, object]) -> T:
    """Return the config with these values changed, including those of nested configs."""
    inside = {
        name: change(value, values)
        for name, value in vars(config).items()
        if dataclasses.is_dataclass(value)
    }
    own = {name: value for name, value in values.items() if name in vars(config)}
    return dataclasses.replace(config, **inside, **own)  # type: ignore[type-var]


def require(ok: bool, setting: str, value: object, rule: str) -> None:
    """Raise UsageError with the flag, its value and the rule, unless `ok`."""
    if not ok:
        raise UsageError(f"--{setting}={value}: {rule}")


def require_range(
    config: Any, settings: str, low: float, high: float = math.inf, *, below: bool = False
) -> None:
    """Raise UsageError unless low <= value <= high (< high if `below`) and finite, for each."""
    for setting in settings.split():
        value = getattr(config, setting)
        ok = low <= value and (value < high if below else value <= high)
        top = "" if high == math.inf else f" and {'below' if below else 'at most'} {high}"
        require(ok, setting, value, f"must be at least {low}{top}")
        require(abs(value) < math.inf, setting, value, "must be finite")
