"""The parts that a student writes in lesson 2, with gptjax's own beside each."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from parts import Part

from gptjax import loss, model
from gptjax.config import GPTConfig, TrainConfig
from gptjax.data import batches
from gptjax.training import optimizer

Tree = Any  # of arrays
Loss = Callable[[Tree, Any], Array]
State = tuple[Tree, Tree, Tree, Any]  # parameters, mu, nu, steps done

# ---- gptjax's own, with the arguments of the lesson ----------------------------------------------


def bigram_log_probs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """gptjax has no bigram model; this one counts pair by pair."""
    counts = [[1] * vocab_size for _ in range(vocab_size)]
    for current, following in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        counts[current][following] += 1
    return np.array([[math.log(n / sum(row)) for n in row] for row in counts])


def windows_of(
    tokens: np.ndarray, seed: int, step: int, batch_size: int, block_size: int
) -> np.ndarray:
    of = {"seed": seed, "step": step, "batch_size": batch_size, "block_size": block_size}
    return batches.sample_batch([tokens], n_vocab=int(tokens.max()) + 1, **of)


def rate(step: int, peak: float, floor: float, warmup: int, steps: int) -> float:
    config = TrainConfig(
        learning_rate=peak, min_lr=floor, warmup_iters=warmup, max_iters=steps, schedule="cosine"
    )
    return float(optimizer.make_schedule(config)(step))


def clip(grads: Tree, max_norm: float) -> tuple[Tree, Array]:
    clipped, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
    return clipped, optax.tree.norm(grads)


def is_decayed(name: str) -> bool:
    return bool(optimizer.decay_mask({name: 0})[name])


def adamw(
    params: Tree, grads: Tree, mu: Tree, nu: Tree, n: int, rate: float
) -> tuple[Tree, Tree, Tree]:
    """One update of gptjax's chain, whose state is set to these means first."""
    config = TrainConfig(
        optimizer="adamw",
        learning_rate=rate,
        min_lr=rate,
        schedule="constant",
        warmup_iters=0,
        grad_clip=0.0,
    )
    theirs = optimizer.make_optimizer(config)
    state = optax.tree.set(theirs.init(params), mu=mu, nu=nu, count=jnp.int32(n - 1))
    updates, state = theirs.update(grads, state, params)
    new = jax.tree.map(jnp.add, params, updates)
    return new, optax.tree.get(state, "mu"), optax.tree.get(state, "nu")


def train_step(
    loss_fn: Loss, state: State, batch: Any, rate: float, max_norm: float
) -> tuple[State, tuple[Array, Array]]:
    params, mu, nu, n = state
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    grads, norm = clip(grads, max_norm)
    return (*adamw(params, grads, mu, nu, n + 1, rate), n + 1), (value, norm)


# ---- Arguments to try them on --------------------------------------------------------------------


