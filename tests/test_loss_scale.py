"""float16 with loss scaling computes what float32 computes, overflows and resumes included."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from gptjax import sharding
from gptjax.checkpoints.restore import restore_extra
from gptjax.config import GPTConfig, TrainConfig, parse_mesh
from gptjax.loss import loss_fn
from gptjax.model import Params
from gptjax.terminal import cli
from gptjax.training import faults, loss_scale, step
from gptjax.training.loss_scale import LossScale, adjust

from .helpers import init_params, tiny

FLOAT16, FLOAT32 = (tiny(n_embd=16, dtype=dtype) for dtype in ("float16", "float32"))
STEPS = 200


def text(steps: int) -> np.ndarray:
    """Windows (1, K, 1, 8, 17) of a text that can be learnt: mostly the next id follows."""
    rng = np.random.default_rng(0)
    jumps = np.where(rng.random((steps, 8, 17)) < 0.2, rng.integers(0, 61, (steps, 8, 17)), 1)
    return (jumps.cumsum(axis=2) % 61).astype(np.int32)[None, :, None]


def run(
    windows: np.ndarray,
    cfg: GPTConfig = FLOAT16,
    fault: str = "",
    mesh: str = "data:1",
    **settings: Any,
) -> tuple[step.TrainState, dict[str, np.ndarray]]:
    """Train on windows (calls, K, A, B, T+1); the last state, and the metrics of each step."""
    fields = {"max_iters": STEPS, "warmup_iters": 20, "learning_rate": 3e-3, **settings}
    config = TrainConfig(model=cfg, **fields)
    axes = parse_mesh(mesh)
    devices = sharding.make_mesh(jax.devices()[: math.prod(axes.values())], axes)
    abstract = step.abstract_state(config, devices)
    struck = [int(number) for number in re.findall(r"\d+", fault)]
    planned = faults.Fault(fault.partition("@")[0], struck[0], struck[-1]) if fault else None
    state = step.init_state(config, abstract)
    train_step, found = step.make_train_step(config, abstract, planned), []
    for batch in windows:
        state, metrics = train_step(state, sharding.place(batch, devices, axis=2))
        metrics.pop("gradient_norms")
        found.append(jax.device_get(metrics))
    return state, {name: np.concatenate([m[name] for m in found]) for name in found[0]}


def largest_error(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], name: str
) -> np.ndarray:
    """The largest relative difference of a metric over all steps; NaN where there is one."""
    return np.max(np.abs(found[name] / wanted[name] - 1))


# ---- Equal to float32


@pytest.fixture(scope="module")
def exact() -> dict[str, np.ndarray]:
    return run(text(STEPS), FLOAT32)[1]


def assert_equal_to_float32(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> None:
    """Within five times what was measured: 9e-5 of the loss, 6e-4 of the gradient's norm.

    bfloat16, with 3 bits less, is 5e-4 and 4e-3 off.
    """
    assert largest_error(found, exact, "loss") <= 4e-4
    assert largest_error(found, exact, "grad_norm") <= 3e-3
    assert exact["loss"][-1] < 0.6 * exact["loss"][0]  # something was learnt meanwhile


@pytest.mark.parametrize("passes", [1, 2])
def test_float16_is_float32_over_200_steps(exact: dict[str, np.ndarray], passes: int) -> None:
    """Whether the scale is divided out of one gradient or of the sum of two passes."""
    state, found = run(text(STEPS).reshape(1, STEPS, passes, -1, 17))
    assert_equal_to_float32(found, exact)
    assert state.guard.skipped == 0 and state.loss_scale == (2**16, STEPS)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_float16_over_several_devices(exact: dict[str, np.ndarray]) -> None:
    """Each scales the loss of its own rows; what overflows on one of them counts for all."""
    windows = text(STEPS)[0, :10, None]
    state, found = run(windows, mesh="fsdp:2", fault="overflow@9")
    assert np.max(np.abs(found["loss"] / exact["loss"][:10] - 1)) <= 4e-4
    assert np.max(np.abs(found["grad_norm"][:9] / exact["grad_norm"][:9] - 1)) <= 3e-3
    assert state.loss_scale == (2**15, 0) and state.guard.skipped == 1


MISTAKES = {  # what a gradient is multiplied by where the scale is divided out wrongly
    "not divided out": lambda scale, passes: scale,
    "divided out in each pass and again of the sum": lambda scale, passes: 1 / scale,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_gate_turns_red(
    exact: dict[str, np.ndarray], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = step.loss_and_grad

    def wrong(cfg: GPTConfig, params: Params, windows: jax.Array, keys: Any, scale: Any) -> Any:
        loss, grads = right(cfg, params, windows, keys, scale)
        factor = MISTAKES[name](scale, windows.shape[0])
        return loss, jax.tree.map(lambda g: g * factor, grads)

    monkeypatch.setattr(step, "loss_and_grad", wrong)
    _, found = run(text(STEPS)[:, :5].reshape(1, 5, 2, 4, 17))
    first = {name: values[:5] for name, values in exact.items()}
    with pytest.raises(AssertionError):
        assert_equal_to_float32(found, first)


def test_gradients_that_underflow_do_not_with_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over 2^14 times as many tokens makes the gradient of each as small as it is here.

    Nine tenths of the parameters' gradient are 0 in float16 then; with a scale none is that should
    not be (its error is 0.0007).
    """
    monkeypatch.setattr(step, "loss_fn", lambda *args: loss_fn(*args) * 2.0**-14)
    params, windows = init_params(FLOAT32, jax.random.key(0)), text(1)[0, 0]
    compute = jax.jit(step.loss_and_grad, static_argnums=0)

    def gradient(cfg: GPTConfig, scale: float | None) -> np.ndarray:
        loss, grads = compute(cfg, params, windows, None, scale)
        assert abs(loss * 2**14 - np.log(61)) <= 0.1  # the scale is divided out of it too
        return np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])

    exact = gradient(FLOAT32, None)
    error = {
        scale: np.linalg.norm(gradient(FLOAT16, scale) - exact) / np.linalg.norm(exact)
        for scale in (None, 1.0, 2.0**16)
    }
    assert error[2.0**16] <= 0.003 and error[None] == error[1.0] >= 0.5
    assert np.linalg.norm(gradient(FLOAT32, 2.0**16) - exact) == 0  # powers of two are exact


