"""GGUF, llama.cpp's format: a GPT-2 read from it and written to it."""

import dataclasses
import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import GPTConfig
from gptjax.conversion import gguf_file
from gptjax.conversion.fields import check_fields, is_one_of, shown
from gptjax.conversion.gguf_file import Header, Place
from gptjax.conversion.gguf_values import check_extents, dtype_name, is_copy, quantised, read_tensor
from gptjax.conversion.gguf_vocabulary import added_to_a_text, describe, read_vocabulary
from gptjax.conversion.stored_tensors import (
    Tensor,
    Tensors,
    drop_zero_biases,
    table_of,
    transpose,
)
from gptjax.conversion.tensors import HEAD, Source, is_linear, make_config, named_tensors, slots
from gptjax.errors import DataError
from gptjax.model import Params
from gptjax.settings import require
from gptjax.tokenizer import Tokenizer

NAMES = {  # ours, behind h.#. where there is one -> GGUF's for the architecture gpt2
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "h.ln_1": "attn_norm",
    "h.attn.c_attn": "attn_qkv",
    "h.attn.c_proj": "attn_output",
    "h.ln_2": "ffn_norm",
    "h.mlp.c_fc": "ffn_up",
    "h.mlp.c_proj": "ffn_down",
}
OURS = {theirs: ours for ours, theirs in NAMES.items()}
SIZES = {
    "n_layer": "gpt2.block_count",
    "n_head": "gpt2.attention.head_count",
    "n_embd": "gpt2.embedding_length",
    "block_size": "gpt2.context_length",
}
EPSILON = "gpt2.attention.layer_norm_epsilon"
OWN_FIELDS = ("bias", "vocab_multiple", "tie_head")  # what only keys of our own can say
HARMLESS = ("general.", "tokenizer.", "quantize.", "split.")  # beginnings of keys
# Keys of other architectures that check_fields does not know by their words.
CHANGING = re.compile(r"gpt2\..*(scale|clamp|norm|lora|logit|temperature|interval)")


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor: `blk.0.attn_qkv.weight` for `h.0.attn.c_attn.weight`."""
    stem, _, leaf = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{NAMES[stem]}.{leaf}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[f'h.{part}']}.{leaf}"


def published_name(name: str) -> str:
    """Return the published name of one of GGUF's, or one that is nobody's where it is unknown."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    ours = OURS.get(match[2], "") if match else ""
    if match is None or not ours or ours.startswith("h.") != (match[1] is not None):
        return f"GGUF's {name}"
    stem = ours.replace("h.", f"h.{match[1]}.", 1) if match[1] else ours
    return f"{stem}.{match[3]}"


# ---- In ------------------------------------------------------------------------------------------


def open_file(path: Path, accept: Collection[str] = ()) -> Source:
    """Open a GPT-2 in one GGUF file.

    Args:
        path: the file.
        accept: keys that gptjax does not know and the user vouches for.

    Raises:
        DataError: the file is damaged, one of several, or not a GPT-2.
        UsageError: it is quantised, and the gguf library is missing.
    """
    header = gguf_file.read_header(path)
    cfg = parse_fields(header, path, accept)
    rows = cfg.vocab_size
    check_extents(header, path)
    tensors: Tensors = {}
    for stored, place in header.tensors.items():
        tensor = Tensor(
            *(place.shape, dtype_name(place)),
            functools.partial(read_tensor, path, header.begin, place),
        )
        name = published_name(stored)
        tensors[name] = transpose(tensor) if is_linear(name) else tensor
    # llama.cpp's converter once wrote the embedding twice for GPT-2, as its head too.
    copied = HEAD in tensors and is_copy(header, path, "output.weight", "token_embd.weight")
    if copied and cfg.tie_head:
        del tensors[HEAD]
    elif HEAD in tensors and "gptjax.tie_head" not in header.fields:
        cfg = dataclasses.replace(cfg, tie_head=False)
    drop_zero_biases(cfg, tensors, path)
    return Source(
        *(cfg, table_of(tensors), lambda name: tensors[name].read(), str(path), (path,)),
        notes=quantised(header) + added_to_a_text(header.fields),
        tokenizer=lambda: read_vocabulary(header.fields, path, rows),
        format="gguf",
    )


