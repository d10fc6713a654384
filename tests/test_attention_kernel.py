"""Flash attention with dropout: its CUDA source computes what `attention.attend` does.

On a CPU, tests/cuda_on_cpu.h is the GPU. On a GPU:
`JAX_PLATFORMS=cuda pytest -n 0 tests/test_attention_kernel.py`.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention, dropout, sharding
from gptjax.config import TrainConfig, parse_mesh
from gptjax.kernels import attention as flash
from gptjax.kernels import cuda
from gptjax.training import step

from .cuda_on_cpu import compile_kernel, launch, needs_gxx
from .helpers import tiny

SOURCE = Path(flash.__file__).with_name("attention.cu").read_text(encoding="utf-8")
RATE = 0.2


def launch_on_cpu(folder: Path, source: str = SOURCE) -> Any:
    """Return what stands for `flash.launch`: the kernels, compiled for this CPU."""

    def launch_it(
        name: str, inputs: list[jax.Array], outputs: list[Any], rate: float, **how: int
    ) -> list[jax.Array]:
        _, T, H, K = inputs[0].shape
        macros = [option[2:].split("=") for option in flash.options(name, T, H, K, rate)]

        def on_host(*arrays: Any) -> list[np.ndarray]:
            made = [np.zeros(x.shape, x.dtype) for x in outputs]
            kernel = compile_kernel(folder, source, name, tuple((k, v) for k, v in macros))
            launch(kernel, [*map(np.array, arrays), *made], block=flash.THREADS, **how)
            return made

        return jax.pure_callback(on_host, outputs, *inputs)

    return launch_it


def plain(
    name: str, inputs: list[jax.Array], outputs: list[Any], rate: float, **how: int
) -> list[jax.Array]:
    """Stand for `flash.launch`: plain JAX that computes what the kernels do."""
    q, k, v, words_BHT2 = inputs[:4]
    T, K = q.shape[1], q.shape[-1]
    keep = dropout.mask_of_words(words_BHT2[..., :1], words_BHT2[..., 1:], T, rate)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5
        scores = jnp.where(jnp.tril(jnp.ones((1, 1, T, T), bool)), scores, -jnp.inf)
        weights = dropout.drop(jax.nn.softmax(scores), keep, rate)
        return jnp.einsum("bhts,bshk->bthk", weights, v), jax.nn.logsumexp(scores, axis=-1)

    (y, log_sums), vjp = jax.vjp(attend, *(x.astype(jnp.float32) for x in (q, k, v)))
    found = [y, log_sums]
    if name == "attention_backward":
        found = vjp((inputs[-1].astype(jnp.float32), jnp.zeros_like(log_sums)))
    return [x.astype(out.dtype) for x, out in zip(found, outputs, strict=True)]


def arguments(B: int, T: int, H: int, K: int) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return q, k, v and the result's gradient, whose scores are far from alike, and row keys."""
    arrays = [jax.random.normal(jax.random.key(i), (B, T, H, K)) for i in range(4)]
    q, *rest = [x.astype(jnp.bfloat16) for x in (2 * arrays[0], *arrays[1:])]
    return [q, *rest[:2]], rest[2], jax.random.split(jax.random.key(4), B)


def reference(inputs: list[jax.Array], dy: jax.Array, keys_B: jax.Array, dtype: Any) -> list[Any]:
    """Return the result and the three gradients of `attend_xla`, computed in a type."""

    def attend(*qkv: jax.Array) -> jax.Array:
        return attention.attend_xla(*qkv, dropout=RATE, keys_B=keys_B)

    @jax.jit
    def all_of_it(dy: jax.Array, *qkv: jax.Array) -> list[jax.Array]:
        y, vjp = jax.vjp(attend, *qkv)
        return [y, *vjp(dy)]

    with jax.default_matmul_precision("highest"):
        return all_of_it(*(x.astype(dtype) for x in (dy, *inputs)))


def errors(found: list[Any], expected: list[Any]) -> list[float]:
    """Return the relative error of each array."""
    pairs = [
        [np.asarray(x, np.float64) for x in pair] for pair in zip(found, expected, strict=True)
    ]
    return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs]


def check(shape: tuple[int, int, int, int]) -> None:
    """Result and gradients are as near to float32's as those of `attend_xla` in bfloat16."""
    inputs, dy, keys_B = arguments(*shape)

    def attend(*qkv: jax.Array) -> jax.Array:
        return attention.attend_flash(*qkv, dropout=RATE, keys_B=keys_B)

    y, vjp = jax.vjp(attend, *inputs)
    exact = reference(inputs, dy, keys_B, jnp.float32)
    allowed = errors(reference(inputs, dy, keys_B, jnp.bfloat16), exact)
    found = errors([y, *vjp(dy)], exact)
    for name, error, limit in zip(("y", "dq", "dk", "dv"), found, allowed, strict=True):
        assert error <= 1.2 * max(limit, 2**-8), (name, error, limit)


on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="it is for a CPU: JAX_PLATFORMS=cpu pytest tests/test_attention_kernel.py",
)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "refusal", lambda T, K, dtype: "")


