"""OpenAI's original format: a TensorFlow checkpoint beside hparams.json."""

import collections
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from gptjax.conversion.fields import check_fields
from gptjax.conversion.tensors import LIMITS, Source, make_config
from gptjax.conversion.tf_checkpoint import read_index, read_tensor
from gptjax.errors import DataError
from gptjax.files import read_json

LEAVES = {"w": "weight", "g": "weight", "b": "bias"}


def published_name(name: str) -> str:
    """Return the published name of a tensor: `h.0.ln_1.bias` for `model/h0/ln_1/b`."""
    parts = name.removeprefix("model/").split("/")
    if parts in (["wte"], ["wpe"]):
        return f"{parts[0]}.weight"
    parts[-1] = LEAVES.get(parts[-1], parts[-1])
    return re.sub(r"^h(\d+)\.", r"h.\1.", ".".join(parts))


def open_folder(folder: Path, accept: Collection[str] = ()) -> Source:
    """Open a folder with hparams.json and model.ckpt.*.

    Args:
        folder: holds them.
        accept: further fields of hparams.json that the user vouches for.

    Raises:
        DataError: a file is missing or damaged, or the sizes make no sense.
    """
    hparams = read_json(folder / "hparams.json")
    names = {"block_size": "n_ctx", "vocab_size": "n_vocab"}
    sizes = {name: hparams.get(names.get(name, name)) for name in LIMITS}
    check_fields(hparams, {names.get(name, name) for name in LIMITS}, folder, accept=accept)
    cfg = make_config(sizes, folder / "hparams.json")
    index = read_index(folder / "model.ckpt")
    counts = collections.Counter(map(published_name, index))
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(f"cannot use this checkpoint ({folder}): stored twice: {', '.join(twice)}")
    entries = {published_name(name): entry for name, entry in index.items()}

    def shape(stored: tuple[int, ...]) -> tuple[int, ...]:
        """Remove the leading 1 of what OpenAI wrote as a convolution of width 1."""
        return stored[1:] if len(stored) == 3 and stored[0] == 1 else stored

    def read(name: str) -> np.ndarray:
        tensor = read_tensor(entries[name])
        return tensor.reshape(shape(tensor.shape))

    tensors = {name: (shape(entry.shape), entry.dtype.name) for name, entry in entries.items()}
    shards = {entry.shard for entry in entries.values()}
    files = (folder / "model.ckpt.index", *sorted(shards))
    return Source(cfg, tensors, read, str(folder), files, format="openai")
