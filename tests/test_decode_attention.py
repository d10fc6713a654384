"""Attention of a token to its cache: the CUDA source computes what `attention.attend` does.

On a CPU, tests/cuda_on_cpu.h is the GPU. On a GPU: `JAX_PLATFORMS=cuda pytest -n 0
tests/test_decode_attention.py`, and `-k caches tests/test_model.py`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention, blocks, model, sampling
from gptjax.config import SampleConfig
from gptjax.kernels import decode_attention
from gptjax.kernels.cuda import KernelError
from gptjax.kv_cache import KVCache

from .cuda_on_cpu import compile_kernel, launch, needs_gxx
from .helpers import scaled_params, tiny

SOURCE = Path(decode_attention.__file__).with_name("decode_attention.cu").read_text("utf-8")

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="it is for a CPU: JAX_PLATFORMS=cpu pytest tests/test_decode_attention.py",
)


# Full, past the end, in the middle of a round, and empty; behind the last is no memory to be read.
LENGTHS = [79, 80, 64, 33, 1, 0]


def launch_on_cpu(folder: Path, source: str = SOURCE) -> Any:
    """Return what stands for `decode_attention.launch`: the kernel, compiled for this CPU."""

    def launch_it(
        inputs: Sequence[jax.Array], outputs: Sequence[Any], together: int, threads: int
    ) -> list[np.ndarray]:
        *new, k, v = map(np.array, inputs)
        B, S, H, K = k.shape
        options = decode_attention.options(S, H, K, together, threads)
        macros = tuple(tuple(option[2:].split("=")) for option in options)
        kernel = compile_kernel(folder, source, "decode_attention", macros)
        y = np.zeros(outputs[2].shape, outputs[2].dtype)
        shared = threads // 32 * together * K // 8 * decode_attention.FOUND
        arrays = [*new, k, v, k, v, y]
        launch(kernel, arrays, grid=B * H // together, block=threads, shared=shared)
        return [k, v, y]

    return launch_it


def plain(
    inputs: Sequence[jax.Array], outputs: Sequence[Any], together: int, threads: int
) -> list[jax.Array]:
    """Stand for `decode_attention.launch`: plain JAX that computes what the kernel does."""
    (q, new_k, new_v), (length_B, k, v) = (x[:, None] for x in inputs[:3]), inputs[3:]
    cache = KVCache((k,), (v,), length_B)
    y, cache = attention.CACHED_ATTENTION["xla"](q, new_k, new_v, cache)
    return [cache.k[0], cache.v[0], y[:, 0]]


def check(heads: int, lengths: Sequence[int], S: int = 80) -> None:
    """The result is as near to float32's as `attend`'s in bfloat16, and the caches are equal."""
    shape = (len(lengths), 1, heads, 64)
    q, new_k, new_v = 2 * jax.random.normal(jax.random.key(0), (3, *shape))
    k, v = jax.random.normal(jax.random.key(1), (2, len(lengths), S, heads, 64))
    length_B = jnp.array(lengths)
    behind = jnp.arange(S)[None, :, None, None] > length_B[:, None, None, None]

    def run(name: str, dtype: Any, fill: float) -> list[np.ndarray]:
        """Return the result, and what the caches hold; behind that is `fill` at first."""
        q_, k_, v_ = (x.astype(jnp.bfloat16).astype(dtype) for x in (q, new_k, new_v))
        held = [jnp.where(behind, fill, x).astype(jnp.bfloat16).astype(dtype) for x in (k, v)]
        cache = KVCache((held[0],), (held[1],), length_B)
        y, cache = attention.CACHED_ATTENTION[name](q_, k_, v_, cache)
        arrays = (cache.k[0], cache.v[0])
        kept = jnp.array([jnp.where(behind, x, fill) for x in arrays])
        assert jnp.array_equal(kept, jnp.full_like(kept, fill), equal_nan=True)
        after = [jnp.where(behind, 0, x) for x in arrays]
        return [np.asarray(x, np.float32) for x in (y, *after)]

    exact, *caches = run("xla", jnp.float32, 0)
    reference, *_ = run("xla", jnp.bfloat16, 0)
    # What a row does not hold is not read: there it need not be a number.
    found, *held = run("flash", jnp.bfloat16, math.nan)

    def norms(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x.reshape(len(lengths), -1), axis=1)

    error, allowed = (norms(y - exact) / norms(exact) for y in (found, reference))
    assert (error <= 1.2 * np.maximum(allowed, 2**-8)).all(), (error, allowed)
    assert all(map(np.array_equal, held, caches))


@needs_gxx
@on_cpu
@pytest.mark.parametrize(("together", "threads"), [(1, 64), (2, 64), (1, 32)])
def test_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int, threads: int
) -> None:
    monkeypatch.setattr(decode_attention, "launch", launch_on_cpu(tmp_path))
    monkeypatch.setattr(decode_attention, "plan", lambda B, H: (together, threads))
    check(2, LENGTHS)


MISTAKES = [
    ("length < PLACES ? length : PLACES - 1", "length < PLACES ? length : PLACES - 2"),
    ("(place < last ? place : 0)", "place"),
    ("if (begin + j * GROUPS + group >= last)", "if (begin + j * GROUPS + group > last)"),
    ("if (group == 0) found.largest", "found.largest"),
    ("if (group == 0) {", "if (false) {"),
    ("for (int other = LANES;", "for (int other = 2 * LANES;"),
    ("  __syncthreads();\n", ""),
    ("int warp = 1; warp < WARPS", "int warp = 1; warp < WARPS - 1"),
    ("rescale(found, largest), rescale(other, largest);", "rescale(other, largest);"),
    ("blockIdx.x % blocks * LANES + lane", "lane"),
    ("(size_t)b * PLACES * ROW", "(size_t)0"),
    ("found.values[2 * i] / found.sum", "found.values[2 * i]"),
]


@needs_gxx
@on_cpu
@pytest.mark.parametrize(("right", "wrong"), MISTAKES)
def test_a_planted_mistake_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    assert SOURCE.count(right) == 1, right
    source = launch_on_cpu(tmp_path, SOURCE.replace(right, wrong))
    monkeypatch.setattr(decode_attention, "launch", source)
    monkeypatch.setattr(decode_attention, "plan", lambda B, H: (1, 64))
    with pytest.raises(AssertionError):
        check(2, LENGTHS)


@pytest.mark.parametrize(("rows", "heads"), [(1, 12), (8, 12), (64, 12), (64, 25)])
def test_kernel_on_a_gpu(rows: int, heads: int) -> None:
    if decode_attention.refusal(1, 64, jnp.bfloat16):
        pytest.skip("needs an H100: JAX_PLATFORMS=cuda pytest -n 0 tests/test_decode_attention.py")
    check(heads, np.linspace(300, 512, rows).astype(int).tolist(), 512)


def test_the_plan_has_whole_heads_and_warps() -> None:
    for rows in (1, 8, 43, 64, 256):
        for heads in (1, 6, 12, 16, 20, 25):
            together, threads = decode_attention.plan(rows, heads)
            assert heads % together == 0 and threads % 32 == 0 and together * 64 // 8 <= 32


@pytest.fixture
def fresh_programs() -> Iterator[None]:
    """Programs that were traced with a stand-in do not outlive the test."""
    yield
    jax.clear_caches()


@on_cpu
def test_the_decoder_writes_and_reads_the_same_caches(
    monkeypatch: pytest.MonkeyPatch, fresh_programs: None
) -> None:
    """Texts of several rows past the end of the context, with a stand-in for the kernel."""
    cfg = tiny(dtype="float32")
    params = model.prepare_for_decoding(cfg, scaled_params(cfg, jax.random.key(0)))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]

    def texts() -> np.ndarray:
        how = SampleConfig(temperature=0)
        pieces = sampling.generate(cfg, params, prompts, how, max_new_tokens=cfg.block_size + 4)
        return np.concatenate(list(pieces), axis=1)

    expected, shapes = texts(), []

    def launch_it(inputs: Sequence[jax.Array], *args: Any) -> list[jax.Array]:
        shapes.append(inputs[0].shape)
        return plain(inputs, *args)

    def choose(cfg: Any, rows: int, T: int, size: int) -> str:
        return "flash" if T == 1 else "xla"

    jax.clear_caches()
    monkeypatch.setattr(decode_attention, "launch", launch_it)
    monkeypatch.setattr(blocks, "choose_cached_attention", choose)
    assert np.array_equal(texts(), expected)
    assert set(shapes) == {(3, cfg.n_head, cfg.head_dim)}


def test_a_kernel_that_cannot_be_compiled_leaves_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> Any:
        raise KernelError("NVRTC refuses a kernel: why")

    monkeypatch.setattr(decode_attention, "launch", refuse)
    monkeypatch.setitem(attention.CACHED_ATTENTION, "cudnn", attention.CACHED_ATTENTION["xla"])
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1, 3, 64))
    cache = KVCache((jnp.zeros((2, 8, 3, 64)),), (jnp.zeros((2, 8, 3, 64)),), jnp.array([0, 5]))
    found, expected = (
        attention.CACHED_ATTENTION[name](q, k, v, cache) for name in ("flash", "xla")
    )
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))
    why = "kernels: cuDNN's attention instead, because NVRTC refuses a kernel: why\n"
    assert capsys.readouterr().err == why


@pytest.mark.parametrize(("attends", "size"), [("flash", 512), ("cudnn", 128), ("xla", 128)])
def test_caches_of_many_rows_grow_where_all_of_them_is_read(
    monkeypatch: pytest.MonkeyPatch, attends: str, size: int
) -> None:
    monkeypatch.setattr(sampling, "on_cpu", lambda: False)
    monkeypatch.setattr(sampling, "choose_cached_attention", lambda *args: attends)
    cfg = tiny(block_size=1024)
    assert sampling.first_size(cfg, sampling.MANY_ROWS, 8, 500) == size
    assert sampling.first_size(cfg, sampling.MANY_ROWS - 1, 8, 500) == 512
