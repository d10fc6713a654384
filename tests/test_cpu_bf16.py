"""Products of bfloat16 on a CPU: equal to their reference, fast in form, and said in the record."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import train
from gptjax import model, precision
from gptjax.config import GPTConfig
from gptjax.kernels import cpu_bf16
from gptjax.loss import loss_fn
from gptjax.presets import PRESETS
from gptjax.terminal import cli
from gptjax.training import run_settings
from gptjax.training.run_settings import read_settings

from .helpers import TINY, digest, init_params, tiny
from .test_training import train as train_tiny

SPECS = {  # products of a model: of a linear layer, of the head, and the two of attention
    "ND,DF->NF": ((48, 24), (24, 40)),
    "ND,VD->NV": ((48, 24), (17, 24)),
    "BTHK,BSHK->BHTS": ((2, 12, 3, 16), (2, 20, 3, 16)),
    "BHTS,BSHK->BTHK": ((2, 3, 12, 20), (2, 20, 3, 16)),
    "LPRS,LPSC->LPRC": ((2, 3, 16, 16), (2, 3, 16, 24)),  # of Muon, whose others are as attention's
}
Einsum = Callable[..., Array]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let XLA's kernels be used, which the tests' XLA_FLAGS keep from every other test."""
    monkeypatch.setenv("XLA_FLAGS", "")
    precision.cpu_computes_bfloat16.cache_clear()
    if not precision.cpu_computes_bfloat16():
        pytest.skip("needs a CPU with avx512_bf16 or amx_bf16: pytest -n 0 tests/test_cpu_bf16.py")
    jax.clear_caches()  # what was traced without them
    yield
    precision.cpu_computes_bfloat16.cache_clear()
    jax.clear_caches()


def with_gradients(einsum: Einsum, spec: str) -> Any:
    def both(a: Array, b: Array, g: Array) -> list[Array]:
        y, vjp = jax.vjp(lambda a, b: einsum(spec, a, b), a, b)
        return [y, *vjp(g)]

    return jax.jit(both)


def operands(spec: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in SPECS[spec])
    return [a, b, rng.standard_normal(np.einsum(spec, a, b).shape).astype(np.float32)]


def errors(found: Any, exact: Any) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float(np.abs(np.asarray(x) - y).max() / np.abs(y).max()) for x, y in pairs]


def check(einsum: Einsum, spec: str) -> None:
    """Products are those of rounded operands, which differ from those of the operands a little."""
    exact, rounded = operands(spec), [x.astype(jnp.bfloat16) for x in operands(spec)]
    found = jax.device_get(with_gradients(einsum, spec)(*exact))
    assert all(x.dtype == np.float32 for x in found)

    def in_float64(a: np.ndarray, b: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
        a, b, g = (x.astype(np.float64) for x in (a, b, g))
        in_a, in_b, out = spec.replace("->", ",").split(",")
        return [
            np.einsum(spec, a, b),
            np.einsum(f"{out},{in_b}->{in_a}", g, b),
            np.einsum(f"{out},{in_a}->{in_b}", g, a),
        ]

    assert max(errors(found, in_float64(*rounded))) <= 1e-6
    away = errors(found, in_float64(*exact))
    assert min(away) >= 1e-4 and max(away) <= 0.01


@pytest.mark.parametrize("spec", SPECS)
def test_products_of_the_reference_are_those_of_rounded_operands(spec: str) -> None:
    check(cpu_bf16.plain_einsum, spec)


@pytest.mark.parametrize("spec", SPECS)
def test_fast_products_are_those_of_rounded_operands(spec: str, cpu: None) -> None:
    check(cpu_bf16.fast_einsum, spec)


@pytest.mark.parametrize("spec", SPECS)
def test_products_reach_the_fast_kernels(spec: str, cpu: None) -> None:
    """A version of JAX or XLA that loses them is seen here: each product is a kernel of YNN."""
    program = with_gradients(cpu_bf16.fast_einsum, spec).lower(*operands(spec)).compile()
    assert program.as_text().count(" dot(") == program.as_text().count('"__ynn_fusion"') == 3


# ---- In a model ----------------------------------------------------------------------------------


def loss_and_gradient(cfg: GPTConfig) -> list[np.ndarray]:
    params = init_params(cfg, jax.random.key(0))
    windows = np.random.default_rng(1).integers(0, cfg.vocab_size, (4, 17)).astype(np.int32)
    keys = jax.random.split(jax.random.key(2), 4)
    found = jax.jit(jax.value_and_grad(loss_fn, 1), static_argnums=0)(cfg, params, windows, keys)
    return jax.device_get(jax.tree.leaves(found))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_of_a_model_are_near_those_in_float32(dropout: float) -> None:
    cfg = tiny(dropout=dropout)
    exact = loss_and_gradient(cfg)
    half = loss_and_gradient(dataclasses.replace(cfg, dtype="bfloat16"))
    assert all(x.dtype == np.float32 for x in half)
    lengths = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(half, exact, strict=True)]
    assert 0 < lengths[0] <= 1e-4  # of the loss
    assert min(lengths[1:]) >= 1e-4 and max(lengths[1:]) <= 0.03


