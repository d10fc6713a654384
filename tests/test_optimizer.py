"""The optax chain: what is decayed, how the rate runs, and the same steps as PyTorch's AdamW."""

import re
from typing import Any

import jax
import numpy as np
import optax
import pytest

from gptjax.config import TrainConfig
from gptjax.loss import loss_fn
from gptjax.training import optimizer

from .helpers import init_params, need, tiny

CFG = tiny(vocab_multiple=1)  # as the PyTorch twin, which has no mask for padding
PARAMS = init_params(CFG, jax.random.key(0))


def paths(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_decay_touches_no_bias_and_no_layer_norm() -> None:
    mask = paths(optimizer.decay_mask(PARAMS))
    assert {path for path, decayed in mask.items() if decayed} == {
        "wte/embedding",
        "wpe/embedding",
        "h/attn/c_attn/kernel",
        "h/attn/c_proj/kernel",
        "h/mlp/c_fc/kernel",
        "h/mlp/c_proj/kernel",
    }
    by_dimension = jax.tree.map(lambda p: p.ndim > 1, PARAMS)  # the usual rule, wrong when stacked
    assert by_dimension != optimizer.decay_mask(PARAMS)


def test_an_untied_head_is_decayed_and_no_matrix_of_muon() -> None:
    params = {"lm_head": {"embedding": PARAMS["wte"]["embedding"]}, **PARAMS}
    assert paths(optimizer.decay_mask(params))["lm_head/embedding"]
    config = TrainConfig(optimizer="muon", warmup_iters=0, weight_decay=0.0)
    tx = optimizer.make_optimizer(config)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    # Adam's first step is the learning rate in every entry; Muon's is far from it.
    assert np.abs(updates["lm_head"]["embedding"]).max() == pytest.approx(6e-4, rel=0.01)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_without_gradient_only_decayed_parameters_move(name: str) -> None:
    config = TrainConfig(optimizer=name, warmup_iters=0)  # type: ignore[arg-type]
    tx = optimizer.make_optimizer(config)
    params = jax.tree.map(lambda p: p + 1.0, PARAMS)
    zeros = jax.tree.map(lambda p: p * 0, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for path, update in paths(updates).items():
        moved = float(np.abs(update).max()) > 0
        assert moved == bool(re.search(r"(kernel|embedding)$", path)), path


# ---- Schedules -----------------------------------------------------------------------------------


def config(schedule: str, **changes: Any) -> TrainConfig:
    fields = {"max_iters": 100, "warmup_iters": 10, "learning_rate": 1.0, "min_lr": 0.1}
    return TrainConfig(schedule=schedule, **{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_warmup_starts_above_zero_and_ends_at_the_peak(name: str) -> None:
    schedule = optimizer.make_schedule(config(name))
    assert schedule(0) == pytest.approx(1 / 11)
    assert schedule(5) == pytest.approx(6 / 11)
    assert schedule(10) == pytest.approx(1)
    assert optimizer.make_schedule(config(name, warmup_iters=0))(0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "at_55", "at_90", "end"),
    [("cosine", 0.55, 0.1 + 0.45 * (1 + np.cos(np.pi * 80 / 90)), 0.1), ("wsd", 1, 0.55, 0.1)],
)
def test_decay(name: str, at_55: float, at_90: float, end: float) -> None:
    schedule = optimizer.make_schedule(config(name))
    found = [float(schedule(step)) for step in (55, 90, 100, 500)]
    assert found == pytest.approx([at_55, at_90, end, end])
    longer = optimizer.make_schedule(config(name, lr_decay_iters=200))
    assert longer(100) > 0.5


def test_wsd_may_fall_to_zero_all_the_way_from_the_warmup() -> None:
    half = optimizer.make_schedule(config("wsd", min_lr=0, decay_fraction=0.5))
    assert [float(half(step)) for step in (50, 75, 99, 100, 500)] == pytest.approx(
        [1, 0.5, 0.02, 0, 0]
    )
    whole = optimizer.make_schedule(config("wsd", min_lr=0, decay_fraction=1))
    assert [float(whole(step)) for step in (10, 55, 100)] == pytest.approx([1, 0.5, 0])


def test_constant_stays() -> None:
    assert optimizer.make_schedule(config("constant"))(10_000) == pytest.approx(1)


def test_muon_has_its_own_peak() -> None:
    tx = optimizer.make_optimizer(TrainConfig(optimizer="muon", warmup_iters=0, weight_decay=0.0))
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), PARAMS)
    updates = paths(jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)[0])
    singular = np.linalg.svd(np.asarray(updates["h/attn/c_proj/kernel"]), compute_uv=False)
    assert singular.shape == (2, 32)  # each layer's matrix is orthogonalised on its own
    assert singular.max() / np.median(singular) < 2
    assert 0.01 < np.median(singular) < 0.04
    assert np.abs(updates["wte/embedding"]).max() == pytest.approx(6e-4, rel=0.01)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_embeddings_and_vectors_may_have_rates_of_their_own(name: str) -> None:
    def updates(**changes: float) -> dict[str, Any]:
        config = TrainConfig(optimizer=name, warmup_iters=0, **changes)  # type: ignore[arg-type]
        tx = optimizer.make_optimizer(config)
        grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), PARAMS)
        return paths(jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)[0])

    plain = updates()
    own = updates(embedding_learning_rate=6e-3, vector_learning_rate=6e-5)
    for path, update in own.items():
        ratio = 10 if path.endswith("embedding") else 1 if path.endswith("kernel") else 0.1
        assert np.abs(update - ratio * plain[path]).max() <= 1e-6, path


