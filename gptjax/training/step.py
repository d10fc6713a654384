"""The training step: batch in, better parameters out.

K steps per call, A accumulated forward passes per step, B batch, T time; a window holds T+1 tokens.
`config` is a TrainConfig whose model has no "auto" left (see `model.resolve`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from gptjax.checkpoints.hashes import json_sha256, leaf_digests
from gptjax.config import GPTConfig, TrainConfig
from gptjax.loss import loss_fn, window_losses
from gptjax.model import Params, init_params
from gptjax.sharding import (
    abstract_tree,
    batch_sharding,
    mesh_of,
    replicated,
    shardings_of,
    tree_shardings,
)
from gptjax.training.faults import Fault, make_corrupt
from gptjax.training.guard import Guard, init_guard, judge
from gptjax.training.optimizer import make_optimizer, make_schedule

Metrics = dict[str, Any]  # arrays by name; `gradient_norms` is a tree of them


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Array
    params: Params
    opt_state: optax.OptState
    guard: Guard


def fresh_state(config: TrainConfig, key: Array) -> TrainState:
    """Return the state before the first step, for use inside jit or eval_shape."""
    params = init_params(config.model, key)
    opt_state = make_optimizer(config).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, init_guard())


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return the shape, dtype and sharding of each array of a state, without making any.

    This is what `init_state`, the compiled steps and a restore agree on.
    """
    shapes = jax.eval_shape(functools.partial(fresh_state, config), jax.random.key(0))
    return abstract_tree(shapes, tree_shardings(mesh, config.strategy, shapes))


def init_state(config: TrainConfig, abstract: TrainState) -> TrainState:
    """Return the state before the first step, each array made where it belongs, from config.seed.

    Args:
        config: the settings.
        abstract: as of `abstract_state`.
    """
    # It runs once: on CPU, XLA takes 1 s more for code that gives the same bits no sooner.
    on_cpu = jax.default_backend() == "cpu"
    init = jax.jit(
        functools.partial(fresh_state, config),
        out_shardings=shardings_of(abstract),
        compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None,
    )
    return init(jax.random.key(config.seed))


def loss_and_grad(
    cfg: GPTConfig, params: Params, windows_ABT: Array, key: Array | None
) -> tuple[Array, Params]:
    """Return loss and gradient, averaged over A passes that share one float32 gradient tree."""
    passes = windows_ABT.shape[0]
    value_and_grad = jax.value_and_grad(loss_fn, argnums=1)

    def dropout_key(i: int | Array) -> Array | None:
        return None if key is None else jax.random.fold_in(key, i)

    if passes == 1:
        return value_and_grad(cfg, params, windows_ABT[0], dropout_key(0))

    Sums = tuple[Array, Params]

    def accumulate(carry: Sums, xs: tuple[Array, Array]) -> tuple[Sums, None]:
        windows_BT, i = xs
        new = value_and_grad(cfg, params, windows_BT, dropout_key(i))
        return jax.tree.map(jnp.add, carry, new), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    sums, _ = jax.lax.scan(accumulate, zeros, (windows_ABT, jnp.arange(passes)))
    return jax.tree.map(lambda x: x / passes, sums)


def make_train_step(
    config: TrainConfig, abstract: TrainState, fault: Fault | None = None
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """Return a jitted function (state, windows_KABT) -> (state, metrics).

    It takes K optimizer steps and donates the state it is given. Metrics hold K values each: `loss`
    in nats per token; `learning_rate`; `grad_norm`, the global norm before clipping;
    `gradient_norms`, the gradient's norm per parameter and layer; `skipped` and `in_a_row` of the
    guard (see `guard.judge`). A step that is skipped leaves parameters and optimizer state as they
    were and counts as a step. Dropout in step n depends on (config.seed, n) alone.

    Args:
        config: the settings.
        abstract: as of `abstract_state`; the layouts of the state come from it.
        fault: strikes loss and gradient of some steps, for the tests.
    """
    cfg, mesh = config.model, mesh_of(abstract)
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    corrupt = make_corrupt(fault)

    def one_step(state: TrainState, windows_ABT: Array) -> tuple[TrainState, Metrics]:
        key = None
        if cfg.dropout > 0:
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, grads = loss_and_grad(cfg, state.params, windows_ABT, key)
        if corrupt is not None:
            loss, grads = corrupt(state.step, loss, grads)
        grad_norm = optax.tree.norm(grads)
        ok, guard = judge(state.guard, loss, grad_norm, config.skip_spikes)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), new, (state.params, state.opt_state)
        )
        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step - state.guard.skipped),
            "grad_norm": grad_norm,
            "gradient_norms": norms_by_layer(grads),
            "skipped": guard.skipped,
            "in_a_row": guard.in_a_row,
        }
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    def train_step(state: TrainState, windows_KABT: Array) -> tuple[TrainState, Metrics]:
        if windows_KABT.shape[0] == 1:
            state, metrics = one_step(state, windows_KABT[0])
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(one_step, state, windows_KABT)

    shardings = shardings_of(abstract)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, axis=2)),
        out_shardings=(shardings, replicated(mesh)),
    )


def make_eval_step(cfg: GPTConfig, abstract: Params) -> Callable[[Params, Array], Array]:
    """Return a jitted function (params, windows_BT) -> mean loss of each window (B,).

    Args:
        cfg: the model, whose dropout is off here.
        abstract: the parameters' shapes and shardings.
    """
    mesh = mesh_of(abstract)
    return jax.jit(
        lambda params, windows_BT: window_losses(cfg, params, windows_BT).mean(axis=1),
        in_shardings=(shardings_of(abstract), batch_sharding(mesh, axis=0)),
        out_shardings=replicated(mesh),
    )


def norms_by_layer(tree: Params) -> Params:
    """Return the norm of every leaf, (L,) of the blocks' stacked ones and () of the others."""

    def norm(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        is_stacked = path[0] == jax.tree_util.DictKey("h")
        axes = tuple(range(int(is_stacked), leaf.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=axes))

    return jax.tree.map_with_path(norm, tree)


def digest(state: TrainState) -> str:
    """Return the sha256 of a state, which is equal for two states only if all their bits are."""
    return json_sha256(leaf_digests(state))