def random_tokens(n: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(vocab_size, size=n).astype(np.uint16)


def logits_and_targets() -> list[tuple]:
    rng = np.random.default_rng(1)
    logits_NV = rng.normal(size=(5, 7)).astype(np.float32)
    targets_N = rng.integers(6, size=5)
    padded_NV = np.where(np.arange(7) < 6, logits_NV, -np.inf)  # the last column is no token
    return [(jnp.array(x), jnp.array(targets_N)) for x in (logits_NV, 100 * logits_NV, padded_NV)]


def tree(seed: int, size: float = 1.0) -> Tree:
    """Random arrays, of few shapes, under names of which some are decayed."""
    rng = np.random.default_rng(seed)
    shapes = {
        "wte": {"embedding": (4, 3)},
        "h": [{"mlp": {"c_fc": {"kernel": (4, 3), "bias": (3,)}}}],
        "ln_f": {"scale": (3,), "bias": (3,)},
    }
    return jax.tree.map(
        lambda shape: jnp.array(size * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@functools.cache
def names_of_params() -> list[tuple]:
    cfg = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=8)
    params = jax.eval_shape(functools.partial(model.init_params, cfg), jax.random.key(0))
    blocks = jax.eval_shape(lambda p: model.unstack_layers(p, 1), params)
    paths = [path for path, _ in jax.tree.leaves_with_path(blocks)]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"),) for path in paths]


def updates() -> list[tuple]:
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    squares = jax.tree.map(jnp.square, tree(3))
    return [
        (tree(0), tree(1), zeros, zeros, 1, 0.1),
        (tree(0), tree(1, 1e-6), zeros, zeros, 1, 0.1),  # where eps counts
        (tree(0), tree(1), tree(2), squares, 7, 0.01),
    ]


def squared_error(params: Tree, batch: Any) -> Array:
    """A loss that all arrays of `tree` take part in."""
    return jnp.asarray(sum(jnp.sum((leaf - batch) ** 2) for leaf in jax.tree.leaves(params)))


def steps() -> list[tuple]:
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    squares = jax.tree.map(jnp.square, tree(3))
    return [
        (squared_error, (tree(0), zeros, zeros, jnp.int32(0)), 0.5, 0.1, 1.0),
        (squared_error, (tree(0), tree(2), squares, jnp.int32(6)), 0.5, 0.01, 1e3),
    ]


# ---- Mistakes that are easily made ---------------------------------------------------------------


def rows_and_columns(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Divides by the sums of the columns."""
    counts = np.ones((vocab_size, vocab_size))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    return np.log(counts / counts.sum(axis=0))


def same_order_each_epoch(
    tokens: np.ndarray, seed: int, step: int, batch_size: int, block_size: int
) -> np.ndarray:
    n_windows = (len(tokens) - 1) // block_size - 1
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    order, offset = rng.permutation(n_windows), rng.integers(block_size)
    rows = np.arange(step * batch_size, (step + 1) * batch_size) % n_windows
    starts = order[rows] * block_size + offset
    return np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int32)


def overflowing(logits_NV: Array, targets_N: Array) -> Array:
    exp_NV = jnp.exp(logits_NV)
    target_N = jnp.take_along_axis(exp_NV, targets_N[:, None], axis=1)[:, 0]
    return -jnp.log(target_N / exp_NV.sum(axis=1))


def idle_first_step(step: int, peak: float, floor: float, warmup: int, steps: int) -> float:
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def clip_each_alone(grads: Tree, max_norm: float) -> tuple[Tree, Array]:
    def shorten(grad: Array) -> Array:
        return grad * jnp.minimum(1, max_norm / jnp.linalg.norm(grad))

    return jax.tree.map(shorten, grads), optax.tree.norm(grads)


def without_bias_correction(
    params: Tree, grads: Tree, mu: Tree, nu: Tree, n: int, rate: float
) -> tuple[Tree, Tree, Tree]:
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
    nu = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, nu, grads)
    move = jax.tree.map(lambda m, v: rate * m / (jnp.sqrt(v) + 1e-8), mu, nu)
    return jax.tree.map(jnp.subtract, params, move), mu, nu


def without_clipping(
    loss_fn: Loss, state: State, batch: Any, rate: float, max_norm: float
) -> tuple[State, tuple[Array, Array]]:
    return train_step(loss_fn, state, batch, rate, math.inf)


# ---- The parts -----------------------------------------------------------------------------------

PARTS = {
    "bigram_log_probs": Part(
        reference=bigram_log_probs,
        cases=lambda: [(random_tokens(200, 5), 5), (random_tokens(20, 9), 9)],
        tolerance=1e-6,
        hint="Row c holds the logarithms of (1 + how often v followed c) / (V + how often c was "
        "followed by anything), so each row of probabilities sums to 1.",
        why="np.add.at counts every pair of neighbours, also where one occurs twice in the index. "
        "The one that is added to each count keeps a pair that never occurred from the "
        "probability 0, whose loss would be infinite.",
        mistake=rows_and_columns,
    ),
    "windows_of": Part(
        reference=windows_of,
        cases=lambda: [(random_tokens(200, 50), 7, step, 4, 8) for step in (0, 2, 5, 9)],
        tolerance=0,
        hint="A window has block_size + 1 tokens; row i of all rows, from step * batch_size on, is "
        "in epoch i // n_windows, and each epoch has a generator of its own, which gives first the "
        "permutation and then the offset.",
        why="The number of a row says which epoch it is in and which place of that epoch's order "
        "it has, so nothing has to be remembered between two steps. One window fewer than fit "
        "leaves room to shift all of them by the offset.",
        mistake=same_order_each_epoch,
    ),
    "cross_entropy": Part(
        reference=loss.token_losses,
        cases=logits_and_targets,
        tolerance=1e-5,
        hint="It is logsumexp(logits) minus the target's logit, one number for each row; exp of "
        "large logits overflows unless the largest is subtracted first, which logsumexp does.",
        why="-log of the softmax at the target is log(sum(exp(z))) - z[target]. jax.nn.logsumexp "
        "subtracts the largest logit before it takes exp, so that logits of some hundred do not "
        "overflow, and a padding column of -inf adds 0.",
        mistake=overflowing,
    ),
    "rate": Part(
        reference=rate,
        cases=lambda: [(step, 3e-3, 3e-4, 10, 100) for step in (0, 3, 9, 10, 55, 99, 100)],
        tolerance=1e-5,
        hint="Step 0 already has peak / (warmup + 1), step `warmup` the peak, and step `steps` the "
        "floor.",
        why="The warmup adds peak / (warmup + 1) with each step, so that the first step trains "
        "too. After it (1 + cos(pi * done)) / 2 goes from 1 to 0, slowly at both ends, and takes "
        "the rate from the peak to the floor.",
        mistake=idle_first_step,
    ),
    "clip": Part(
        reference=clip,
        cases=lambda: [(tree(0, size), 1.0) for size in (3.0, 0.01)],
        tolerance=1e-5,
        hint="All arrays together are one vector with one norm and one factor, min(1, max_norm / "
        "norm); the norm that is returned is that before clipping.",
        why="One factor for all arrays keeps the direction of the step. A gradient that is short "
        "enough stays as it is, and the norm is returned because it tells how a run is doing.",
        mistake=clip_each_alone,
    ),
    "is_decayed": Part(
        reference=is_decayed,
        cases=names_of_params,
        tolerance=0,
        hint="Names that end in kernel or embedding are decayed; biases and the scales of "
        "LayerNorms are not.",
        why="Decay pulls towards 0. That keeps matrices small, but 0 is no good value for the "
        "scale of a LayerNorm, and a bias has no part in overfitting. A rule by the number of "
        "axes would fail in gptjax, whose layers are stacked: there a bias has two.",
        mistake=lambda name: not name.endswith("bias"),
    ),
    "adamw": Part(
        reference=adamw,
        cases=updates,
        tolerance=1e-5,
        hint="The means are corrected by 1 - beta**n in the step but kept without it, eps is added "
        "outside the square root, and the decay is weight_decay * param, added to the step of the "
        "parameters that is_decayed names.",
        why="The means begin with 0, so after n steps they hold only 1 - beta**n of the weight; "
        "dividing by that makes the first steps as large as later ones. The decay is added to the "
        "step and not to the gradient, so that sqrt(nu) does not divide it: that is the W.",
        mistake=without_bias_correction,
    ),
    "train_step": Part(
        reference=train_step,
        cases=steps,
        tolerance=1e-5,
        hint="Loss and gradient, clip, adamw with n + 1, and the new state with the loss before "
        "the update and the norm before clipping.",
        why="jax.value_and_grad gives the loss and a tree of gradients like that of the "
        "parameters. Nothing is changed in place: the new parameters and means are returned, and "
        "jit compiles all of it into one program.",
        mistake=without_clipping,
    ),
}
