"""nanoGPT's ckpt.pt."""

import re
from pathlib import Path
from typing import Any

from gptjax.errors import DataError
from gptjax.gpt2_tensors import Source, is_linear, make_config
from gptjax.torch_file import load_torch, tensor_table, to_numpy

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
ARGS = {*SIZES, "bias", "dropout"}
PADDED, GPT2_VOCAB = 50304, 50257  # nanoGPT's default vocabulary, and the tokens in it


def choose_activation(args: dict[str, Any], config: Any) -> tuple[str, str]:
    """Which GELU to take, since the file does not say it, and a sentence about it.

    nanoGPT computes the exact form since June 2023, and computed the tanh form before. Weights that
    it started from are GPT-2's, which were trained with tanh.
    """
    start = str(config.get("init_from")) if isinstance(config, dict) else ""
    # A resumed run does not say where it began; only GPT-2's own vocabulary is not padded.
    if start.startswith("gpt2") or (start == "resume" and args.get("vocab_size") == GPT2_VOCAB):
        taken, other, reason = "gelu_tanh", "gelu", "that of GPT-2, whose weights it started from"
    else:
        taken, other, reason = "gelu", "gelu_tanh", "nanoGPT's since June 2023"
    return taken, (
        f"the file does not say its activation: {taken} is assumed, {reason}; "
        f"for the other one take --activation={other}"
    )


def open_file(path: Path, allow_pickle: bool) -> Source:
    """The model of a nanoGPT checkpoint.

    Of a vocabulary of 50304 it keeps GPT-2's 50257: the other rows belong to no token (nanoGPT
    leaves them in the softmax, where training drives them to nothing).

    Raises:
        DataError: the file is damaged or not nanoGPT's.
        UsageError: it is a pickle, and pickles are not allowed (see `load_torch`).
    """
    saved = load_torch(path, allow_pickle)
    saved = saved if isinstance(saved, dict) else {}
    args: Any = saved.get("model_args")
    model: Any = saved.get("model")
    if not isinstance(args, dict) or type(args.get("bias")) is not bool:
        raise DataError(f"not a checkpoint of nanoGPT ({path}): it has no model_args")
    tensor_table(model, path)
    unknown = sorted(str(name) for name in args if name not in ARGS)
    if unknown:
        raise DataError(f"cannot use this model ({path}): unknown model_args {', '.join(unknown)}")
    sizes = {name: args.get(name) for name in SIZES}
    if sizes["vocab_size"] == PADDED:
        sizes["vocab_size"] = GPT2_VOCAB
    activation, assumed = choose_activation(args, saved.get("config"))
    cfg = make_config(sizes, path, bias=args["bias"], activation=activation)
    state = {}
    for name, tensor in model.items():
        name = str(name).removeprefix("_orig_mod.").removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.bias", name):  # the causal mask, which is no weight
            continue
        if is_linear(name) and tensor.ndim == 2:
            tensor = tensor.T
        elif name in ("wte.weight", "lm_head.weight") and tensor.ndim == 2:
            tensor = tensor[: cfg.vocab_size] if len(tensor) == args["vocab_size"] else tensor
        if name in state:
            raise DataError(f"cannot use this checkpoint ({path}): {name} is stored twice")
        state[name] = tensor

    def read(name: str) -> Any:
        return to_numpy(state.pop(name))

    return Source(cfg, tensor_table(state, path), read, None, str(path), (path,), assumed=assumed)
