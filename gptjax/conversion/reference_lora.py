"""A LoRA adapter merged into the tensors of its base, apart from the importer.

W + alpha / r * B A (Hu et al. 2021, section 4.1), with the square root of r for `use_rslora`. See
`reference_files` for what this is good for.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.conversion.reference_pytorch import Opened, Pairs, Stored, Tensor, open_tensors
from gptjax.conversion.tensors import Source
from gptjax.files import read_json

SIDES = {  # the end of a tensor's name -> whether it is A
    "lora_A.weight": True,
    "lora_B.weight": False,
    "lora_A.default.weight": True,
    "lora_B.default.weight": False,
    "lora_embedding_A": True,
    "lora_embedding_B": False,
    "lora_embedding_A.default": True,
    "lora_embedding_B.default": False,
}
WRAPPED = ("module.", "_orig_mod.", "base_model.model.")
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def read_lora(source: Source, read_base: Callable[[Source], Stored]) -> Stored:
    """Read the base, whose files come first, with the adapter in the last file."""
    *base, path = source.files
    stored = read_base(source._replace(files=tuple(base)))
    fields = read_json(path.parent / "adapter_config.json")
    return Stored(merged(stored.tensors, fields, open_tensors(path)), stored.n_head)


def merged(base: Pairs, fields: dict[str, Any], adapter: Opened) -> Pairs:
    """Yield the tensors of the base, changed or replaced; the head too, if it is adapted alone."""
    pairs: dict[str, dict[bool, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for stored in adapter.shapes:
        name = stored
        while name.startswith(WRAPPED):
            name = name.removeprefix(next(word for word in WRAPPED if name.startswith(word)))
        if name.startswith(("wte.", "wpe.", "ln_f.", "h.")):
            name = f"transformer.{name}"
        end = next((end for end in SIDES if name.endswith(f".{end}")), "")
        if end:
            layer = name.removesuffix(f".{end}")
            pairs.setdefault(layer, {})[SIDES[end]] = adapter.read(stored)
        else:
            plain = name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
            whole[plain.replace(".modules_to_save.", ".")] = adapter.read(stored)

    def change(name: str, tensor: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        tensor = whole.get(name, tensor)
        return tensor if layer not in pairs else add(tensor, layer, pairs[layer], fields)

    wte, has_head = None, False
    for name, tensor in base:
        wte = tensor if name == WTE else wte
        has_head |= name == HEAD
        yield name, change(name, tensor)
    if not has_head and any(name in whole or name[:-7] in pairs for name in (WTE, HEAD)):
        yield HEAD, change(HEAD, wte)


def add(tensor: Tensor, layer: str, pair: dict[bool, Tensor], fields: dict[str, Any]) -> Tensor:
    """Return W + scale B A. Every W but the head's is (in, out), and B A is (out, in)."""
    import torch

    r = chosen(layer, fields.get("rank_pattern"), fields["r"])
    alpha = chosen(layer, fields.get("alpha_pattern"), fields["lora_alpha"])
    scale = np.float32(alpha / (math.sqrt(r) if fields.get("use_rslora") else r))
    # By NumPy, as the importer: the same bits are asked of both.
    a, b = (pair[side].float().numpy() for side in (True, False))
    product = scale * (b @ a)
    return tensor.float() + torch.from_numpy(product if layer == "lm_head" else product.T)


def chosen(layer: str, pattern: dict[str, float] | None, otherwise: float) -> float:
    """Return the value of the first pattern that matches the end of a layer's name, as in peft."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return otherwise
