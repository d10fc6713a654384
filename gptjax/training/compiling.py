"""The functions of the loop of a run, compiled side by side while its first state is made."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np

from gptjax import sharding
from gptjax.checkpoints.record import available_cpus
from gptjax.model import Params
from gptjax.training import plan, validation
from gptjax.training.start import TrainingRun
from gptjax.training.step import (
    Metrics,
    TrainState,
    make_eval_step,
    make_train_step,
    options_of,
)

P = ParamSpec("P")
T = TypeVar("T")
CORES = 4  # below, side by side took longer: 19 s instead of 16 to a first step on 2 busy cores
Stopped = Callable[[], bool]
TrainStep = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, jax.Array], jax.Array]


class Ahead(Generic[P, T]):
    """A function that waits, when it is called, until a thread has compiled its programs.

    XLA lets other threads run meanwhile. JAX keeps what it compiled, so that the call finds it.
    Where the thread failed, the call compiles again, and fails where its caller expects it.
    """

    def __init__(self, function: Callable[P, T], compile_programs: Callable[[], object]) -> None:
        """Begin to compile: `compile_programs` does it."""
        self.function, self.compile_programs = function, compile_programs
        # No daemon: the process would abort if it ended while XLA compiles.
        self.thread = threading.Thread(target=self._compile)
        self.thread.start()

    def _compile(self) -> None:
        with contextlib.suppress(Exception):
            self.compile_programs()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the function returns."""
        self.thread.join()
        return self.function(*args, **kwargs)


class Loop(NamedTuple):
    """What the loop calls: a function returns None where it was stopped before its end."""

    train_step: TrainStep
    validate: Callable[[Params, Stopped], float | None]
    write_sample: Callable[[Params, Stopped], str | None]


def begin(run: TrainingRun, abstract: TrainState) -> Loop:
    """Return the functions of the loop; begin to compile those that its first round calls.

    With few cores, or several processes, which must compile in the same order, a function is
    compiled when it is called.

    Args:
        run: the run.
        abstract: as of `step.abstract_state`.
    """
    config, dataset, params = run.config, run.dataset, abstract.params
    train_step: Any = make_train_step(config, abstract, run.fault)
    eval_step: Any = make_eval_step(config.model, params, options_of(config))

    def validate(params: Params, stopped: Stopped) -> float | None:
        losses = functools.partial(eval_step, params)  # looked up here: it may be `Ahead` by then
        return validation.validate(config, dataset.val, run.mesh, losses, stopped)

    def write_sample(params: Params, stopped: Stopped) -> str | None:
        return validation.write_sample(config, params, dataset.tokenizer, stopped)

    loop = Loop(train_step, validate, write_sample)
    if available_cpus() < CORES or jax.process_count() > 1:
        return loop
    step, fresh = run.steps[-1] if run.steps else 0, not run.steps
    # A GPU's first program takes 1.4 s, whichever it is.
    threading.Thread(target=jax.random.key, args=(0,)).start()
    # The training step takes longest, so it is traced alone: Python traces one at a time.
    if step < plan.last_step(config):
        count = plan.steps_per_call(config, step)
        batch = windows(run, count, config.gradient_accumulation_steps)
        lowered = train_step.lower(abstract, batch)
        loop = loop._replace(train_step=Ahead(train_step, lowered.compile))
    if fresh and plan.is_evaluation_due(config, step):
        eval_step = Ahead(eval_step, compiler(eval_step, params, windows(run)))
    if fresh and plan.is_sample_due(config, step):
        compile_sampler = functools.partial(validation.compile_sampler, config, params)
        loop = loop._replace(write_sample=Ahead(write_sample, compile_sampler))
    return loop


def windows(run: TrainingRun, *shape: int) -> jax.ShapeDtypeStruct:
    """Return the shape and layout of so many batches, as `feed` and `validate` place them."""
    one_cpu = sharding.is_one_cpu(run.mesh)
    rows = None if one_cpu else sharding.batch_sharding(run.mesh, axis=len(shape))
    shape = (*shape, run.config.batch_size, run.config.model.block_size + 1)
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)


def compiler(jitted: Any, *shapes: Any) -> Callable[[], object]:
    """Return a function that compiles a jitted one for arguments of these shapes and layouts."""
    return lambda: jitted.lower(*shapes).compile()
