"""GPT-2 in a state dict of PyTorch, whichever program wrote it: names, layout and sizes."""

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.conversion.model_words import Found, is_hugging_faces, read_words
from gptjax.conversion.published_names import WRAPPERS, published_names
from gptjax.conversion.tensors import FLOATS, HEAD, Source, Table, is_linear
from gptjax.conversion.torch_file import tensor_table, to_numpy
from gptjax.memory import require_memory

PADDED, GPT2_VOCAB = 50304, 50257  # nanoGPT's default vocabulary, and the tokens in it
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|mask|masked_bias)")
MASK_TYPES = (*FLOATS, "bool", "uint8", "BOOL", "U8")
# minGPT's names of 2020 -> published ones. Its query, key and value are c_attn together.
OF_2020 = {
    r"tok_emb\.weight": "wte.weight",
    r"pos_emb": "wpe.weight",
    r"head\.weight": HEAD,
    r"ln_f\.(weight|bias)": r"ln_f.\1",
    r"blocks\.(\d+)\.ln([12])\.(weight|bias)": r"h.\1.ln_\2.\3",
    r"blocks\.(\d+)\.attn\.(query|key|value)\.(weight|bias)": r"h.\1.attn.\2.\3",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"h.\1.attn.c_proj.\2",
    r"blocks\.(\d+)\.attn\.mask": r"h.\1.attn.mask",
    r"blocks\.(\d+)\.mlp\.0\.(weight|bias)": r"h.\1.mlp.c_fc.\2",
    r"blocks\.(\d+)\.mlp\.2\.(weight|bias)": r"h.\1.mlp.c_proj.\2",
}


class Tensor(NamedTuple):
    """A tensor of a file, not yet read, or made of such."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def of_torch(state: dict[str, Any], path: Path) -> Tensors:
    """Return the tensors of a state dict; raise DataError if it holds anything else."""
    return {
        name: Tensor(*entry, functools.partial(to_numpy, state[name]))
        for name, entry in tensor_table(state, path).items()
    }


def of_file(table: Table, read: Callable[[str], np.ndarray]) -> Tensors:
    """Return the tensors of a file that is read one tensor at a time."""
    return {name: Tensor(*table[name], functools.partial(read, name)) for name in table}


def open_state(
    stored: Tensors, fields: Mapping[str, Any], path: Path, accept: Collection[str] = ()
) -> Source:
    """Return the model of a state dict.

    Layout and sizes are those of the shapes. Of nanoGPT's vocabulary of 50304 it keeps GPT-2's
    50257: the other rows belong to no token (nanoGPT leaves them in the softmax, where training
    drives them to nothing).

    Args:
        stored: the tensors.
        fields: what is known about the model otherwise, as of `read_words`.
        path: the file.
        accept: fields that the user vouches for.

    Raises:
        DataError: the names are not GPT-2's, or the fields do not fit.
    """
    # Shapes are only said: a tensor's rows may all be the same numbers of the file.
    size = 4 * sum(math.prod(tensor.shape) for tensor in stored.values())
    require_memory(size, f"{path}: a model of these tensors")
    of_2020 = any(WRAPPERS.sub("", name).endswith("tok_emb.weight") for name in stored)
    if of_2020:
        stored = rename_2020(stored)
    names = published_names(stored, path)
    tensors = {name: stored[old] for old, name in names.items() if not is_mask(name, stored[old])}
    linear = is_out_in(tensors)
    if linear:
        kernels = [n for n in tensors if is_linear(n) and len(tensors[n].shape) == 2]
        tensors |= {name: transpose(tensors[name]) for name in kernels}
    if linear and not is_hugging_faces(fields):
        fields = cut_padding(tensors, fields)
    cfg, assumed = read_words(fields, find(tensors, of_2020), path, accept)

    def read(name: str) -> np.ndarray:
        return tensors.pop(name).read()

    table = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    says = "activation_function" in fields or is_hugging_faces(fields)
    return Source(
        *(cfg, table, read, str(path), (path,)),
        says_activation=says,
        assumed=assumed,
        format="pytorch",
    )


def find(tensors: Tensors, of_2020: bool) -> Found:
    """Return what the tensors say, None for a size where the tensor that says it is missing."""
    none: tuple[None, None] = (None, None)
    wte, wpe, head = (tensors.get(name) for name in ("wte.weight", "wpe.weight", HEAD))
    V, D = wte.shape if wte and len(wte.shape) == 2 else none
    S = wpe.shape[0] if wpe and len(wpe.shape) == 2 else None
    layers = [int(m[1]) for name in tensors if (m := re.match(r"h\.(\d{1,6})\.", name))]
    sizes = {"n_layer": max(layers, default=-1) + 1, "n_embd": D, "block_size": S, "vocab_size": V}
    same = True
    if wte and head and wte.dtype in FLOATS and head.dtype in FLOATS:
        same = wte.shape == head.shape and np.array_equal(wte.read(), head.read())
    return Found(sizes, "ln_f.bias" in tensors, same, of_2020)


def is_mask(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is the causal mask, or the number that it puts in: no weights.

    A mask must be lower triangular ones, (1, 1, S, S): with another one it is another model.
    """
    if not BUFFER.fullmatch(name) or tensor.dtype not in MASK_TYPES:
        return False
    if name.endswith("masked_bias"):
        return tensor.shape in ((), (1,)) and bool((tensor.read() < 0).all())
    S = tensor.shape[-1] if tensor.shape else 0
    if tensor.shape != (1, 1, S, S):
        return False
    return bool(np.array_equal(tensor.read()[0, 0] != 0, np.tri(S, dtype=bool)))


