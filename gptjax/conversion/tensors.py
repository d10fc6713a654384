"""GPT-2's tensors under their published names, on their way into our tree of parameters or out.

The published names are Hugging Face's, `h.0.attn.c_attn.weight` and so on. Its linear layers store
(in, out) as we do, so nothing is transposed here; formats that store (out, in) transpose in their
own file.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.checkpoints.hashes import leaf_paths
from gptjax.config import GPTConfig
from gptjax.errors import DataError, UsageError, plural
from gptjax.model import Params, param_shapes
from gptjax.settings import architecture, names, require
from gptjax.tokenizer import Tokenizer

Table = dict[str, tuple[tuple[int, ...], str]]  # name of a tensor -> shape, dtype

HEAD = "lm_head.weight"  # (V, D); a file may store it although the head is tied to wte
ROWS = ("wte/embedding", "lm_head/embedding")  # a row for each token, and padding behind them
# our path -> published name, with # for the layer
TENSORS = {
    "wte/embedding": "wte.weight",
    "wpe/embedding": "wpe.weight",
    "h/ln_1/scale": "h.#.ln_1.weight",
    "h/ln_1/bias": "h.#.ln_1.bias",
    "h/attn/c_attn/kernel": "h.#.attn.c_attn.weight",
    "h/attn/c_attn/bias": "h.#.attn.c_attn.bias",
    "h/attn/c_proj/kernel": "h.#.attn.c_proj.weight",
    "h/attn/c_proj/bias": "h.#.attn.c_proj.bias",
    "h/ln_2/scale": "h.#.ln_2.weight",
    "h/ln_2/bias": "h.#.ln_2.bias",
    "h/mlp/c_fc/kernel": "h.#.mlp.c_fc.weight",
    "h/mlp/c_fc/bias": "h.#.mlp.c_fc.bias",
    "h/mlp/c_proj/kernel": "h.#.mlp.c_proj.weight",
    "h/mlp/c_proj/bias": "h.#.mlp.c_proj.bias",
    "ln_f/scale": "ln_f.weight",
    "ln_f/bias": "ln_f.bias",
    "lm_head/embedding": HEAD,
}
LIMITS = {  # size -> the largest that is believed
    "n_layer": 1000,
    "n_head": 1000,
    "n_embd": 100_000,
    "block_size": 1_000_000,
    "vocab_size": 10_000_000,
}
# Settings that GPT-2's formats can say.
SAID = (*LIMITS, "vocab_multiple", "bias", "activation", "tie_head")
FLOATS = ("float32", "float16", "bfloat16", "float64")
SHOWN = 6  # problems of one kind
STRANGE = {  # a tensor's name, what the file is then
    r"lora_|\.base_layer\.": "LoRA's tensors are beside the model's: merge them (peft's "
    "merge_and_unload) and save the model again",
    r"qweight|qzeros|absmax|quant_state|\.SCB$|\.g_idx$": "its weights are quantised: take the "
    "model that was quantised",
    r"\.attn\.(masked_)?bias$|\.attn\.mask$": "its attention has another mask than the causal one",
    r"crossattention|ln_cross_attn": "its blocks attend to an encoder",
}


class Source(NamedTuple):
    """A checkpoint in any format: opened, its tensors not yet read."""

    cfg: GPTConfig
    tensors: Table  # by published names
    read: Callable[[str], np.ndarray]  # each name once: what was read may be let go
    where: str  # the file or folder, for error messages
    files: tuple[Path, ...]  # that hold the weights, all in one folder
    is_hf: bool = False  # whether transformers reads that folder by itself
    says_activation: bool = False  # whether the file does
    dataset: str = ""  # that nanoGPT trained it on; its folder may have the vocabulary
    assumed: str = ""  # a sentence: what the file does not say, and what was taken for it
    notes: tuple[str, ...] = ()  # further sentences on what was read
    tokenizer: Callable[[], Tokenizer] | None = None  # reads the vocabulary that the file holds
    format: str = ""  # a key of reference_files.FORMATS, by which verify reads it a second time


class Slot(NamedTuple):
    """The place of a published tensor: a whole parameter, or one layer of it."""

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]


def size_problems(sizes: dict[str, Any]) -> list[str]:
    """Return what is wrong with the sizes in a file: not integers, or out of the limits."""
    problems = [
        f"{name}={sizes.get(name)!r}, expected 1 to {limit:,}"
        for name, limit in LIMITS.items()
        if type(sizes.get(name)) is not int or not 1 <= sizes[name] <= limit
    ]
    if not problems and sizes["n_embd"] % sizes["n_head"]:
        problems.append(f"n_head={sizes['n_head']} does not divide n_embd={sizes['n_embd']}")
    return problems


def make_config(sizes: dict[str, Any], where: object, **settings: Any) -> GPTConfig:
    """Return the model of these sizes and settings; raise DataError if the sizes are wrong."""
    problems = size_problems(sizes)
    if problems:
        raise DataError(f"cannot use this model ({where}): {'; '.join(problems)}")
    return GPTConfig(**sizes, **settings)


def is_linear(name: str) -> bool:
    """Return whether a tensor is a linear layer's kernel, which PyTorch stores as (out, in)."""
    return ".c_" in name and name.endswith(".weight")


