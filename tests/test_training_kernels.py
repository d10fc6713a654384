"""The kernels of the training step: their gradients, where they are taken, and on a GPU themselves.

Without a GPU `plain` stands for each kernel: plain JAX that computes what its docstring says.
On a GPU: `JAX_PLATFORMS=cuda pytest -n 0 tests/test_training_kernels.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import functions, loss, model, sharding
from gptjax.config import GPTConfig, parse_mesh
from gptjax.kernels import cuda, training
from gptjax.training import step

from .helpers import scaled_params, tiny

f32 = jnp.float32


# ---- The kernels in plain JAX --------------------------------------------------------------------


def cross_entropy(logits_NV: Any, targets_N: Any, tokens: int) -> tuple[Any, Any]:
    """Gradient of the mean loss by the logits, and the losses."""
    is_token_1V = (jnp.arange(logits_NV.shape[1]) < tokens)[None]
    logits_NV = jnp.where(is_token_1V, logits_NV.astype(f32), -jnp.inf)
    losses_N, vjp = jax.vjp(lambda x: loss.token_losses(x, targets_N), logits_NV)
    return vjp(jnp.full(len(logits_NV), 1 / len(logits_NV), f32))[0], losses_N


def norm_forward(x_ND: Any, *rest: Any) -> tuple[Any, ...]:
    """The sum, its rows normalised, scaled and shifted, and their moments."""
    *added, (scale_D, bias_D) = rest
    sum_ND = sum(added, x_ND)
    normal_ND = functions.layer_norm(sum_ND, scale_D) + bias_D[None]
    return sum_ND, normal_ND, jnp.concatenate(functions._moments(sum_ND), axis=1)


def norm_backward(
    x_ND: Any, vectors_2D: Any, moments_N2: Any, gradient_ND: Any, residual_ND: Any
) -> tuple[Any, ...]:
    """The gradient of x, those of scale and bias."""
    saved = x_ND.astype(f32), vectors_2D[0], moments_N2[:, :1], moments_N2[:, 1:]
    dx_ND, dscale_D = functions._layer_norm_backward(saved, gradient_ND.astype(f32))
    return dx_ND + residual_ND, dscale_D, gradient_ND.astype(f32).sum(axis=0)


def join(*parts: Any) -> tuple[Any, Any]:
    """Them side by side, and the sums of columns."""
    all_ND = jnp.concatenate(parts, axis=1)
    return all_ND, all_ND.astype(f32).sum(axis=0)


def plain(
    name: str, inputs: Sequence[Any], outputs: Sequence[Any], grid: int, **how: Any
) -> list[Any]:
    """Stand for `training.run`."""
    more = [how["TOKENS"]] if name == "cross_entropy" else []
    results: Any = globals()[name](*inputs, *more)
    N, columns = inputs[0].shape if name != "join" else outputs[0][0]
    assert (how["N"], how["V" if name == "cross_entropy" else "D"]) == (N, columns)
    if name.startswith("norm"):
        vectors = [x for x in inputs if x.shape == (2, columns)]
        assert [x.dtype for x in vectors] == [jnp.float32]  # as the source reads them
    if name == "norm_forward":
        assert len(inputs) == 2 + how["ADD"]
        results = results if how["ADD"] else results[1:]
    if name == "norm_backward":
        results = results[0], jnp.concatenate(results[1 : 2 + how["BIAS"]])
    # Sums come in parts, of which the first has it all here.
    results = [
        jnp.zeros(shape, dtype).at[0].set(x) if len(shape) > x.ndim else x.astype(dtype)
        for x, (shape, dtype) in zip(results, outputs, strict=True)
    ]
    assert [(x.shape, x.dtype) for x in results] == [(s, jnp.dtype(d)) for s, d in outputs]
    return results


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let this machine have kernels; the names of those that ran."""
    if jax.default_backend() == "gpu" and cuda.capability() != cuda.HOPPER:
        pytest.skip(
            "needs an H100 or H200; or JAX_PLATFORMS=cpu pytest tests/test_training_kernels.py"
        )
    names: list[str] = []
    compute = training.run if jax.default_backend() == "gpu" else plain

    def run(name: str, *args: Any, **how: Any) -> list[Any]:
        names.append(name)
        return compute(name, *args, **how)

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(training, "choose", whatever_the_size)
    jax.clear_caches()
    yield names
    jax.clear_caches()


