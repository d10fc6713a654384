"""What a resumed run may change, and what it may not."""

import re
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.checkpoints.record import (
    COMPARED,
    FIXED,
    GUARDED,
    Record,
    check_record,
    make_record,
    token_fingerprint,
)
from gptjax.config import TrainConfig
from gptjax.errors import UsageError
from gptjax.settings import fields_of, flatten, names, once
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

from .helpers import tiny

TOKENS = np.arange(3 * 2**20, dtype=np.uint16)


def record(
    tokens: np.ndarray = TOKENS, tokenizer: Tokenizer | None = None, **changes: Any
) -> Record:
    model = {name: changes.pop(name) for name in list(changes) if hasattr(tiny(), name)}
    config = TrainConfig(model=tiny(**model), **changes)
    return make_record(config, [tokens], tokenizer or ByteTokenizer())


def check(new: Record, allow: tuple[str, ...] = ()) -> list[str]:
    said: list[str] = []
    check_record(record(), new, allow, said.append)
    return said


def test_nothing_changed() -> None:
    assert check(record()) == []
    assert check(record(out_dir="elsewhere", stop_step=7, debug=True, dataset="x")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n_layer", 3), ("n_head", 4), ("n_embd", 64), ("block_size", 8), ("bias", False)),
        *(("vocab_size", 60), ("vocab_multiple", 4), ("optimizer", "muon"), ("activation", "gelu")),
    ],
)
def test_other_shapes_are_refused_whatever_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"the checkpoint has {name}=.*, you asked for {value}"):
        check(record(**{name: value}), tuple(GUARDED))


def test_a_record_from_before_a_setting_has_what_was_computed_then() -> None:
    old, said = record(), list[str]()
    del old["settings"]["activation"]
    check_record(old, record(), [], said.append)
    assert said == []
    with pytest.raises(UsageError, match="has activation=gelu_tanh, you asked for gelu;"):
        check_record(old, record(activation="gelu"), [], said.append)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((n, {n: 16}) for n in ("seed", "batch_size", "gradient_accumulation_steps")),
        ("dtype", {"dtype": "bfloat16"}),
        ("dropout", {"dropout": 0.5}),
        ("data", {"tokens": np.append(TOKENS, TOKENS[:5])}),
        ("tokenizer", {"tokenizer": CharTokenizer("abc")}),
    ],
)
def test_another_experiment_only_where_allowed(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--allow_change={name}"):
        check(record(**change))
    assert any(name in line for line in check(record(**change), (name,)))


def test_another_split_of_a_step_is_the_same_experiment() -> None:
    assert check(record(batch_size=4, gradient_accumulation_steps=3)) == [
        "resuming with batch_size=4, it was 12",
        "resuming with gradient_accumulation_steps=3, it was 1",
    ]
    with pytest.raises(UsageError, match="--allow_change=batch_size,gradient_accumulation_steps"):
        check(record(batch_size=4, gradient_accumulation_steps=2))


def test_the_rest_is_free_and_said() -> None:
    assert check(record(learning_rate=1e-3, beta2=0.99)) == [
        "resuming with learning_rate=0.001, it was 0.0006",
        "resuming with beta2=0.99, it was 0.95",
    ]
    with pytest.raises(UsageError, match="--allow_change=learning_rate"):
        check(record(), ("learning_rate",))


def test_another_machine_is_said() -> None:
    new = record()
    new["machine"] = {**new["machine"], "devices": "1 x cpu"}
    new["versions"] = {**new["versions"], "jax": "9"}
    jax_said, devices_said = check(new)
    assert jax_said.startswith("resuming with jax 9, it was " + jax.__version__)
    assert "sums may round differently" in devices_said and "1 x cpu" in devices_said


@pytest.mark.parametrize("n", [1, 5, 2**20, 3 * 2**20])
def test_a_changed_token_changes_the_fingerprint(n: int) -> None:
    whole = token_fingerprint(TOKENS[:n])
    for at in {0, n // 2, n - 1}:
        other = TOKENS[:n].copy()
        other[at] ^= 1
        assert token_fingerprint(other) != whole
    assert token_fingerprint(TOKENS[: n - 1]) != whole


def test_a_large_file_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptjax.checkpoints.record.SAMPLED", 3)
    other = TOKENS.copy()
    other[-1] ^= 1
    assert token_fingerprint(other) != token_fingerprint(TOKENS)
    assert token_fingerprint(TOKENS[:-1]) != token_fingerprint(TOKENS)


def test_the_lists_that_the_roles_make() -> None:
    """Written out once here: a role that changes by accident shows."""
    assert set(FIXED) >= {
        *("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "vocab_multiple", "bias"),
        *("activation", "optimizer"),
    }
    assert set(GUARDED) == {
        *(
            "seed",
            "batch_size",
            "gradient_accumulation_steps",
            "dtype",
            "dropout",
            "attention_dropout",
            "zero_projections",
            "reduce_dtype",
        ),
        *("data", "tokenizer"),
    }
    assert set(names(TrainConfig, once)) == {
        *("resume_step", "allow_change", "stop_step", "force", "resume_check", "replay", "debug"),
        *("coordinator_address", "num_processes", "process_id", "distributed"),
    }
    assert set(flatten(TrainConfig())) - set(COMPARED) - set(names(TrainConfig, once)) == {
        *("dataset", "val_dataset", "val_fraction", "tokenizer", "tokenizer_dir"),
        *("out_dir", "init_from", "compile_cache", "heartbeat_timeout", "wait_for_checkpoints"),
        "batch_tokens",
    }
    help = fields_of(TrainConfig)["allow_change"].metadata["help"]
    assert [name for name in GUARDED if not re.search(rf"\b{name}\b", help)] == []
