"""Hugging Face's format: a folder with config.json beside safetensors files."""

import functools
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.config import GPTConfig
from gptjax.conversion.hf_config import format_config, parse_config, stored_name
from gptjax.conversion.published_names import published_names
from gptjax.conversion.state_dict import open_state
from gptjax.conversion.stored_tensors import BUFFER, Tensor, Tensors
from gptjax.conversion.tensors import Source, named_tensors, some_of_each
from gptjax.conversion.torch_file import check_size, load_torch, of_torch
from gptjax.conversion.weight_check import AGAIN, SUFFIXES, why_no_weights
from gptjax.errors import DataError, DiskError
from gptjax.files import read_json
from gptjax.model import Params

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"  # peft's
DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "BOOL": "bool",
    "U8": "uint8",
}


def open_folder(folder: Path, allow_pickle: bool = False, accept: Collection[str] = ()) -> Source:
    """Open the model of a folder, in one file or in shards.

    Args:
        folder: holds config.json and the weights.
        allow_pickle: whether to read pytorch_model.bin.
        accept: as of `parse_config`.

    Raises:
        DataError: a file is missing or damaged, or is not GPT-2.
        UsageError: there is only a pickle, and pickles are not allowed.
    """
    fields = read_json(folder / "config.json")
    parse_config(fields, str(folder / "config.json"), accept)  # another model's weights stay shut
    paths, mapped = weight_files(folder)
    check_size([path for path in paths if path.suffix == ".bin"])
    stored: Tensors = {}
    problems = []
    for path in paths:
        for name, tensor in open_file(path, allow_pickle).items():
            if name in stored:
                problems.append((name, "is stored twice"))
            if mapped is not None and mapped.get(name) != path.name:
                place = f"is in {path.name}, the index says {mapped.get(name)}"
                problems.append((name, place))
            stored[name] = tensor
    problems += [
        (name, "is in the index and in no file")
        for name in sorted(mapped or ())
        if name not in stored and not BUFFER.search(name)
    ]
    if problems:
        raise DataError(f"cannot use this checkpoint ({folder}): {some_of_each(problems)}")
    source = open_state(stored, fields, folder, accept)
    return source._replace(files=tuple(paths), is_hf=is_transformers_own(stored, source))


def is_transformers_own(stored: Tensors, source: Source) -> bool:
    """Return whether the names and the layout of a source are those that transformers writes."""
    names = published_names(stored, source.where)
    named = all(name in (ours, stored_name(ours)) for name, ours in names.items())
    # Masks, and biases that are said to be none, are no more among the tensors.
    kept = {name: source.tensors[ours] for name, ours in names.items() if ours in source.tensors}
    return named and all(shape == stored[name].shape for name, (shape, _) in kept.items())


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
        plain = plain and len(os.fsencode(name)) <= 255  # no file system has longer names
        ok = plain and path.resolve().is_relative_to(root)
    except (ValueError, OSError, RuntimeError):  # a NUL, a surrogate, a circle of links
        ok = False
    if not ok:
        raise DataError(f"refusing {name!r} ({folder}): not a plain file of this folder")
    return path


def open_file(path: Path, allow_pickle: bool) -> Tensors:
    """Return the tensors of a weight file, a pickle's if its name ends in .bin."""
    if path.suffix == ".bin":
        return of_torch(load_torch(path, allow_pickle), path)
    try:
        # The library checks that the header is sound and the file whole. What follows relies on it,
        # and reads the header again for what it does not tell: where a tensor begins.
        with safe_open(path, "np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        found: Tensors = {}
        for name, fields in sorted(header.items()):  # messages list them in this order
            dtype, shape = DTYPES.get(fields["dtype"], fields["dtype"]), tuple(fields["shape"])
            begin = 8 + size + fields["data_offsets"][0]
            read = functools.partial(read_array, path, begin, dtype, shape)
            found[name] = Tensor(shape, dtype, read)
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a list in place of a dict
        wrong = why_no_weights(path) or f"cut short or damaged ({error}); {AGAIN}"
        raise DataError(f"cannot read the weights ({path}): it is {wrong}") from error
    return found


def read_array(path: Path, begin: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read the array that begins at this byte of the file; DataError if the file ends too soon.

    The library would copy it while all other threads of Python wait, and keep in memory what it
    read until it closes the file.
    """
    array = np.fromfile(path, jnp.dtype(dtype), math.prod(shape), offset=begin)
    if array.size < math.prod(shape):
        raise DataError(f"cannot read the weights ({path}): cut short since it was opened; {AGAIN}")
    return array.reshape(shape)


def write_folder(
    folder: Path,
    cfg: GPTConfig,
    params: Params,
    special: Mapping[str, object] | None,
    dtype: str = "float32",
) -> None:
    """Write config.json and model.safetensors as transformers reads them.

    Args:
        folder: where; it is there already.
        cfg: the model.
        params: its parameters.
        special: the special ids, by their names in config.json.
        dtype: of the stored tensors, float32 or bfloat16, to which numbers are rounded.

    Raises:
        DiskError: the weights cannot be written.
    """
    fields = format_config(cfg, special) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    named, stored = named_tensors(cfg, params), jnp.dtype(dtype)
    tensors = {stored_name(name): array.astype(stored, copy=False) for name, array in named}
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # its word for whatever the disk said
        raise DiskError(f"cannot write the weights ({folder}): {error}") from error