def whatever_the_size(name: str, kernels: str, dtype: Any, rows: int, columns: int) -> Any:
    """Stand for `training.choose`."""
    return training.TRAINING[name] if kernels == "auto" and dtype == "bfloat16" else None


def test_a_samplers_parameters_are_read_as_float32(calls: list[str]) -> None:
    """Those of `prepare_for_decoding` have the compute dtype, also where a prompt is long."""
    x_ND = jax.random.normal(jax.random.key(0), (12, 16)).astype(jnp.bfloat16)
    one_D = jnp.ones(16, jnp.bfloat16)
    _, normal_ND = training.add_norm(x_ND, None, one_D, 0 * one_D)
    expected_ND = functions.layer_norm(x_ND, jnp.ones(16))
    assert calls == ["norm_forward"]
    assert np.allclose(normal_ND.astype(jnp.float32), expected_ND, atol=0.02)


# ---- Each function -------------------------------------------------------------------------------


def plain_mean_loss(x_ND: Any, head_VD: Any, targets_N: Any) -> Any:
    logits_NV = jnp.einsum("ND,VD->NV", x_ND, head_VD)
    is_token_1V = (jnp.arange(len(head_VD)) < len(head_VD) - 3)[None]
    return loss.token_losses(jnp.where(is_token_1V, logits_NV, -jnp.inf), targets_N).mean()


def plain_add_norm(x_ND: Any, y_ND: Any, scale_D: Any, bias_D: Any) -> Any:
    sum_ND = x_ND if y_ND is None else x_ND + y_ND
    normal_ND = functions.layer_norm(sum_ND, scale_D) + (0 if bias_D is None else bias_D[None])
    return sum_ND, normal_ND.astype(x_ND.dtype)


def plain_linear_split(x_ND: Any, kernel: Any, bias: Any) -> Any:
    bias_1 = 0 if bias is None else bias[None].astype(x_ND.dtype)
    return tuple(jnp.split(x_ND @ kernel + bias_1, 3, axis=1))


def cases() -> dict[str, tuple[Callable, Callable, list[Any]]]:
    """A function, the plain one that it must equal, and arguments, by name."""
    on_gpu = jax.default_backend() == "gpu"
    N, D, V = (4100, 768, 1024) if on_gpu else (12, 16, 24)
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    def vector(size: int, mean: float = 0) -> jax.Array:
        return mean + normal(size, scale=0.3, dtype=f32)

    x_ND, scale_D, width = 1 + 2 * normal(N, D), vector(D, 1), D**-0.5
    targets_N, kernel = jnp.asarray(rng.integers(0, V - 3, N)), normal(D, 3 * D, scale=width)
    mean_loss = functools.partial(training.TRAINING["mean_loss"], tokens=V - 3)
    add_norm, linear_split = training.TRAINING["add_norm"], training.TRAINING["linear_split"]
    return {
        "mean_loss": (mean_loss, plain_mean_loss, [x_ND, normal(V, D, scale=width), targets_N]),
        "add_norm": (add_norm, plain_add_norm, [x_ND, normal(N, D), scale_D, vector(D)]),
        "add_norm, no bias": (add_norm, plain_add_norm, [x_ND, normal(N, D), scale_D, None]),
        "norm": (add_norm, plain_add_norm, [x_ND, None, scale_D, vector(D)]),
        "linear_split": (linear_split, plain_linear_split, [x_ND, kernel, vector(3 * D)]),
        "linear_split, no bias": (linear_split, plain_linear_split, [x_ND, kernel, None]),
    }


def check_function(name: str) -> None:
    """Values and gradients are as near to float32's as those of plain JAX in bfloat16."""
    function, reference, arguments = cases()[name]
    last = len(arguments) - ("loss" in name)

    def results(function: Callable, arguments: list[Any]) -> list[np.ndarray]:
        def all_of_it(*arrays: Any) -> Any:
            values, vjp = jax.vjp(lambda *a: function(*a, *arguments[last:]), *arrays)
            leaves, tree = jax.tree.flatten(values)
            rng = np.random.default_rng(1)
            given = [jnp.asarray(1 + rng.random(x.shape), x.dtype) for x in leaves]
            return values, vjp(jax.tree.unflatten(tree, given))

        found = jax.jit(all_of_it)(*arguments[:last])
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]

    in_32 = [x if x is None or x.dtype == jnp.int32 else x.astype(f32) for x in arguments]
    with jax.default_matmul_precision("highest"):
        exact = results(reference, in_32)
    allowed, found = results(reference, arguments), results(function, arguments)
    for one, plainly, wanted in zip(found, allowed, exact, strict=True):
        size = np.linalg.norm(wanted)
        error, limit = np.linalg.norm(one - wanted), np.linalg.norm(plainly - wanted)
        # Or as bfloat16 rounds once: some versions of XLA keep more digits between operations.
        assert error <= max(1.2 * limit, 2**-8 * size), (
            name,
            wanted.shape,
            error / size,
            limit / size,
        )


