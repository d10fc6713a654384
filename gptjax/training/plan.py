"""The times at which something is due: functions of the settings and the number of steps done."""

import math

import jax

from gptjax.config import TrainConfig
from gptjax.model import count_params

SMALL_MODEL = 20_000_000  # parameters, below which a GPU waits for Python between steps
SHORT_RUN = 20_000  # steps, up to which 5 s less to compile win more than 0.25 ms less a step


def last_step(config: TrainConfig) -> int:
    """Return the number of steps after which this start of the run ends."""
    return min(config.max_iters, config.stop_step or config.max_iters)


def is_small(config: TrainConfig) -> bool:
    """Return whether the model is so small that a GPU waits for Python between steps."""
    return count_params(config.model) < SMALL_MODEL


def needs_little_memory(config: TrainConfig) -> bool:
    """Return whether a run is known to need a small part of a GPU, before anything was read.

    The vocabulary is not known then, nor is the model where it comes from elsewhere.
    """
    known = config.init_from in ("scratch", "auto", "resume") and config.batch_size > 0
    return known and 12 * config.model.n_layer * config.model.n_embd**2 < SMALL_MODEL


def is_short(config: TrainConfig) -> bool:
    """Return whether a run wins more if XLA compiles for fewer seconds than by faster steps."""
    return is_small(config) and config.max_iters <= SHORT_RUN


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


def steps_per_call(config: TrainConfig, first: int = 0) -> int:
    """Return how many steps each call of JAX takes, from step `first` to the end.

    Calls end where something is due, and all take equally many steps: two lengths would be two
    programs, of which the second would be compiled in the middle of training.
    """
    small = jax.default_backend() != "cpu" and is_small(config)
    most = config.steps_per_dispatch or (10 if small else 1)
    sample_interval = config.sample_interval if config.sample_tokens else 0
    intervals = (config.eval_interval, sample_interval, config.checkpoint_interval)
    last = last_step(config)
    common = math.gcd(first, last, *(interval for interval in intervals if interval < last))
    return next(count for count in range(most, 0, -1) if common % count == 0)


def count_saves(config: TrainConfig) -> int:
    """Return how many checkpoints are on disk at once: those kept, the best, and a new one."""
    interval = config.checkpoint_interval
    saves = 2 + (config.max_iters // interval if interval else 0)
    return min(saves, config.keep_checkpoints + 2)
