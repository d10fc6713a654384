"""The times at which something is due: functions of the settings and the number of steps done."""

import jax

from gptjax.config import TrainConfig
from gptjax.model import count_params

SMALL_MODEL = 20_000_000  # parameters, below which a GPU waits for Python between steps


def last_step(config: TrainConfig) -> int:
    """Return the number of steps after which this start of the run ends."""
    return min(config.max_iters, config.stop_step or config.max_iters)


def is_due(config: TrainConfig, step: int, interval: int) -> bool:
    """Return whether an action of every `interval` steps is due after `step` steps.

    The end of the run is always one of the times, and the only one if the interval is 0.
    """
    return step == config.max_iters or (interval > 0 and step % interval == 0)


def is_evaluation_due(config: TrainConfig, step: int) -> bool:
    """Return whether to evaluate after `step` steps."""
    return is_due(config, step, config.eval_interval)


def is_sample_due(config: TrainConfig, step: int) -> bool:
    """Return whether to write a sample after `step` steps."""
    return config.sample_tokens > 0 and is_due(config, step, config.sample_interval)


def is_checkpoint_due(config: TrainConfig, step: int) -> bool:
    """Return whether to save after `step` steps; the fresh state is not worth it."""
    return step > 0 and is_due(config, step, config.checkpoint_interval)


def is_anything_due(config: TrainConfig, step: int) -> bool:
    """Return whether to evaluate, sample or save after `step` steps."""
    checks = (is_evaluation_due, is_sample_due, is_checkpoint_due)
    return any(check(config, step) for check in checks)


def steps_per_call(config: TrainConfig) -> int:
    """Return how many steps a call of JAX takes if nothing is due in between."""
    small = jax.default_backend() != "cpu" and count_params(config.model) < SMALL_MODEL
    return config.steps_per_dispatch or (10 if small else 1)


def steps_of_next_call(config: TrainConfig, step: int, per_call: int) -> int:
    """Return how many steps the call from `step` on takes: `per_call`, or 1; 0 at the end.

    Two lengths are two compiled programs; any other number would be one more.
    """
    last = last_step(config)
    if step >= last:
        return 0
    too_long = step + per_call > last
    between = range(step + 1, step + per_call)
    return 1 if too_long or any(is_anything_due(config, i) for i in between) else per_call


def count_saves(config: TrainConfig) -> int:
    """Return how many checkpoints are on disk at once: those kept, the best, and a new one."""
    interval = config.checkpoint_interval
    saves = 2 + (config.max_iters // interval if interval else 0)
    return min(saves, config.keep_checkpoints + 2)
