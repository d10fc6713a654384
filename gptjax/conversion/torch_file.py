"""Pickle files of PyTorch: opened only if a flag allows it, and then without running code."""

import functools
import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.conversion.stored_tensors import Tensor, Tensors
from gptjax.conversion.weight_check import why_no_weights
from gptjax.errors import DataError, UsageError, first_line
from gptjax.memory import require_memory

MINIMUM = (2, 10)  # older ones have known holes in weights_only
CLASSES = 16  # of other programs, that a file may name: each costs another reading

# ---- What stands in the place of a class that a file names ---------------------------------------


class Fields:
    """Stands for a class of settings: making one gives an empty mapping, which then is filled.

    That is safe because a name in the file only chooses this class: nothing of that name is looked
    up, imported or called. PyTorch fills an OrderedDict with the items of a dict's subclass, and
    its `__dict__` with the attributes of any other object; `plain` returns both.
    """

    def __new__(cls, *args: object) -> Any:
        """Return the mapping, whatever the arguments of the class in the file."""
        return OrderedDict()


class NumpyValue:
    """Stands for an array or a dtype of NumPy, of which only a dtype's letters are kept."""

    def __init__(self, *args: object) -> None:
        """Keep the first argument, if it is a text."""
        self.code = args[0] if args and isinstance(args[0], str) else ""

    def __setstate__(self, state: object) -> None:
        """Read nothing more: random states and metrics are no part of a model."""


def numpy_scalar(dtype: object, data: object) -> object:
    """Return a number of NumPy, or None for anything else that NumPy has as a scalar."""
    code = dtype.code if isinstance(dtype, NumpyValue) else ""
    if not isinstance(data, bytes) or not re.fullmatch("[iuf][1248]|b1", code):
        return None
    return np.frombuffer(data, f"<{code}")[0].item()


OF_SETTINGS = (
    *("argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict"),
    *("typing.Any", "torch.torch_version.TorchVersion", "datetime.datetime", "datetime.timedelta"),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"pathlib._local.{kind}" for kind in ("PosixPath", "WindowsPath")),  # of Python 3.13
    *(f"builtins.{kind}" for kind in ("dict", "float", "int", "list", "str")),  # of a defaultdict
)
STAND_INS: dict[str, Any] = {
    **dict.fromkeys(OF_SETTINGS, Fields),
    "numpy.dtype": NumpyValue,
    "numpy.ndarray": NumpyValue,
    **dict.fromkeys(
        ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), NumpyValue
    ),
    **dict.fromkeys(
        ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), numpy_scalar
    ),
}
# Packages, with what Python 2 called builtins and subprocess, since pickles keep these names.
NO_SETTINGS = {*sys.stdlib_module_names, "torch", "numpy", "transformers"}
NO_SETTINGS |= {"__builtin__", "commands"}


def is_class_of_settings(name: str) -> bool:
    """Return whether a dotted name is written like a class, of a program or a lesser library.

    What the standard library, PyTorch, NumPy and transformers have is no settings, apart from
    `OF_SETTINGS`: a file that names such a class or a function is another thing than a checkpoint.
    """
    module, _, last = name.rpartition(".")
    return last[:1].isupper() and module.partition(".")[0] not in {"", *NO_SETTINGS}


def plain(value: object) -> dict[str, Any]:
    """Return a mapping's items and what `Fields` got as attributes; {} of anything else."""
    if not isinstance(value, dict):
        return {}
    attributes = vars(value) if isinstance(value, OrderedDict) else {}
    # Not by the value's own methods, over which attributes of these names would lie.
    own = {k: v for k, v in attributes.items() if isinstance(k, str) and k[:1] != "_"}
    return own | dict(dict.items(value))


# ---- Reading -------------------------------------------------------------------------------------