# ---- The scale's life


def adjusted(values: list[tuple[float, float]], start: float = 8.0, **settings: Any) -> list[Any]:
    """(overflow, scale, good steps) after each (loss, gradient norm)."""
    config = TrainConfig(model=FLOAT16, loss_scale_growth_interval=3, **settings)
    now, found = LossScale(jnp.float32(start), jnp.int32(0)), []
    for loss, norm in values:
        overflow, now = adjust(config, now, jnp.float32(loss), jnp.float32(norm))
        found.append((bool(overflow), float(now.scale), int(now.good_steps)))
    return found


GOOD, OVER, NAN, INF = (3.0, 1.0), (3.0, np.inf), (np.nan, np.nan), (np.inf, 1.0)


def test_the_scale_of_the_next_step() -> None:
    assert adjusted([GOOD, GOOD, GOOD, GOOD]) == [
        (False, 8, 1),
        (False, 8, 2),
        (False, 16, 0),
        (False, 16, 1),
    ]
    assert adjusted([GOOD, GOOD, OVER, GOOD, (3.0, np.nan)])[2:] == [
        (True, 4, 0),
        (False, 4, 1),
        (True, 2, 0),
    ]
    # A loss that is not finite tells nothing of the scale; at 1 a gradient does not either.
    assert adjusted([GOOD, NAN]) == [(False, 8, 1), (False, 8, 1)]
    assert not adjusted([INF])[0][0]
    assert adjusted([OVER, OVER], start=2) == [(True, 1, 0), (False, 1, 0)]
    # From a scale that was fixed before: 0.5 may grow, 1.5 falls to 1.
    assert adjusted([GOOD] * 3, start=0.5)[-1] == (False, 1, 0)
    assert adjusted([OVER], start=1.5) == [(True, 1, 0)]
    assert adjusted([GOOD] * 3, start=2**24)[-1] == (False, 2**24, 0)
    assert adjusted([OVER, GOOD, GOOD, GOOD], loss_scale=8.0) == [(False, 8, 0)] * 4


def test_an_overflow_is_skipped_and_halves_the_scale() -> None:
    windows = text(6).reshape(6, 1, 1, 8, 17)
    before, _ = run(windows[:3], fault="overflow@3")
    after, _ = run(windows[:4], fault="overflow@3")
    assert (int(after.guard.skipped), int(after.guard.in_a_row), int(after.step)) == (1, 0, 4)
    assert after.loss_scale == (2**15, 0) and before.loss_scale == (2**16, 3)
    kept = jax.tree.map(np.array_equal, before[1:3], after[1:3])  # parameters and moments
    assert all(jax.tree.leaves(kept))
    further, metrics = run(windows, fault="overflow@3")
    assert further.loss_scale == (2**15, 2)
    assert metrics["loss_scale"].tolist() == [2**16] * 4 + [2**15] * 2
    assert metrics["next_loss_scale"].tolist() == [2**16] * 3 + [2**15] * 3
    assert np.isfinite(metrics["loss"]).all()  # also of the step that overflowed
    rates = metrics["learning_rate"]
    assert rates[4] == rates[3] < rates[5]  # it did not take one of the warmup's steps


def test_a_scale_that_begins_too_high_comes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**32)
    state, metrics = run(text(40), loss_scale_growth_interval=5)
    scales = metrics["loss_scale"]
    overflows = metrics["next_loss_scale"] < scales
    assert overflows[:4].all() and int(state.guard.skipped) == overflows.sum() < 20
    assert (metrics["next_loss_scale"] > scales).any() and (metrics["in_a_row"] == 0).all()
    assert np.log2(scales).tolist() == np.log2(scales).round().tolist()
    assert metrics["loss"][-1] < metrics["loss"][0]


