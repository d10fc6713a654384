"""The comparison of our model with transformers', tensor by tensor and layer by layer.

N tokens of the probe in all, D width, V vocabulary.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from gptjax import blocks, model, sampling
from gptjax.config import GPTConfig, SampleConfig
from gptjax.conversion.common_rows import ROWS
from gptjax.conversion.hf_config import stored_name
from gptjax.conversion.reference import (
    Reference,
    reference_activations,
    reference_gradients,
    reference_greedy,
    reference_half,
)
from gptjax.conversion.tensors import HEAD, Source, find, named_tensors, slots
from gptjax.errors import DataError, NonFiniteError
from gptjax.loss import loss_fn
from gptjax.settings import architecture, names

PROBE = (2, 64)  # rows and tokens of the probe, shorter where the context is
GREEDY = 20  # tokens continued
TOLERANCE = 1e-5  # of activations, logits and gradients, relative to the largest (at least 1)
KL_TOLERANCE = 1e-6  # nats per token; float32's noise gives below 1e-8
# What no format says: padding is ours, and biases that are missing are zeros there.
UNSAID = {"vocab_multiple", "bias"}
HALF_TOLERANCE = 1.5  # times PyTorch's own error in bfloat16
BFLOAT16 = "in bfloat16"  # the name of that comparison of the logits
RESIZED = ("--resized", "which compares the tokens and positions that both have")


class Check(NamedTuple):
    """One comparison; NaN or infinity in either model fails it."""

    group: str  # tensor, activation, logits, gradient or tokens
    name: str  # the published one
    shape: tuple[int, ...]
    difference: float
    allowed: float
    ours: str = ""  # where gptjax keeps it, of a tensor or gradient

    @property
    def ok(self) -> bool:
        """Return whether the two models agree here."""
        return math.isfinite(self.allowed) and self.difference <= self.allowed


# The parts of the computation, in their order; there is a block for each layer.
EMBEDDINGS, BLOCK, HEAD_PART, LOGITS, HALF, GRADIENTS, GREEDY = range(7)
OUTSIDE = {"wte.weight": EMBEDDINGS, "wpe.weight": EMBEDDINGS, "embeddings": EMBEDDINGS}
KINDS = {"logits": LOGITS, "gradient": GRADIENTS, "tokens": GREEDY}


def place(check: Check) -> tuple[int, int]:
    """Return the part of the computation that a check is of, and the number of the block."""
    if check.name == BFLOAT16:
        return HALF, 0
    if check.group in KINDS:
        return KINDS[check.group], 0
    block = re.match(r"h\.(\d+)", check.name)
    return (BLOCK, int(block[1])) if block else (OUTSIDE.get(check.name, HEAD_PART), 0)


def first_failure(checks: list[Check]) -> Check | None:
    """Return the first check that fails, in the order of computation; None if all hold."""
    return min((check for check in checks if not check.ok), key=place, default=None)


def compare(
    group: str, name: str, ours: ArrayLike, theirs: ArrayLike, tolerance: float, path: str = ""
) -> Check:
    """Compare two arrays by their largest difference.

    It may be tolerance * max(1, largest value of theirs). A gradient has no such 1, since its size
    says nothing about its error.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        return Check(group, name, a.shape, float("nan"), 0.0, path)
    largest = float(np.max(np.abs(b)))
    allowed = tolerance * (largest if group == "gradient" else max(1.0, largest))
    return Check(group, name, a.shape, float(np.max(np.abs(a - b))), allowed, path)


# ---- Our side ------------------------------------------------------------------------------------


