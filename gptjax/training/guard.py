"""Which updates count: one from a gradient that is not finite, or from a spike, does not."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

WINDOW = 128  # steps, as in llm.c


class Guard(NamedTuple):
    """The past that the judgement of the next step depends on; part of the training state."""

    recent: Array  # (WINDOW, 2) loss and gradient norm of the last good steps, NaN until there are
    skipped: Array  # int32, steps skipped so far
    in_a_row: Array  # int32, how many of them since the last good one, overflows not counted


def init_guard() -> Guard:
    """Return the guard before the first step."""
    none = jnp.zeros((), jnp.int32)
    return Guard(jnp.full((WINDOW, 2), jnp.nan, jnp.float32), none, none)


def judge(
    guard: Guard,
    loss: Array,
    grad_norm: Array,
    skip_spikes: float,
    overflow: Array | None = None,
) -> tuple[Array, Guard]:
    """Return whether a step's update counts, and the guard after it.

    It does not if loss or gradient norm is not finite or, with `skip_spikes` > 0 and after WINDOW
    good steps, lies more than `skip_spikes` standard deviations above the mean of the last WINDOW
    good ones. Skipped steps never enter the window, so that one NaN cannot blind it. A step that is
    known to `overflow` because of its loss scale is skipped, but not counted in `in_a_row`: the
    next one has another scale (see `loss_scale.adjust`).
    """
    values = jnp.stack([loss, grad_norm])
    ok = jnp.isfinite(values).all()
    recent = guard.recent
    if skip_spikes > 0:
        limit = recent.mean(axis=0) + skip_spikes * recent.std(axis=0)
        ok &= ~(values > limit).any()  # NaN, the limit of a window not yet full, refuses nothing
        recent = jnp.where(ok, jnp.concatenate([recent[1:], values[None]]), recent)
    skip = (~ok).astype(jnp.int32)
    bad = skip if overflow is None else (~ok & ~overflow).astype(jnp.int32)
    return ok, Guard(recent, guard.skipped + skip, (guard.in_a_row + bad) * skip)
