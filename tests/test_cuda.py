"""CUDA C++ in a JAX program: what XLA is asked for, and that nothing breaks where it cannot run."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.kernels import cuda

DOUBLE = r"""
extern "C" __global__ void twice(const float* x, float* y) {
  y[threadIdx.x] = TIMES * x[threadIdx.x];
}
"""


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found out about this machine once does not hold for a machine that a test makes."""
    for name in ("nvrtc", "compile_ptx", "refusal_here", "available"):
        monkeypatch.setattr(cuda, name, functools.cache(getattr(cuda, name).__wrapped__))


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch,
    found: tuple[int, int] | None = (9, 0),
    passed: Path | None = None,
) -> None:
    monkeypatch.setattr(cuda, "capability", lambda: found)
    monkeypatch.setattr(cuda, "passed_file", lambda: passed)


def test_the_call_asks_xla_for_its_ptx_target() -> None:
    """The dictionary that XLA parses, aliases included; lowered for a GPU on a machine without."""

    def program(x: jax.Array, old: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        kernel = functools.partial(cuda.call, "k", "PTX", grid=3, block=64, shared=1000)
        return kernel(inputs=[x, old], outputs=[shape, shape], aliases={1: 0})[1] + 1

    x = jnp.ones(192)
    text = jax.jit(program).trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.ptx" in text
    for part in (
        'name = "k"',
        'kernel_type = "ptx"',
        'kernel_data = "PTX"',
        "grid_x = 3 : i32",
        "grid_z = 1 : i32",
        "block_x = 64 : i32",
        "shared_mem_bytes = 1000 : i32",
        "operand_index = 1",
    ):
        assert part in text, part


def test_without_an_nvidia_gpu_there_are_no_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    if cuda.capability() is not None:
        pytest.skip("there is an NVIDIA GPU; run it without: JAX_PLATFORMS=cpu pytest -k nvidia")
    assert cuda.refusal() == "there is no NVIDIA GPU"
    assert not cuda.available()
    assert capsys.readouterr().err == ""  # nobody expects them there


def test_an_old_gpu_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    assert "7.5 is below 8.0" in cuda.refusal()
    assert not cuda.available()


def test_a_missing_compiler_leaves_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpu(monkeypatch)

    def missing(name: str, *mode: object) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    assert not cuda.available()
    assert not cuda.available()
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "NVRTC is missing" in printed


def test_a_target_that_xla_does_not_know_leaves_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CPU does not know it, so this asks XLA in earnest; found while a program is traced."""
    if cuda.capability() is not None:
        pytest.skip("there is an NVIDIA GPU; run it without: JAX_PLATFORMS=cpu pytest -k target")
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "compile_ptx", lambda *source: "PTX")
    found = []

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        found.append(cuda.available())
        return x

    program(1.0)
    assert found == [False]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("answer", "reason"), [(2, ""), (3, "something else")])
def test_the_probe_checks_the_answer(
    answer: float, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what it found out is kept for other processes only if it passed."""
    passed = tmp_path / "passed"
    pretend_gpu(monkeypatch, passed=passed)
    monkeypatch.setattr(cuda, "compile_ptx", lambda *source: "PTX")

    def pretend(*_: object, inputs: list[jax.Array], **__: object) -> list[jax.Array]:
        return [answer * inputs[0] + inputs[1]]

    monkeypatch.setattr(cuda, "call", pretend)
    assert reason in cuda.refusal()
    assert bool(cuda.refusal()) == bool(reason)
    assert passed.exists() == (not reason)
    monkeypatch.setattr(cuda, "call", None)
    cuda.refusal_here.cache_clear()
    assert bool(cuda.refusal()) == bool(reason)


def test_a_probe_that_passed_holds_for_this_gpu_and_software(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "kept_file", Path)
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(cuda, "architecture", lambda: "compute_90")
    names = [cuda.passed_file(), cuda.passed_file()]
    for name, value in (("nvrtc_version", (13, 1)), ("architecture", "compute_100")):
        monkeypatch.setattr(cuda, name, lambda value=value: value)
        names.append(cuda.passed_file())
    monkeypatch.setattr(cuda, "PROBE", "another")
    names.append(cuda.passed_file())
    monkeypatch.setattr(cuda.jax, "__version__", "0.1")
    names.append(cuda.passed_file())
    assert names[0] == names[1] and len(set(names)) == 5


def have_nvrtc() -> bool:
    try:
        return bool(cuda.nvrtc())
    except cuda.KernelError:
        return False


needs_nvrtc = pytest.mark.skipif(
    not have_nvrtc(), reason="NVRTC is missing: pip install nvidia-cuda-nvrtc"
)


@needs_nvrtc
def test_nvrtc_compiles_for_an_architecture() -> None:
    ptx = cuda.compile_ptx(DOUBLE, "compute_90", ("-DTIMES=2",))
    assert ".target sm_90" in ptx
    assert ".entry twice" in ptx


@needs_nvrtc
def test_nvrtc_says_what_is_wrong_with_a_source() -> None:
    with pytest.raises(cuda.KernelError, match='"TIMES" is undefined'):
        cuda.compile_ptx(DOUBLE, "compute_90")


@pytest.mark.skipif(
    cuda.refusal() != "",
    reason="kernels do not run here; on an NVIDIA GPU: pytest tests/test_cuda.py",
)
def test_a_kernel_runs_inside_jit() -> None:
    ptx = cuda.compile_ptx(DOUBLE, cuda.architecture(), ("-DTIMES=3",))
    x = jax.random.normal(jax.random.key(0), (256,))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    run = jax.jit(lambda x: cuda.call("twice", ptx, [x + 1], [shape], grid=1, block=256)[0] - 1)
    np.testing.assert_allclose(run(x), 3 * (x + 1) - 1, rtol=1e-6)
