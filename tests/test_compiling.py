"""What a run compiles ahead: the programs that it then calls, with the same results."""

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import sharding
from gptjax.config import TrainConfig
from gptjax.training import compiling
from gptjax.training.step import abstract_state, digest, init_state, make_eval_step, make_train_step

from .helpers import tiny

# A shape of its own: what other tests compiled would be found.
CONFIG = TrainConfig(model=tiny(n_embd=24, dropout=0.1), batch_size=3, sample_tokens=20)
WINDOWS = np.random.default_rng(0).integers(0, 61, (1, 1, 3, 17), dtype=np.int32)


TOKENIZER = SimpleNamespace(start_id=0, decode_bytes=lambda ids: b"x" * len(ids))
DATASET = SimpleNamespace(val=[np.arange(40, dtype=np.uint16)], tokenizer=TOKENIZER)


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "available_cpus", lambda: 4)


def begin(config: TrainConfig = CONFIG, **changes: Any) -> tuple[compiling.Loop, Any]:
    """Return the functions of a run on one device, and the shapes of its state."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    run = {
        "config": config,
        "steps": [],
        "mesh": mesh,
        "fault": None,
        "dataset": DATASET,
        **changes,
    }
    abstract = abstract_state(config, mesh)
    return compiling.begin(SimpleNamespace(**run), abstract), abstract  # type: ignore[arg-type]


def test_the_loop_calls_what_was_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """The calls themselves compile nothing, and give the same bits."""
    loop, abstract = begin()
    state, mesh = init_state(CONFIG, abstract), sharding.mesh_of(abstract)
    windows = sharding.place(WINDOWS, mesh, axis=2)
    caplog.set_level(logging.WARNING)
    with jax.log_compiles():
        assert loop.write_sample(state.params, lambda: False) == "x" * 20
        assert loop.validate(state.params, lambda: False) is not None
        state, _ = loop.train_step(state, windows)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    for name in ("train_step", "lambda", "prepare", "prefill", "decode"):
        assert not any(f"jit({name})" in line for line in compiled)
    plain, _ = make_train_step(CONFIG, abstract)(init_state(CONFIG, abstract), windows)
    assert digest(state) == digest(plain)


def test_shapes_take_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's first one takes more than a second, in which others can be compiled."""
    keys, make_key = [], jax.random.key

    def note(seed: int) -> jax.Array:
        keys.append(make_key(seed))
        return keys[-1]

    monkeypatch.setattr(jax.random, "key", note)
    abstract_state(CONFIG, sharding.make_mesh(jax.devices()[:1]))
    assert keys and all(isinstance(key, jax.core.Tracer) for key in keys)


def test_an_evaluation_s_layers_are_a_loop() -> None:
    """All layers one by one would be one more program that takes as long as the step's."""
    abstract = abstract_state(CONFIG, sharding.make_mesh(jax.devices()[:1])).params
    windows = jax.ShapeDtypeStruct((3, 17), np.int32)
    for unroll, loop in ((0, True), (CONFIG.model.n_layer, False)):
        step: Any = make_eval_step(dataclasses.replace(CONFIG.model, unroll=unroll), abstract)
        assert ("stablehlo.while" in step.lower(abstract, windows).as_text()) == loop


def test_a_state_that_is_made_has_the_types_of_one_that_is_restored() -> None:
    """Weakly typed arrays would compile every program once more."""
    abstract = abstract_state(CONFIG, sharding.make_mesh(jax.devices()[:1]))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(init_state(CONFIG, abstract)))


def test_what_fails_in_the_thread_fails_where_it_is_called() -> None:
    def fail() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: while compiling")

    assert compiling.Ahead(lambda x: 2 * x, fail)(21) == 42  # it may have been chance
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        compiling.Ahead(lambda: fail(), fail)()


@pytest.mark.parametrize(
    ("changes", "steps", "ahead"),
    [
        ({}, [], "train eval sample"),
        ({"sample_tokens": 0}, [], "train eval"),
        ({"eval_interval": 0, "sample_interval": 0}, [], "train"),  # they come at the end
        ({"max_iters": 0, "warmup_iters": 0}, [], "eval sample"),
        ({}, [250], "train"),  # it may have been evaluated already
    ],
)
def test_only_what_the_first_round_calls_is_compiled(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], steps: list[int], ahead: str
) -> None:
    """A run that evaluates nothing compiles no evaluation."""
    begun = []

    class Noted(compiling.Ahead):
        def __init__(self, function: Any, compile_programs: Any) -> None:
            begun.append(function.__name__)

    monkeypatch.setattr(compiling, "Ahead", Noted)
    begin(dataclasses.replace(CONFIG, **changes), steps=steps)
    names = {"train_step": "train", "<lambda>": "eval", "write_sample": "sample"}
    assert sorted(names[name] for name in begun) == sorted(ahead.split())


def test_few_cores_compile_one_program_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(begin()[0].train_step, compiling.Ahead)
    monkeypatch.setattr(compiling, "available_cpus", lambda: 2)
    assert not isinstance(begin()[0].train_step, compiling.Ahead)