@needs_gxx
@on_cpu
@pytest.mark.parametrize("shape", [(2, 192, 2, 32), (2, 64, 1, 64)])
def test_source(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    anywhere: None,
    shape: tuple[int, int, int, int],
) -> None:
    """Of one tile and of three, of one head and of two."""
    monkeypatch.setattr(flash, "launch", launch_on_cpu(tmp_path))
    check(shape)


MISTAKES = [
    ("__syncthreads();\n    load_tile(k_tile", "load_tile(k_tile"),
    (
        "load_tile(v_tile, v, bh, other * TILE);\n    __syncthreads();",
        "load_tile(v_tile, v, bh, other * TILE);",
    ),
    ("__syncthreads();\n    load_tile(columns_a", "load_tile(columns_a"),
    ("__syncthreads();\n    float p[8][4]", "float p[8][4]"),
    ("bh % HEADS", "0"),
    ("column < r :", "column <= r :"),
    (": 0) - delta", ": 0)"),
    ("is_kept(row_words[i], other * TILE +", "is_kept(row_words[i],"),
    ("is_kept(column_words[column], tile * TILE + r)", "is_kept(column_words[column], r)"),
]


@needs_gxx
@on_cpu
@pytest.mark.parametrize(("right", "wrong"), MISTAKES)
def test_a_planted_mistake_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anywhere: None, right: str, wrong: str
) -> None:
    assert SOURCE.count(right) == 1, right
    monkeypatch.setattr(flash, "launch", launch_on_cpu(tmp_path, SOURCE.replace(right, wrong)))
    with pytest.raises(AssertionError):
        check((2, 192, 2, 32))


@pytest.mark.parametrize("shape", [(3, 64, 5, 64), (8, 256, 6, 64), (2, 512, 12, 64)])
def test_kernels_on_a_gpu(shape: tuple[int, int, int, int]) -> None:
    if flash.refusal(shape[1], shape[3], jnp.bfloat16):
        pytest.skip("needs an H100: JAX_PLATFORMS=cuda pytest -n 0 tests/test_attention_kernel.py")
    check(shape)


def test_without_the_kernels_it_is_xlas_and_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    """At other lengths, heads and types, wherever this runs; and without dropout."""
    inputs, _, keys_B = arguments(2, 24, 2, 16)
    expected = attention.attend_xla(*inputs, dropout=RATE, keys_B=keys_B)
    assert jnp.array_equal(attention.attend_flash(*inputs, dropout=RATE, keys_B=keys_B), expected)
    monkeypatch.setattr(attention, "attend_cudnn", lambda *qkv: "cudnn")
    assert attention.attend_flash(*inputs) == "cudnn"
    assert attention.attend_flash(*inputs, dropout=RATE) == "cudnn"
    monkeypatch.setattr(cuda, "capability", lambda: cuda.HOPPER)
    monkeypatch.setattr(cuda, "available", lambda: True)
    assert not flash.refusal(64, 64, "bfloat16")
    assert "float32" in flash.refusal(64, 64, "float32")


# ---- In a training step --------------------------------------------------------------------------


def loss_and_grad(attention: str, mesh: str, **changes: Any) -> Any:
    """Return loss and gradients of two passes with dropout."""
    cfg = tiny(dropout=0.2, dtype="float32", attention=attention, **changes)
    axes = parse_mesh(mesh)
    devices = sharding.make_mesh(jax.devices()[: math.prod(axes.values())], axes)
    config = TrainConfig(model=cfg, batch_size=4)
    params = step.init_state(config, abstract := step.abstract_state(config, devices)).params
    compute = jax.jit(step.make_loss_and_grad(cfg, abstract.params))
    rng = np.random.default_rng(0)
    windows = rng.integers(0, cfg.vocab_size, (2, 4, cfg.block_size + 1), dtype=np.int32)
    placed = sharding.place(windows, devices, axis=1)
    return compute(params, placed, step.dropout_keys(config, 3, (2, 4)), None)


@on_cpu
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ("data:1", {}),
        ("data:1", {"remat": True}),
        ("data:1", {"unroll": 1}),
        ("data:2,fsdp:2", {}),
        ("data:2,tensor:2", {}),
    ],
)
def test_a_step_has_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, anywhere: None, mesh: str, changes: dict[str, Any]
) -> None:
    shapes = []

    def launch_it(name: str, inputs: list[jax.Array], *args: Any, **how: Any) -> list[jax.Array]:
        shapes.append(inputs[0].shape)
        return plain(name, inputs, *args, **how)

    monkeypatch.setattr(flash, "launch", launch_it)
    found, expected = (loss_and_grad(name, mesh, **changes) for name in ("flash", "xla"))
    rows = {"data:1": 4, "data:2,fsdp:2": 1, "data:2,tensor:2": 2}[mesh]
    heads = 1 if "tensor" in mesh else 2
    assert {(shape[0], shape[2]) for shape in shapes} == {(rows, heads)}
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-6)
