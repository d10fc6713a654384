"""What all tests share: 8 emulated CPU devices, caches of their own, and tiny models."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import gptjax  # noqa: F401

# isort: split
import jax
import pytest

from gptjax import model
from gptjax.config import GPTConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders for caches, so that no test reads or writes the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_caches(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gptjax and tiktoken use those."""
    monkeypatch.setenv("GPTJAX_CACHE", str(cache / "gptjax"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache / "tiktoken"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there: no network


def tiny(**changes: object) -> GPTConfig:
    """A model of 2 layers that compiles in a second, without any "auto"."""
    fields = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "vocab_size": 61,
        "vocab_multiple": 8,
    }
    return model.resolve(GPTConfig(**{**fields, **changes}))  # type: ignore[arg-type]


init_params = jax.jit(model.init_params, static_argnums=0)  # one compilation, not one an operation


def scaled_params(cfg: GPTConfig, key: jax.Array, scale: float = 8.0) -> model.Params:
    """Random parameters so large that small mistakes show; biases and LayerNorms perturbed."""
    params = init_params(cfg, key)
    leaves, treedef = jax.tree.flatten_with_path(params)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))

    def change(path: object, leaf: jax.Array, key: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")  # type: ignore[arg-type]
        if name.endswith(("kernel", "embedding")):
            return leaf * scale
        return leaf + 0.2 * jax.random.normal(key, leaf.shape)

    return treedef.unflatten(
        [change(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    )