def activations(cfg: GPTConfig, params: model.Params, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the output of every part of our model, by the names of `reference_activations`."""

    @jax.jit
    def run_block(layer: model.Params, x_BTD: jax.Array) -> tuple[jax.Array, model.Params]:
        variables = {"params": layer}
        (y_BTD, _), kept = blocks.Block(cfg).apply(
            variables, x_BTD, capture_intermediates=True, mutable="intermediates"
        )
        return y_BTD, kept["intermediates"]

    x_BTD = model.embed(cfg, params, jnp.asarray(tokens))
    found = {"embeddings": x_BTD}
    for i, layer in enumerate(model.unstack_layers(params, cfg.n_layer)["h"]):
        x_BTD, kept = run_block(layer, x_BTD)
        for name in ("ln_1", "attn", "ln_2", "mlp"):
            output = kept[name]["__call__"][0]
            found[f"h.{i}.{name}"] = output[0] if name == "attn" else output
        found[f"h.{i}"] = x_BTD
    found["ln_f"] = model.apply(blocks.LayerNorm(cfg), params["ln_f"], x_BTD)
    return {name: np.asarray(value) for name, value in found.items()}


# ---- Both ----------------------------------------------------------------------------------------


def verify(cfg: GPTConfig, params: model.Params, reference: Reference) -> list[Check]:
    """Make every comparison, in the order of computation.

    Args:
        cfg: our model; compute dtype, attention and cache are chosen here.
        params: its parameters.
        reference: from `load_reference`; its weights are cast to bfloat16 in the end.

    Returns:
        For each tensor whether it is bit-equal, and their tied head to our wte; for each part of
        each block its output; for the logits their difference, the same relative to the largest,
        the KL divergence per token and the share of positions where the likeliest token differs;
        the gradient of each tensor; the tokens of a greedy continuation that differ; the error of
        the logits in bfloat16.
    """
    cfg = dataclasses.replace(cfg, dtype="float32", attention="xla", dropout=0.0, cache="auto")
    rows, length = PROBE[0], min(PROBE[1], cfg.block_size)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, length))
    checks = [
        *compare_tensors(cfg, params, reference),
        *compare_outputs(cfg, params, reference, tokens),
    ]
    if length > 1:  # in a context of one token there is none to predict
        checks += compare_gradients(cfg, params, reference, tokens)
        checks.append(compare_greedy(cfg, params, reference, tokens[0, : max(1, length // 4)]))
    return [*checks, compare_half(cfg, params, reference, tokens)]


def check_sizes(cfg: GPTConfig, source: Source, resized: bool = False) -> None:
    """Raise DataError if our model has another architecture than the source's.

    Args:
        cfg: our model.
        source: what it is compared with.
        resized: whether it may have another number of tokens and positions.
    """
    compared = [name for name in names(GPTConfig, architecture) if name not in UNSAID]
    differing = [name for name in compared if getattr(cfg, name) != getattr(source.cfg, name)]
    if not differing or (resized and set(differing) <= set(ROWS.values())):
        return
    each = [f"{n} is {getattr(cfg, n)}, there {getattr(source.cfg, n)}" for n in differing]
    said = f"not the same model as {source.where}: {', '.join(each)}"
    if "activation" in differing and source.assumed:
        said = f"{said}; {source.assumed}"
    raise DataError(said, *(RESIZED if set(differing) <= set(ROWS.values()) else ()))


def compare_tensors(cfg: GPTConfig, params: model.Params, reference: Reference) -> Iterator[Check]:
    """Compare every weight, to the bit, under its published name; their head is our wte."""
    state, path = reference.state_dict(), our_paths(cfg)
    for name, ours in named_tensors(cfg, params):
        theirs = state[stored_name(name)]
        yield compare("tensor", name, ours, theirs, 0.0, path.get(name, ""))
        if name == "wte.weight" and cfg.tie_head:
            yield compare("tensor", HEAD, ours, state[HEAD], 0.0, path[name])


def our_paths(cfg: GPTConfig) -> dict[str, str]:
    """Return our path of each published tensor: h/ln_1/scale[0] for h.0.ln_1.weight."""
    return {
        slot.name: slot.path if slot.layer is None else f"{slot.path}[{slot.layer}]"
        for slot in slots(cfg)
    }


def forward(cfg: GPTConfig, params: model.Params, tokens: np.ndarray) -> np.ndarray:
    """Return our logits, without those of the padding."""
    logits = jax.jit(model.forward, static_argnums=0)(cfg, params, tokens)[0]
    return np.asarray(logits)[..., : cfg.vocab_size]


def compare_outputs(
    cfg: GPTConfig, params: model.Params, reference: Reference, tokens: np.ndarray
) -> Iterator[Check]:
    """Compare the output of each part, then the logits: values, KL divergence, likeliest token."""
    outputs, theirs = reference_activations(reference, tokens)
    for name, value in activations(cfg, params, tokens).items():
        yield compare("activation", name, value, outputs[name], TOLERANCE)
    ours = forward(cfg, params, tokens)
    absolute = compare("logits", "largest difference", ours, theirs, TOLERANCE)
    largest = float(np.max(np.abs(theirs))) or 1.0
    yield absolute
    relative = absolute.difference / largest, absolute.allowed / largest
    yield Check("logits", "relative to the largest", ours.shape, *relative)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(theirs), log_softmax(ours)
    kl = float(np.sum(np.exp(p) * (p - q), axis=-1).max())
    yield Check("logits", "KL per token", tokens.shape, kl, KL_TOLERANCE)
    missed = float(np.mean(ours.argmax(-1) != theirs.argmax(-1)))
    yield Check("logits", "share of other argmax", tokens.shape, missed, 0.0)


def compare_gradients(
    cfg: GPTConfig, params: model.Params, reference: Reference, tokens: np.ndarray
) -> Iterator[Check]:
    """Compare the gradient of the mean cross-entropy, tensor by tensor."""
    theirs = reference_gradients(reference, tokens)
    ours = jax.jit(jax.grad(loss_fn, argnums=1), static_argnums=0)(cfg, params, tokens)
    path = our_paths(cfg)
    for slot in slots(cfg):
        grad = find(ours, slot.path)
        grad = (grad if slot.layer is None else grad[slot.layer])[: slot.shape[0]]
        yield compare("gradient", slot.name, grad, theirs[slot.name], TOLERANCE, path[slot.name])


def compare_greedy(
    cfg: GPTConfig, params: model.Params, reference: Reference, prompt: np.ndarray
) -> Check:
    """Count the tokens that differ in the likeliest continuation.

    Ours comes from the cached decoder, theirs from the full context at every token.
    """
    count = min(GREEDY, cfg.block_size - len(prompt))
    pieces = sampling.generate(
        cfg,
        model.prepare_for_decoding(cfg, params),
        [prompt.tolist()],
        SampleConfig(temperature=0),
        max_new_tokens=count,
    )
    try:
        ours = np.concatenate(list(pieces), axis=1)[0].tolist()
    except NonFiniteError:
        return Check("tokens", "greedy continuation", (count,), float("nan"), 0.0)
    theirs = reference_greedy(reference, prompt, count)
    wrong = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return Check("tokens", "greedy continuation", (count,), wrong, 0.0)


def compare_half(
    cfg: GPTConfig, params: model.Params, reference: Reference, tokens: np.ndarray
) -> Check:
    """Compare our logits' error in bfloat16 with PyTorch's error in bfloat16."""
    exact, theirs = reference_half(reference, tokens)
    ours = forward(dataclasses.replace(cfg, dtype="bfloat16"), params, tokens)
    error, their_error = (float(np.max(np.abs(half - exact))) for half in (ours, theirs))
    return Check("logits", BFLOAT16, exact.shape, error, HALF_TOLERANCE * their_error)
