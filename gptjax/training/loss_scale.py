"""Loss scaling, without which small gradients become 0 in float16.

The loss is multiplied by a scale before it is differentiated, and the gradients are divided by it
in float32. Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding

from gptjax.config import TrainConfig

# Powers of two, so that dividing by a scale is exact.
FIRST = 2.0**16
LEAST = 1.0  # a gradient that overflows here overflows without a scale too
# 2^-24 is the least number above 0 in float16: this scale keeps gradients down to 4e-15, and what
# is smaller is nothing beside adamw's eps of 1e-8.
LARGEST = 2.0**24


class LossScale(NamedTuple):
    """The scale of the next step's loss; part of the training state in float16."""

    scale: Array  # float32
    good_steps: Array  # int32, steps in a row with this scale whose gradient was finite


def init_loss_scale(config: TrainConfig) -> LossScale | None:
    """Return the scale before the first step; None where the computation is not in float16."""
    if config.model.dtype != "float16":
        return None
    scale = jnp.full((), config.loss_scale or FIRST, jnp.float32)
    return LossScale(scale, jnp.zeros((), jnp.int32))


def abstract_loss_scale(sharding: Sharding) -> LossScale:
    """Return the shapes, types and sharding of a saved scale, whatever the data type is now."""
    zeros = LossScale(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    return jax.tree.map(
        lambda zero: jax.ShapeDtypeStruct(zero.shape, zero.dtype, sharding=sharding), zeros
    )


def adjust(
    config: TrainConfig, now: LossScale, loss: Array, grad_norm: Array
) -> tuple[Array, LossScale]:
    """Return whether a step overflowed because of its scale, and the scale of the next step.

    A scale that is fixed never changes, and a step is never said to overflow because of it: it
    would again. Neither is one whose loss is not finite, for the loss is computed without a scale.

    Args:
        config: the settings.
        now: the scale of this step.
        loss: of the step, in nats per token, without the scale.
        grad_norm: the norm of its gradient, the scale divided out.
    """
    if config.loss_scale > 0:
        return jnp.array(False), now
    finite = jnp.isfinite(grad_norm)
    overflow = jnp.isfinite(loss) & ~finite & (now.scale > LEAST)
    good_steps = now.good_steps + finite
    grow = good_steps >= config.loss_scale_growth_interval
    lower, higher = jnp.maximum(now.scale / 2, LEAST), jnp.minimum(now.scale * 2, LARGEST)
    scale = jnp.where(overflow, lower, jnp.where(grow, higher, now.scale))
    return overflow, LossScale(scale, jnp.where(overflow | grow, 0, good_steps))


def resume_loss_scale(
    config: TrainConfig, saved: LossScale | None, notify: Callable[[str], None]
) -> LossScale | None:
    """Return the scale with which a resumed run goes on.

    Args:
        config: the settings, which may have another data type than the saved step.
        saved: the scale of the saved step, None if it was not computed in float16.
        notify: is told if a scale begins or ends here.
    """
    fresh = init_loss_scale(config)
    if fresh is None and saved is not None:
        notify(f"the loss scale {saved.scale:g} ends here: {config.model.dtype} needs none")
    if fresh is not None and saved is None:
        notify(f"the loss scale begins here, at {fresh.scale:g}")
    dynamic = fresh is not None and saved is not None and config.loss_scale == 0
    return saved if dynamic else fresh
