"""The training step: batch in, better parameters out.

K steps per call, A accumulated forward passes per step, B batch, T time; a window holds T+1 tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from gptjax.checkpoints.hashes import json_sha256, leaf_digests
from gptjax.config import GPTConfig
from gptjax.loss import loss_fn, window_losses
from gptjax.model import Params, init_params
from gptjax.sharding import batch_sharding, replicated
from gptjax.training.faults import Corrupt
from gptjax.training.guard import Guard, init_guard, judge


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Array
    params: Params
    opt_state: Any
    guard: Guard


def init_state(cfg: GPTConfig, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step."""
    params = init_params(cfg, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), init_guard())


def loss_and_grad(
    cfg: GPTConfig, params: Params, windows_ABT: Array, key: Array | None
) -> tuple[Array, Params]:
    """Loss and gradient, averaged over A passes that share one float32 gradient tree."""
    passes = windows_ABT.shape[0]
    value_and_grad = jax.value_and_grad(loss_fn, argnums=1)

    def dropout_key(i: int | Array) -> Array | None:
        return None if key is None else jax.random.fold_in(key, i)

    if passes == 1:
        return value_and_grad(cfg, params, windows_ABT[0], dropout_key(0))

    def accumulate(carry: Any, xs: Any) -> tuple[Any, None]:
        windows_BT, i = xs
        new = value_and_grad(cfg, params, windows_BT, dropout_key(i))
        return jax.tree.map(jnp.add, carry, new), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    sums, _ = jax.lax.scan(accumulate, zeros, (windows_ABT, jnp.arange(passes)))
    return jax.tree.map(lambda x: x / passes, sums)


def make_train_step(
    cfg: GPTConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: Any,
    seed: int,
    skip_spikes: float = 0.0,
    corrupt: Corrupt | None = None,
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """A jitted function (state, windows_KABT) -> (state, metrics).

    It takes K optimizer steps and donates the state it is given. Metrics hold K values each: `loss`
    in nats per token; `grad_norm`, the global norm before clipping; `layer_norms`, the gradient's
    norm per parameter and layer; `skipped` and `in_a_row` of the guard (see `guard.judge`). A step
    that is skipped leaves parameters and optimizer state as they were and counts as a step.
    Dropout in step n depends on (seed, n) alone. `corrupt` is for tests.
    """

    def one_step(state: TrainState, windows_ABT: Array) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if cfg.dropout > 0 else None
        loss, grads = loss_and_grad(cfg, state.params, windows_ABT, key)
        if corrupt is not None:
            loss, grads = corrupt(state.step, loss, grads)
        grad_norm = optax.tree.norm(grads)
        ok, guard = judge(state.guard, loss, grad_norm, skip_spikes)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), new, (state.params, state.opt_state)
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "layer_norms": layer_norms(grads),
            "skipped": guard.skipped,
            "in_a_row": guard.in_a_row,
        }
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    def train_step(state: TrainState, windows_KABT: Array) -> tuple[TrainState, dict[str, Array]]:
        if windows_KABT.shape[0] == 1:
            state, metrics = one_step(state, windows_KABT[0])
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(one_step, state, windows_KABT)

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, axis=2)),
        out_shardings=(shardings, replicated(mesh)),
    )


def make_eval_step(
    cfg: GPTConfig, mesh: Mesh, params_shardings: Any
) -> Callable[[Params, Array], Array]:
    """A jitted function (params, windows_BT) -> mean loss of each window (B,), without dropout."""
    return jax.jit(
        lambda params, windows_BT: window_losses(cfg, params, windows_BT).mean(axis=1),
        in_shardings=(params_shardings, batch_sharding(mesh, axis=0)),
        out_shardings=replicated(mesh),
    )


def layer_norms(tree: Params) -> Params:
    """The norm of every parameter, (L,) of the blocks' stacked ones and () of the others."""

    def norm(path: Any, leaf: Array) -> Array:
        is_stacked = path[0] == jax.tree_util.DictKey("h")
        axes = tuple(range(int(is_stacked), leaf.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=axes))

    return jax.tree.map_with_path(norm, tree)


def digest(state: TrainState) -> str:
    """sha256 of all that a state holds: equal digests are bit-equal states."""
    return json_sha256(leaf_digests(state))
