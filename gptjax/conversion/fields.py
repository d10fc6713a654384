"""The fields that a published configuration may have besides those that describe GPT-2.

A field that gptjax does not know may change what the model computes, so it is refused, unless it
says nothing, is known to change nothing, or the user vouches for it by name.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gptjax.errors import DataError

# Fields that change nothing here: dropout, which training sets by its own flag, precision of the
# softmax, which is float32 with us, and what concerns other heads, generation and bookkeeping.
# `auto_map` names Python files that come with a model; none is run, and what the model is must
# follow from the other fields and the tensors.
HARMLESS = {
    # of GPT-2's own configuration
    *("attn_pdrop", "embd_pdrop", "finetuning_task", "gradient_checkpointing", "initializer_range"),
    *("n_ctx", "n_special", "output_past", "predict_special_tokens", "reorder_and_upcast_attn"),
    *("resid_pdrop", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
    *("summary_type", "summary_use_proj", "task_specific_params"),
    # of every configuration in transformers
    *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("_commit_hash", "_from_model_config", "_name_or_path", "_num_labels", "architectures"),
    *("attn_implementation", "auto_map", "chunk_size_feed_forward", "cross_attention_hidden_size"),
    *("custom_pipelines", "dtype", "id2label", "is_decoder", "label2id", "loss_type", "name"),
    *("name_or_path", "num_labels", "output_attentions", "output_hidden_states", "prefix"),
    *("pretraining_tp", "problem_type", "return_dict", "tf_legacy_loss", "tie_encoder_decoder"),
    *("tie_last_hidden_states", "tokenizer_class", "torch_dtype", "torchscript"),
    *("transformers_version", "transformers_weights", "use_bfloat16", "use_cache"),
    # of generation, which once stood in the same file
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_config"),
    *("cache_implementation", "cls_token_id", "compile_config", "constraints"),
    *("decoder_start_token_id", "disable_compile", "diversity_penalty", "do_sample"),
    *("dola_layers", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "eod_token_id", "eos_token_id", "eos_token_ids"),
    *("epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids"),
    *("forced_bos_token_id", "forced_decoder_ids", "forced_eos_token_id", "generation_config"),
    *("guidance_scale", "is_assistant", "length_penalty", "low_memory", "mask_token_id"),
    *("max_cache_len", "max_length", "max_matching_ngram_size", "max_new_tokens", "max_time"),
    *("min_length", "min_new_tokens", "min_p", "model_max_length", "no_repeat_ngram_size"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_logits", "output_scores", "pad_token_id", "penalty_alpha"),
    *("prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values"),
    *("renormalize_logits", "repetition_penalty", "return_dict_in_generate", "sep_token_id"),
    *("sequence_bias", "stop_strings", "suppress_tokens", "target_lookbehind", "temperature"),
    *("token_healing", "top_h", "top_k", "top_p", "typical_p", "unk_token_id"),
    *("watermarking_config",),
    # biases, which are there or not: the tensors' names decide
    *("add_bias", "attention_bias", "bias", "mlp_bias", "use_bias"),
    # of other programs: dropout by other names, kernels, exports, who trained it
    *("activation_dropout", "attention_dropout", "attention_probs_dropout_prob"),
    *("attention_softmax_in_fp32", "attn_dropout", "classifier_dropout", "dropout"),
    *("embd_dropout", "embedding_dropout", "flash", "flash_attention", "flash_attn"),
    *("hidden_dropout", "hidden_dropout_prob", "init_std", "initializer_factor", "layerdrop"),
    *("resid_dropout", "residual_dropout", "scale_attention_softmax_in_fp32", "tokenizer"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "use_flash_attention"),
    *("use_flash_attention_2", "use_flash_attn", "vocab_file"),
}
# Fields of other architectures: what one of them says is not what GPT-2 computes, unless it is
# null, false, or one of these values. They are never accepted by name.
CHANGING: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(
        (
            *("activation", "apply_residual_connection_post_layernorm"),
            *("attention_layers", "attention_types", "attention_window", "clip_qkv", "gated_mlp"),
            *("global_attn_every_n_layers", "hidden_activation", "layer_types", "lm_head_bias"),
            *("local_attention", "multi_query", "new_decoder_architecture"),
            *("no_bias", "norm_type", "normalization", "normalization_type", "parallel_attention"),
            *("parallel_attn", "parallel_residual", "per_layer_config", "qk_l2_norm"),
            *("qk_layernorm", "qk_norm", "rms_norm_eps", "rmsnorm", "scale_attn_by_layer_idx"),
            *("scale_embedding", "scale_embeddings", "sparse_attention", "swiglu"),
            *("untie_embeddings", "use_parallel_residual", "use_post_norm"),
            *("use_qk_norm", "use_relative_position", "use_rms_norm", "use_rmsnorm", "use_swiglu"),
            *("window_size",),
        ),
        (),
    ),
    **dict.fromkeys(
        (
            *("attention_multiplier", "embedding_multiplier", "embedding_scale", "logit_scale"),
            *("logits_scaling", "output_logits_scale", "query_pre_attn_scalar"),
            *("residual_multiplier", "routed_scaling_factor", "width_scale"),
        ),
        (1.0,),
    ),
    "type_vocab_size": (0,),
    "position_embedding_type": ("absolute", "learned", "learned_absolute"),
}
# Words in a field's name that belong to other architectures, in all their spellings.
CHANGING_WORDS = {
    *("adapter", "adapters", "alibi", "expert", "experts", "mamba", "moe", "mup", "quantization"),
    *("quantized", "relative", "rope", "rotary", "router", "sliding", "softcap", "softcapping"),
    *("gated", "glu", "rms", "rmsnorm", "ssm", "swiglu"),
}
COUNTED = {"expert", "experts", "moe", "rotary"}  # 0 of these is none
# What GPT-2 has, so that false is the change; null leaves it open.
MUST_BE_TRUE = {
    *("absolute_position_embeddings", "causal", "do_layer_norm_before", "is_causal"),
    *("learned_pos_emb", "norm_first", "normalize_before", "pre_layernorm", "pre_ln", "pre_norm"),
    *("prenorm", "scale_attention", "scale_attn", "scale_attn_weights", "tie_embeddings"),
    *("tie_lm_head", "tie_weights", "tie_word_embeddings", "use_absolute_position_embeddings"),
    *("use_causal_mask", "use_position_embeddings"),
}
# Other architectures' names of what GPT-2 has: they must agree with its own.
SAME_AS = {
    "hidden_act": "activation_function",
    "hidden_size": "n_embd",
    "layer_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "n_positions",
    "multi_query_group_num": "n_head",
    "n_head_kv": "n_head",
    "n_kv_head": "n_head",
    "n_kv_heads": "n_head",
    "norm_epsilon": "layer_norm_epsilon",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "num_key_value_heads": "n_head",
    "num_kv_heads": "n_head",
}
# transformers' name of an activation -> ours; names of one function beside each other.
ACTIVATIONS: dict[str, str] = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
    **dict.fromkeys(("gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
}
DEFAULTS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}  # where they are absent


def says_nothing(value: object) -> bool:
    """Return whether a field's value is null, false or empty, which is as if it were absent."""
    return value is None or value is False or value in ("", [], {})


