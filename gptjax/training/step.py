"""The training step: batch in, better parameters out.

K steps per call, A accumulated forward passes per step, B batch, T time; a window holds T+1 tokens.
`config` is a TrainConfig whose model has no "auto" left (see `model.resolve`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.checkpoints.hashes import json_sha256, leaf_digests
from gptjax.collectives import mean_over_batch, per_device
from gptjax.config import GPTConfig, TrainConfig
from gptjax.loss import loss_fn, window_losses
from gptjax.model import Params, init_params
from gptjax.sharding import (
    abstract_tree,
    batch_axes,
    batch_sharding,
    mesh_of,
    over_batch,
    replicated,
    shardings_of,
    tree_shardings,
)
from gptjax.training import plan
from gptjax.training.faults import Fault, make_corrupt
from gptjax.training.guard import Guard, init_guard, judge
from gptjax.training.loss_scale import LossScale, adjust, init_loss_scale
from gptjax.training.optimizer import (
    global_norm,
    make_optimizer,
    make_schedule,
    match_paths,
    squares_by_layer,
)
from gptjax.xla_options import Options, products_by_cublas, updates_in_place

PROJECTIONS = r"^h/.*c_proj/kernel$"
Metrics = dict[str, Any]  # arrays by name; `gradient_norms` is a tree of them


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Array
    params: Params
    opt_state: optax.OptState
    guard: Guard
    loss_scale: LossScale | None = None  # None where the computation is not in float16

    def extra(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the step's number and the parameters."""
        extra: dict[str, Any] = {"opt_state": self.opt_state, "guard": self.guard}
        return extra if self.loss_scale is None else {**extra, "loss_scale": self.loss_scale}


