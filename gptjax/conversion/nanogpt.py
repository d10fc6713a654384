"""nanoGPT's ckpt.pt."""

import re
from collections.abc import Collection, Container
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.conversion.fields import check_fields
from gptjax.conversion.published_names import published_names
from gptjax.conversion.tensors import HEAD, LIMITS, Source, is_linear, make_config
from gptjax.conversion.torch_file import load_torch, tensor_table, to_numpy
from gptjax.errors import DataError

ARGS = {*LIMITS, "bias", "dropout"}
PADDED, GPT2_VOCAB = 50304, 50257  # nanoGPT's default vocabulary, and the tokens in it


def choose_activation(args: Container[object]) -> tuple[str, str]:
    """Return which GELU to take, since the file does not say it, and a sentence about it.

    nanoGPT computes the exact form since June 2023, whatever the weights it started from, and
    computed the tanh form before. Files without `bias` are older.
    """
    if "bias" not in args:
        taken, other = "gelu_tanh", "the exact form take --activation=gelu"
        reason = "nanoGPT's before June 2023, when its files had no bias setting"
    else:
        taken, other = "gelu", "GPT-2's form, as in older files, take --activation=gelu_tanh"
        reason = "the exact form, nanoGPT's since June 2023"
    return taken, (
        f"the file does not say its activation: {taken} is assumed, {reason}; for {other}"
    )


def open_file(path: Path, allow_pickle: bool, accept: Collection[str] = ()) -> Source:
    """Open a nanoGPT checkpoint.

    Of a vocabulary of 50304 it keeps GPT-2's 50257: the other rows belong to no token (nanoGPT
    leaves them in the softmax, where training drives them to nothing). Checkpoints from before
    February 2023 do not say whether there are biases: then they have them.

    Args:
        path: the file.
        allow_pickle: whether to read it at all.
        accept: further model_args that the user vouches for.

    Raises:
        DataError: the file is damaged or not nanoGPT's.
        UsageError: it is a pickle, and pickles are not allowed (see `load_torch`).
    """
    saved = load_torch(path, allow_pickle)
    args: Any = saved.get("model_args") if isinstance(saved, dict) else None
    if not isinstance(args, dict):
        text = f"not a checkpoint of nanoGPT ({path}): it has no model_args{instead(saved)}"
        raise DataError(text)
    model: Any = saved.get("model")
    tensor_table(model, path)
    sizes = {name: args.get(name) for name in LIMITS}
    if sizes["vocab_size"] == PADDED:
        sizes["vocab_size"] = GPT2_VOCAB
    bias = args.get("bias", True)
    problems = [] if type(bias) is bool else [f"bias={bias!r}, expected true or false"]
    check_fields({str(name): args[name] for name in args}, ARGS, path, problems, accept)
    activation, assumed = choose_activation(args)
    cfg = make_config(sizes, path, bias=bias, activation=activation)
    state = {}
    for stored, name in published_names(model, path).items():
        tensor = model[stored]
        if re.fullmatch(r"h\.\d+\.attn\.bias", name):  # the causal mask, which is no weight
            continue
        if is_linear(name) and tensor.ndim == 2:
            tensor = tensor.T
        elif name in ("wte.weight", HEAD) and tensor.ndim == 2:
            tensor = tensor[: cfg.vocab_size] if len(tensor) == args["vocab_size"] else tensor
        state[name] = tensor

    def read(name: str) -> np.ndarray:
        return to_numpy(state.pop(name))

    return Source(cfg, tensor_table(state, path), read, str(path), (path,), assumed=assumed)


def instead(saved: object) -> str:
    """Return the end of a message: what another pickle holds instead, and what to do."""
    if not isinstance(saved, dict):
        return f", but a {type(saved).__name__}"
    keys = ", ".join(repr(str(key)[:60]) for key in list(saved)[:4]) or "nothing"
    kernel = next((v for k, v in saved.items() if str(k).endswith("h.0.attn.c_attn.weight")), None)
    shape = tuple(getattr(kernel, "shape", ()))
    if len(shape) == 2 and shape[1] == 3 * shape[0]:
        return (
            f", but tensors alone ({keys}), in Hugging Face's layout; put the file as "
            "pytorch_model.bin beside the model's config.json, and give that folder"
        )
    return (
        f", but {keys}, and how many heads the model has is not in tensors; save it as "
        "torch.save({'model': model.state_dict(), 'model_args': {'n_layer': ..., 'n_head': ..., "
        "'n_embd': ..., 'block_size': ..., 'vocab_size': ..., 'bias': ...}}, 'ckpt.pt')"
    )