def load_torch(path: Path, allow_pickle: bool) -> Any:
    """Return what torch.save wrote, on the CPU, limited to tensors and plain Python values.

    Objects that hold settings come as mappings; `plain` reads them.

    Args:
        path: the file.
        allow_pickle: whether it may be read at all.

    Raises:
        UsageError: pickles are not allowed, or PyTorch is missing or too old.
        DataError: the file is damaged, larger than memory, or holds anything else (nothing of it
            has run).
    """
    check_size([path])
    if wrong := why_no_weights(path):
        raise DataError(f"cannot read the pickle ({path}): it is {wrong}")
    if not allow_pickle:
        raise UsageError(
            f"{path} is a pickle, which can run code as it is read, unlike safetensors",
            "--allow_pickle",
            "which reads tensors and nothing else",
        )
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{path} needs PyTorch; pip install 'gptjax[verify]'") from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM:
        raise UsageError(
            f"{path}: PyTorch {torch.__version__} is too old to read pickles safely; take "
            f"{MINIMUM[0]}.{MINIMUM[1]} or newer"
        )
    stand_ins = dict(STAND_INS)
    for _ in range(CLASSES):
        try:  # not mapped: pages of a mapping stay, a tensor that was copied is let go
            with torch.serialization.safe_globals([(v, k) for k, v in stand_ins.items()]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # UnpicklingError, RuntimeError, EOFError, OSError, ...
            name = unknown_name(error)
            if not is_class_of_settings(name) or name in stand_ins:
                raise DataError(f"cannot read the pickle ({path}): {why_not(error)}") from error
            stand_ins[name] = Fields
    raise DataError(f"cannot read the pickle ({path}): it names {CLASSES} classes and more")


def unknown_name(error: Exception) -> str:
    """Return what a pickle names that PyTorch did not let pass, "" if that is not the error."""
    match = re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)", str(error))
    return match[1] if match else ""


def why_not(error: Exception) -> str:
    """Return why a pickle was not read, for a sentence."""
    if name := unknown_name(error):
        args = "'model_args': vars(model.config)"
        save = f"torch.save({{'model': model.state_dict(), {args}}}, 'ckpt.pt')"
        if name.startswith("transformers."):
            save = "model.save_pretrained(FOLDER), and import that folder"
        return (
            f"it holds {name}, which belongs to the program that wrote it, and gptjax loads "
            f"plain values only; there, save it by {save}"
        )
    if str(error).strip().startswith("Weights only"):  # it would go on to advise the careless way
        return "it is damaged, or holds more than tensors and plain values"
    return first_line(error)


def check_size(paths: Sequence[Path]) -> None:
    """Raise DataError if pickles that are read at the same time are larger than memory."""
    if paths:
        what = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        size = sum(path.stat().st_size for path in paths)
        require_memory(size, f"{what}: a pickle is read whole, which")


def is_state_dict(content: dict[Any, Any]) -> bool:
    """Return whether a pickle holds tensors by name, and perhaps other things."""
    import torch

    return all(isinstance(name, str) for name in content) and any(
        isinstance(value, torch.Tensor) for value in content.values()
    )


def of_torch(state: object, path: Path) -> Tensors:
    """Return the tensors of a state dict, which will be read as float32.

    Raises:
        DataError: it holds anything else, or tensors larger than memory: a pickle may say any
            shape, where all rows are the same numbers of the file.
    """
    import torch

    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"  # a tensor on "meta" has no numbers
        and isinstance(name, str)
        for name, value in state.items()
    ):
        raise DataError(f"not a state dict of dense tensors ({path})")
    size = 4 * sum(value.numel() for value in state.values())
    require_memory(size, f"{path}: a model of these tensors")

    def read(tensor: torch.Tensor) -> np.ndarray:
        array: np.ndarray = tensor.detach().float().resolve_neg().numpy()  # a sign may be a mark
        return array

    return {
        name: Tensor(
            *(tuple(value.shape), str(value.dtype).removeprefix("torch.")),
            functools.partial(read, value),
        )
        for name, value in state.items()
    }