def fresh_state(config: TrainConfig, key: Array) -> TrainState:
    """Return the state before the first step, for use inside jit or eval_shape."""
    params = init_params(config.model, key)
    if config.zero_projections:
        zeros = match_paths(PROJECTIONS, params, 0.0, 1.0)
        params = jax.tree.map(jnp.multiply, params, zeros)
    opt_state = make_optimizer(config).init(params)
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, opt_state, init_guard(), init_loss_scale(config))


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return the shape, dtype and sharding of each array of a state, without making any.

    This is what `init_state`, the compiled steps and a restore agree on.
    """
    # The key is made inside: a GPU's first program takes 1.4 s, in which others can be compiled.
    shapes = jax.eval_shape(lambda: fresh_state(config, jax.random.key(0)))
    return abstract_tree(shapes, tree_shardings(mesh, shapes))


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
    cfg: GPTConfig,
    params: Params,
    windows_ABT: Array,
    keys_AB: Array | None,
    scale: Array | None = None,
) -> tuple[Array, Params]:
    """Return loss and gradient, averaged over A passes that share one float32 gradient tree.

    Args:
        cfg: the model, without "auto".
        params: its parameters.
        windows_ABT: token ids (A, B, T+1).
        keys_AB: the random key of each row's dropout; None without dropout.
        scale: what the loss of each pass is multiplied by in float32; the sums are divided by it,
            once (see `loss_scale`).
    """
    passes = windows_ABT.shape[0]

    def scaled_loss(*args: Any) -> Array:
        return loss_fn(*args) if scale is None else loss_fn(*args) * scale

    value_and_grad = jax.value_and_grad(scaled_loss, argnums=1)
    if passes == 1:
        keys_B = None if keys_AB is None else keys_AB[0]
        one = value_and_grad(cfg, params, windows_ABT[0], keys_B)
        return one if scale is None else jax.tree.map(lambda x: x / scale, one)

    Sums = tuple[Array, Params]

    def accumulate(carry: Sums, batch: tuple[Array, Array | None]) -> tuple[Sums, None]:
        new = value_and_grad(cfg, params, *batch)
        return jax.tree.map(jnp.add, carry, new), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    sums, _ = jax.lax.scan(accumulate, zeros, (windows_ABT, keys_AB))
    divisor = passes if scale is None else passes * scale
    return jax.tree.map(lambda x: x / divisor, sums)


def dropout_keys(config: TrainConfig, step: int | Array, shape: tuple[int, ...]) -> Array | None:
    """Return the random keys of the rows of a step, of shape (A, B); None without dropout.

    A row's key is a function of the seed, the step and the row's number in it. So masks depend
    neither on the devices nor on how a step is cut into passes.
    """
    if config.model.dropout == 0:
        return None
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    rows = jnp.arange(math.prod(shape))
    return jax.vmap(functools.partial(jax.random.fold_in, key))(rows).reshape(shape)


def make_loss_and_grad(
    cfg: GPTConfig, abstract: Params
) -> Callable[[Params, Array, Array | None, Array | None], tuple[Array, Params]]:
    """Return `loss_and_grad` for parameters and rows that lie on the devices of a mesh.

    Each device computes with its rows in all passes; then the gradients are added, once. They come
    in the layout of the optimizer's state.

    Args:
        cfg: the model, without "auto".
        abstract: the parameters' shapes and shardings.
    """
    mesh = mesh_of(abstract)
    params_specs = over_batch(shardings_of(abstract))
    specs = over_batch(tree_shardings(mesh, abstract, "opt_state/"))
    rows = P(None, batch_axes(mesh))

    def on_device(
        params: Params, windows_ABT: Array, keys_AB: Array | None, scale: Array | None
    ) -> tuple[Array, Params]:
        loss, grads = loss_and_grad(cfg, params, windows_ABT, keys_AB, scale)
        if mesh.size > 1:
            loss = jax.lax.pmean(loss, batch_axes(mesh))
            grads = mean_over_batch(cfg, mesh, grads, params_specs, specs)
        return loss, grads

    return per_device(on_device, mesh, (params_specs, rows, rows, P()), (P(), specs))


def make_train_step(
    config: TrainConfig, abstract: TrainState, fault: Fault | None = None
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """Return a jitted function (state, windows_KABT) -> (state, metrics).

    It takes K optimizer steps and donates the state it is given. Metrics hold K values each: `loss`
    in nats per token; `learning_rate`; `grad_norm`, the global norm before clipping;
    `gradient_norms`, the gradient's norm per parameter and layer; `skipped` and `in_a_row` of the
    guard (see `guard.judge`); in float16 `loss_scale` and `next_loss_scale`, those of this step and
    of the next, and `good_steps` with the latter. A step that is skipped leaves parameters and
    optimizer state as they were and counts as a step. Dropout in step n depends on (config.seed, n)
    alone.

    Args:
        config: the settings.
        abstract: as of `abstract_state`; the layouts of the state come from it.
        fault: strikes loss and gradient of some steps, for the tests.
    """
    mesh, shardings = mesh_of(abstract), shardings_of(abstract)
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    mean_loss_and_grad = make_loss_and_grad(config.model, abstract.params)
    corrupt = make_corrupt(fault)

    def one_step(state: TrainState, windows_ABT: Array) -> tuple[TrainState, Metrics]:
        keys_AB = dropout_keys(config, state.step, windows_ABT.shape[:2])
        now, after, overflow = state.loss_scale, None, None
        scale = None if now is None else now.scale
        loss, grads = mean_loss_and_grad(state.params, windows_ABT, keys_AB, scale)
        if corrupt is not None:
            loss, grads = corrupt(state.step, loss, grads)
        grad_norm = global_norm(config.model, grads)
        if now is not None:
            overflow, after = adjust(config, now, loss, grad_norm)
        ok, guard = judge(state.guard, loss, grad_norm, config.skip_spikes, overflow)
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
        if now is not None and after is not None:
            metrics |= {"loss_scale": now.scale, "next_loss_scale": after.scale}
            metrics["good_steps"] = after.good_steps
        state = TrainState(state.step + 1, params, opt_state, guard, after)
        if mesh.size > 1:
            state = jax.lax.with_sharding_constraint(state, shardings)
        return state, metrics

    def train_step(state: TrainState, windows_KABT: Array) -> tuple[TrainState, Metrics]:
        if windows_KABT.shape[0] == 1:
            state, metrics = one_step(state, windows_KABT[0])
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(one_step, state, windows_KABT)

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, axis=2)),
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=updates_in_place() or options_of(config),
    )


def options_of(config: TrainConfig) -> Options | None:
    """Return options of XLA for the programs of a run: a short one is over sooner with them."""
    return products_by_cublas() if plan.is_short(config) else None


def make_eval_step(
    cfg: GPTConfig, abstract: Params, options: Options | None = None
) -> Callable[[Params, Array], Array]:
    """Return a jitted function (params, windows_BT) -> mean loss of each window (B,).

    Its layers are a loop, unless cfg.unroll says otherwise: without a gradient that costs no time,
    and spares XLA two thirds of its own (5.2 s instead of 16.4 for 6 layers on an H100).

    Args:
        cfg: the model, whose dropout is off here.
        abstract: the parameters' shapes and shardings.
        options: as of `options_of`.
    """
    mesh, shardings = mesh_of(abstract), shardings_of(abstract)
    cfg, rows = dataclasses.replace(cfg, unroll=cfg.unroll or 1), P(batch_axes(mesh))
    losses = per_device(
        lambda params, windows_BT: window_losses(cfg, params, windows_BT).mean(axis=1),
        mesh,
        (over_batch(shardings), rows),
        rows,
    )
    return jax.jit(
        losses,
        in_shardings=(shardings, batch_sharding(mesh, axis=0)),
        out_shardings=replicated(mesh),
        compiler_options=options,
    )


def norms_by_layer(tree: Params) -> Params:
    """Return the norm of every leaf, (L,) of the blocks' stacked ones and () of the others."""
    norms: Params = jax.tree.map(jnp.sqrt, squares_by_layer(tree))
    return norms


def digest(state: TrainState) -> str:
    """Return the sha256 of a state, which is equal for two states only if all their bits are."""
    return json_sha256(leaf_digests(state))
