"""Flash attention with dropout: its CUDA source computes what `attention.attend` does.

On a CPU, tests/cuda_on_cpu.h is the GPU. On a GPU:
`JAX_PLATFORMS=cuda pytest -n 0 tests/test_attention_kernel.py`.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention
from gptjax.kernels import attention as flash

from .cuda_on_cpu import compile_kernel, launch, needs_gxx

SOURCE = Path(flash.__file__).with_name("attention.cu").read_text(encoding="utf-8")
RATE = 0.2


def run_on_cpu(folder: Path, source: str = SOURCE) -> Any:
    """Return what stands for `flash.run`: the kernels, compiled for this CPU."""

    def run(name: str, inputs: list[jax.Array], n_gradients: int, rate: float) -> list[jax.Array]:
        (B, T, H, K), dtype = inputs[0].shape, inputs[0].dtype
        like_q = [jax.ShapeDtypeStruct((B, T, H, K), dtype)] * (n_gradients or 1)
        log_sums = [] if n_gradients else [jax.ShapeDtypeStruct((B, H, T), jnp.float32)]
        outputs = [*like_q, *log_sums]
        macros = [option[2:].split("=") for option in flash.options(name, T, H, K, rate)]

        def on_host(*arrays: Any) -> list[np.ndarray]:
            made = [np.zeros(x.shape, x.dtype) for x in outputs]
            launch(
                compile_kernel(folder, source, name, tuple((key, value) for key, value in macros)),
                [*map(np.array, arrays), *made],
                grid=B * H * T // flash.TILE * (2 if n_gradients else 1),
                block=flash.THREADS,
                shared=flash.shared_memory(K, backward=n_gradients > 0),
            )
            return made

        return jax.pure_callback(on_host, outputs, *inputs)

    return run


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


@needs_gxx
@pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="it is for a CPU: JAX_PLATFORMS=cpu pytest tests/test_attention_kernel.py",
)
@pytest.mark.parametrize("shape", [(1, 192, 2, 32), (2, 64, 1, 64)])
def test_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int]
) -> None:
    """Of one tile and of three, of one row and of two."""
    monkeypatch.setattr(flash, "run", run_on_cpu(tmp_path))
    monkeypatch.setattr(flash, "takes", lambda T, K: True)
    check(shape)


@pytest.mark.parametrize("shape", [(3, 64, 5, 64), (8, 256, 6, 64), (2, 512, 12, 64)])
def test_kernels_on_a_gpu(shape: tuple[int, int, int, int]) -> None:
    if not flash.takes(shape[1], shape[3]):
        pytest.skip("needs an H100: JAX_PLATFORMS=cuda pytest -n 0 tests/test_attention_kernel.py")
    check(shape)


def test_without_the_kernels_it_is_xlas_and_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    """At other lengths or in a program for several devices; and without dropout."""
    inputs, _, keys_B = arguments(2, 24, 2, 16)
    expected = attention.attend_xla(*inputs, dropout=RATE, keys_B=keys_B)
    assert jnp.array_equal(attention.attend_flash(*inputs, dropout=RATE, keys_B=keys_B), expected)
    monkeypatch.setattr(attention, "attend_cudnn", lambda *qkv: "cudnn")
    assert attention.attend_flash(*inputs) == "cudnn"
    assert attention.attend_flash(*inputs, dropout=RATE) == "cudnn"
