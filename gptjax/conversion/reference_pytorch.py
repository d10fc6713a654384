"""State dicts of PyTorch's GPT-2s as transformers names them, read apart from the importer.

Names and layouts of transformers, nanoGPT, minGPT and their children, in safetensors or pickles.
See `reference_files` for what this is good for. V vocabulary, S context, D width.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.conversion.tensors import Source
from gptjax.conversion.torch_file import load_torch, plain

Tensor = Any  # of PyTorch
Pairs = Iterator[tuple[str, Tensor]]  # transformers' name, tensor; each is let go once it is used


class Stored(NamedTuple):
    """What a file says of a model."""

    tensors: Pairs
    n_head: int


OUTSIDE = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
INSIDE = {  # in a block: name in transformers, nanoGPT and minGPT -> is it a linear layer's
    "ln_1.weight": False,
    "ln_1.bias": False,
    "attn.c_attn.weight": True,
    "attn.c_attn.bias": False,
    "attn.c_proj.weight": True,
    "attn.c_proj.bias": False,
    "ln_2.weight": False,
    "ln_2.bias": False,
    "mlp.c_fc.weight": True,
    "mlp.c_fc.bias": False,
    "mlp.c_proj.weight": True,
    "mlp.c_proj.bias": False,
}
WRAPPED = {"module", "_orig_mod", "_forward_module"} | {
    f"_{wrapper}_wrapped_module" for wrapper in ("fsdp", "checkpoint")
}
STATES = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
)  # where a checkpoint keeps its state dict
OLD_OUTSIDE = {  # minGPT of 2020
    "tok_emb.weight": "transformer.wte.weight",
    "pos_emb": "transformer.wpe.weight",
    "ln_f.weight": "transformer.ln_f.weight",
    "ln_f.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}
OLD_INSIDE = {
    "ln1": "ln_1",
    "ln2": "ln_2",
    "attn.proj": "attn.c_proj",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}


class Opened(NamedTuple):
    """A file of named tensors; each is read once."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def open_tensors(path: Path) -> Opened:
    """Open a safetensors file, or the state dict in a pickle, which the importer has allowed."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        def read(name: str) -> Tensor:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)

        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return Opened({name: tuple(file.get_slice(name).get_shape()) for name in names}, read)
    saved = plain(load_torch(path, allow_pickle=True))
    state = next((found for key in STATES if (found := plain(saved.get(key)))), saved)
    tensors = {name: tensor for name, tensor in state.items() if hasattr(tensor, "shape")}
    return Opened({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.pop)


def read_pytorch(source: Source) -> Stored:
    """Read files of PyTorch or safetensors with the names of nanoGPT, minGPT or transformers."""
    files = [open_tensors(path) for path in source.files]
    return Stored(pytorch_tensors(files, source.cfg.vocab_size), source.cfg.n_head)


def pytorch_tensors(files: list[Opened], vocab_size: int) -> Pairs:
    """Yield the tensors of state dicts; linear layers are (out, in) where c_attn is (3 D, D)."""
    if any(last_words(name, 2) == "tok_emb.weight" for file in files for name in file.shapes):
        yield from old_mingpt_tensors(files)
        return
    transposed = any(
        shape[0] > shape[1]
        for file in files
        for name, shape in file.shapes.items()
        if last_words(name, 3) == "attn.c_attn.weight"
    )
    for file in files:
        for stored in file.shapes:
            name, is_linear = pytorch_name(stored)
            if not name:
                continue
            tensor = file.read(stored)
            if is_linear and transposed:
                tensor = tensor.T
            elif name.endswith(("wte.weight", "lm_head.weight")):
                # nanoGPT rounds GPT-2's vocabulary of 50257 up to 50304: those rows are no tokens.
                tensor = tensor[:50257] if (len(tensor), vocab_size) == (50304, 50257) else tensor
            yield name, tensor


def last_words(name: str, count: int) -> str:
    """Return the last words of a name: `c_attn.weight` for `h.0.attn.c_attn.weight` and 2."""
    return ".".join(name.split(".")[-count:])


def pytorch_name(stored: str) -> tuple[str, bool]:
    """Return transformers' name of a tensor, and whether it is a linear layer's; "" for none."""
    words = [word for word in stored.split(".") if word not in WRAPPED]
    for at in range(len(words)):
        rest = ".".join(words[at:])
        if rest == "lm_head.weight":
            return rest, False
        if rest in OUTSIDE:
            return f"transformer.{rest}", False
        block = re.fullmatch(r"h\.(\d+)\.(.+)", rest)
        if block and block[2] in INSIDE:
            return f"transformer.h.{block[1]}.{block[2]}", INSIDE[block[2]]
    return "", False


def old_mingpt_tensors(files: list[Opened]) -> Pairs:
    """Yield the tensors of minGPT as it was in 2020: apart, as (out, in), are query, key, value."""
    import torch

    def read(file: Opened, stored: str) -> Tensor:
        tensor = file.read(stored)
        return tensor.T if tensor.ndim == 2 and ".blocks." in f".{stored}" else tensor

    for file in files:
        for stored in file.shapes:
            block = re.search(r"\bblocks\.(\d+)\.(.+)\.(weight|bias)$", stored)
            if block is None:
                ending = next(
                    (name for name in OLD_OUTSIDE if f".{stored}".endswith(f".{name}")), ""
                )
                if ending:
                    tensor = read(file, stored)
                    yield OLD_OUTSIDE[ending], tensor[0] if ending == "pos_emb" else tensor
                continue
            layer, part, leaf = block.groups()
            if part in OLD_INSIDE:
                yield f"transformer.h.{layer}.{OLD_INSIDE[part]}.{leaf}", read(file, stored)
            elif part == "attn.query":
                parts = [stored.replace(".query.", f".{x}.") for x in ("query", "key", "value")]
                joined = torch.cat([read(file, x) for x in parts], dim=-1)
                yield f"transformer.h.{layer}.attn.c_attn.{leaf}", joined
