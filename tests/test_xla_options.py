"""Options of XLA: given where they hold and are known, and left out elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gptjax import decoding, sharding, xla_options
from gptjax.config import TrainConfig
from gptjax.training import plan, step
from gptjax.training.step import options_of

from .helpers import tiny

CUBLAS, TRIALS = "xla_gpu_enable_triton_gemm", "xla_gpu_autotune_level"
IN_PLACE = "xla_cpu_copy_insertion_use_region_analysis"


def test_this_xla_has_them() -> None:
    """Or programs would be slower to compile or to run, and nobody would know."""
    assert xla_options.known(CUBLAS, False) == {CUBLAS: False}
    assert xla_options.known(TRIALS, 0) == {TRIALS: 0}
    assert xla_options.known(IN_PLACE, True) == {IN_PLACE: True}


def test_an_option_that_xla_does_not_have_is_left_out() -> None:
    assert xla_options.known("xla_gpu_no_such_option", True) is None


@pytest.mark.parametrize(("backend", "gpu", "cpu"), [("gpu", 1, 0), ("cpu", 0, 1), ("tpu", 0, 0)])
def test_each_is_for_one_backend(
    backend: str, gpu: int, cpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert (xla_options.products_by_cublas() is not None) == gpu
    assert xla_options.untuned() == ({CUBLAS: False, TRIALS: 0} if gpu else None)
    assert (xla_options.updates_in_place() is not None) == cpu


def test_short_runs_of_small_models_compile_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    small, large = tiny(), tiny(n_layer=24, n_embd=512, n_head=8)
    assert options_of(TrainConfig(model=small)) == {CUBLAS: False}
    assert options_of(TrainConfig(model=large)) is None
    assert options_of(TrainConfig(model=small, max_iters=plan.SHORT_RUN + 1)) is None


def test_the_programs_of_a_run_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown by one that XLA does not have, so that it refuses to compile."""
    config, mesh = TrainConfig(model=tiny()), sharding.make_mesh(jax.devices()[:1])
    abstract = step.abstract_state(config, mesh)
    windows = jax.ShapeDtypeStruct((1, 1, 8, 17), jnp.int32)
    rows = jax.ShapeDtypeStruct((8, 17), jnp.int32)
    wrong = {"xla_no_such_option": True}
    monkeypatch.setattr(step, "updates_in_place", lambda: None)
    monkeypatch.setattr(step, "products_by_cublas", lambda: wrong)
    train_step: Any = step.make_train_step(config, abstract)
    eval_step: Any = step.make_eval_step(config.model, abstract.params, step.options_of(config))
    for lowered in (train_step.lower(abstract, windows), eval_step.lower(abstract.params, rows)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
            lowered.compile()


def test_a_function_gets_its_options_at_its_first_call() -> None:
    asked: list[str] = []

    def options() -> dict[str, Any]:
        asked.append("now")
        return {IN_PLACE: True}

    def scaled(x: jax.Array, by: int) -> jax.Array:
        """Return x, scaled."""
        return by * x

    jitted = xla_options.Jitted(scaled, options, static_argnames="by")
    assert jitted.__doc__ == scaled.__doc__ and not asked
    assert jitted(jnp.ones(2), by=3).tolist() == [3, 3] and jitted(jnp.ones(2), 2).tolist() == [
        2,
        2,
    ]
    assert jitted.lower(jnp.ones(2), 3).compile()(jnp.ones(2)).tolist() == [3, 3]
    assert asked == ["now"]
    assert decoding.prefill.options is xla_options.untuned
