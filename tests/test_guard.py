"""Steps that must not count leave no trace but in the count of steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import DataError, UsageError
from gptjax.training import faults, guard

from .test_training import PLAIN, train


def test_a_nan_step_leaves_parameters_and_moments_as_they_were() -> None:
    before, _ = train(PLAIN[:3])
    fault = faults.Fault("nan_grad", 3, 3)
    after, losses = train(PLAIN[:4], fault=fault)
    same = jax.tree.map(
        np.array_equal, (before.params, before.opt_state), (after.params, after.opt_state)
    )
    assert all(jax.tree.leaves(same))
    assert int(after.step) == 4 and int(after.guard.skipped) == int(after.guard.in_a_row) == 1
    assert np.isnan(losses[3]) and np.isfinite(losses[:3]).all()
    # The next step counts again, on its own data.
    further, losses = train(PLAIN[:5], fault=fault)
    assert np.isfinite(losses[4]) and int(further.guard.in_a_row) == 0
    assert not np.array_equal(further.params["wte"]["embedding"], before.params["wte"]["embedding"])


def test_the_gate_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: the step is judged, and taken all the same."""

    judge = guard.judge
    monkeypatch.setattr(
        "gptjax.training.step.judge", lambda *args: (jnp.array(True), judge(*args)[1])
    )
    after, _ = train(PLAIN[:4], fault=faults.Fault("nan_grad", 3, 3))
    assert np.isnan(after.params["wte"]["embedding"]).all()


def run_guard(values: list[float], skip_spikes: float) -> tuple[list[bool], guard.Guard]:
    state, oks = guard.init_guard(), []
    judge = jax.jit(guard.judge, static_argnums=3)
    for value in values:
        ok, state = judge(state, jnp.float32(value), jnp.float32(1 + value / 100), skip_spikes)
        oks.append(bool(ok))
    return oks, state


RNG = np.random.default_rng(0)
CALM = (3 + 0.1 * RNG.standard_normal(guard.WINDOW)).tolist()


@pytest.mark.parametrize(
    ("values", "skip_spikes", "skipped"),
    [
        ([*CALM, 3000.0, 3.0], 6.0, [guard.WINDOW]),
        ([*CALM, 3000.0, 3.0], 0.0, []),  # off
        ([*CALM[1:], 3000.0, 3.0], 6.0, []),  # the window was not full yet
        ([*CALM, float("nan"), 3000.0, 3.0, 3.1], 6.0, [guard.WINDOW, guard.WINDOW + 1]),
        ([*CALM, -3000.0], 6.0, []),  # a loss that falls is no spike
        ([float("inf"), 3.0, float("-inf")], 0.0, [0, 2]),
    ],
)
def test_what_is_skipped(values: list[float], skip_spikes: float, skipped: list[int]) -> None:
    oks, state = run_guard(values, skip_spikes)
    assert [i for i, ok in enumerate(oks) if not ok] == skipped
    assert int(state.skipped) == len(skipped)
    assert not (np.asarray(state.recent) > 1000).any() or skip_spikes == 0 or not skipped


def test_a_spike_in_the_gradient_alone_is_seen() -> None:
    _, state = run_guard(CALM, 6.0)
    ok, _ = guard.judge(state, jnp.float32(3.0), jnp.float32(50.0), 6.0)
    assert not ok


@pytest.mark.parametrize(
    ("text", "fault"), [("raise@3", (3, 3)), ("nan_grad@2-5", (2, 5)), ("", None)]
)
def test_faults_on_demand(monkeypatch: pytest.MonkeyPatch, text: str, fault: Any) -> None:
    monkeypatch.setenv("GPTJAX_FAULT", text)
    planned = faults.planned_fault()
    assert (planned and planned[1:]) == (fault or None)


def test_a_misspelt_fault_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJAX_FAULT", "nan@3")
    with pytest.raises(UsageError, match="GPTJAX_FAULT=nan@3"):
        faults.planned_fault()
    with pytest.raises(DataError):
        faults.maybe_fail(faults.Fault("raise", 3, 4), 4)
    faults.maybe_fail(faults.Fault("raise", 3, 4), 5)