def slots(cfg: GPTConfig) -> Iterator[Slot]:
    """Yield every tensor that a model of this shape has, each once, wte without its padding."""
    leaves = jax.tree.leaves_with_path(param_shapes(cfg))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }
    shapes |= {path: (cfg.vocab_size, cfg.n_embd) for path in ROWS if path in shapes}
    for path, name in TENSORS.items():
        if path not in shapes:  # a bias of a model without
            continue
        if path.startswith("h/"):
            for layer in range(cfg.n_layer):
                yield Slot(path, layer, name.replace("#", str(layer)), shapes[path][1:])
        else:
            yield Slot(path, None, name, shapes[path])


def find(params: Params, path: str) -> jax.Array:
    """Return the parameter at a path like `h/ln_1/scale`."""
    node: Any = params
    for key in path.split("/"):
        node = node[key]
    return node


def nested(flat: Mapping[str, Any]) -> Params:
    """Return the tree of parameters whose paths and arrays these are: `find` finds each in it."""
    tree: Params = {}
    for path, array in flat.items():
        node = tree
        *parents, leaf = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = array
    return tree


def check_tensors(source: Source) -> None:
    """Check that the source has exactly the model's tensors, with their shapes, as floats.

    Raises:
        DataError: it does not; all that is wrong with it is listed at once.
    """
    refuse(source, list(tensor_problems(source).items()))


def tensor_problems(source: Source) -> dict[str, str]:
    """Return what is wrong with the source's tensors, by their names, before any is read."""
    expected = {slot.name: slot.shape for slot in slots(source.cfg)}
    optional = {HEAD: expected["wte.weight"]} if source.cfg.tie_head else {}
    problems = {name: "is missing" for name in expected if name not in source.tensors}
    for name, (shape, dtype) in source.tensors.items():
        wanted = expected.get(name) or optional.get(name)
        if wanted is None:
            problems[name] = "is not GPT-2's"
        elif shape != wanted:
            problems[name] = f"has shape {shape}, expected {wanted}"
        elif dtype not in FLOATS:
            problems[name] = f"is {dtype}, expected one of {', '.join(FLOATS)}"
    return problems


def refuse(source: Source, problems: list[tuple[str, str]]) -> None:
    """Raise DataError with some of each kind of problem, if there are any."""
    if problems:
        count = f"{len(problems)} {plural(len(problems), 'problem')}"
        raise DataError(
            f"cannot use this checkpoint ({source.where}): {count}: {some_of_each(problems)}"
        )


