"""llm.c's model file: a header of 256 int32, then every parameter in a fixed order.

Source: write_model in karpathy/llm.c, train_gpt2.py. Version 3 holds float32, version 5 bfloat16;
linear layers store (out, in), all layers of a kind lie together, wte is padded.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gptjax.config import GPTConfig
from gptjax.conversion import llmc_vocabulary
from gptjax.conversion.source_tokenizer import OWN_TOKENIZER
from gptjax.conversion.tensors import Source, is_linear, make_config, named_tensors, slots
from gptjax.errors import DataError
from gptjax.model import Params
from gptjax.settings import require

MAGIC = 20240326
HEADER = 256 * 4
DTYPES = {3: np.dtype(np.float32), 5: np.dtype(ml_dtypes.bfloat16)}  # by version


class Part(NamedTuple):
    """The place of a tensor in the file; the offset is in bytes."""

    name: str
    shape: tuple[int, ...]
    offset: int


def layout(cfg: GPTConfig, dtype: np.dtype) -> Iterator[Part]:
    """Yield every tensor in the file's order, which is that of `slots`, with its shape there."""
    offset = HEADER
    for slot in slots(cfg):
        shape = slot.shape[::-1] if is_linear(slot.name) else slot.shape
        if slot.name == "wte.weight":
            shape = (cfg.padded_vocab_size, cfg.n_embd)
        yield Part(slot.name, shape, offset)
        offset += math.prod(shape) * dtype.itemsize


def open_file(path: Path) -> Source:
    """Open a file that llm.c wrote or reads.

    Raises:
        DataError: the file is damaged, or of a version that gptjax does not read.
    """
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or header[0] != MAGIC:
        raise DataError(f"not a model of llm.c ({path}): no magic number {MAGIC}")
    version, S, V, L, H, D, padded = (int(x) for x in header[1:8])
    if version not in DTYPES:
        raise DataError(f"llm.c's version {version} ({path}): gptjax reads 3 (fp32) and 5 (bf16)")
    if header[8:].any():
        raise DataError(f"llm.c's header ({path}) has numbers that gptjax does not know")
    dtype = DTYPES[version]
    sizes = {"n_layer": L, "n_head": H, "n_embd": D, "block_size": S, "vocab_size": V}
    cfg = make_config(sizes, path, vocab_multiple=128)
    if padded != cfg.padded_vocab_size:
        raise DataError(
            f"a vocabulary of {V} padded to {padded} ({path}), expected {cfg.padded_vocab_size}"
        )
    parts = {part.name: part for part in layout(cfg, dtype)}
    last = parts["ln_f.bias"]
    expected, size = last.offset + D * dtype.itemsize, path.stat().st_size
    if size != expected:
        raise DataError(f"{size:,} bytes, expected {expected:,} by the header ({path})")

    def read(name: str) -> np.ndarray:
        _, shape, offset = parts[name]
        tensor = np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
        if name == "wte.weight":
            tensor = tensor[:V]
        return tensor.T if is_linear(name) else tensor

    tensors = {
        name: (part.shape[::-1] if is_linear(name) else part.shape, dtype.name)
        for name, part in parts.items()
    }
    tensors["wte.weight"] = ((V, D), dtype.name)
    vocabulary = path.with_name(llmc_vocabulary.NAME)
    source = Source(cfg, tensors, read, str(path), (path,), format="llmc")
    if path.with_name(OWN_TOKENIZER).is_file() or not vocabulary.is_file():
        return source
    return source._replace(tokenizer=lambda: llmc_vocabulary.read(vocabulary))


def write_file(path: Path, cfg: GPTConfig, params: Params) -> None:
    """Write the model in float32, its vocabulary padded to a multiple of 128.

    A model without biases gets zeros for them.

    Raises:
        UsageError: its activation is not llm.c's, or its head is not tied.
    """
    ok = cfg.activation == "gelu_tanh"
    require(ok, "to", "llmc", "llm.c computes GELU by tanh, but this model by erf; take --to=hf")
    rule = "llm.c has no head besides the embedding, but this model does; take --to=hf or gguf"
    require(cfg.tie_head, "to", "llmc", rule)
    cfg = dataclasses.replace(cfg, vocab_multiple=128)
    version, dtype = 3, DTYPES[3]
    header = np.zeros(256, np.int32)
    header[:8] = (
        *(MAGIC, version, cfg.block_size, cfg.vocab_size),
        *(cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.padded_vocab_size),
    )
    offsets = {
        part.name: part.offset for part in layout(dataclasses.replace(cfg, bias=True), dtype)
    }
    with path.open("wb") as file:
        file.write(header.tobytes())
        for name, tensor in named_tensors(cfg, params):
            file.seek(offsets[name])  # past the padding of wte, which so becomes zeros
            file.write(np.ascontiguousarray(tensor.T if is_linear(name) else tensor).data)