def test_the_fast_products_give_a_model_the_same_gradients(cpu: None) -> None:
    on, off = (tiny(dtype="bfloat16", kernels=kernels) for kernels in ("auto", "off"))
    # Sums in another order round some operands to the next number.
    assert max(errors(loss_and_gradient(on), loss_and_gradient(off))) <= 0.01


def test_two_hundred_steps_learn_as_in_float32() -> None:
    start = np.arange(0, 61, 61 / 8).astype(np.int32)[:, None]
    windows = (start + np.arange(17) * (1 + start % 3)) % 61  # texts that count upwards
    windows = np.broadcast_to(windows, (10, 20, 1, 8, 17)).astype(np.int32)
    exact, half = (
        train_tiny(windows, cfg=tiny(dtype=dtype), max_iters=200, learning_rate=1e-2)[1]
        for dtype in ("float32", "bfloat16")
    )
    assert exact[-1] < 0.01 < 4 < exact[0]
    assert 0 < np.abs(np.subtract(half, exact)).max() <= 0.03


# ---- Which is chosen -----------------------------------------------------------------------------

XEON, RYZEN = "flags\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", "flags\t: sse2 avx512_bf16"


@pytest.mark.parametrize(
    ("cpuinfo", "flags", "computes"),
    [
        *((XEON, "", True), (RYZEN, "", True), (XEON, "--xla_cpu_max_isa=AMX", True)),
        *((XEON, "--xla_cpu_max_isa=AVX512", False), ("flags\t: avx512f avx512_vnni", "", False)),
        *(("Features\t: fp asimd bf16 sve", "", False), (None, "", False)),
    ],
)
def test_auto_takes_bfloat16_to_train_where_the_cpu_computes_it(
    cpuinfo: str | None,
    flags: str,
    computes: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}\n")
    precision.cpu_computes_bfloat16.cache_clear()
    try:
        chosen = [
            model.resolve(cfg, training=training).dtype
            for cfg, training in [
                *((GPTConfig(), True), (GPTConfig(), False), (GPTConfig(kernels="off"), True)),
                *((GPTConfig(dtype="float32"), True), (GPTConfig(dtype="bfloat16"), False)),
            ]
        ]
        half = tiny(dtype="bfloat16")
        used = precision.einsum_of(half)
        without = precision.einsum_of(dataclasses.replace(half, kernels="off"))
    finally:
        precision.cpu_computes_bfloat16.cache_clear()
    auto = "bfloat16" if computes else "float32"
    assert chosen == [auto, "float32", "float32", "float32", "bfloat16"]
    assert used is (cpu_bf16.fast_einsum if computes else cpu_bf16.plain_einsum)
    assert without is cpu_bf16.plain_einsum
    assert precision.einsum_of(tiny(dtype="float32")) is jnp.einsum


@pytest.mark.parametrize(
    ("argv", "preset"),
    [
        *(([], "quickstart_bf16"), (["--dtype=bfloat16"], "quickstart_bf16")),
        *((["--dtype=float32"], "quickstart"), (["--kernels=off"], "quickstart")),
        *((["quickstart"], "quickstart"), (["quickstart_bf16"], "quickstart_bf16")),
    ],
)
def test_the_first_command_takes_the_larger_model_where_the_cpu_computes_bfloat16(
    argv: list[str], preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = PRESETS["quickstart"].model.n_embd
    assert read_settings([])[0].model.n_embd == small  # as in all other tests
    monkeypatch.setattr(run_settings, "cpu_computes_bfloat16", lambda: True)
    assert read_settings(argv)[0].model.n_embd == PRESETS[preset].model.n_embd


def test_the_suite_does_not_depend_on_the_cpu() -> None:
    assert not precision.cpu_computes_bfloat16()


@pytest.mark.usefixtures("restore_process")
def test_a_run_says_its_arithmetic_keeps_it_and_refuses_another(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*argv: str, expect: int = 0) -> str:
        argv = (*TINY, "--n_layer=1", "--max_iters=8", "--optimizer=muon", *argv)
        argv = (*argv, f"--dataset={folder}/corpus.txt", "--sample_tokens=0")
        assert cli.run(train.main, list(argv)) == expect
        said = capsys.readouterr()
        return said.out + said.err

    whole = say("--dtype=bfloat16", f"--out_dir={tmp_path}/whole")
    assert "parameters, float32, products of bfloat16, xla attention" in whole
    out = f"--out_dir={tmp_path}/out"
    say("--dtype=bfloat16", out, "--stop_step=4")
    refused = say("--dtype=float32", out, "--init_from=resume", expect=2)
    assert "--dtype=bfloat16" in refused and "--allow_change=dtype" in refused
    resumed = say("--dtype=bfloat16", out, "--init_from=resume")
    assert digest(resumed) == digest(whole)
    assert f"sha256={digest(whole)} (bfloat16)" in whole
