"""The reference that gptjax's model is compared with: transformers' GPT-2, on PyTorch."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gptjax.config import GPTConfig
from gptjax.conversion.hf_config import format_config
from gptjax.conversion.reference_files import FORMATS
from gptjax.conversion.reference_pytorch import Pairs
from gptjax.conversion.tensors import HEAD, Source, check_tensors
from gptjax.errors import DataError, UsageError

Reference = Any  # a GPT2LMHeadModel of transformers, which need not be installed


def load_reference(source: Source) -> Reference:
    """Return transformers' GPT2LMHeadModel of a source, in float32, with eager attention.

    It reads a folder of its own format by itself. Other files are read a second time, by
    `reference_files`, which shares no mapping with the importer. Biases that a source has not are
    zeros.

    Raises:
        UsageError: transformers or PyTorch is not installed.
        DataError: the source has other tensors than it should (see `check_tensors`), at which
            transformers would shrug, or the second reading finds others.
    """
    torch, transformers = import_reference()
    check_tensors(source)
    if source.is_hf:
        reference = transformers.GPT2LMHeadModel.from_pretrained(
            source.where, attn_implementation="eager", dtype=torch.float32
        )
        return reference.eval()
    stored = FORMATS[source.format](source)
    cfg = dataclasses.replace(source.cfg, n_head=stored.n_head)
    reference = transformers.GPT2LMHeadModel(reference_config(cfg))
    fill(reference, stored.tensors, source)
    return reference.eval()


def how_read(source: Source) -> str:
    """Return a sentence that says who read the reference's tensors."""
    if source.is_hf:
        return "transformers read the source by itself"
    return (
        "the tensors were read a second time, by a mapping of their own, and given to "
        "transformers; settings such as the activation function are the importer's"
    )


def fill(reference: Reference, tensors: Pairs, source: Source) -> None:
    """Copy tensors into a fresh model, one at a time; a head that differs from wte is kept apart.

    Raises:
        DataError: one is missing, or has another shape than the model's.
    """
    torch, _ = import_reference()
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    missing, head = set(parameters), None
    with torch.no_grad():
        for name, tensor in tensors:
            if name not in parameters or tensor.shape != parameters[name].shape:
                raise DataError(
                    f"the second reading of {source.where} found {name} of shape "
                    f"{tuple(tensor.shape)}, which the model has not: please report it to gptjax"
                )
            missing.discard(name)
            if name == HEAD:
                head = tensor.float()
            else:
                parameters[name].copy_(tensor)
        absent = {name for name in missing if name.endswith(".bias") and not source.cfg.bias}
        for name in absent:
            parameters[name].zero_()
        wte, tied = reference.transformer.wte.weight, reference.lm_head.weight
        if head is not None and not (tied is wte and torch.equal(head, wte)):
            reference.lm_head.weight = torch.nn.Parameter(head.clone())
    lost = missing - absent - ({HEAD} if tied is wte else set())
    if lost:
        raise DataError(
            f"the second reading of {source.where} found no {', '.join(sorted(lost)[:6])}: please "
            "report it to gptjax"
        )


def import_reference() -> tuple[ModuleType, ModuleType]:
    """Return torch and transformers, made silent; raise UsageError if one is missing."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError("verify needs transformers; pip install 'gptjax[verify]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # The first tanh and erf of a process must not be of several threads: MKL may then give one of
    # them a less exact one (github.com/pytorch/pytorch/issues/188792). GELU was wrong by 2e-4
    # instead of 4e-7 in 4 of 109 processes on 2 CPU cores, in none of 250 after these calls.
    torch.tanh(torch.zeros(8))
    torch.erf(torch.zeros(8))
    return torch, transformers


def reference_config(cfg: GPTConfig) -> object:  # a GPT2Config of transformers
    """Return transformers' configuration of the same model."""
    _, transformers = import_reference()
    fields = {**format_config(cfg, None), "gptjax": None}
    return transformers.GPT2Config(**fields, attn_implementation="eager")


def reference_activations(
    reference: Reference, tokens: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the output of every part of the model by name, and the logits."""
    import torch

    gpt2 = reference.transformer
    parts = {"embeddings": gpt2.drop}
    for i, block in enumerate(gpt2.h):
        parts |= {f"h.{i}.{name}": getattr(block, name) for name in ("ln_1", "attn", "ln_2", "mlp")}
        parts[f"h.{i}"] = block
    parts["ln_f"] = gpt2.ln_f
    found: dict[str, np.ndarray] = {}

    def keep(name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        found[name] = output.detach().float().numpy().copy()

    hooks = [
        part.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, part in parts.items()
    ]
    logits = reference(torch.from_numpy(tokens)).logits
    for hook in hooks:
        hook.remove()
    return found, logits.detach().numpy()


def reference_gradients(reference: Reference, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradient of the mean cross-entropy, by the published names."""
    import torch

    logits = reference(torch.from_numpy(tokens[:, :-1])).logits
    targets = torch.from_numpy(tokens[:, 1:]).flatten()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    return {
        name.removeprefix("transformer."): parameter.grad.numpy()
        for name, parameter in reference.named_parameters()
    }


def reference_half(reference: Reference, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits in float32 and in bfloat16, to which the weights are cast for good."""
    import torch

    with torch.no_grad():
        full = reference(torch.from_numpy(tokens)).logits.numpy()
        half = reference.to(torch.bfloat16)(torch.from_numpy(tokens)).logits.float().numpy()
    return full, half


def reference_greedy(reference: Reference, tokens: np.ndarray, count: int) -> list[int]:
    """Return the likeliest continuation, every token from the whole context."""
    import torch

    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(tokens) :].tolist()


def write_random_model(cfg: GPTConfig, folder: Path, seed: int = 0) -> None:
    """Write a random model with transformers, scaled so that small mistakes show.

    At GPT-2's initialisation an erf-GELU moves the logits by 2.5e-6, so weights are scaled up and
    biases and LayerNorms are noisy.
    """
    torch, transformers = import_reference()
    torch.manual_seed(seed)
    random = transformers.GPT2LMHeadModel(reference_config(cfg))
    scale = 8 if cfg.n_layer <= 4 else 3 if cfg.n_layer <= 12 else 2
    with torch.no_grad():
        for parameter in random.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    random.save_pretrained(folder)
