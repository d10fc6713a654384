"""Hugging Face's format: a folder with config.json beside safetensors files."""

import dataclasses
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.config import GPTConfig
from gptjax.conversion.fields import ACTIVATIONS, check_fields, is_one_of, says_nothing, shown
from gptjax.conversion.tensors import (
    FLOATS,
    LIMITS,
    Source,
    Table,
    make_config,
    named_tensors,
    published_names,
    size_problems,
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

# ---- config.json ---------------------------------------------------------------------------------

# What a field may say for the model to be the one that gptjax computes.
MUST_BE: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": tuple(ACTIVATIONS),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
    "pruned_heads": ({},),
}


def parse_config(fields: dict[str, Any], where: str, accept: Collection[str] = ()) -> GPTConfig:
    """Return the model that a config.json describes.

    Args:
        fields: what the file says.
        where: its path, for the message.
        accept: fields that gptjax does not know and the user vouches for.

    Raises:
        DataError: it describes another architecture, sizes beyond belief, or has fields that
            gptjax does not know, all listed at once.
    """
    if fields.get("model_type", "gpt2") != "gpt2":  # all its fields are another model's
        fields = {"model_type": fields["model_type"]}
        check_fields(fields, fields, where, [must_be("model_type", fields["model_type"])])
    sizes: dict[str, Any] = {name: fields.get(name) for name in LIMITS}
    sizes["block_size"] = fields.get("n_positions", fields.get("n_ctx"))
    problems = size_problems(sizes)
    ours = fields.get("gptjax") or {}
    for name, allowed in MUST_BE.items():
        if name in fields and not is_one_of(fields[name], allowed):
            if says_nothing(fields[name]) and any(map(says_nothing, allowed)):
                continue
            problems.append(must_be(name, fields[name]))
    if (
        not isinstance(ours, dict)
        or not set(ours) <= {"bias", "vocab_multiple"}
        or type(ours.get("bias", True)) is not bool
    ):
        problems.append(f"gptjax={ours!r}, expected bias and vocab_multiple")
        ours = {}
    multiple = ours.get("vocab_multiple", 128)
    if type(multiple) is not int or not 1 <= multiple <= 2**16:
        problems.append(f"gptjax.vocab_multiple={multiple!r}, expected 1 to {2**16:,}")
    inner = fields.get("n_inner")
    if inner is not None and not problems and inner != 4 * sizes["n_embd"]:
        problems.append(f"n_inner={inner!r}, gptjax computes 4 n_embd")
    known = {"n_positions", "n_inner", "gptjax"} | set(MUST_BE) | set(LIMITS)
    check_fields(fields, known, where, problems, accept)
    return make_config(
        sizes,
        where,
        vocab_multiple=multiple,
        bias=ours.get("bias", True),
        activation=ACTIVATIONS[fields.get("activation_function", "gelu_new")],
    )


def must_be(name: str, value: object) -> str:
    """Return the message for a field whose value is not GPT-2's."""
    if name == "quantization_config":
        return f"{shown(name, value)}: take the model from before it was quantised"
    return f"{shown(name, value)}, gptjax computes {' or '.join(map(repr, MUST_BE[name]))}"


def format_config(cfg: GPTConfig, eot: int | None) -> dict[str, object]:
    """Return config.json for transformers; its field `gptjax` has what the format cannot say."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "n_positions": cfg.block_size,
        "vocab_size": cfg.vocab_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[cfg.activation],
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "gptjax": {"bias": cfg.bias, "vocab_multiple": cfg.vocab_multiple},
    }


# ---- Weights -------------------------------------------------------------------------------------


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
        stored in (tensor, f"transformer.{tensor}") for stored, tensor in names.items()
    )
    where = str(file or folder)
    return Source(
        *(cfg, table, lambda name: readers[name](), where, tuple(paths)),
        is_hf=alike,
        says_activation=True,
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
        if loose := [p.name for p in there if p.suffix in (".safetensors", ".bin")]:
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


def refuse_adapter(folder: Path) -> None:
    """Raise DataError for a folder with an adapter, which changes a model that is elsewhere."""
    if not (folder / ADAPTER).is_file():
        return
    fields = read_json(folder / ADAPTER)
    base, kind = fields.get("base_model_name_or_path"), fields.get("peft_type")
    raise DataError(
        f"{folder} holds an adapter ({kind}) of the model {base}, not a model ({ADAPTER}); merge "
        "them by peft's AutoPeftModelForCausalLM: from_pretrained(ADAPTER).merge_and_unload()"
        ".save_pretrained(FOLDER), and give that folder"
    )


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
                raise DataError(f"{name} is not zero, but config.json says bias false ({folder})")
            del table[name]


def write_folder(folder: Path, cfg: GPTConfig, params: Params, eot: int | None) -> None:
    """Write config.json and model.safetensors, in float32, as transformers reads them."""
    text = json.dumps(format_config(cfg, eot), indent=2) + "\n"
    (folder / "config.json").write_text(text)
    tensors = {f"transformer.{name}": array for name, array in named_tensors(cfg, params)}
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # its word for whatever the disk said
        raise DiskError(f"cannot write the weights ({folder}): {error}") from error
