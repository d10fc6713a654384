"""Section 2: MFU, computed from rates that were measured on H100s (docs/performance.md)."""

from typing import NamedTuple

from gptjax.config import GPTConfig
from gptjax.model import count_params
from gptjax.training.metrics import PEAK_FLOPS, flops_per_token
from scale.measuring import GPT2, Measured


class Run(NamedTuple):
    """A training step that was measured on H100s, at context 1024 in bfloat16."""

    what: str
    cfg: GPTConfig
    rows: int  # for each card
    cards: int
    rate: int  # tokens/s, of all cards together


RUNS = [
    Run("GPT-2 124M", GPT2["gpt2"], 64, 1, 521_800),
    Run("GPT-2 124M", GPT2["gpt2"], 64, 4, 1_973_800),
    Run("GPT-2 XL", GPT2["gpt2_xl"], 8, 1, 46_249),
    Run("GPT-2 XL", GPT2["gpt2_xl"], 8, 4, 161_133),
]
FORMATS = {  # GPT-2 124M, 100 steps: tokens/s, validation loss
    "bfloat16": ("478,800", "5.840"),
    "float16, `--dtype=float16`": ("467,300", "5.838"),
    "float16 without scaling, `--loss_scale=1`": ("510,700", "7.868"),
    "float32": ("158,300", "5.861"),
}


def mfu(run: Run) -> float:
    """The share of the cards' peak that the model's FLOPs are."""
    return run.rate * flops_per_token(run.cfg) / (run.cards * PEAK_FLOPS["H100"])


def generating() -> list[tuple[str, float, float, tuple[int, int]]]:
    """Name, FLOPs per byte, GFLOP/s and place of the name: one text by GPT-2 124M on an H100.

    Measured by `python -m benchmarks.decode` on two cards (benchmarks/README.md): 1,024 tokens read
    in 2.0 ms, of which only the last needs the head, and 5,080 tokens/s. Bytes are the weights'.
    """
    cfg, tokens, seconds, rate = GPT2["gpt2"], 1024, 2.0e-3, 5_080
    blocks = count_params(cfg, without=("wpe", "wte"))
    weights = count_params(cfg, without=("wpe",))
    prefill = tokens * (2 * blocks + 4 * cfg.n_layer * cfg.n_embd * tokens)
    return [
        ("prefill,\n1,024 tokens", prefill / (2 * weights), prefill / seconds / 1e9, (9, -9)),
        ("decoding, token by token", 1.0, 2 * weights * rate / 1e9, (8, -9)),
    ]


def table(_: Measured) -> str:
    """Tokens a second, and what they mean."""
    lines = [
        "| | sequences a card | H100s | tokens/s | FLOPs a token | TFLOP/s a card | MFU |",
        "|---" * 7 + "|",
    ]
    for run in RUNS:
        flops = flops_per_token(run.cfg)
        lines.append(
            f"| {run.what} | {run.rows} | {run.cards} | {run.rate:,} | {flops / 1e9:.2f}e9 "
            f"| {run.rate * flops / run.cards / 1e12:.0f} | {mfu(run):.1%} |"
        )
    return "\n".join(lines)


def formats_table(_: Measured) -> str:
    """The same model in four formats, as train.py trains it."""
    lines = ["| | tokens/s | validation loss after 100 steps |", "|---|---|---|"]
    lines += [f"| {name} | {rate} | {loss} |" for name, (rate, loss) in FORMATS.items()]
    return "\n".join(lines)
