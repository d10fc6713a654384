"""Hugging Face's format: a folder with config.json beside safetensors files."""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.config import GPTConfig
from gptjax.conversion.hf_config import format_config, parse_config, stored_name
from gptjax.conversion.published_names import published_names
from gptjax.conversion.tensors import (
    FLOATS,
    Source,
    Table,
    named_tensors,
    slots,
    some_of_each,
)
from gptjax.conversion.torch_file import check_size, load_torch, tensor_table, to_numpy
from gptjax.conversion.weight_check import AGAIN, SUFFIXES, why_no_weights
from gptjax.errors import DataError, DiskError
from gptjax.files import read_json
from gptjax.model import Params

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"  # peft's
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which is no weight


def open_folder(
    folder: Path, allow_pickle: bool = False, accept: Collection[str] = (), file: Path | None = None
) -> Source:
    """Open the model of a folder, in one file or in shards.

    Args:
        folder: holds config.json and the weights.
        allow_pickle: whether to read pytorch_model.bin.
        accept: as of `parse_config`.
        file: the weights, where they are not those that `weight_files` would choose.

    Raises:
        DataError: a file is missing or damaged, or is not GPT-2.
        UsageError: there is only a pickle, and pickles are not allowed.
    """
    where = str(folder / "config.json")
    cfg = parse_config(read_json(folder / "config.json"), where, accept)
    paths, mapped = ([file], None) if file else weight_files(folder)
    check_size([path for path in paths if path.suffix == ".bin"])
    opened = [(path, *open_file(path, allow_pickle)) for path in paths]
    stored_names = {name for _, found, _ in opened for name in found} | set(mapped or ())
    names = published_names(stored_names, folder)
    table: Table = {}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    problems = []
    for path, found, read in opened:
        for stored, entry in found.items():
            tensor = names[stored]
            if BUFFER.fullmatch(tensor):
                continue
            if tensor in table:
                problems.append((stored, "is stored twice"))
            if mapped is not None and mapped.get(stored) != path.name:
                place = f"is in {path.name}, the index says {mapped.get(stored)}"
                problems.append((stored, place))
            table[tensor] = entry
            readers[tensor] = lambda read=read, stored=stored: read(stored)  # type: ignore[misc]
    problems += [
        (names[name], "is in the index and in no file")
        for name in sorted(mapped or ())
        if names[name] not in table and not BUFFER.fullmatch(names[name])
    ]
    if problems:
        raise DataError(f"cannot use this checkpoint ({folder}): {some_of_each(problems)}")
    if not cfg.bias:
        drop_zero_biases(cfg, table, readers, folder)
    # transformers reads that folder alike only if it chooses the file and knows its names.
    alike = file is None and all(
        stored in (tensor, stored_name(tensor)) for stored, tensor in names.items()
    )
    return Source(
        *(cfg, table, lambda name: readers[name](), str(file or folder), tuple(paths)),
        is_hf=alike,
        says_activation=True,
        format="pytorch",
    )


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files of a folder's weights and, for shards, which of them holds which tensor.

    Raises:
        DataError: there are none, or the index of the shards is damaged.
    """
    names = [w for weights in WEIGHTS for w in (weights, f"{weights}.index.json")]
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        text = f"no weights ({folder}): expected one of {', '.join(names)}"
        there = sorted(folder.iterdir())
        if other := [f"{p.name} ({SUFFIXES[p.suffix]})" for p in there if p.suffix in SUFFIXES]:
            text += f"; it has {', '.join(other)}, which gptjax does not read"
        if loose := [p.name for p in there if p.suffix in (".safetensors", ".bin", ".gguf")]:
            text += f"; it has {', '.join(loose[:5])}: give the weights by their own name"
        raise DataError(text)
    if not name.endswith(".index.json"):
        return [inside(folder, name)], None
    mapped = read_json(folder / name).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise DataError(f"{folder / name} has no weight_map")
    paths = [inside(folder, file) for file in sorted({str(v) for v in mapped.values()})]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{name} names files that are not there ({folder}): {', '.join(missing)}")
    return paths, mapped


def inside(folder: Path, name: str) -> Path:
    """Return the file of this name in the folder; raise DataError if it is anywhere else."""
    root = folder.resolve()
    if root.parent.name == "snapshots":  # the Hub's cache links its snapshots to its blobs
        root = root.parent.parent
    path = folder / name
    plain = Path(name).name == name and name not in ("", "..")
    try:
        ok = plain and path.resolve().is_relative_to(root)
    except (ValueError, OSError, RuntimeError):  # a NUL, a surrogate, a circle of links
        ok = False
    if not ok:
        raise DataError(f"refusing {name!r} ({folder}): not a plain file of this folder")
    return path


def open_file(path: Path, allow_pickle: bool) -> tuple[Table, Callable[[str], np.ndarray]]:
    """Return what a weight file holds, and a function that reads one tensor of it."""
    if path.suffix == ".bin":
        state = load_torch(path, allow_pickle)
        return tensor_table(state, path), lambda name: to_numpy(state.pop(name))

    def read(name: str) -> np.ndarray:
        # Opened anew each time: what was read stays in memory until the file is closed.
        with safe_open(path, "np") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: (tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        wrong = why_no_weights(path) or f"cut short or damaged ({error}); {AGAIN}"
        raise DataError(f"cannot read the weights ({path}): it is {wrong}") from error
    return found, read


def drop_zero_biases(
    cfg: GPTConfig, table: Table, readers: dict[str, Callable[[], np.ndarray]], folder: Path
) -> None:
    """Remove the zeros that `write_folder` stores for biases of a model that has none.

    Raises:
        DataError: such a bias is not zero.
    """
    with_biases = {slot.name: slot.shape for slot in slots(dataclasses.replace(cfg, bias=True))}
    for name, (shape, dtype) in list(table.items()):
        if name.endswith(".bias") and with_biases.get(name) == shape and dtype in FLOATS:
            if np.any(readers.pop(name)()):
                raise DataError(f"{name} is not zero, but the model has no biases ({folder})")
            del table[name]


def write_folder(
    folder: Path, cfg: GPTConfig, params: Params, special: Mapping[str, object] | None
) -> None:
    """Write config.json and model.safetensors, in float32, as transformers reads them."""
    text = json.dumps(format_config(cfg, special), indent=2) + "\n"
    (folder / "config.json").write_text(text)
    tensors = {stored_name(name): array for name, array in named_tensors(cfg, params)}
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # its word for whatever the disk said
        raise DiskError(f"cannot write the weights ({folder}): {error}") from error
