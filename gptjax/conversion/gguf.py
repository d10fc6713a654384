"""GGUF, llama.cpp's format, written with the gguf library (an extra)."""

from pathlib import Path

import numpy as np

from gptjax.config import GPTConfig
from gptjax.conversion.tensors import is_linear, named_tensors
from gptjax.errors import UsageError
from gptjax.gpt2_files import gpt2_merges, gpt2_spelling
from gptjax.model import Params
from gptjax.settings import require
from gptjax.tokenizer import GPT2Tokenizer, Tokenizer

NAMES = {  # ours, behind h.#. where there is one -> GGUF's for the architecture gpt2
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor: `blk.0.attn_qkv.weight` for `h.0.attn.c_attn.weight`."""
    stem, _, leaf = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{NAMES[stem]}.{leaf}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.{leaf}"


def write_file(path: Path, cfg: GPTConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Write the model in float32, and its vocabulary.

    The head is tied, so there is no output.weight; llama.cpp reads such a GPT-2 since March 2025.

    Raises:
        UsageError: the gguf library is missing, or the tokenizer or activation is not GPT-2's.
    """
    ok = cfg.activation == "gelu_tanh"
    require(
        ok, "to", "gguf", "llama.cpp computes GELU by tanh, but this model by erf; take --to=hf"
    )
    if not isinstance(tokenizer, GPT2Tokenizer):
        raise UsageError(
            f"--to=gguf: this format has no tokenizer like this model's ({tokenizer.kind})"
        )
    try:
        import gguf
    except ImportError as error:
        raise UsageError("--to=gguf: needs the gguf library; pip install 'gptjax[gguf]'") from error
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_name("gptjax")
    writer.add_block_count(cfg.n_layer)
    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_feed_forward_length(4 * cfg.n_embd)
    writer.add_head_count(cfg.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = gpt2_spelling(tokenizer)
    writer.add_token_list(words)
    kinds = [gguf.TokenType.NORMAL] * (len(words) - 1) + [gguf.TokenType.CONTROL]
    writer.add_token_types(kinds)
    writer.add_token_merges(gpt2_merges(tokenizer))
    writer.add_bos_token_id(tokenizer.start_id)
    writer.add_eos_token_id(tokenizer.start_id)
    for name, tensor in named_tensors(cfg, params):
        tensor = np.ascontiguousarray(tensor.T) if is_linear(name) else tensor
        writer.add_tensor(gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