# ---- Against PyTorch -----------------------------------------------------------------------------


def parameters_after_20_steps(tx: optax.GradientTransformation, batches: np.ndarray) -> Any:
    @jax.jit
    def step(params: Any, opt_state: Any, windows: Any) -> Any:
        grads = jax.grad(loss_fn, argnums=1)(CFG, params, windows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = PARAMS, tx.init(PARAMS)
    for windows in batches:
        params, opt_state = step(params, opt_state, windows)
    return params


def difference_to_torch(tx: optax.GradientTransformation, config: TrainConfig) -> float:
    """Largest difference of any parameter after 20 steps of AdamW with clipping."""
    torch = need("torch")
    from .torch_gpt import (
        MeanLoss,
        TorchGPT,
        copy_params,
        make_adamw,
        named_gradients,
        train_step,
    )

    batches = np.random.default_rng(0).integers(0, 61, (20, 4, 17))
    twin = TorchGPT(CFG)
    copy_params(PARAMS, twin)
    adamw = make_adamw(twin, config)
    for windows in batches:
        train_step(MeanLoss(twin), adamw, torch.tensor(windows), config.grad_clip)
    theirs = named_gradients(twin, of="data")
    ours = paths(parameters_after_20_steps(tx, batches))
    return max(float(np.abs(ours[path] - theirs[path]).max()) for path in theirs)


TORCH_CONFIG = TrainConfig(
    schedule="constant", warmup_iters=0, learning_rate=1e-3, weight_decay=0.5, grad_clip=0.3
)


def test_adamw_is_pytorchs() -> None:
    assert difference_to_torch(optimizer.make_optimizer(TORCH_CONFIG), TORCH_CONFIG) <= 1e-4


@pytest.mark.parametrize("mistake", ["decay of biases", "clip after Adam", "beta2"])
def test_adamw_gate_turns_red(mistake: str) -> None:
    def adamw(**changes: Any) -> optax.GradientTransformation:
        fields = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.5}
        return optax.adamw(1e-3, **{**fields, "mask": optimizer.decay_mask, **changes})

    clip = optax.clip_by_global_norm(0.3)
    wrong = {
        "decay of biases": optax.chain(
            clip, adamw(mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
        ),
        "clip after Adam": optax.chain(adamw(), clip),
        "beta2": optax.chain(clip, adamw(b2=0.999)),
    }[mistake]
    assert not difference_to_torch(wrong, TORCH_CONFIG) <= 1e-4


@pytest.mark.parametrize("limit", [0.3, 1e3])  # shorter and longer than the gradient
def test_with_products_of_bfloat16_gradients_are_clipped_as_by_optax(limit: float) -> None:
    half, optax_clip = tiny(dtype="bfloat16"), optax.clip_by_global_norm(limit)
    clip = optimizer.clip_by_global_norm(limit, half)
    norm = jax.jit(optimizer.global_norm, static_argnums=0)(half, PARAMS)
    assert float(norm) == pytest.approx(float(optax.tree.norm(PARAMS)), rel=1e-6)
    assert clip.init(PARAMS) == optax_clip.init(PARAMS)  # as older runs saved it
    found, exact = (jax.jit(tx.update)(PARAMS, tx.init(PARAMS))[0] for tx in (clip, optax_clip))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
