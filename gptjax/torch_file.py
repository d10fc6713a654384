"""Files that PyTorch pickled: never opened unless asked for, and then without running code."""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import DataError, UsageError

MINIMUM = (2, 10)  # older ones have known holes in weights_only


def load_torch(path: Path, allow_pickle: bool) -> Any:
    """What torch.save wrote, on CPU, limited to tensors and plain Python values.

    Raises:
        UsageError: pickles are not allowed, or PyTorch is missing or too old.
        DataError: the file is damaged, or holds anything else (nothing of it has run).
    """
    if not allow_pickle:
        raise UsageError(
            f"{path} is a pickle, which can run code as it is read; take a safetensors file, or "
            "import it by convert_gpt2.py --allow_pickle, which reads tensors and nothing else"
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
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"cannot read the pickle ({path}): {reason}") from error


def tensor_table(state: Any, path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a state dict; DataError if it holds anything else."""
    import torch

    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"  # a tensor on "meta" has no numbers
        for value in state.values()
    ):
        raise DataError(f"not a state dict of dense tensors ({path})")
    return {
        str(name): (tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in state.items()
    }


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor of floats as float32 numbers on their own."""
    return tensor.detach().float().numpy()
