"""Fields of a config.json: what changes nothing passes, what changes the model never does."""

from typing import Any

import pytest

from gptjax.conversion import hf_config, model_words
from gptjax.conversion.fields import CHANGING, HARMLESS, MUST_BE_TRUE, SAME_AS
from gptjax.conversion.sources import SourceConfig
from gptjax.errors import DataError
from gptjax.terminal import flags

from .helpers import tiny

CFG = tiny(vocab_size=100, vocab_multiple=128)
GPT2 = hf_config.format_config(CFG, None)

HARMLESS_ONES: dict[str, dict[str, object]] = {
    "what newer transformers write": {
        "_attn_implementation_autoset": True,
        "_commit_hash": "abc",
        "loss_type": "ForCausalLMLoss",
        "pretraining_tp": 1,
        "eos_token_ids": None,
    },
    "code that comes with the model": {
        "auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"},
        "architectures": ["GPT2LMHeadModel"],
    },
    "null": {"rope_scaling": None, "sliding_window": None, "num_experts": None, "nobody": None},
    "false": {"use_parallel_residual": False, "alibi": False, "nobody": False},
    "empty": {"adapters": {}, "nobody": [], "somebody": "", "quantization_config": {}},
    "unset where false is the rule": {
        "add_cross_attention": None,
        "is_encoder_decoder": None,
        "scale_attn_by_inverse_layer_idx": None,
        "pruned_heads": None,
    },
    "other names of the sizes": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "head_dim": 16,
        "intermediate_size": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": True,
        "use_bias": True,
        "num_experts": 0,
        "rotary_dim": 0,
        "type_vocab_size": 0,
    },
    "values that GPT-2 has": {
        "position_embedding_type": "absolute",
        "logit_scale": 1.0,
        "is_causal": True,
        "layer_norm_eps": 1e-5,
    },
    "of generation": {"min_p": 0.1, "generation_config": {"do_sample": True}, "max_new_tokens": 5},
    "of a 2019 model": {"n_ctx": 16, "n_special": 0, "finetuning_task": "x", "num_labels": 2},
    "of other programs": {"unsloth_version": "2025.1", "transformers.js_config": {"dtype": "q4"}},
}


@pytest.mark.parametrize("case", HARMLESS_ONES)
def test_harmless_fields_pass(case: str) -> None:
    cfg = hf_config.parse_config({**GPT2, **HARMLESS_ONES[case]}, "here")
    assert cfg.n_embd == 32


CHANGING_ONES = [
    *({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_theta": 1e4}, {"use_rope": True}),
    *({"sliding_window": 4}, {"sliding_window": 0}, {"rotary_pct": 0.25}, {"alibi": True}),
    *({"use_parallel_residual": True}, {"num_key_value_heads": 1}, {"num_key_value_heads": True}),
    *({"logit_scale": 0.5}, {"logit_scale": True}, {"lm_head_bias": True}, {"head_dim": 8}),
    *({"hidden_size": 64}, {"intermediate_size": 64}, {"n_head_kv": 1}, {"hidden_act": "silu"}),
    *({"is_causal": False}, {"is_causal": 0}, {"scale_attn": False}, {"causal": False}),
    *({"position_embedding_type": "rotary"}, {"mup_scale": 2.0}, {"num_local_experts": 8}),
    *({"attn_logit_softcapping": 30.0}, {"per_layer_config": {"0": {"n_head": 1}}}),
    *({"use_rms": True}, {"norm": "rmsnorm"}, {"position_embedding": "rotary"}, {"moe": 2}),
    *({"layer_norm_eps": 1e-6}, {"quantization": {"bits": 4}}, {"adapters": {"a": 1}}),
    # and of those that GPT-2 has itself
    *({"scale_attn_weights": 1}, {"scale_attn_weights": None}, {"tie_weights": False}),
    *({"add_cross_attention": 1}, {"layer_norm_epsilon": 1e-6}, {"n_inner": 64}),
    {"scale_attn_by_inverse_layer_idx": True},
]


@pytest.mark.parametrize("changes", CHANGING_ONES, ids=str)
def test_what_changes_the_computation_is_never_accepted(changes: dict[str, Any]) -> None:
    """Also not by its name, and no flag is proposed."""
    (name,) = changes
    for accept in ((), (name,)):
        with pytest.raises(DataError) as error:
            hf_config.parse_config({**GPT2, **changes}, "here", accept)
        assert name in str(error.value) and "accept" not in str(error.value)


@pytest.mark.parametrize("value", [0, 1, 0.0, True, "x", [0], {"a": None}], ids=repr)
def test_an_unknown_field_must_be_accepted_by_name(value: Any) -> None:
    fields = {**GPT2, "nobody": value, "somebody": 1, "silent": None}
    with pytest.raises(DataError) as error:
        hf_config.parse_config(fields, "here")
    assert "--accept_fields=nobody,somebody (" in str(error.value)
    with pytest.raises(DataError, match="somebody=1 is unknown"):
        hf_config.parse_config(fields, "here", ["nobody"])
    assert hf_config.parse_config(fields, "here", ["nobody", "somebody"]).n_layer == 2


def test_a_flag_that_would_not_help_is_not_proposed() -> None:
    with pytest.raises(DataError) as error:
        hf_config.parse_config({**GPT2, "nobody": 1, "alibi": True}, "here")
    assert "nobody=1 is unknown" in str(error.value) and "--accept" not in str(error.value)


def test_the_flag_is_a_list_of_names() -> None:
    argv = ["--accept_fields=a, b,c,"]
    config = flags.parse(argv, SourceConfig(), "test")
    assert config.accepted() == ["a", "b", "c"]


def test_no_field_is_on_two_lists() -> None:
    lists = [HARMLESS, set(CHANGING), MUST_BE_TRUE, set(SAME_AS)]
    assert len(set().union(*lists)) == sum(map(len, lists))
    assert not HARMLESS & set(hf_config.MUST_BE)


def test_long_values_are_cut() -> None:
    with pytest.raises(DataError) as error:
        hf_config.parse_config({**GPT2, **{f"x{i}": "y" * 9999 for i in range(50)}}, "here")
    assert "and 30 more" in str(error.value) and len(str(error.value)) < 4000


def test_of_another_model_its_name_is_enough() -> None:
    llama = {"model_type": "llama", "hidden_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    with pytest.raises(DataError) as error:
        hf_config.parse_config(llama, "here")
    assert str(error.value) == (
        "cannot use this model (here): model_type='llama', gptjax computes 'gpt2'"
    )


def test_nanogpts_model_args_follow_the_same_rules() -> None:
    """As its forks write them."""
    sizes = dict.fromkeys(("n_layer", "n_embd", "block_size", "vocab_size"), 2)
    found = model_words.Found(sizes, bias=True, same_head=True, of_2020=False)
    fields: dict[str, object] = {"n_head": 2, "flash": True, "n_kv_head": 2, "x": None}
    model_words.read_words(fields, found, "here")
    for change in ({"use_rope": True}, {"n_kv_head": 1}, {"tie_lm_head": False}):
        with pytest.raises(DataError):
            model_words.read_words(fields | change, found, "here", list(change))
