"""Small GPTs in PyTorch under the names of minGPT, its older self, makemore and build-nanogpt."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, H, L, S, V = 24, 3, 2, 12, 37  # width, heads, layers, context, vocabulary


@dataclasses.dataclass
class GPTConfig:
    """As build-nanogpt's, which pickles it."""

    block_size: int = S
    vocab_size: int = V
    n_layer: int = L
    n_head: int = H
    n_embd: int = D


def mask() -> Tensor:
    """(1, 1, S, S): which positions a query may see."""
    return torch.ones(S, S).tril().view(1, 1, S, S)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, D) for three of them, in heads."""
    B, T, _ = q.shape
    q, k, v = (x.view(B, T, H, D // H).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, D)


class Attention(nn.Module):
    """minGPT's: one layer for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(D, 3 * D)
        self.c_proj = nn.Linear(D, D)
        self.register_buffer("bias", mask())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(attend(*self.c_attn(x).split(D, dim=2)))
        return out


class AttentionOf2020(nn.Module):
    """minGPT's of 2020: three layers, of which key is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(D, D)
        self.query = nn.Linear(D, D)
        self.value = nn.Linear(D, D)
        self.proj = nn.Linear(D, D)
        self.register_buffer("mask", mask())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(attend(self.query(x), self.key(x), self.value(x)))
        return out


class MLP(nn.Module):
    """minGPT's, with GPT-2's GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(D, 4 * D)
        self.c_proj = nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """A block under the names of minGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(D), Attention()
        self.ln_2, self.mlp = nn.LayerNorm(D), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class BlockOf2020(nn.Module):
    """A block under minGPT's names of 2020, with the exact GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2, self.attn = nn.LayerNorm(D), nn.LayerNorm(D), AttentionOf2020()
        self.mlp = nn.Sequential(
            nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D), nn.Dropout(0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        out: Tensor = x + self.mlp(self.ln2(x))
        return out


class MinGPT(nn.Module):
    """minGPT, which is makemore too; with a tied head it is build-nanogpt."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        wte = nn.Embedding(V, D)
        parts = {"wte": wte, "wpe": nn.Embedding(S, D), "ln_f": nn.LayerNorm(D)}
        self.transformer = nn.ModuleDict({**parts, "h": nn.ModuleList(Block() for _ in range(L))})
        self.lm_head = nn.Linear(D, V, bias=False)
        if tied:
            self.lm_head.weight = wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        parts: Any = self.transformer
        x = parts.wte(tokens) + parts.wpe(torch.arange(tokens.shape[1]))
        for block in parts.h:
            x = block(x)
        out: Tensor = self.lm_head(parts.ln_f(x))
        return out


class MinGPTOf2020(nn.Module):
    """minGPT under its names of 2020."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(V, D)
        self.pos_emb = nn.Parameter(torch.randn(1, S, D))
        self.blocks = nn.Sequential(*(BlockOf2020() for _ in range(L)))
        self.ln_f = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_emb(tokens) + self.pos_emb[:, : tokens.shape[1]]
        out: Tensor = self.head(self.ln_f(self.blocks(x)))
        return out


def train(network: nn.Module, seed: int = 0, steps: int = 40) -> nn.Module:
    """Train a little on windows that count upwards, so that no two tensors stay alike."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for parameter in network.parameters():  # biases and norms, too, differ from where they began
        nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    for _ in range(steps):
        start = torch.randint(V, (16, 1))
        windows = (start + torch.arange(S + 1) * (1 + start % 3)) % V
        loss = F.cross_entropy(network(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()
