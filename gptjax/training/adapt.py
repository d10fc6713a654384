"""Settings without a flag, changed to fit those with one."""

import dataclasses
import math
from collections.abc import Container, Mapping
from typing import Any

from gptjax.config import TrainConfig
from gptjax.errors import UsageError
from gptjax.model_config import nearest_divisor


def adapt_preset(config: TrainConfig, given: Mapping[str, Any]) -> tuple[TrainConfig, list[str]]:
    """Change a preset where its own values would collide with the flags that were given.

    Args:
        config: the preset.
        given: the flags' values, which may still be out of range: then nothing is changed.

    Returns:
        The preset, and a sentence for each change. What was given is never changed.
    """
    notes: list[str] = []
    model = config.model
    width = given.get("n_embd", 0)
    if width > 0 and width % model.n_head and "n_head" not in given:
        heads = nearest_divisor(width, model.n_head)
        notes.append(f"n_head is {heads}: {model.n_head} does not divide --n_embd={width}")
        model = dataclasses.replace(model, n_embd=width, n_head=heads)

    warmup, min_lr = config.warmup_iters, config.min_lr
    for flag in ("max_iters", "lr_decay_iters"):
        steps = given.get(flag, -1)
        off = flag == "lr_decay_iters" and steps == 0
        if steps < 0 or off or "warmup_iters" in given or warmup <= steps:
            continue
        notes.append(f"warmup_iters is {steps // 10}, a tenth of --{flag}, not {warmup}")
        warmup = steps // 10
    rate = given.get("learning_rate", 0.0)
    if 0 < rate < min_lr and "min_lr" not in given:
        notes.append(f"min_lr is {rate / 10:g}, a tenth of --learning_rate, not {min_lr:g}")
        min_lr = rate / 10
    config = dataclasses.replace(config, model=model, warmup_iters=warmup, min_lr=min_lr)
    if given.get("batch_size") == 0:  # auto: evaluations are the preset's on any machine
        config = dataclasses.replace(config, eval_batch_size=config.batch_size)
    return config, notes


# ---- The batch -----------------------------------------------------------------------------------


def keep_batch(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run to go on with, ready for another batch_size if one is given.

    The tokens of a step and the windows of an evaluation stay what they are, unless --allow_change
    names the batch.
    """
    allowed = given.get("allow_change", "").split(",")
    if "batch_size" not in given or {"batch_size", "gradient_accumulation_steps"} & {*allowed}:
        return config
    rows = config.batch_size * config.gradient_accumulation_steps
    return dataclasses.replace(
        config,
        batch_tokens=rows * config.model.block_size,
        eval_batch_size=config.eval_batch_size or config.batch_size,
    )


def step_rows(config: TrainConfig, given: Container[str]) -> int:
    """Return the sequences of a step that the settings ask for; 0 if --batch_size=auto decides.

    batch_tokens decides if it is not 0, but if it is not given and the number of passes is, not.
    """
    passes = config.gradient_accumulation_steps
    if "gradient_accumulation_steps" in given and "batch_tokens" not in given:
        return config.batch_size * passes
    tokens, block = config.batch_tokens, config.model.block_size
    return max(1, round(tokens / block)) if tokens else config.batch_size * passes


def check_batch(config: TrainConfig, n_devices: int, given: Container[str]) -> None:
    """Raise UsageError unless devices, context and what is given allow a batch of these tokens."""
    batch, tokens = config.batch_size, config.batch_tokens
    parts = {"block_size": config.model.block_size, "devices": n_devices}
    if "batch_size" in given and batch:
        if batch % n_devices:
            raise UsageError(f"--batch_size={batch}: {neighbours(batch, n_devices)}")
        parts = {"block_size": config.model.block_size, "batch_size": batch}
    exact = "gradient_accumulation_steps" in given and "batch_size" in parts
    if "gradient_accumulation_steps" in given:
        parts["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    unit = math.prod(parts.values())
    if "batch_tokens" in given and tokens and (tokens % unit or (exact and tokens != unit)):
        below = tokens // unit * unit
        choices = f"{below} or {below + unit}" if below and not exact else f"{unit}"
        product = " x ".join(f"{name}={value}" for name, value in parts.items())
        rule = "must be" if exact else "must be a multiple of"
        raise UsageError(f"--batch_tokens={tokens}: {rule} {unit} ({product}); take {choices}")


def neighbours(batch: int, n_devices: int) -> str:
    """Return the rule that a batch_size breaks, and the values beside it that do not."""
    above = batch - batch % n_devices + n_devices
    choices = f"{above - n_devices} or {above}" if above > n_devices else f"{above}"
    return f"must be divisible by {n_devices} devices; take {choices}"


def fit_batch(
    config: TrainConfig, n_devices: int, given: Container[str], *, resumed: bool = False
) -> tuple[TrainConfig, str | None]:
    """Cut a step into forward passes that the devices share equally, with the same tokens in it.

    A batch_size that is not given becomes the largest number up to it that divides the sequences of
    a step. Where none does, a new run takes the nearest number of passes, so that a step has a few
    tokens more or less.

    Args:
        config: the settings. A batch_size of 0, for auto, stays.
        n_devices: how many devices share each forward pass.
        given: the settings that must stay as they are.
        resumed: whether a saved run goes on, whose steps have so many tokens.

    Returns:
        The settings, and a sentence for a person if they changed.

    Raises:
        UsageError: what is given does not fit, or what is saved.
    """
    check_batch(config, n_devices, given)
    batch, passes = config.batch_size, config.gradient_accumulation_steps
    rows, passes_given = step_rows(config, given), "gradient_accumulation_steps" in given
    size_given = "batch_size" in given and batch > 0
    if resumed and not size_given and rows % n_devices:
        rule = f"{neighbours(batch or rows, n_devices)} with --allow_change=batch_size"
        raise UsageError(f"--batch_size={batch or 'auto'}: {rule}")
    wanted = rows // passes if passes_given else batch
    if wanted == 0:
        return config, None
    lower = range(max(wanted, n_devices) // n_devices * n_devices, 0, -n_devices)
    sizes = [wanted] if size_given or passes_given else lower
    fits = (size for size in sizes if size % n_devices == 0 and rows % size == 0)
    size = next(fits, -(-wanted // n_devices) * n_devices)
    count = passes if passes_given else max(1, round(rows / size))
    tokens = size * count * config.model.block_size if config.batch_tokens else 0
    fitted = dataclasses.replace(
        config,
        batch_size=size,
        gradient_accumulation_steps=count,
        batch_tokens=tokens,
        eval_batch_size=config.eval_batch_size or (batch if size != batch else 0),
    )
    if fitted == config:
        return config, None
    note = f"batch_size is {size} and gradient_accumulation_steps {count}"
    if not tokens:
        return fitted, (
            f"{note}, not {batch} and {passes}, so that each of {n_devices} devices takes an "
            "equal part"
        )
    asked = f", not {config.batch_tokens:,}" if tokens != config.batch_tokens else ""
    return fitted, f"{note}: {tokens:,} tokens in a step{asked}"
