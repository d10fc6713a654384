"""The optax chain: clip by global norm -> AdamW or Muon, under a learning-rate schedule."""

import re

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gptjax.config import GPTConfig, TrainConfig
from gptjax.precision import is_mixed
from gptjax.sharding import PyTree
from gptjax.training.muon import scale_by_muon

DECAYED = r"(kernel|embedding)$"  # by path: under the layer axis even a bias has two dimensions
MATRICES = r"^h/.*kernel$"
EMBEDDINGS = r"embedding$"
VECTORS = r"(bias|scale)$"


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
    end = decay_end(config) - config.warmup_iters
    steps = max(1, min(end, round(config.decay_fraction * decay_end(config))))
    floor = peak * config.min_lr / config.learning_rate
    begin = max(0, end - steps)
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


# ---- The norm of a gradient ----------------------------------------------------------------------


def squares_by_layer(tree: PyTree) -> PyTree:
    """Return the sum of squares of every leaf, (L,) of stacked ones and () of the others."""

    def squares(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        is_stacked = path[0] == jax.tree_util.DictKey("h")
        return jnp.sum(jnp.square(leaf), axis=tuple(range(int(is_stacked), leaf.ndim)))

    return jax.tree.map_with_path(squares, tree)


def global_norm(cfg: GPTConfig, tree: PyTree) -> Array:
    """Return the norm of all leaves together."""
    if not is_mixed(cfg):
        return optax.tree.norm(tree)
    # The sums of layers, which the metrics have too, serve this norm. With two sums of each leaf
    # XLA would store the squares: 3 % of a small step.
    sums = jax.lax.optimization_barrier(squares_by_layer(tree))
    return jnp.sqrt(sum(jnp.sum(x) for x in jax.tree.leaves(sums)))


def clip_by_global_norm(limit: float, cfg: GPTConfig) -> optax.GradientTransformation:
    """Return what scales a gradient down to this norm, where it is longer."""
    if not is_mixed(cfg):
        return optax.clip_by_global_norm(limit)

    def clip(grads: optax.Updates, params: optax.Params | None) -> optax.Updates:
        # One factor, where optax divides each number, which XLA would store.
        norm = global_norm(cfg, grads)
        factor = jnp.where(norm < limit, 1, limit / norm)
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)


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
    """Return Muon for the blocks' matrices, and `adamw` for everything else."""
    schedule = make_schedule(config, config.muon_learning_rate)
    matrices = optax.chain(
        scale_by_muon(config),
        optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    # With an Adam of no parameters the state has the paths of optax.contrib.muon's, as older runs
    # saved it.
    matrices = optax.partition(
        {"muon": matrices, "adam": optax.adamw(schedule)},
        lambda params: jax.tree.map(lambda _: "muon", params),
    )
    return optax.partition(
        {"muon": matrices, "adamw": adamw(config)},
        lambda params: match_paths(MATRICES, params, "muon", "adamw"),
    )


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def with_rates_of_groups(
    optimizer: optax.GradientTransformation, config: TrainConfig
) -> optax.GradientTransformation:
    """Return the optimizer with the learning rates of embeddings and vectors, and the same state.

    An update is proportional to its learning rate, so it is multiplied by the ratio of the rates.
    """
    ratios = {
        EMBEDDINGS: config.embedding_learning_rate / config.learning_rate,
        VECTORS: config.vector_learning_rate / config.learning_rate,
    }

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = optimizer.update(grads, state, params)
        for regex, ratio in ratios.items():
            if ratio > 0:
                factors = match_paths(regex, updates, ratio, 1.0)
                updates = jax.tree.map(lambda u, factor: u * factor, updates, factors)
        return updates, state

    return optax.GradientTransformation(optimizer.init, update)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the optimizer of a run: clip by the global norm, then config.optimizer."""
    limit = config.grad_clip
    clip = clip_by_global_norm(limit, config.model) if limit else optax.identity()
    optimizer = with_rates_of_groups(OPTIMIZERS[config.optimizer](config), config)
    return optax.chain(clip, optimizer)
