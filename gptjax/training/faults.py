"""Faults on demand, for tests of recovery: GPTJAX_FAULT=KIND@STEP or KIND@FIRST-LAST.

nan_grad makes loss and gradient NaN, overflow makes the gradient infinite, spike makes loss and
gradient 1000 times as large, raise fails as damaged data would, kill ends the process by SIGKILL,
each in these steps. Without the variable nothing of this is compiled in.
"""

import os
import re
import signal
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.errors import DataError, UsageError
from gptjax.model import Params

# Of loss and gradient.
FACTORS = {"nan_grad": (jnp.nan, jnp.nan), "overflow": (1.0, jnp.inf), "spike": (1e3, 1e3)}
Corrupt = Callable[[Array, Array, Params], tuple[Array, Params]]  # step, loss, grads -> the last 2


class Fault(NamedTuple):
    """A fault and the steps, both ends included, in which it strikes."""

    kind: str
    first: int
    last: int


def planned_fault() -> Fault | None:
    """Return the fault that the environment asks for; raise UsageError if it is misspelt."""
    text = os.environ.get("GPTJAX_FAULT")
    if not text:
        return None
    found = re.fullmatch(r"(nan_grad|overflow|spike|raise|kill)@(\d+)(?:-(\d+))?", text)
    if not found:
        kinds = "{nan_grad,overflow,spike,raise,kill}"
        raise UsageError(f"GPTJAX_FAULT={text}: must be {kinds}@STEP[-LAST]")
    first = int(found[2])
    return Fault(found[1], first, int(found[3] or first))


def make_corrupt(fault: Fault | None) -> Corrupt | None:
    """Return a function that spoils loss and gradient of the fault's steps, None if it does not."""
    if fault is None or fault.kind not in FACTORS:
        return None
    of_loss, of_grads = FACTORS[fault.kind]

    def corrupt(step: Array, loss: Array, grads: Params) -> tuple[Array, Params]:
        strikes = (step >= fault.first) & (step <= fault.last)
        grads = jax.tree.map(lambda g: jnp.where(strikes, g * of_grads, g), grads)
        return jnp.where(strikes, loss * of_loss, loss), grads

    return corrupt


def maybe_fail(fault: Fault | None, step: int) -> None:
    """Raise DataError or end by SIGKILL before a step for which the fault asks for that."""
    if fault is None or not fault.first <= step <= fault.last:
        return
    if fault.kind == "raise":
        raise DataError(f"GPTJAX_FAULT: the data of step {step} fails")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
