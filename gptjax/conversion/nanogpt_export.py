"""nanoGPT's ckpt.pt, as its own sample.py and train.py --init_from=resume load it."""

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.checkpoints.restore import restore_extra
from gptjax.checkpoints.run_folder import Run
from gptjax.checkpoints.save import check_space
from gptjax.checkpoints.steps import loss_of, read_meta
from gptjax.config import GPTConfig, TrainConfig
from gptjax.conversion.hf_config import format_config
from gptjax.conversion.nanogpt import OWN
from gptjax.conversion.tensors import HEAD, is_linear, named_tensors, nested, slots
from gptjax.errors import DiskError, UsageError, first_line
from gptjax.model import Params
from gptjax.settings import require
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, stored
from gptjax.tokens import CONFIG, published_ids

DATASET = "gptjax"  # the folder in nanoGPT's data/ where sample.py looks for meta.pkl
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
SAME = (  # settings of the same name and meaning
    *("eval_interval", "eval_iters", "log_interval", "batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "max_iters", "warmup_iters", "min_lr", "weight_decay", "beta1", "beta2"),
    "grad_clip",
)
NEVER = 1e9  # nanoGPT's best_val_loss before the first evaluation


class Moments(NamedTuple):
    """The state of AdamW: its steps, and its moments by nanoGPT's names."""

    steps: int
    first: dict[str, Any]
    second: dict[str, Any]


def write_folder(folder: Path, run: Run) -> list[str]:
    """Write ckpt.pt, and meta.pkl where nanoGPT can use the vocabulary.

    The optimizer's state is the run's, where the step has moments of AdamW; else nanoGPT begins
    with none. What nanoGPT cannot say is in a key of our own, so that our import is exact.

    Returns:
        Sentences on what nanoGPT does otherwise.

    Raises:
        UsageError: the head is not tied, or PyTorch is missing.
        CheckpointError: the step's optimizer state is damaged.
        DiskError: the disk is full.
    """
    config, cfg = run.config, run.config.model
    rule = "nanoGPT's head is its embedding, but this model has its own; take --to=hf or gguf"
    require(cfg.tie_head, "to", "nanogpt", rule)
    try:
        import torch
    except ImportError as error:
        text = "--to=nanogpt: needs PyTorch; pip install 'gptjax[verify]'"
        raise UsageError(text) from error
    extra = restore_extra(run.folder, run.step) if run.folder else {}
    moments = find_moments(cfg, extra)
    check_space(folder, run.params, copies=3 if moments else 1)
    model = torch_tensors(cfg, run.params)
    optimizer = optimizer_state(config, model, moments)
    model[HEAD] = model["transformer.wte.weight"]  # one tensor, stored once
    loss = loss_of(read_meta(run.folder, run.step)) if run.folder else math.inf
    args = {name: getattr(cfg, name) for name in MODEL_ARGS}
    saved = {
        "model": model,
        "optimizer": optimizer,
        "model_args": args,
        "iter_num": run.step,
        "best_val_loss": loss if math.isfinite(loss) else NEVER,
        "config": {
            **{name: getattr(config, name) for name in SAME},
            **args,
            "lr_decay_iters": config.lr_decay_iters or config.max_iters,
            "decay_lr": config.schedule == "cosine",
            "dataset": DATASET,
        },
        OWN: {
            "config": format_config(cfg, published_ids(run.tokenizer)[CONFIG]),
            "tokenizer": json.dumps(stored(run.tokenizer)),
        },
    }
    try:
        torch.save(saved, folder / "ckpt.pt")
    except RuntimeError as error:  # PyTorch's word for whatever the disk said
        raise DiskError(f"cannot write the weights ({folder}): {first_line(error)}") from error
    return notes(run, bool(moments), write_characters(folder, run.tokenizer))


# ---- Tensors -------------------------------------------------------------------------------------


def torch_tensors(cfg: GPTConfig, params: Params) -> dict[str, Any]:
    """Return tensors by nanoGPT's names, in the order of its parameters: block after block."""
    import torch

    found = {
        name: torch.from_numpy(array.T.copy()) if is_linear(name) else torch.tensor(array)
        for name, array in named_tensors(cfg, params)
        if cfg.bias or not name.endswith(".bias")
    }

    def block(name: str) -> float:
        match = re.match(r"h\.(\d+)\.", name)
        return int(match[1]) if match else math.inf if name.startswith("ln_f") else -1

    return {f"transformer.{name}": found[name] for name in sorted(found, key=block)}


def find_moments(cfg: GPTConfig, extra: dict[str, np.ndarray]) -> Moments | None:
    """Return the state of AdamW among what training saved; None if it is not of all parameters."""
    end = "/mu/wte/embedding"
    roots = [path.removesuffix(end) for path in extra if path.endswith(end)]
    paths = {slot.path for slot in slots(cfg)}
    for root in roots:
        trees = [
            {path: extra.get(f"{root}/{name}/{path}") for path in paths} for name in ("mu", "nu")
        ]
        if all(array is not None for tree in trees for array in tree.values()):
            first, second = (torch_tensors(cfg, nested(tree)) for tree in trees)
            return Moments(int(extra[f"{root}/count"]), first, second)
    return None


def optimizer_state(config: TrainConfig, model: dict[str, Any], moments: Moments | None) -> Any:
    """Return the state_dict of the AdamW that nanoGPT makes for these parameters.

    It has two groups: tensors of two dimensions, which are decayed, then the others.
    """
    import torch

    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in model.items()}
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    if moments is not None:
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.steps)),
                "exp_avg": moments.first[name],
                "exp_avg_sq": moments.second[name],
            }
    return optimizer.state_dict()


# ---- The vocabulary ------------------------------------------------------------------------------


def write_characters(folder: Path, tokenizer: Tokenizer) -> bool:
    """Write meta.pkl below data/, for characters and, as Latin-1, for bytes; return whether."""
    if isinstance(tokenizer, CharTokenizer):
        characters = tokenizer.chars
    elif isinstance(tokenizer, ByteTokenizer):
        characters = bytes(range(256)).decode("latin-1")
    else:
        return False
    place = folder / "data" / DATASET
    place.mkdir(parents=True)
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }
    (place / "meta.pkl").write_bytes(pickle.dumps(meta, 2))
    return True


def notes(run: Run, moments: bool, characters: bool) -> list[str]:
    """Return sentences on what nanoGPT does otherwise."""
    said = []
    if run.config.model.activation != "gelu":
        said.append(
            "nanoGPT computes the exact GELU and this model its tanh form: there its logits differ "
            "a little; gptjax reads it back as it is"
        )
    if not moments:
        said.append("the step has no moments of AdamW: nanoGPT's resume begins with none")
    if characters:
        said.append(
            f"for nanoGPT's sample.py copy data/{DATASET} of this folder into nanoGPT's folder data"
        )
    elif not isinstance(run.tokenizer, GPT2Tokenizer):
        said.append(
            "nanoGPT's sample.py knows GPT-2's tokens and characters only: it would print the ids "
            f"of this model's tokenizer ({run.tokenizer.kind}) as other text"
        )
    return said
