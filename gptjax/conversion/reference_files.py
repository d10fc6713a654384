"""The tensors of a file as transformers' GPT-2 names them, read apart from the importer.

verify compares what the importer made of a file with what is read here, so a mistake in one of them
shows. Both use the same readers of bytes (PyTorch's, safetensors, TensorFlow's, gguf); names, order
and layout are written down here once more, and nothing is taken from the importer's tables.
transformers stores linear layers as (in, out). V vocabulary, S context, D width, L layers.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.conversion.reference_lora import read_lora
from gptjax.conversion.reference_pytorch import Pairs, Stored, Tensor, read_pytorch
from gptjax.conversion.tensors import Source
from gptjax.conversion.tf_checkpoint import read_index, read_tensor
from gptjax.errors import UsageError
from gptjax.files import read_json

# ---- llm.c ---------------------------------------------------------------------------------------

LLMC = (  # the order of the file: name of a block's tensor, its shape there in units of D
    ("ln_1.weight", (1,)),
    ("ln_1.bias", (1,)),
    ("attn.c_attn.weight", (3, 1)),
    ("attn.c_attn.bias", (3,)),
    ("attn.c_proj.weight", (1, 1)),
    ("attn.c_proj.bias", (1,)),
    ("ln_2.weight", (1,)),
    ("ln_2.bias", (1,)),
    ("mlp.c_fc.weight", (4, 1)),
    ("mlp.c_fc.bias", (4,)),
    ("mlp.c_proj.weight", (1, 4)),
    ("mlp.c_proj.bias", (1,)),
)


def read_llmc(source: Source) -> Stored:
    """Read llm.c's model file, from its header to its end."""
    (path,) = source.files
    header = np.fromfile(path, "<i4", 8).tolist()
    return Stored(llmc_tensors(path, header), header[5])


def llmc_tensors(path: Path, header: list[int]) -> Pairs:
    """Yield the tensors in the order of the file: of each kind, those of all layers together."""
    import torch

    _, version, S, V, L, _, D, padded = header
    dtype = np.dtype("<f4") if version == 3 else np.dtype(ml_dtypes.bfloat16)
    with path.open("rb") as file:
        file.seek(1024)

        def take(*shape: int) -> Tensor:
            array = np.frombuffer(file.read(int(np.prod(shape)) * dtype.itemsize), dtype)
            return torch.from_numpy(array.astype(np.float32).reshape(shape))

        yield "transformer.wte.weight", take(padded, D)[:V]
        yield "transformer.wpe.weight", take(S, D)
        for name, units in LLMC:
            for layer in range(L):
                tensor = take(*(unit * D for unit in units))
                yield f"transformer.h.{layer}.{name}", tensor.T if tensor.ndim == 2 else tensor
        yield "transformer.ln_f.weight", take(D)
        yield "transformer.ln_f.bias", take(D)


# ---- OpenAI --------------------------------------------------------------------------------------

OPENAI_OUTSIDE = {  # behind model/
    "wte": "transformer.wte.weight",
    "wpe": "transformer.wpe.weight",
    "ln_f/g": "transformer.ln_f.weight",
    "ln_f/b": "transformer.ln_f.bias",
}
OPENAI_INSIDE = {  # behind model/hN/
    "ln_1/g": "ln_1.weight",
    "ln_1/b": "ln_1.bias",
    "attn/c_attn/w": "attn.c_attn.weight",
    "attn/c_attn/b": "attn.c_attn.bias",
    "attn/c_proj/w": "attn.c_proj.weight",
    "attn/c_proj/b": "attn.c_proj.bias",
    "ln_2/g": "ln_2.weight",
    "ln_2/b": "ln_2.bias",
    "mlp/c_fc/w": "mlp.c_fc.weight",
    "mlp/c_fc/b": "mlp.c_fc.bias",
    "mlp/c_proj/w": "mlp.c_proj.weight",
    "mlp/c_proj/b": "mlp.c_proj.bias",
}


def read_openai(source: Source) -> Stored:
    """Read OpenAI's checkpoint, whose linear layers are (1, in, out)."""
    folder = source.files[0].parent
    return Stored(openai_tensors(folder), read_json(folder / "hparams.json")["n_head"])


def openai_tensors(folder: Path) -> Pairs:
    """Yield the tensors of a TensorFlow checkpoint."""
    import torch

    for stored, entry in read_index(folder / "model.ckpt").items():
        name = stored.removeprefix("model/")
        block = re.fullmatch(r"h(\d+)/(.+)", name)
        inside = block and f"transformer.h.{block[1]}.{OPENAI_INSIDE.get(block[2], block[2])}"
        array = read_tensor(entry)
        array = array[0] if array.ndim == 3 else array
        # A name that is unknown here is refused by its reader.
        yield inside or OPENAI_OUTSIDE.get(name, name), torch.from_numpy(array.astype(np.float32))


# ---- GGUF ----------------------------------------------------------------------------------------

GGUF_OUTSIDE = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
GGUF_INSIDE = {  # behind blk.N.
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GGUF_LINEAR = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # stored as (out, in)


def read_gguf(source: Source) -> Stored:
    """Read a GGUF file by the gguf library; what is quantised there is multiplied out by it.

    Raises:
        UsageError: the library is missing.
    """
    try:
        import gguf
    except ImportError as error:
        text = "verify reads a GGUF file by the gguf library; pip install 'gptjax[gguf]'"
        raise UsageError(text) from error
    (path,) = source.files
    reader = gguf.GGUFReader(path)
    n_head = reader.fields["gpt2.attention.head_count"].contents()
    return Stored(gguf_tensors(reader, gguf.quants.dequantize), n_head)


def gguf_tensors(reader: Any, dequantize: Callable[[Any, Any], Any]) -> Pairs:
    """Yield the tensors of a GGUF file."""
    import torch

    for stored in reader.tensors:
        numbers = stored.data.dtype.kind == "f"
        array = stored.data if numbers else dequantize(stored.data, stored.tensor_type)
        tensor = torch.from_numpy(array.astype(np.float32))
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored.name)
        if block is None:
            yield GGUF_OUTSIDE.get(stored.name, stored.name), tensor
        else:
            layer, part, leaf = block.groups()
            name = f"transformer.h.{layer}.{GGUF_INSIDE.get(part, part)}.{leaf}"
            yield name, tensor.T if part in GGUF_LINEAR and leaf == "weight" else tensor


READERS = {  # Source.format -> how its files are read here
    "pytorch": read_pytorch,
    "llmc": read_llmc,
    "openai": read_openai,
    "gguf": read_gguf,
}
FORMATS: dict[str, Callable[[Source], Stored]] = {
    **READERS,
    **{f"lora on {name}": partial(read_lora, read_base=base) for name, base in READERS.items()},
}
