"""What adapter_config.json, of the peft kind, says about a LoRA adapter."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gptjax.conversion.fields import check_fields, is_one_of, says_nothing, shown
from gptjax.errors import DataError

MUST_BE: dict[str, tuple[object, ...]] = {  # what a field may say, if it says anything
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    "fan_in_fan_out": (True,),  # of Conv1D; A and B have the same shapes either way
    "use_rslora": (True,),
    # The others begin with another model than the base.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "use_bdlora", "megatron_config"), ()),
    **dict.fromkeys(("layer_replication", "loftq_config", "trainable_token_indices"), ()),
    **dict.fromkeys(("target_parameters", "alora_invocation_tokens", "arrow_config"), ()),
    **dict.fromkeys(("corda_config", "ensure_weight_tying"), ()),
}
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
READ |= {"modules_to_save", "layers_to_transform", "base_model_name_or_path"}
HARMLESS = {"auto_mapping", "eva_config", "inference_mode", "layers_pattern", "lora_dropout"}
HARMLESS |= {"megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"}
HARMLESS |= {"task_type"}


def check_adapter(fields: Mapping[str, Any], where: Path, accept: Collection[str]) -> None:
    """Raise DataError unless an adapter_config.json describes a LoRA that can be merged."""
    kind = fields.get("peft_type")
    if kind != "LORA":  # all its fields are another method's
        raise DataError(f"{shown('peft_type', kind)} ({where}): gptjax merges LORA only")
    problems = [
        f"{shown(name, fields[name])}, which gptjax cannot merge"
        for name, allowed in MUST_BE.items()
        if not says_nothing(fields.get(name)) and not is_one_of(fields[name], allowed)
    ]
    texts = ("target_modules", "exclude_modules", "modules_to_save")
    for name in texts:
        value = fields.get(name)
        several = isinstance(value, list) and all(isinstance(item, str) for item in value)
        text = name == "target_modules" and isinstance(value, str)
        if not (several or text or says_nothing(value)):
            problems.append(f"{shown(name, value)}, expected a list of names")
    layers = fields.get("layers_to_transform")
    if not (says_nothing(layers) or type(layers) is int or is_list_of(layers, int)):
        problems.append(f"{shown('layers_to_transform', layers)}, expected numbers of layers")
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values = fields.get(pattern) or {}
        if not isinstance(values, dict) or not all(re.fullmatch(r"\^?[\w.]+", k) for k in values):
            problems.append(f"{shown(pattern, values)}, expected names of layers")
            values = {}
        for value in (fields.get(name), *values.values()):
            if not is_positive(value):
                problems.append(f"{shown(name, value)}, expected a positive number")
    check_fields(fields, {*MUST_BE, *READ, *HARMLESS}, where, problems, accept)


def is_list_of(value: object, kind: type) -> bool:
    """Return whether a value is a list of this type alone, where true is no number."""
    return isinstance(value, list) and all(type(item) is kind for item in value)


def is_positive(value: object) -> bool:
    """Return whether a value is a number above 0 that a float can hold."""
    return type(value) in (int, float) and 0 < value < 1e30  # type: ignore[operator]


def is_named(module: str, names: object) -> bool:
    """Return whether one of the names, if any, is a layer's or the end of it, as peft says it."""
    path = module if module == "lm_head" else f"transformer.{module}"
    several = names if isinstance(names, list) else []
    return any(path == name or path.endswith(f".{name}") for name in several)


def rank_and_scale(module: str, fields: Mapping[str, Any]) -> tuple[float, float]:
    """Return a layer's rank, and by what B A is multiplied."""
    r = of_pattern(module, fields.get("rank_pattern"), fields["r"])
    alpha = of_pattern(module, fields.get("alpha_pattern"), fields["lora_alpha"])
    return r, alpha / (math.sqrt(r) if fields.get("use_rslora") else r)


def of_pattern(module: str, pattern: object, default: float) -> float:
    """Return what the first matching key of a rank_pattern or alpha_pattern says, or else r."""
    for key, value in (pattern or {}).items():  # type: ignore[attr-defined]
        path = module if module == "lm_head" else f"transformer.{module}"
        if is_named(module, [key]) or key == f"^{path}":
            return float(value)
    return default
