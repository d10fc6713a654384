"""LoRA adapters of the peft kind, merged into the model that they change while it is read.

Source of the formula: Hu et al. 2021, section 4.1; with `use_rslora` Kalajdzievski 2023.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.conversion import huggingface
from gptjax.conversion.lora_config import check_adapter, is_named, rank_and_scale
from gptjax.conversion.published_names import WRAPPERS
from gptjax.conversion.stored_tensors import Tensor, Tensors, is_mask, table_of
from gptjax.conversion.tensors import (
    FLOATS,
    HEAD,
    Source,
    Table,
    check_tensors,
    slots,
    some_of_each,
)
from gptjax.errors import DataError
from gptjax.files import read_json

FILES = ("adapter_model.safetensors", "adapter_model.bin")
WTE = "wte.weight"
PREFIX = re.compile(r"^(base_model\.model\.)?(transformer\.)?")
NAME = re.compile(r"(.+?)\.lora_(?:(A|B)(?:\.default)?\.weight|embedding_(A|B)(?:\.default)?)")
WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)")


class Adapter(NamedTuple):
    """What an adapter changes, by published names of tensors."""

    pairs: dict[str, dict[str, Tensor]]  # A and B of W, to which scale times B A is added
    whole: Tensors  # what replaces the base's
    scales: dict[str, float]


def open_adapter(
    folder: Path, base: Source, allow_pickle: bool = False, accept: Collection[str] = ()
) -> Source:
    """Return the base with the adapter merged, each tensor when it is read.

    An adapter of the embedding or of the head changes one of them. So a tied head is one of its
    own afterwards, as it was in training; peft's `merge_and_unload` would change both.

    Args:
        folder: holds adapter_config.json and the adapter's tensors.
        base: the model that was adapted, its tensors not yet read.
        allow_pickle: whether to read adapter_model.bin.
        accept: fields of adapter_config.json that the user vouches for.

    Raises:
        DataError: it is no LoRA, or its tensors do not fit the base one to one.
        UsageError: it is a pickle, and pickles are not allowed.
    """
    fields = read_json(folder / huggingface.ADAPTER)
    check_adapter(fields, folder / huggingface.ADAPTER, accept)
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"no adapter in {folder}: expected {' or '.join(FILES)}")
    check_tensors(base)
    stored = huggingface.open_file(path, allow_pickle)
    adapter = match(stored, fields, base, path)
    tied = base.cfg.tie_head and stays_tied(adapter)
    cfg = dataclasses.replace(base.cfg, tie_head=tied)
    table: Table = dict(base.tensors)
    if base.cfg.tie_head and not tied:
        table[HEAD] = table[WTE]
    table |= table_of(adapter.whole)
    notes = [*base.notes, f"merged: {len(adapter.pairs)} matrices changed by {path}"]
    if tied != base.cfg.tie_head:
        notes.append(
            "the head is one of its own now: the adapter changes the embedding or the head alone"
        )
    return base._replace(
        cfg=cfg,
        tensors=table,
        read=reader(base, adapter, tied),
        where=str(folder),
        files=(*base.files, path),
        is_hf=False,
        notes=tuple(notes),
        format=f"lora on {base.format}",
    )


def stays_tied(adapter: Adapter) -> bool:
    """Return whether embedding and head, if they were one before, are one with the adapter too."""
    if {WTE, HEAD} & {*adapter.pairs}:
        return False
    wte, head = (adapter.whole.get(name) for name in (WTE, HEAD))
    if wte is None or head is None:
        return wte is head
    return np.array_equal(wte.read(), head.read())


def reader(base: Source, adapter: Adapter, tied: bool) -> Callable[[str], np.ndarray]:
    """Return the function that reads a tensor of the merged model."""
    kept: list[np.ndarray] = []  # the base's wte, which becomes wte and head

    def original(name: str) -> np.ndarray:
        if tied or not base.cfg.tie_head or name not in (WTE, HEAD):
            return base.read(name)
        if kept:
            return kept.pop()
        kept.append(base.read(WTE))
        if HEAD in base.tensors and not np.array_equal(base.read(HEAD), kept[0]):
            raise DataError(f"{HEAD} differs from {WTE}, to which it is said to be tied")
        return kept[0]

    def read(name: str) -> np.ndarray:
        array = adapter.whole[name].read() if name in adapter.whole else original(name)
        if name not in adapter.pairs:
            return array
        pair = adapter.pairs.pop(name)
        A, B = (pair[key].read().astype(np.float32) for key in ("A", "B"))
        with np.errstate(all="ignore"):  # what overflows is refused as infinite
            change = np.float32(adapter.scales[name]) * (B @ A)
            merged: np.ndarray = array.astype(np.float32) + (change if name == HEAD else change.T)
        return merged

    return read


def path_of(name: object) -> str:
    """Return the path that adapter_config.json names as the base, "" if nothing is there."""
    try:
        return name if isinstance(name, str) and name and Path(name).exists() else ""
    except OSError:  # too long for a name
        return ""


# ---- Names ---------------------------------------------------------------------------------------


def match(stored: Tensors, fields: Mapping[str, Any], base: Source, path: Path) -> Adapter:
    """Return which tensor of the base each one of the adapter belongs to.

    Raises:
        DataError: one has no place or another shape, an A has no B, or one is missing that the
            configuration names; all of them are listed.
    """
    shapes = {slot.name: slot.shape for slot in slots(base.cfg)}
    shapes[HEAD] = shapes[WTE]
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: Tensors = {}
    problems: list[tuple[str, str]] = []
    for name, tensor in stored.items():
        short = PREFIX.sub("", WRAPPERS.sub("", name))
        if is_mask(short, tensor):
            continue
        if tensor.dtype not in FLOATS:
            problems.append((short, f"is {tensor.dtype}, expected floats"))
        elif found := NAME.fullmatch(short):
            module, side = found[1], found[2] or found[3]
            lists = bool(found[3]) == (module in ("wte", "wpe"))
            if f"{module}.weight" not in shapes or module.startswith("ln_") or not lists:
                problems.append((short, "is not GPT-2's"))
            elif side in pairs.setdefault(f"{module}.weight", {}):
                problems.append((short, "is stored twice"))
            else:
                pairs[f"{module}.weight"][side] = tensor
        else:
            place = WHOLE.sub(r"\1.\2", short) if WHOLE.fullmatch(short) else short
            if place in whole:
                problems.append((short, "is stored twice"))
            whole[place] = tensor
    if not pairs and not whole:
        problems.append(("the file", "is empty: it changes nothing"))
    problems += missing(pairs, whole, fields, base.cfg.n_layer, shapes)
    scales = {}
    for name, pair in pairs.items():
        module, shape = name.removesuffix(".weight"), shapes[name]
        r, scales[name] = rank_and_scale(module, fields)
        out, into = shape if name == HEAD else shape[::-1]
        for side, wanted in (("A", (r, into)), ("B", (out, r))):
            if side in pair and pair[side].shape != wanted:
                text = f"has shape {pair[side].shape}, expected {tuple(map(int, wanted))}"
                problems.append((f"{module}.lora_{side}", text))
    if problems:
        raise DataError(f"cannot use this adapter ({path}): {some_of_each(problems)}")
    return Adapter(pairs, whole, scales)


def missing(
    pairs: Mapping[str, Collection[str]],
    whole: Collection[str],
    fields: Mapping[str, Any],
    n_layer: int,
    shapes: Collection[str],
) -> list[tuple[str, str]]:
    """Return which tensors are there and not named by the configuration, or named and not there."""
    targets, layers = fields.get("target_modules"), fields.get("layers_to_transform")
    chosen = [layers] if type(layers) is int else layers or range(n_layer)
    # A regular expression is not tried: then whatever one layer has, each must have.
    kinds = {re.sub(r"^h\.\d+\.", "", name) for name in pairs}
    problems = []
    for name in shapes:
        module, _, last = name.rpartition(".")
        kind = re.sub(r"^h\.\d+\.", "", name)
        layer = re.match(r"h\.(\d+)\.", name)
        named = is_named(module, targets)
        if isinstance(targets, str):
            linear = layer is not None and ".c_" in name
            named = linear if targets == "all-linear" else kind in kinds
        named &= last == "weight" and not module.rpartition(".")[2].startswith("ln_")
        named &= not is_named(module, fields.get("exclude_modules"))
        named &= layer is None or int(layer[1]) in chosen
        if named or name in pairs:
            has = pairs.get(name, ())
            problems += [(f"{module}.lora_{s}", "is missing") for s in "AB" if s not in has]
        if name in pairs and not named:
            problems.append((name, "is adapted, and target_modules does not name it"))
        saved = is_named(module, fields.get("modules_to_save"))
        biases = fields.get("bias") or "none"
        if name not in whole and (saved or (biases == "all" and last == "bias")):
            problems.append((name, "is missing"))
        # peft stores both of these where the vocabulary may have grown.
        may = saved or (name in (WTE, HEAD) and WTE in whole and HEAD in whole)
        may |= last == "bias" and biases != "none"
        if name in whole and not may:
            problems.append((name, "is stored, and modules_to_save does not name it"))
    return problems