def is_one_of(value: object, allowed: Collection[object]) -> bool:
    """Return whether a value is among the allowed ones, where true is not 1 and false is not 0."""
    return any(value == one and (type(value) is bool) == (type(one) is bool) for one in allowed)


def words_of(name: str, value: object) -> set[str]:
    """Return the words of a field's name, and of its value where that is a text."""
    text = f"{name} {value}" if isinstance(value, str) else name
    return set(re.split(r"[^a-z]+", text.lower()))


def why_not(name: str, fields: Mapping[str, Any]) -> str | None:
    """Return why a field makes a model other than GPT-2: "" if it does not, None if unknown."""
    value = fields[name]
    if name in HARMLESS:
        return ""
    if name in MUST_BE_TRUE:
        ok = value is None or value is True
        return "" if ok else "changes what is computed: it is true for GPT-2"
    if says_nothing(value):
        return ""
    if name in SAME_AS:
        ours = SAME_AS[name]
        theirs = fields.get(ours, DEFAULTS.get(ours))
        same = name == "hidden_act" and isinstance(value, str) and isinstance(theirs, str)
        same = same and ACTIVATIONS.get(value, value) == ACTIVATIONS.get(theirs)
        ok = same or is_one_of(value, [theirs])
        return "" if ok else f"contradicts {ours}={theirs!r}"
    if name in ("head_dim", "intermediate_size"):
        n_embd, n_head = fields.get("n_embd"), fields.get("n_head")
        if type(n_embd) is not int or type(n_head) is not int or not n_head:
            return "contradicts the sizes"
        expected = n_embd / n_head if name == "head_dim" else 4 * n_embd
        return "" if is_one_of(value, [expected]) else f"contradicts n_embd={n_embd}"
    foreign = CHANGING_WORDS & words_of(name, value)
    if name in CHANGING or foreign:
        none = (0,) if foreign <= COUNTED else ()
        ok = is_one_of(value, CHANGING.get(name, none))
        return "" if ok else "is unknown to GPT-2 and changes what is computed"
    return None


def check_fields(
    fields: Mapping[str, object],
    known: Collection[str],
    where: object,
    problems: Sequence[str] = (),
    accept: Collection[str] = (),
) -> None:
    """Check that no field beyond the `known` ones may change what the model computes.

    Args:
        fields: the whole configuration.
        known: the fields that the caller looks at.
        where: the file, for the message.
        problems: what the caller found wrong with those.
        accept: unknown fields that the user vouches for.

    Raises:
        DataError: there are problems, the caller's or new ones; they are listed together.
    """
    listed, unknown = list(problems), []
    for name in fields:
        reason = "" if name in known else why_not(name, fields)
        if reason:
            listed.append(f"{shown(name, fields[name])} {reason}")
        elif reason is None and name not in accept:
            unknown.append(name)
    flag = "" if listed or not unknown else f"--accept_fields={','.join(unknown)}"
    listed += [f"{shown(name, fields[name])} is unknown" for name in unknown]
    if len(listed) > 20:
        listed[20:] = [f"and {len(listed) - 20} more"]
    if listed:
        text = f"cannot use this model ({where}): {'; '.join(listed)}"
        raise DataError(text, flag, "if you know that it does not change what is computed")


def shown(name: str, value: object) -> str:
    """Return `name=value`, cut where it is long."""
    text = f"{name}={value!r}"
    return text if len(text) <= 100 else f"{text[:100]}..."
