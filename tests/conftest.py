"""What all tests share: 8 emulated CPU devices, caches of their own, and tiny models."""

import os
import re
import signal
import subprocess
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gptjax  # noqa: F401

# isort: split
import jax
import pytest

from gptjax import model
from gptjax.config import GPTConfig
from gptjax.conversion import huggingface
from gptjax.terminal import cli

jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same program anew, with new functions: a cache for the session.
if "GPTJAX_TESTS_COMPILED" not in os.environ:  # xdist's workers take that of the first process
    COMPILED = tempfile.TemporaryDirectory()
    os.environ["GPTJAX_TESTS_COMPILED"] = COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["GPTJAX_TESTS_COMPILED"])
# Half of the time went into optimising programs that run once.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

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


@pytest.fixture
def restore_process() -> Iterator[None]:
    """The scripts set signal handlers and jax's cache for their own process."""
    handlers = {number: signal.getsignal(number) for number in cli.stop_signals()}
    compiled = jax.config.jax_compilation_cache_dir
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    jax.config.update("jax_compilation_cache_dir", compiled)


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


BYTES = tiny(vocab_size=256, vocab_multiple=128)


@pytest.fixture(scope="session")
def params() -> model.Params:
    """The parameters of a random model over bytes."""
    return jax.device_get(scaled_params(BYTES, jax.random.key(1)))


@pytest.fixture
def hf(tmp_path: Path, params: model.Params) -> Path:
    """A folder in Hugging Face's format with that model, and without a tokenizer."""
    (tmp_path / "hf").mkdir()
    huggingface.write_folder(tmp_path / "hf", BYTES, params, None)
    return tmp_path / "hf"


def need(name: str) -> Any:
    """A package that only some tests use; where it is missing, they are skipped."""
    return pytest.importorskip(name, reason=f"needs {name}: pip install -e '.[dev]'")


# ---- The scripts, as processes

TINY = (
    *("--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=8"),
    *("--max_iters=40", "--warmup_iters=4", "--learning_rate=3e-3", "--dropout=0.1"),
    *("--eval_interval=20", "--eval_iters=2", "--log_interval=5", "--checkpoint_interval=10"),
    *("--sample_interval=20", "--sample_tokens=20"),
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripts")
    (path / "corpus.txt").write_text("the cat sat on the mat and the dog ran to the cat\n" * 60)
    return path


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """One device, the tests' cache, two threads at most whatever the machine."""
    return {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # a first start takes 16 s, not 28
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "2",
        "GPTJAX_CACHE": os.environ["GPTJAX_TESTS_COMPILED"],
    }


def run(
    environment: dict[str, str], script: str, *argv: str, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == expect, done.stderr
    return done


def digest(output: str) -> str:
    found = re.search(r"state sha256=(\w{64})", output)
    assert found, output
    return found[1]


@pytest.fixture(scope="session")
def whole(folder: Path, environment: dict[str, str]) -> str:
    """What an undisturbed run prints."""
    argv = (*TINY, f"--dataset={folder}/corpus.txt", f"--out_dir={folder}/whole")
    return run(environment, "train.py", *argv).stdout