def some_of_each(problems: list[tuple[str, str]]) -> str:
    """Return the names of tensors and their problems as one line, a few of each kind."""
    kinds: dict[str, list[str]] = {}
    for name, problem in problems:
        kind = " ".join(problem.split()[:2])  # is missing, is not, has shape, is int64, ...
        kinds.setdefault(kind, []).append(f"{name[:100]} {problem}")
    parts = []
    for kind, texts in kinds.items():
        parts += texts[:SHOWN]
        if len(texts) > SHOWN:
            parts.append(f"and {len(texts) - SHOWN} more like these ({kind} ...)")
    names = [name for name, problem in problems if problem.startswith("is not GPT-2's")]
    hints = [hint for form, hint in STRANGE.items() if any(re.search(form, n) for n in names)]
    return "; ".join([*hints, *parts])


def read_params(source: Source, place: Callable[[np.ndarray], Any] = lambda x: x) -> Params:
    """Read the tree of parameters, in float32, with each tensor of the source used exactly once.

    Args:
        source: checked here as by `check_tensors`; what can be read of a bad one is read too, so
            that the values' problems are listed with the others.
        place: takes each finished parameter, so that not all of them are held twice; what it
            returns is in the tree.

    Raises:
        DataError: a tensor is missing, unknown, misshapen or not of floats, holds NaN or infinity,
            or a head is stored that differs from wte, to which it is said to be tied.
    """
    cfg, unreadable = source.cfg, tensor_problems(source)
    problems = list(unreadable.items())
    parameters: dict[str, Any] = {}
    for path, found in itertools.groupby(slots(cfg), lambda slot: slot.path):
        group = list(found)
        shape = group[0].shape
        if path in ROWS:
            shape = (cfg.padded_vocab_size, cfg.n_embd)
        stacked = group[0].layer is not None
        parameter = np.zeros((cfg.n_layer, *shape) if stacked else shape, np.float32)
        for slot in group:
            if slot.name in unreadable:
                continue
            target = parameter if slot.layer is None else parameter[slot.layer]
            with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity: refused
                target[: slot.shape[0]] = source.read(slot.name)
            if not np.isfinite(target).all():
                problems.append((slot.name, "holds NaN or infinity"))
        tied = cfg.tie_head and HEAD in source.tensors
        if path == "wte/embedding" and tied and not {HEAD, group[0].name} & set(unreadable):
            head = source.read(HEAD).astype(np.float32, copy=False)
            equal = np.array_equal(head, parameter[: len(head)])
            del head  # a third of GPT-2's size
            if not equal:
                problems.append(
                    (HEAD, "differs from wte.weight; tie_word_embeddings=false would take both")
                )
        parameters[path] = place(parameter)
    refuse(source, problems)
    return nested(parameters)


def named_tensors(cfg: GPTConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yield published names with float32 arrays, without the padding rows of wte.

    A model without biases gets zeros for them, since GPT-2's formats know none without.

    Raises:
        UsageError: the model is another than GPT-2 in something that its formats cannot say.
    """
    for name in names(GPTConfig, architecture):
        ours, theirs = getattr(cfg, name), getattr(GPTConfig(), name)
        rule = f"GPT-2's formats know {name}={theirs} only"
        require(name in SAID or ours == theirs, name, ours, rule)
    unsaid = set(leaf_paths(params)) - set(TENSORS)
    if unsaid:
        raise UsageError(f"GPT-2's formats have no {min(unsaid)}, which this model has")
    fetched: tuple[str, np.ndarray] = ("", np.empty(0))
    for slot in slots(dataclasses.replace(cfg, bias=True)):
        if slot.path.endswith("/bias") and not cfg.bias:
            yield slot.name, np.zeros(slot.shape, np.float32)
            continue
        if fetched[0] != slot.path:
            fetched = slot.path, np.asarray(find(params, slot.path))
        tensor = fetched[1] if slot.layer is None else fetched[1][slot.layer]
        yield slot.name, np.ascontiguousarray(tensor[: slot.shape[0]])
