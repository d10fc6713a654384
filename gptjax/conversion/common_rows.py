"""The tokens and positions that two models have in common, where one of them was resized."""

import dataclasses
from typing import NamedTuple

from gptjax.config import GPTConfig
from gptjax.conversion.reference import Reference
from gptjax.model import Params

ROWS = {"wte": "vocab_size", "lm_head": "vocab_size", "wpe": "block_size"}  # whose rows are which


class Common(NamedTuple):
    """A model cut to what another one has too."""

    cfg: GPTConfig
    params: Params
    note: str  # a sentence, "" if nothing was left out


def common_rows(cfg: GPTConfig, params: Params, theirs: GPTConfig) -> Common:
    """Return our model with the first tokens and positions only, as many as both have."""
    sizes = {size: min(getattr(cfg, size), getattr(theirs, size)) for size in ROWS.values()}
    if (
        sizes
        == {size: getattr(cfg, size) for size in sizes}
        == {size: getattr(theirs, size) for size in sizes}
    ):
        return Common(cfg, params, "")
    smaller = dataclasses.replace(cfg, vocab_multiple=1, **sizes)
    rows = {name: sizes[size] for name, size in ROWS.items() if name in params}
    cut = {name: {"embedding": params[name]["embedding"][:n]} for name, n in rows.items()}
    note = (
        f"compared are the first {smaller.vocab_size} tokens ({cfg.vocab_size} here, "
        f"{theirs.vocab_size} there) and {smaller.block_size} positions ({cfg.block_size} here, "
        f"{theirs.block_size} there)"
    )
    return Common(smaller, {**params, **cut}, note)


def cut_reference(reference: Reference, cfg: GPTConfig) -> None:
    """Cut the reference to the tokens and positions of a model from `common_rows`."""
    import torch

    gpt2, head = reference.transformer, reference.lm_head
    tied = head.weight is gpt2.wte.weight
    for part, size in ((gpt2.wte, cfg.vocab_size), (gpt2.wpe, cfg.block_size)):
        part.weight = torch.nn.Parameter(part.weight.detach()[:size].clone())
    rows = gpt2.wte.weight if tied else head.weight.detach()[: cfg.vocab_size].clone()
    head.weight = rows if tied else torch.nn.Parameter(rows)
