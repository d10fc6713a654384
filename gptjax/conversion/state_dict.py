"""GPT-2 in a state dict of PyTorch, whichever program wrote it: names, layout and sizes."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.conversion.hf_config import parse_config
from gptjax.conversion.model_words import Found, is_hugging_faces, read_words
from gptjax.conversion.published_names import WRAPPERS, published_names
from gptjax.conversion.stored_tensors import (
    Tensor,
    Tensors,
    drop_zero_biases,
    first_rows,
    fuse,
    is_mask,
    table_of,
    transpose,
)
from gptjax.conversion.tensors import FLOATS, HEAD, Source, is_linear
from gptjax.errors import DataError

PADDED, GPT2_VOCAB = 50304, 50257  # nanoGPT's default vocabulary, and the tokens in it
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


def open_state(
    stored: Tensors,
    fields: Mapping[str, Any],
    path: Path,
    accept: Collection[str] = (),
    own_tokens: bool = False,
) -> Source:
    """Return the model of a state dict.

    Layout and sizes are those of the shapes. Of nanoGPT's vocabulary of 50304 it keeps GPT-2's
    50257: the other rows belong to no token (nanoGPT leaves them in the softmax, where training
    drives them to nothing).

    Args:
        stored: the tensors.
        fields: what is known about the model otherwise, in Hugging Face's words or others.
        path: the file or folder.
        accept: fields that the user vouches for.
        own_tokens: whether the vocabulary is known not to be GPT-2's.

    Raises:
        DataError: the names are not GPT-2's, or the fields do not fit.
    """
    of_2020 = any(WRAPPERS.sub("", name).endswith("tok_emb.weight") for name in stored)
    if of_2020:
        stored = rename_2020(stored, path)
    names = published_names(stored, path)
    tensors = {name: stored[old] for old, name in names.items() if not is_mask(name, stored[old])}
    linear = is_out_in(tensors)
    if linear:
        kernels = [n for n in tensors if is_linear(n) and len(tensors[n].shape) == 2]
        tensors |= {name: transpose(tensors[name]) for name in kernels}
    assumed, notes = "", []
    if is_hugging_faces(fields):
        cfg = parse_config(dict(fields), str(path), accept)
        drop_zero_biases(cfg, tensors, path)
    else:
        if linear and not own_tokens and is_padded(tensors, fields):
            for name in {"wte.weight", HEAD} & set(tensors):
                tensors[name] = first_rows(tensors[name], GPT2_VOCAB)
            fields = {**fields, "vocab_size": GPT2_VOCAB}
            rows = f"rows {GPT2_VOCAB} to {PADDED - 1} of the embedding"
            notes = [f"vocab_size is {GPT2_VOCAB}: {rows} belong to no token of GPT-2's"]
        cfg, assumed = read_words(fields, find(tensors, of_2020), path, accept)
    return Source(
        *(cfg, table_of(tensors), lambda name: tensors.pop(name).read(), str(path), (path,)),
        says_activation="activation_function" in fields or is_hugging_faces(fields),
        assumed=assumed,
        notes=tuple(notes),
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


def is_out_in(tensors: Tensors) -> bool:
    """Return whether linear layers are stored (out, in), as nn.Linear does, by c_attn's shape.

    It is (3D, D) then and (D, 3D) in Hugging Face's layout; the shapes of the others are checked
    with all tensors.
    """
    shapes = (t.shape for name, t in tensors.items() if name.endswith(".attn.c_attn.weight"))
    shape = next(shapes, ())
    return len(shape) == 2 and shape[0] == 3 * shape[1]


def is_padded(tensors: Tensors, fields: Mapping[str, Any]) -> bool:
    """Return whether the vocabulary is GPT-2's, padded to nanoGPT's 50304."""
    shapes = {tensors[name].shape for name in ("wte.weight", HEAD) if name in tensors}
    said = fields.get("vocab_size")
    return {shape[:1] for shape in shapes} == {(PADDED,)} and said in (None, PADDED, GPT2_VOCAB)


# ---- minGPT of 2020 ------------------------------------------------------------------------------


def rename_2020(stored: Tensors, path: Path) -> Tensors:
    """Return the tensors of minGPT of 2020 under published names; what is none keeps its own.

    Raises:
        DataError: two names become one.
    """
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
        if found in renamed:
            raise DataError(f"cannot use this checkpoint ({path}): {name[:100]} is stored twice")
        renamed[found] = stored[old]
    wpe = renamed.get("wpe.weight")
    if wpe and wpe.shape[:1] == (1,) and len(wpe.shape) == 3:  # (1, S, D)
        renamed["wpe.weight"] = Tensor(wpe.shape[1:], wpe.dtype, lambda: wpe.read()[0])
    for name in [name for name in renamed if ".attn.query." in name]:
        keys = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        parts = [renamed[key] for key in keys if key in renamed]
        fused = name.replace(".query.", ".c_attn.")
        same = len({part.shape for part in parts}) == 1 and len(parts) == 3 and parts[0].shape
        if same and fused not in renamed:  # anything else is told as it is stored
            for key in keys:
                del renamed[key]
            renamed[fused] = fuse(parts)
    return renamed