FUNCTIONS = [*cases()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_against_float32(name: str, calls: list[str]) -> None:
    check_function(name)


def without_the_target(logits_NV: Any, targets_N: Any, tokens: int) -> Any:
    gradient_NV, losses_N = cross_entropy(logits_NV, targets_N, tokens)
    return gradient_NV.at[jnp.arange(len(losses_N)), targets_N].add(1 / len(losses_N)), losses_N


def a_sum(*inputs: Any) -> Any:
    gradient_NV, losses_N = cross_entropy(*inputs)
    return len(losses_N) * gradient_NV, losses_N


def moments_of_x(x_ND: Any, *rest: Any) -> Any:
    return *norm_forward(x_ND, *rest)[:2], norm_forward(x_ND, rest[-1])[2]


MISTAKES: dict[str, tuple[str, str, Callable]] = {
    "no target": ("mean_loss", "cross_entropy", without_the_target),
    "a sum, not a mean": ("mean_loss", "cross_entropy", a_sum),
    "padding counted": (
        *("mean_loss", "cross_entropy"),
        lambda logits_NV, targets_N, _: cross_entropy(logits_NV, targets_N, logits_NV.shape[1]),
    ),
    "no residual gradient": (
        *("add_norm", "norm_backward"),
        lambda x, vectors, moments, dy, residual: norm_backward(x, vectors, moments, dy, 0 * dy),
    ),
    "moments of x alone": ("add_norm", "norm_forward", moments_of_x),
    "keys first": ("linear_split", "join", lambda q, k, v: join(k, q, v)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_turns_red(
    mistake: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("mistakes are planted in what stands for kernels: JAX_PLATFORMS=cpu pytest")
    name, kernel, wrong = MISTAKES[mistake]
    monkeypatch.setitem(globals(), kernel, wrong_of(kernel, wrong))
    with pytest.raises(AssertionError, match=name):
        check_function(name)


def wrong_of(kernel: str, wrong: Callable) -> Callable:
    """Let the mistake call the right function, whose name it takes."""
    right = globals()[kernel]

    def planted(*inputs: Any, **how: Any) -> Any:
        globals()[kernel] = right
        try:
            return wrong(*inputs, **how)
        finally:
            globals()[kernel] = planted

    return planted


# ---- The model with them -------------------------------------------------------------------------

KEY = jax.random.key(5)
WINDOWS = np.random.default_rng(0).integers(0, 61, (1, 4, 17))


def half(**changes: object) -> GPTConfig:
    return tiny(dtype="bfloat16", attention="xla", **changes)


def gradients(cfg: GPTConfig, passes: int = 1) -> tuple[float, dict[str, Any]]:
    """Loss and gradients by path, in float64."""
    windows_ABT = WINDOWS.reshape(passes, -1, 17)
    params = scaled_params(dataclasses.replace(cfg, kernels="auto", dtype="float32"), KEY, 4.0)
    rows = windows_ABT.shape[:2]
    keys = jax.random.split(KEY, rows) if cfg.dropout else None
    value, tree = jax.jit(functools.partial(step.loss_and_grad, cfg))(params, windows_ABT, keys)
    return float(value), by_path(tree)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


without_kernels = functools.cache(gradients)


def errors(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """Relative error of each gradient."""
    size = {name: float(np.linalg.norm(array)) for name, array in exact.items()}
    return {k: float(np.linalg.norm(found[k] - exact[k])) / size[k] for k in exact}


def check(cfg: GPTConfig, passes: int) -> None:
    """The loss and each gradient are as near to float32's as without kernels."""
    exact_loss, exact = without_kernels(dataclasses.replace(cfg, dtype="float32"), passes)
    plain_loss, by_plain = without_kernels(dataclasses.replace(cfg, kernels="off"), passes)
    found_loss, by_kernels = gradients(cfg, passes)
    assert abs(found_loss - exact_loss) <= abs(plain_loss - exact_loss) + 2e-3 * exact_loss
    allowed = errors(by_plain, exact)
    for name, error in errors(by_kernels, exact).items():
        assert error <= 1.2 * allowed[name] + 1e-3, (name, error, allowed[name])


ALL = ["cross_entropy", "join", "norm_backward", "norm_forward"]
CONFIGS: dict[str, dict[str, Any]] = {
    "biases": {},
    "neither, the exact GELU, an untied head": {
        "bias": False,
        "activation": "gelu",
        "tie_head": False,
    },
    "remat, dropout, layers in a loop, two passes": {"remat": True, "dropout": 0.2, "unroll": 1},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_with_kernels(name: str, calls: list[str]) -> None:
    check(half(**CONFIGS[name]), passes=2 if "two" in name else 1)
    left_out = ["join"] if name.startswith("neither") else []
    assert sorted({*calls}) == [kernel for kernel in ALL if kernel not in left_out]


@pytest.mark.parametrize(("mesh", "names"), [("data:2,fsdp:2", ALL), ("data:2,tensor:2", [])])
def test_on_several_devices(mesh: str, names: list[str], calls: list[str]) -> None:
    """Each device computes with its rows; where it has a part of each row, without kernels."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices, which a CPU emulates: JAX_PLATFORMS=cpu pytest")
    cfg = half()
    devices = sharding.make_mesh(jax.devices()[:4], parse_mesh(mesh))
    params = scaled_params(dataclasses.replace(cfg, dtype="float32"), KEY, 4.0)
    abstract = sharding.abstract_tree(params, sharding.tree_shardings(devices, params))
    params = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, abstract)
    windows = sharding.place(WINDOWS, devices, axis=1)
    grad = jax.jit(step.make_loss_and_grad(cfg, abstract))
    _, tree = grad(params, windows, None, None)
    assert sorted({*calls}) == names
    _, alone = without_kernels(dataclasses.replace(cfg, kernels="off"), 1)
    assert max(errors(by_path(tree), alone).values()) <= 3e-2


def test_a_program_for_a_gpu_has_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a block once, for all layers in a loop."""
    monkeypatch.setattr(training, "choose", whatever_the_size)
    monkeypatch.setattr(cuda, "compile_ptx", lambda source, architecture, options: options[0])
    cfg = half(unroll=1)
    function = functools.partial(step.loss_and_grad, cfg)
    traced = jax.jit(function).trace(model.param_shapes(cfg), WINDOWS, None)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    counts = {name: text.count(f'name = "{name}"') for name in ALL}
    twice = {"norm_forward": 2, "norm_backward": 2}
    assert counts == {**dict.fromkeys(ALL, 1), **twice}


CHOICES: dict[str, tuple[dict[str, Any], bool]] = {
    "as measured": ({}, True),
    "--kernels=off": ({"kernels": "off"}, False),
    "float32": ({"dtype": "float32"}, False),
    "float16": ({"dtype": "float16"}, False),
    "few rows": ({"rows": 1024}, False),
    "another width": ({"columns": 1024}, False),
}


@pytest.mark.parametrize("name", training.TRAINING)
@pytest.mark.parametrize("choice", CHOICES)
def test_where_kernels_are_taken(name: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how, taken = CHOICES[choice]
    monkeypatch.setattr(cuda, "capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "available", lambda: True)
    width = training.COLUMNS[name]
    given: dict[str, Any] = {"kernels": "auto", "dtype": "bfloat16", "rows": 65536}
    assert (training.choose(name, **{**given, "columns": width, **how}) is not None) == taken


@pytest.mark.parametrize("capability", [None, (8, 0), (10, 0)])
def test_machines_without_kernels(
    capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "capability", lambda: capability)
    assert training.choose("add_norm", "auto", "bfloat16", 65536, 768) is None


def test_a_machine_whose_kernels_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert training.choose("add_norm", "auto", "bfloat16", 65536, 768) is None


def test_the_source_has_the_kernels() -> None:
    assert all(f" {name}(" in training.source() for name in ALL)
    assert functions.EPSILON == 1e-5
    assert "#define EPSILON 1e-5f" in training.source()
