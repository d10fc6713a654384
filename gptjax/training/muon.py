"""Muon: momentum, each matrix of which is orthogonalised before it becomes an update.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
L layers, P matrices side by side in each, R (or S, T) rows and C columns of a matrix, which are its
inputs and its outputs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike
from optax.contrib import MuonState

from gptjax import precision
from gptjax.config import TrainConfig

MOMENTUM, FIRST_MOMENTUM = 0.95, 0.85  # of all updates, and of the first where it is warmed up
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # chosen so that small singular values grow fastest
NEWTON_SCHULZ_STEPS = 5
QKV_PARTS = {"apart": 3, "whole": 1}  # matrices in c_attn, by TrainConfig.muon_qkv


def scale_by_muon(config: TrainConfig) -> optax.GradientTransformation:
    """Return the transformation of gradients (L, R, C) into orthogonalised Nesterov momentum.

    An update is scaled by sqrt(max(1, C / R)), so that an entry of every matrix has a root mean
    square of about 1 / sqrt(R). c_attn (L, D, 3D) is three matrices (L, D, D), unless
    config.muon_qkv is "whole"; entries of its update are as large either way. The state is that of
    optax.contrib.muon, which older runs saved.
    """
    half = config.model.dtype == "bfloat16" and config.muon_qkv != "whole"
    dtype = precision.stored_dtype(config.model) if half else "float32"
    einsum = precision.einsum_of(config.model) if half else jnp.einsum

    def init(params: optax.Params) -> MuonState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return MuonState(jnp.zeros((), jnp.int32), zeros, jnp.asarray(COEFFICIENTS))

    def update(
        grads: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        beta = momentum(config, state.count)
        count = state.count + 1
        mean = optax.tree.update_moment(grads, state.mu, beta, 1)
        # Both without the pull of the zeros that the mean began with; mean is one update ahead.
        ahead = optax.tree.bias_correction(mean, beta, count + 1)
        now = optax.tree.bias_correction(grads, beta, count)
        nesterov = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)

        def at_leaf(path: jax.tree_util.KeyPath, x_LRC: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            parts = QKV_PARTS[config.muon_qkv] if name.endswith("c_attn/kernel") else 1
            return orthogonalise(x_LRC, state.ns_coeffs, parts, dtype, einsum)

        updates = jax.tree.map_with_path(at_leaf, nesterov)
        return updates, MuonState(count, mean, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def momentum(config: TrainConfig, count: Array) -> Array | float:
    """Return the momentum after `count` updates: 0.95, or on a straight line to it from 0.85."""
    if config.muon_momentum_warmup == 0:
        return MOMENTUM
    part = jnp.minimum(count / config.muon_momentum_warmup, 1)
    return FIRST_MOMENTUM + part * (MOMENTUM - FIRST_MOMENTUM)


def orthogonalise(
    x_LRC: Array,
    coefficients: Array,
    parts: int,
    dtype: DTypeLike,
    einsum: Callable[..., Array] = jnp.einsum,
) -> Array:
    """Return matrices (L, R, C) whose singular values are near 1, times sqrt(max(1, C / R)).

    Five Newton-Schulz steps bring them to between 0.7 and 1.2. The matrices of all layers go
    through each product together.

    Args:
        x_LRC: matrices.
        coefficients: (3,) of the polynomial a x + b x^3 + c x^5.
        parts: how many matrices lie side by side in each, along C.
        dtype: type in which all is computed.
        einsum: what the products are made with.
    """
    L, R, C = x_LRC.shape
    x = jnp.moveaxis(x_LRC.reshape(L, R, parts, C // parts), 2, 1)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the products are of the shorter side
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    x, (a, b, c) = x.astype(dtype), coefficients.astype(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = einsum("LPRC,LPSC->LPRS", x, x)
        sum_of_powers = b * square + c * einsum("LPRS,LPST->LPRT", square, square)
        x = a * x + einsum("LPRS,LPSC->LPRC", sum_of_powers, x)
    x = (x.mT if tall else x).astype(x_LRC.dtype)
    x = x * max(1, x.shape[-1] / x.shape[-2]) ** 0.5
    return jnp.moveaxis(x, 1, 2).reshape(L, R, C)
