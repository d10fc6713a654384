"""The exercises of lesson 4."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from exercises import Exercise

from gptjax import attention, blocks, model
from gptjax.config import GPTConfig
from gptjax.conversion.tensors import is_linear, slots

GPT2 = GPTConfig()  # 124M


def is_tensor_count(answer: Any) -> bool:
    """Whether it is the number of tensors in GPT-2 124M's file, without masks."""
    return float(answer) == len(list(slots(GPT2)))


def is_transposed(answer: Any) -> bool:
    """Whether these are the kernels of a block's linear layers; with or without `h.0.`."""
    names = [slot.name for slot in slots(GPT2) if slot.layer == 0]
    kernels = {name.removeprefix("h.0.") for name in names if is_linear(name)}
    given = [answer] if isinstance(answer, str) else answer
    return {str(name).strip().removeprefix("h.0.") for name in given} == kernels


def is_split(answer: Any) -> bool:
    """Whether attention over these q, k and v is what gptjax's block computes."""
    B, T, H, K = 2, 5, 3, 4
    D = H * K
    cfg = GPTConfig(n_head=H, n_embd=D, block_size=8, dtype="float32", attention="xla")
    rng = np.random.default_rng(0)
    x_BTD, kernel, bias = (
        rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, 3 * D), (3 * D,))
    )
    c_proj = {"kernel": jnp.eye(D), "bias": jnp.zeros(D)}
    attn = {"c_attn": {"kernel": kernel, "bias": bias}, "c_proj": c_proj}
    block = blocks.CausalSelfAttention(cfg)
    expected_BTD, _ = block.apply({"params": attn}, x_BTD)
    parts = [np.asarray(part) for part in answer(x_BTD.reshape(B * T, D) @ kernel + bias, H)]
    if [part.shape for part in parts] != [(B * T, H, K)] * 3:
        return False
    q, k, v = (jnp.asarray(part).reshape(B, T, H, K) for part in parts)
    y_BTHK = attention.attend(q, k, v, jnp.arange(T)[None])
    return bool(np.abs(y_BTHK.reshape(B, T, D) - expected_BTD).max() <= 1e-5)


def split_qkv(qkv_NE: np.ndarray, n_head: int) -> Any:
    """Thirds, then heads."""
    return tuple(part.reshape(len(qkv_NE), n_head, -1) for part in np.split(qkv_NE, 3, axis=1))


def split_heads_first(qkv_NE: np.ndarray, n_head: int) -> Any:
    """Heads, then thirds, as other models have it."""
    q, k, v = np.moveaxis(qkv_NE.reshape(len(qkv_NE), n_head, 3, -1), 2, 0)
    return q, k, v


def mystery(params: model.Params) -> model.Params:
    """The parameters with the mistake of exercise 4.4."""
    return {**params, "h": [params["h"][0]] * len(params["h"])}


EXERCISES = {
    "4.1": Exercise(
        is_tensor_count,
        "Count the tensors of one block and those outside the blocks; the file stacks nothing.",
        148,
        160,
    ),
    "4.2": Exercise(
        is_transposed,
        "Only kernels of linear layers have two ways round, and a block has two in attn and two "
        "in mlp.",
        ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"],
        ["attn.c_attn.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"],
    ),
    "4.3": Exercise(
        is_split,
        "The columns are q's D, then k's, then v's: cut into thirds first, and each third into "
        "heads of shape (N, H, K).",
        split_qkv,
        split_heads_first,
    ),
    "4.4": Exercise(
        lambda answer: str(answer).strip().lower() == "d",
        "The whole of block 0 holds, so nothing that every block has can be wrong in all of them.",
        "d",
        "b",
    ),
}