def parse_fields(header: Header, path: Path, accept: Collection[str]) -> GPTConfig:
    """Return the model that the values describe.

    Raises:
        DataError: it is not a GPT-2 of ours, or has keys that gptjax does not know.
    """
    fields = header.fields
    if fields.get("general.architecture") != "gpt2":
        text = shown("general.architecture", fields.get("general.architecture"))
        raise DataError(f"cannot use {path}, a GGUF file: {text}, gptjax computes 'gpt2'")
    if fields.get("split.count", 1) not in (0, 1):
        raise DataError(
            f"{path} is one of {fields['split.count']} files of a model; join them by "
            "llama-gguf-split --merge FIRST WHOLE"
        )
    sizes: dict[str, Any] = {ours: fields.get(theirs) for ours, theirs in SIZES.items()}
    rows = header.tensors.get("token_embd.weight", Place((), 0, 0)).shape[:1]
    cfg = make_config({**sizes, "vocab_size": rows[0] if rows else None}, path)
    expected: dict[str, Collection[object]] = {
        "gpt2.vocab_size": [cfg.vocab_size],
        "gpt2.feed_forward_length": [4 * cfg.n_embd],
        "gpt2.attention.head_count_kv": [cfg.n_head],
        "gpt2.attention.key_length": [cfg.head_dim],
        "gpt2.attention.value_length": [cfg.head_dim],
        "gpt2.attention.causal": [True],
        EPSILON: [float(np.float32(1e-5))],
        "general.type": ["model"],
        "general.quantization_version": [2],
        "gptjax.bias": [True, False],
        "gptjax.vocab_multiple": range(1, 2**16 + 1),
        "gptjax.tie_head": [True, False],
    }
    problems = [
        f"{shown(key, fields[key])}, gptjax computes {' or '.join(map(str, allowed))[:50]}"
        for key, allowed in expected.items()
        if key in fields and not is_one_of(fields[key], allowed)
    ]
    problems += [
        f"{shown(key, value)} changes what is computed"
        for key, value in fields.items()
        if CHANGING.match(key) and key not in expected and value not in (0, False)
    ]
    if EPSILON not in fields:
        problems.append(f"{EPSILON} is missing")
    known = {*SIZES.values(), *expected, "gptjax.tokenizer"}
    known |= {key for key in fields if key.startswith(HARMLESS) or CHANGING.match(key)}
    check_fields(fields, known, path, problems, accept)
    said: Any = fields
    ours = {name: said.get(f"gptjax.{name}", getattr(cfg, name)) for name in OWN_FIELDS}
    return dataclasses.replace(cfg, **ours)


# ---- Out -----------------------------------------------------------------------------------------


def write_file(path: Path, cfg: GPTConfig, params: Params, tokenizer: Tokenizer) -> list[str]:
    """Write the model in float32, and its vocabulary.

    A tied head is not written; llama.cpp reads such a GPT-2 since March 2025.

    Returns:
        A sentence on what llama.cpp cannot do with the vocabulary, if there is any.

    Raises:
        UsageError: the activation is not GPT-2's.
    """
    ok = cfg.activation == "gelu_tanh"
    require(
        ok, "to", "gguf", "llama.cpp computes GELU by tanh, but this model by erf; take --to=hf"
    )
    vocabulary, notes = describe(tokenizer)
    fields: dict[str, gguf_file.Value] = {
        "general.architecture": "gpt2",
        "general.name": "gptjax",
        "gpt2.block_count": cfg.n_layer,
        "gpt2.context_length": cfg.block_size,
        "gpt2.embedding_length": cfg.n_embd,
        "gpt2.feed_forward_length": 4 * cfg.n_embd,
        "gpt2.attention.head_count": cfg.n_head,
        EPSILON: 1e-5,
        "general.file_type": 0,  # all tensors in float32
        **vocabulary,
        **{f"gptjax.{name}": getattr(cfg, name) for name in OWN_FIELDS},
    }
    shapes = {
        gguf_name(slot.name): slot.shape[::-1] if is_linear(slot.name) else slot.shape
        for slot in slots(dataclasses.replace(cfg, bias=True))
    }
    tensors = (
        tensor.T if is_linear(name) else tensor for name, tensor in named_tensors(cfg, params)
    )
    gguf_file.write(path, fields, shapes, tensors)
    return notes
