"""The optax chain: clip by global norm -> AdamW or Muon, under a learning-rate schedule."""

import re

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from gptjax.config import TrainConfig
from gptjax.sharding import PyTree

DECAYED = r"(kernel|embedding)$"  # by path: under the layer axis even a bias has two dimensions
MATRICES = r"^h/.*kernel$"


def match_paths(regex: str, tree: PyTree, match: object = True, other: object = False) -> PyTree:
    """Return a tree with `match` where the leaf's path matches the regex and `other` elsewhere."""

    def at_leaf(path: jax.tree_util.KeyPath, _: object) -> object:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return match if re.search(regex, name) else other

    return jax.tree.map_with_path(at_leaf, tree)


def decay_mask(params: PyTree) -> PyTree:
    """Return a tree that is True for matrices and embeddings, False for biases and LayerNorms."""
    return match_paths(DECAYED, params)


# ---- Schedules: peak, config -> (step -> learning rate) ------------------------------------------


def cosine(peak: float, config: TrainConfig) -> optax.Schedule:
    """Return half a cosine from the peak to min_lr (Loshchilov & Hutter 2017)."""
    steps = max(1, decay_end(config) - config.warmup_iters)
    return optax.cosine_decay_schedule(peak, steps, alpha=config.min_lr / config.learning_rate)


def wsd(peak: float, config: TrainConfig) -> optax.Schedule:
    """Return warmup-stable-decay: the peak, then a straight line to min_lr (Hu et al. 2024)."""
    end = decay_end(config)
    steps = max(1, round(config.decay_fraction * end))
    floor = peak * config.min_lr / config.learning_rate
    begin = max(0, end - steps - config.warmup_iters)
    return optax.linear_schedule(peak, floor, steps, transition_begin=begin)


def constant(peak: float, config: TrainConfig) -> optax.Schedule:
    """Return the peak for every step."""
    return optax.constant_schedule(peak)


SCHEDULES = {"cosine": cosine, "wsd": wsd, "constant": constant}


def decay_end(config: TrainConfig) -> int:
    """Return the step from which the learning rate is min_lr."""
    return config.lr_decay_iters or config.max_iters


def make_schedule(config: TrainConfig, peak: float | None = None) -> optax.Schedule:
    """Return the learning rate as a function of the step: linear warmup, then config.schedule.

    Step 0 trains: it gets peak / (warmup_iters + 1).
    """
    peak = config.learning_rate if peak is None else peak
    after = SCHEDULES[config.schedule](peak, config)
    warmup = config.warmup_iters
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup))
    return lambda step: jnp.where(step < warmup, ramp(step), after(step - warmup))


# ---- Optimizers ----------------------------------------------------------------------------------


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    """Return AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return optax.adamw(
        make_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def muon(config: TrainConfig) -> optax.GradientTransformation:
    """Return Muon for the blocks' matrices, and `adamw` for everything else.

    Muon orthogonalises momentum by Newton-Schulz steps (Jordan et al. 2024). The rest does not get
    the Adam inside optax's muon, which would decay biases.
    """
    spec = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # axis 0: the layers
    matrices = contrib.muon(
        make_schedule(config, config.muon_learning_rate),
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: spec, params),
    )
    return optax.partition(
        {"muon": matrices, "adamw": adamw(config)},
        lambda params: match_paths(MATRICES, params, "muon", "adamw"),
    )


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the optimizer of a run: clip by the global norm, then config.optimizer."""
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    return optax.chain(clip, OPTIMIZERS[config.optimizer](config))
