"""The same GPT-2 in PyTorch, as a good PyTorch programmer writes it: the races' other side."""

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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class TorchGPT(nn.Module):
    """Tokens (B, T) to logits (B, T, V), head tied to the token embedding."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(cfg.padded_vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.h = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def make_adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW that decays matrices and embeddings only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, config.learning_rate, betas, config.eps, fused=True)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor, clip: float
) -> Tensor:
    """One optimizer step on windows (B, T+1); returns the loss."""
    logits = model(windows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
