"""Section 6: what the published scaling laws ask of GPT-2's sizes. All of it is computed.

N parameters.
"""

import math
from typing import NamedTuple

from gptjax import model
from gptjax.training.metrics import PEAK_FLOPS, flops_per_token
from scale.measuring import GPT2, Measured

MFU = 0.4
TOKENS_A_PARAMETER = 20
DAY = 24 * 3600


class Fit(NamedTuple):
    """L(N, tokens) = E + A / N^alpha + B / tokens^beta, in nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: float, tokens: float) -> float:
        return self.E + self.A / n**self.alpha + self.B / tokens**self.beta

    def best_size(self, flops: float) -> float:
        """The N of the least loss among all with 6 N tokens = flops.

        There alpha A / N^alpha = beta B / tokens^beta: neither is worth more of the compute.
        """
        ratio = self.alpha * self.A / (self.beta * self.B)
        total = self.alpha + self.beta
        return float(ratio ** (1 / total) * (flops / 6) ** (self.beta / total))

    def best_tokens(self, n: float) -> float:
        """The tokens for which a model of this size is the best use of its compute."""
        return float(
            (self.beta * self.B / (self.alpha * self.A) * n**self.alpha) ** (1 / self.beta)
        )


# Hoffmann et al. 2022, equation 10; Besiroglu et al. 2024, from the runs in the former's figure 4
HOFFMANN = Fit(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
BESIROGLU = Fit(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
CHINCHILLA_FLOPS = 5.76e23  # of Gopher and Chinchilla


def card_seconds(flops: float, cards: int = 1) -> float:
    """How long H100s take at the MFU that the text assumes."""
    return flops / (cards * MFU * PEAK_FLOPS["H100"])


def demand_table(_: Measured) -> str:
    """What 20 tokens a parameter cost, and what the two fits ask for."""
    lines = [
        "| | N | tokens = 20 N | FLOPs 6 N tokens | H100 hours | ... with attention | loss "
        "| best tokens a parameter, Hoffmann's fit | Besiroglu's fit |",
        "|---" * 9 + "|",
    ]
    for name, cfg in GPT2.items():
        n: float = model.count_params(cfg)
        tokens: float = TOKENS_A_PARAMETER * n
        flops = 6 * n * tokens
        exact = flops_per_token(cfg) * tokens
        best = [fit.best_tokens(n) / n for fit in (HOFFMANN, BESIROGLU)]
        lines.append(
            f"| `{name}` | {n / 1e6:,.0f} M | {tokens / 1e9:.1f} B | {flops:.1e} "
            f"| {card_seconds(flops) / 3600:,.1f} | {card_seconds(exact) / 3600:,.1f} "
            f"| {BESIROGLU.loss(n, tokens):.2f} | {best[0]:.0f} | {best[1]:.0f} |"
        )
    there = [at_budget(fit, CHINCHILLA_FLOPS) for fit in (HOFFMANN, BESIROGLU)]
    (n, tokens), (n_2, tokens_2) = there
    lines += [
        "",
        f"The losses are those of Besiroglu's fit. For the compute of Chinchilla itself "
        f"({CHINCHILLA_FLOPS:.2e} FLOPs) Hoffmann's fit asks for {n / 1e9:.0f} billion parameters "
        f"and {tokens / n:.0f} tokens for each, Besiroglu's for {n_2 / 1e9:.0f} billion and "
        f"{tokens_2 / n_2:.0f}; Chinchilla was trained with 70 billion and 20.",
    ]
    return "\n".join(lines)


def at_budget(fit: Fit | None, flops: float) -> tuple[float, float]:
    """Parameters and tokens for this much compute; without a fit, by 20 tokens a parameter."""
    n = fit.best_size(flops) if fit else math.sqrt(flops / 6 / TOKENS_A_PARAMETER)
    return n, flops / 6 / n


def day_flops() -> float:
    """What 8 H100s compute in a day."""
    return 8 * DAY * MFU * PEAK_FLOPS["H100"]


def budget_table(_: Measured) -> str:
    """A day on 8 H100s: by three rules, then spent on each of GPT-2's sizes."""
    flops = day_flops()
    lines = [
        f"8 cards x {DAY:,} s x {MFU:.0%} x {PEAK_FLOPS['H100'] / 1e12:.0f}e12 FLOP/s = "
        f"**{flops:.3g} FLOPs**. With 6 N x tokens equal to that:",
        "",
        "| | N | tokens | tokens a parameter | loss by Besiroglu's fit |",
        "|---|---|---|---|---|",
    ]
    rules = {
        "20 tokens a parameter": None,
        "best by Besiroglu's fit": BESIROGLU,
        "best by Hoffmann's fit": HOFFMANN,
    }
    rows = {name: at_budget(fit, flops) for name, fit in rules.items()}
    sizes = {name: model.count_params(cfg) for name, cfg in GPT2.items()}
    rows |= {f"all on `{name}`": (n, flops / 6 / n) for name, n in sizes.items()}
    for name, (n, tokens) in rows.items():
        lines.append(
            f"| {name} | {n / 1e6:,.0f} M | {tokens / 1e9:,.1f} B | {tokens / n:,.0f} "
            f"| {BESIROGLU.loss(n, tokens):.3f} |"
        )
    return "\n".join(lines)