def is_out_in(tensors: Tensors) -> bool:
    """Return whether linear layers are stored (out, in), as nn.Linear does, by c_attn's shape.

    It is (3D, D) then and (D, 3D) in Hugging Face's layout; the shapes of the others are checked
    with all tensors.
    """
    shapes = (t.shape for name, t in tensors.items() if name.endswith(".attn.c_attn.weight"))
    shape = next(shapes, ())
    return len(shape) == 2 and shape[0] == 3 * shape[1]


def transpose(tensor: Tensor) -> Tensor:
    """Return a matrix's transpose."""
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)


def cut_padding(tensors: Tensors, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Cut wte and the head to GPT-2's tokens, in place, and return the fields that say so."""
    fields = dict(fields)
    wte = tensors.get("wte.weight")
    said = fields.get("vocab_size")
    if not wte or wte.shape[:1] != (PADDED,) or said not in (None, PADDED, GPT2_VOCAB):
        return fields
    for name in ("wte.weight", HEAD):
        if name in tensors and tensors[name].shape == wte.shape:
            tensors[name] = first_rows(tensors[name], GPT2_VOCAB)
    return {**fields, "vocab_size": GPT2_VOCAB}


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return the first rows of a matrix."""
    return Tensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[:rows])


# ---- minGPT of 2020 ------------------------------------------------------------------------------


def rename_2020(stored: Tensors) -> Tensors:
    """Return the tensors of minGPT of 2020 under published names; what is none keeps its own."""
    plain = {WRAPPERS.sub("", name): name for name in stored}
    if len(plain) != len(stored):  # two names became one: `published_names` says so
        return stored
    first = min(name for name in plain if name.endswith("tok_emb.weight"))
    prefix = first.removesuffix("tok_emb.weight")
    renamed: Tensors = {}
    for name, old in plain.items():
        found = name
        for form, published in OF_2020.items():
            if match := re.fullmatch(re.escape(prefix) + form, name):
                found = match.expand(published)
        renamed[found] = stored[old]
    wpe = renamed.get("wpe.weight")
    if wpe and wpe.shape[:1] == (1,) and len(wpe.shape) == 3:  # (1, S, D)
        renamed["wpe.weight"] = Tensor(wpe.shape[1:], wpe.dtype, lambda: wpe.read()[0])
    for name in [name for name in renamed if ".attn.query." in name]:
        keys = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        parts = [renamed[key] for key in keys if key in renamed]
        if len({part.shape for part in parts}) == 1 and len(parts) == 3 and parts[0].shape:
            for key in keys:
                del renamed[key]
            renamed[name.replace(".query.", ".c_attn.")] = fuse(parts)
    return renamed


def fuse(parts: list[Tensor]) -> Tensor:
    """Return one linear layer for several that read the same: kernels (out, in), or biases."""
    rows, *rest = parts[0].shape
    dtype = next((part.dtype for part in parts if part.dtype not in FLOATS), parts[0].dtype)
    return Tensor(
        (len(parts) * rows, *rest), dtype, lambda: np.concatenate([part.read() for part in parts])
    )
