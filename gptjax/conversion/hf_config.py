"""Hugging Face's config.json: the model that it describes, read and written."""

from collections.abc import Collection, Mapping
from typing import Any

from gptjax.config import GPTConfig
from gptjax.conversion.fields import ACTIVATIONS, check_fields, is_one_of, says_nothing, shown
from gptjax.conversion.tensors import HEAD, LIMITS, make_config, size_problems
from gptjax.tokens import NO_IDS

# What a field may say for the model to be the one that gptjax computes.
MUST_BE: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": tuple(ACTIVATIONS),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({},),
}
CHECKED = {*MUST_BE, "n_inner"}  # what `other_computation` looks at


def parse_config(fields: dict[str, Any], where: str, accept: Collection[str] = ()) -> GPTConfig:
    """Return the model that a config.json describes.

    Args:
        fields: what the file says.
        where: its path, for the message.
        accept: fields that gptjax does not know and the user vouches for.

    Raises:
        DataError: it describes another architecture, sizes beyond belief, or has fields that
            gptjax does not know, all listed at once.
    """
    if fields.get("model_type", "gpt2") != "gpt2":  # all its fields are another model's
        fields = {"model_type": fields["model_type"]}
        check_fields(fields, fields, where, [must_be("model_type", fields["model_type"])])
    sizes: dict[str, Any] = {name: fields.get(name) for name in LIMITS}
    sizes["block_size"] = fields.get("n_positions", fields.get("n_ctx"))
    problems = size_problems(sizes)
    ours = fields.get("gptjax") or {}
    problems += other_computation(fields)
    if (
        not isinstance(ours, dict)
        or not set(ours) <= {"bias", "vocab_multiple"}
        or type(ours.get("bias", True)) is not bool
    ):
        problems.append(f"gptjax={ours!r}, expected bias and vocab_multiple")
        ours = {}
    multiple = ours.get("vocab_multiple", 128)
    if type(multiple) is not int or not 1 <= multiple <= 2**16:
        problems.append(f"gptjax.vocab_multiple={multiple!r}, expected 1 to {2**16:,}")
    tied = fields.get("tie_word_embeddings")
    if tied is not None and type(tied) is not bool:
        problems.append(f"tie_word_embeddings={tied!r}, expected true or false")
    known = {"n_positions", "gptjax", "tie_word_embeddings", *CHECKED, *LIMITS}
    check_fields(fields, known, where, problems, accept)
    return make_config(
        sizes,
        where,
        vocab_multiple=multiple,
        bias=ours.get("bias", True),
        tie_head=tied is not False,
        activation=ACTIVATIONS[fields.get("activation_function", "gelu_new")],
    )


def other_computation(fields: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with those of the CHECKED fields that are there."""
    problems = [
        must_be(name, fields[name])
        for name, allowed in MUST_BE.items()
        if name in fields
        and not is_one_of(fields[name], allowed)
        and not (says_nothing(fields[name]) and any(map(says_nothing, allowed)))
    ]
    inner, width = fields.get("n_inner"), fields.get("n_embd")
    if inner is not None and type(width) is int and inner != 4 * width:
        problems.append(f"n_inner={inner!r}, gptjax computes 4 n_embd")
    return problems


def stored_name(name: str) -> str:
    """Return the name under which transformers stores a published tensor."""
    return name if name == HEAD else f"transformer.{name}"


def must_be(name: str, value: object) -> str:
    """Return the message for a field whose value is not GPT-2's."""
    if name == "quantization_config":
        return f"{shown(name, value)}: take the model from before it was quantised"
    return f"{shown(name, value)}, gptjax computes {' or '.join(map(repr, MUST_BE[name]))}"


def format_config(cfg: GPTConfig, special: Mapping[str, object] | None) -> dict[str, object]:
    """Return config.json for transformers; its field `gptjax` has what the format cannot say."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "n_positions": cfg.block_size,
        "vocab_size": cfg.vocab_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[cfg.activation],
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": cfg.weights_dropout,
        "embd_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
        **(NO_IDS if special is None else special),  # as the tokenizer's model had them
        "tie_word_embeddings": cfg.tie_head,
        "dtype": "float32",
        "gptjax": {"bias": cfg.bias, "vocab_multiple": cfg.vocab_multiple},
    }
