"""Settings without a flag, changed to fit those with one."""

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from gptjax.config import TrainConfig
from gptjax.errors import UsageError


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
        divisors = [n for n in range(1, 2 * model.n_head) if width % n == 0]
        heads = min(divisors, key=lambda n: abs(n - model.n_head))
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
    return dataclasses.replace(config, model=model, warmup_iters=warmup, min_lr=min_lr), notes


def fit_batch(
    config: TrainConfig, n_devices: int, fixed: Container[str], how: str = ""
) -> tuple[TrainConfig, str | None]:
    """Make the batch divisible by the devices, with the same tokens per step if possible.

    Args:
        config: the settings.
        n_devices: how many devices share each forward pass.
        fixed: the settings that must stay as they are.
        how: the end of the advice, where it takes more than the flag.

    Returns:
        The settings, and a sentence for a person if they changed.

    Raises:
        UsageError: batch_size would have to change, but is fixed.
    """
    batch, passes = config.batch_size, config.gradient_accumulation_steps
    if batch % n_devices == 0:
        return config, None
    above = batch - batch % n_devices + n_devices
    if "batch_size" in fixed:
        choices = f"{above - n_devices} or {above}" if above > n_devices else f"{above}"
        raise UsageError(
            f"--batch_size={batch}: must be divisible by {n_devices} devices; take {choices}{how}"
        )
    total = batch * passes
    new, new_passes = above, passes
    if "gradient_accumulation_steps" not in fixed and total % n_devices == 0:
        new = next(b for b in range(above, total + 1, n_devices) if total % b == 0)
        new_passes = total // new
    config = dataclasses.replace(config, batch_size=new, gradient_accumulation_steps=new_passes)
    return config, (
        f"batch_size is {new} and gradient_accumulation_steps {new_passes}, not {batch} and "
        f"{passes}, so that each of {n_devices} devices takes an equal part"
    )
