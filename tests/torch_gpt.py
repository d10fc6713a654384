"""The same GPT-2 in PyTorch, as a good PyTorch programmer writes it.

It is the reference of every architecture option, and the other side of the benchmarks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptjax.config import GPTConfig, TrainConfig


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        D = cfg.n_embd
        self.n_head = cfg.n_head
        self.approximate = "tanh" if cfg.activation == "gelu_tanh" else "none"
        self.dropout = nn.Dropout(cfg.dropout)
        self.ln_1 = nn.LayerNorm(D, bias=cfg.bias)
        self.c_attn = nn.Linear(D, 3 * D, bias=cfg.bias)
        self.attn_proj = nn.Linear(D, D, bias=cfg.bias)
        self.ln_2 = nn.LayerNorm(D, bias=cfg.bias)
        self.c_fc = nn.Linear(D, 4 * D, bias=cfg.bias)
        self.mlp_proj = nn.Linear(4 * D, D, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        B, T, D = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.attn_proj(y.transpose(1, 2).reshape(B, T, D)))
        x_F = F.gelu(self.c_fc(self.ln_2(x)), approximate=self.approximate)
        return x + self.dropout(self.mlp_proj(x_F))


class TorchGPT(nn.Module):
    """Tokens (B, T) to logits (B, T, V), by a head that is tied to the token embedding or not."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(cfg.padded_vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)
        V, D = self.wte.weight.shape
        self.lm_head = None if cfg.tie_head else nn.Embedding(V, D)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), (self.lm_head or self.wte).weight)


def make_adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW that decays matrices and embeddings only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, config.learning_rate, betas, config.eps, fused=True)


def mean_loss(model: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Cross-entropy of predicting tokens 1..T of windows (B, T+1), in nats per token."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


class MeanLoss(nn.Module):
    """`mean_loss` of a model, as one module that can be compiled and distributed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> Tensor:
        """(B, T+1) -> ()."""
        return mean_loss(self.model, windows)


def train_step(
    mean_loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    clip: float,
) -> Tensor:
    """One optimizer step on windows (B, T+1), of which `mean_loss` is taken; returns the loss."""
    loss = mean_loss(windows)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def modules(model: TorchGPT) -> list[tuple[str, list[nn.Module]]]:
    """Our names with the twin's modules: one for each layer under h, else a single one."""
    blocks = [block for block in model.h if isinstance(block, Block)]
    head: list[tuple[str, list[nn.Module]]] = (
        [("lm_head", [model.lm_head])] if model.lm_head else []
    )
    return [
        *head,
        ("wte", [model.wte]),
        ("wpe", [model.wpe]),
        ("h/ln_1", [block.ln_1 for block in blocks]),
        ("h/attn/c_attn", [block.c_attn for block in blocks]),
        ("h/attn/c_proj", [block.attn_proj for block in blocks]),
        ("h/ln_2", [block.ln_2 for block in blocks]),
        ("h/mlp/c_fc", [block.c_fc for block in blocks]),
        ("h/mlp/c_proj", [block.mlp_proj for block in blocks]),
        ("ln_f", [model.ln_f]),
    ]


def tensors(model: TorchGPT) -> list[tuple[str, list[Tensor], bool]]:
    """Our path, the twin's tensors of it, and whether they are transposed."""
    names = {nn.Embedding: "embedding", nn.LayerNorm: "scale", nn.Linear: "kernel"}
    found: list[tuple[str, list[Tensor], bool]] = []
    for name, parts in modules(model):
        weights: list[Tensor] = [part.get_parameter("weight") for part in parts]
        linear = isinstance(parts[0], nn.Linear)
        found.append((f"{name}/{names[type(parts[0])]}", weights, linear))
        if not isinstance(parts[0], nn.Embedding) and parts[0].bias is not None:
            found.append((f"{name}/bias", [part.get_parameter("bias") for part in parts], False))
    return found


def copy_params(params: dict[str, Any], model: TorchGPT) -> None:
    """Give the twin our parameters."""
    with torch.no_grad():
        for path, parts, transposed in tensors(model):
            value: Any = params
            for key in path.split("/"):
                value = value[key]
            value = np.asarray(value)
            for part, array in zip(parts, value if path.startswith("h/") else [value], strict=True):
                part.copy_(torch.tensor(array.T if transposed else array))


def named_gradients(model: TorchGPT, of: str = "grad") -> dict[str, np.ndarray]:
    """The twin's gradients by our paths (its values with of="data"), layers stacked."""
    found = {}
    for path, parts, transposed in tensors(model):
        arrays = [getattr(part, of).numpy() for part in parts]
        arrays = [array.T for array in arrays] if transposed else arrays
        found[path] = np.stack(arrays) if path.startswith("h/") else arrays[0]
    return found