def test_a_fixed_scale_stays_and_an_overflow_is_a_bad_step() -> None:
    state, metrics = run(
        text(5), fault="overflow@2-3", loss_scale=1000.0, loss_scale_growth_interval=1
    )
    assert metrics["next_loss_scale"].tolist() == [1000.0] * 5
    assert metrics["in_a_row"].tolist() == [0, 0, 1, 2, 0] and state.loss_scale == (1000, 0)


def test_other_types_have_no_scale() -> None:
    for cfg in (FLOAT32, tiny(dtype="bfloat16")):
        config = TrainConfig(model=cfg, loss_scale=8.0)
        state = step.abstract_state(config, sharding.make_mesh())
        assert state.loss_scale is None and set(state.extra()) == {"opt_state", "guard"}


# ---- The program


Started = tuple[Path, tuple[str, ...]]


@pytest.fixture
def started(tmp_path: Path, restore_process: None, monkeypatch: pytest.MonkeyPatch) -> Started:
    """A folder, and the flags of a run of 10 steps in float16 in it, on one device."""
    one = functools.partial(sharding.make_mesh, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one)
    (tmp_path / "a.txt").write_text("the cat sat on the mat and the dog ran\n" * 60)
    shape = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=8", "--batch_size=8")
    length = ("--max_iters=10", "--warmup_iters=2", "--eval_iters=1", "--sample_tokens=0")
    flags = ("--dtype=float16", "--loss_scale_growth_interval=4", "--log_interval=1")
    return tmp_path, (f"--dataset={tmp_path}/a.txt", *shape, *length, *flags)


def main(*argv: str) -> int:
    return cli.run(train.main, [*argv])


def test_a_run_in_the_middle_of_a_scales_life_is_resumed(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flags = started
    monkeypatch.setenv("GPTJAX_FAULT", "overflow@2")
    assert main(*flags, f"--out_dir={folder}/one") == 0
    said = capsys.readouterr().out
    changes = re.findall(r"^step \d+: loss scale \d+ -> \d+$", said, re.MULTILINE)
    assert changes == [
        "step 2: loss scale 65536 -> 32768",
        "step 6: loss scale 32768 -> 65536",
    ]
    assert not (folder / "one" / "bad_steps").exists()
    lines = map(json.loads, (folder / "one" / "metrics.jsonl").read_text().splitlines())
    scales = [line["loss_scale"] for line in lines if "loss" in line]
    assert scales == [2**16] * 3 + [2**15] * 4 + [2**16] * 3

    out = f"--out_dir={folder}/two"
    assert main(*flags, out, "--stop_step=8") == 0
    saved = restore_extra(folder / "two", 8)
    scale = {path: float(value) for path, value in saved.items() if "loss_scale" in path}
    assert sorted(scale.values()) == [1, 2**16]
    assert main(out, "--init_from=resume", "--stop_step=0") == 0
    ends = re.findall(r"state sha256=(\w+)", said + capsys.readouterr().out)
    assert len(ends) == 2 and ends[0] == ends[1]

    # Into another type the scale ends, and back it begins anew.
    again = (out, "--init_from=resume", "--allow_change=dtype")
    assert main(*again, "--dtype=float32", "--max_iters=11") == 0
    assert "the loss scale 65536 ends here" in capsys.readouterr().out
    assert not any("loss_scale" in path for path in restore_extra(folder / "two", 11))
    assert main(*again, "--dtype=float16", "--max_iters=12") == 0
    assert "the loss scale begins here, at 65536" in capsys.readouterr().out
    # A scale that is fixed on resume holds.
    assert main(out, "--init_from=resume", "--loss_scale=512", "--max_iters=13") == 0
    values = restore_extra(folder / "two", 13).items()
    assert sorted(float(value) for path, value in values if "loss_scale" in path) == [0, 512]


def test_what_stays_infinite_at_scale_1_ends_the_run(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flags = started
    monkeypatch.setattr(loss_scale, "FIRST", 2.0)
    monkeypatch.setenv("GPTJAX_FAULT", "overflow@1-99")
    assert main(*flags, f"--out_dir={folder}/out", "--max_skips=3") == 76
    said = capsys.readouterr()
    assert "step 1: loss scale 2 -> 1" in said.out
    bad = sorted(path.name for path in (folder / "out" / "bad_steps").iterdir())
    assert bad == ["2.json", "3.json", "4.json"] and "the last 3 steps up to 4" in said.err


def test_a_bad_step_is_replayed_with_its_scale(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flags = started
    out = f"--out_dir={folder}/out"
    assert main(*flags, out, "--loss_scale=1e9", "--stop_step=2") == 0  # overflows by itself
    record = json.loads((folder / "out" / "bad_steps" / "1.json").read_text())
    assert record["loss_scale"] == 1e9 and record["grad_norm"] in ("inf", "nan")
    assert main(out, f"--replay={folder}/out/bad_steps/1.json") == 0
    said = capsys.readouterr().out
    assert "step 1: the same tokens" in said and "not finite" in said
    assert f"loss {record['loss']:.6g}, recorded {record['loss']}" in said
    table = dict(re.findall(r"(\S+\[0\]) +\S+ +(\S+)", said))
    assert not np.isfinite(float(table["h/mlp/c_fc/kernel[0]"]))
