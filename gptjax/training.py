"""The training step: batch in, better parameters out.

K steps per call, A accumulated forward passes per step, B batch, T time; a window holds T+1 tokens.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from gptjax.config import GPTConfig
from gptjax.loss import token_losses
from gptjax.model import Params, head, hidden_states, init_params
from gptjax.sharding import batch_sharding, replicated


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: Array
    params: Params
    opt_state: Any


def init_state(cfg: GPTConfig, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step."""
    params = init_params(cfg, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def window_losses(
    cfg: GPTConfig, params: Params, windows_BT: Array, dropout_key: Array | None = None
) -> Array:
    """Cross-entropy (B, T) of predicting tokens 1..T of each window from its tokens 0..T-1."""
    tokens_BT, targets_BT = windows_BT[:, :-1], windows_BT[:, 1:]
    x_ND, _ = hidden_states(cfg, params, tokens_BT, dropout_key=dropout_key)
    losses_N = token_losses(head(cfg, params, x_ND), targets_BT.reshape(-1))
    return losses_N.reshape(targets_BT.shape)


def loss_fn(
    cfg: GPTConfig, params: Params, windows_BT: Array, dropout_key: Array | None = None
) -> Array:
    """The mean of `window_losses`, which training minimises."""
    return jnp.mean(window_losses(cfg, params, windows_BT, dropout_key))


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
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """A jitted function (state, windows_KABT) -> (state, metrics).

    It takes K optimizer steps and donates the state it is given. Metrics hold K values each: `loss`
    in nats per token and `grad_norm`, the global norm before clipping. Dropout in step n depends
    on (seed, n) alone.
    """

    def one_step(state: TrainState, windows_ABT: Array) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if cfg.dropout > 0 else None
        loss, grads = loss_and_grad(cfg, state.params, windows_ABT, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

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


def digest(state: TrainState) -> str:
    """sha256 over step, parameters and optimizer state: equal digests are bit-equal states."""
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.ascontiguousarray(jax.device_get(leaf))
        sha256.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha256.update(array.data)
    return sha256.hexdigest()
