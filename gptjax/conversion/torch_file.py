"""Pickle files of PyTorch: opened only if a flag allows it, and then without running code."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.conversion.tensors import Table
from gptjax.conversion.weight_check import why_no_weights
from gptjax.errors import DataError, UsageError, first_line
from gptjax.memory import require_memory

MINIMUM = (2, 10)  # older ones have known holes in weights_only


def load_torch(path: Path, allow_pickle: bool) -> Any:
    """Return what torch.save wrote, on the CPU, limited to tensors and plain Python values.

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
            f"{path} is a pickle, which can run code as it is read; take a safetensors file",
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
    try:  # not mapped: pages of a mapping stay, a tensor that was copied is let go
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, OSError, ...
        text, reason = str(error).strip(), first_line(error)
        if match := re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)", text):
            args = "'model_args': vars(model.config)"
            save = f"torch.save({{'model': model.state_dict(), {args}}}, 'ckpt.pt')"
            if match[1].startswith("transformers."):
                save = "model.save_pretrained(FOLDER), and import that folder"
            reason = (
                f"it holds {match[1]}, which belongs to the program that wrote it, and gptjax "
                f"loads plain values only; there, save it by {save}"
            )
        elif text.startswith("Weights only"):  # PyTorch would go on to advise the careless way
            reason = "it is damaged, or holds more than tensors and plain values"
        raise DataError(f"cannot read the pickle ({path}): {reason}") from error


def check_size(paths: Sequence[Path]) -> None:
    """Raise DataError if pickles that are read at the same time are larger than memory."""
    if paths:
        what = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        size = sum(path.stat().st_size for path in paths)
        require_memory(size, f"{what}: a pickle is read whole, which")


def tensor_table(state: object, path: Path) -> Table:
    """Return shape and dtype of each tensor in a state dict; raise DataError if it has others."""
    import torch

    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"  # a tensor on "meta" has no numbers
        and isinstance(name, str)
        for name, value in state.items()
    ):
        raise DataError(f"not a state dict of dense tensors ({path})")
    return {
        name: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in state.items()
    }


def to_numpy(tensor: Any) -> np.ndarray:
    """Return a tensor of floats as an array of float32."""
    return tensor.detach().float().numpy()
