"""The settings of the model, as fields of a frozen dataclass that refuses values out of range."""

import dataclasses
from typing import Literal

from gptjax.settings import architecture, experiment, require, require_range, run

DType = Literal["auto", "float32", "bfloat16", "float16"]
Activation = Literal["gelu_tanh", "gelu"]
Attention = Literal["auto", "xla", "cudnn", "flash"]
AUTO_DTYPE = (
    "auto is bfloat16 on a GPU or TPU, float16 on an NVIDIA GPU below compute capability 8.0 (T4, "
    "V100), and float32 on a CPU. On a CPU bfloat16 is the type of the operands of matrix products "
    "and of the weights and the cache that a sampler keeps; all else is float32."
)
AUTO_TO_TRAIN = (
    " In training auto is bfloat16 on a CPU that computes it (AVX512_BF16 or AMX), too, unless "
    "kernels=off."
)
WEIGHTS = (
    "Type of the weights of a decoder: int8 takes half of the memory of bfloat16, a quarter of "
    "float32, with a scale for each output of a matrix. auto is the type of the computation."
)
CACHE = (
    "Type of the keys and values that a decoder keeps: int8 takes half of the memory of bfloat16, "
    "with a scale for each token and head. auto is the type of the computation."
)
KERNELS = (
    "Whether to use the hand-written kernels of gptjax/kernels where they were measured to be "
    "faster (on an H100 or H200 for GPT-2 124M from 65,536 tokens a pass, for attention with "
    "dropout, and in decoders in bfloat16; on a CPU with AVX512_BF16 or AMX), or plain JAX. off "
    "keeps a decoder from cuDNN's attention, too; --attention says what whole sequences take."
)


def nearest_divisor(number: int, near: int) -> int:
    """Return the divisor of a number that is nearest to another one."""
    return min((n for n in range(1, 2 * near) if number % n == 0), key=lambda n: abs(n - near))


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The model. The defaults are GPT-2 124M."""

    n_layer: int = architecture(12, "Number of transformer blocks (layers).", section="Model")
    n_head: int = architecture(12, "Number of attention heads in each block; must divide n_embd.")
    n_embd: int = architecture(768, "Width of the residual stream.")
    block_size: int = architecture(1024, "Context length in tokens.")
    vocab_size: int = architecture(
        50257, "Size of the vocabulary. train.py takes the tokenizer's and refuses any other."
    )
    vocab_multiple: int = architecture(
        128, "Pad the rows of the embedding to a multiple of this, for speed; 1 adds none."
    )
    bias: bool = architecture(True, "Whether linear layers and LayerNorms have biases.")
    tie_head: bool = architecture(True, "Use the token embedding as head too, as GPT-2 does.")
    activation: Activation = architecture(
        "gelu_tanh",
        "Activation function of the MLP: gelu_tanh is GPT-2's, gelu the exact form, nanoGPT's.",
    )
    dropout: float = experiment(0.0, "Probability of dropping an activation in training.")
    attention_dropout: bool = experiment(
        True,
        "Whether dropout drops attention weights too, or only what is added to the residual "
        "stream: then attention may be cudnn.",
    )
    dtype: DType = experiment(
        "auto",
        f"Data type of the computation; parameters are float32 whatever it is. {AUTO_DTYPE}"
        f"{AUTO_TO_TRAIN}",
    )
    reduce_dtype: Literal["float32", "bfloat16"] = experiment(
        "float32", "Data type in which several devices add up their gradients."
    )
    attention: Attention = run(
        "auto",
        "Implementation of attention. auto is cudnn on an NVIDIA GPU of compute capability 8.0 or "
        "more in half precision without dropout, flash on an H100 or H200 in bfloat16 with it, if "
        "heads are of 64 and block_size is a multiple of 64, and xla elsewhere.",
    )
    kernels: Literal["auto", "off"] = run("auto", KERNELS)
    cache: Literal["auto", "int8"] = run("auto", CACHE)
    unroll: int = run(
        0, "Layers to unroll in the layer scan; 0 = all, which runs fastest; 1 compiles fastest."
    )
    remat: bool = run(
        False,
        "Gradient checkpointing: recompute each block in the backward pass, which takes less "
        "memory and about a third more computation. On a CPU it saves memory only with unroll=1.",
    )

    def __post_init__(self) -> None:
        require_range(self, "n_layer n_head n_embd block_size vocab_size vocab_multiple", 1)
        require_range(self, "dropout", 0, 1, below=True)
        ok, rule = 0 <= self.unroll <= self.n_layer, f"must be 0 to n_layer={self.n_layer}"
        require(ok, "unroll", self.unroll, rule)
        if self.n_embd % self.n_head:
            nearest = nearest_divisor(self.n_embd, self.n_head)
            rule = f"must divide n_embd={self.n_embd}; take --n_head={nearest}, or another --n_embd"
            require(False, "n_head", self.n_head, rule)
        require(
            self.attention != "cudnn" or self.weights_dropout == 0,
            "attention",
            self.attention,
            f"does not support --dropout={self.dropout} of attention weights; take "
            "--attention=auto, --attention_dropout=False or --dropout=0",
        )

    @property
    def weights_dropout(self) -> float:
        """Probability of dropping an attention weight in training."""
        return self.dropout if self.attention_dropout else 0.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: vocab_size rounded up to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
