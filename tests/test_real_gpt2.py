"""What is published about the real GPT-2 124M, for whoever has its weights.

    GPTJAX_GPT2_DIR=FOLDER pytest -n 0 -m real_gpt2

FOLDER is Hugging Face's (config.json, model.safetensors) or OpenAI's. The evaluations also want
their files: GPTJAX_EVAL_DIR with wiki.test.raw and lambada_test.jsonl. Each fact names its source.
"""

import functools
import os
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from gptjax import model, sampling, scoring
from gptjax.checkpoints.run_folder import Run
from gptjax.commands import protocols
from gptjax.config import SampleConfig
from gptjax.conversion import reference, sources, verify
from gptjax.conversion.sources import SourceConfig
from gptjax.loss import loss_fn

WEIGHTS = os.environ.get("GPTJAX_GPT2_DIR", "")
FILES = Path(os.environ.get("GPTJAX_EVAL_DIR", "/no/such/folder"))
pytestmark = [
    pytest.mark.real_gpt2,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not WEIGHTS,
        reason="needs GPT-2's weights: GPTJAX_GPT2_DIR=FOLDER pytest -n 0 -m real_gpt2",
    ),
]


@pytest.fixture(scope="module")
def run() -> Run:
    return sources.load_model(WEIGHTS)


def continue_greedily(run: Run, prompts: list[str], count: int) -> list[str]:
    cfg = model.resolve(run.config.model)
    pieces = sampling.generate(
        cfg,
        model.prepare_for_decoding(cfg, run.params),
        [run.tokenizer.encode(prompt).tolist() for prompt in prompts],
        SampleConfig(temperature=0),
        max_new_tokens=count,
    )
    new = np.concatenate(list(pieces), axis=1)
    return [run.tokenizer.decode_bytes(row.tolist()).decode() for row in new]


def test_it_is_gpt2(run: Run) -> None:
    assert model.count_params(run.config.model) == 124_439_808


def test_verify(run: Run) -> None:
    theirs = reference.load_reference(sources.open_source(WEIGHTS, SourceConfig()))
    first = verify.first_failure(verify.verify(run.config.model, run.params, theirs))
    assert first is None, first


def test_token_ids(run: Run) -> None:
    """huggingface/transformers, tests/models/gpt2/test_modeling_gpt2.py, test_lm_generate_gpt2."""
    expected = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688]
    expected += [27262, 13, 198, 198, 464, 3290]
    text = continue_greedily(run, ["The dog"], 18)[0]
    assert run.tokenizer.encode("The dog" + text).tolist() == expected


CONTINUATIONS = [  # prompt, continuation, source
    (
        "Hello, my dog is a little",
        " bit of a mess. I'm not sure if he's going",
        "transformers, test_modeling_gpt2.py, test_batch_generation",
    ),
    (
        "Today, I",
        "'m going to be doing a lot of research on this. I",
        "the same",
    ),
    (
        "Hello this is a long string",
        " of words. I'm going to start with the first one.\n",
        "transformers, test_modeling_flax_gpt2.py, test_batch_generation",
    ),
    ("Hey", ", I'm not sure if I'm going to be able to do", "the same"),
    (
        "hi",
        ", who was born in the city of Kolkata, was a member of the Kolkata",
        "transformers, test_modeling_gpt2.py, test_flash_attn_2_generate_padding_left",
    ),
    (
        "Hello this is a very long sentence",
        ". I'm sorry. I'm sorry. I'm sorry. I'm sorry. I'm sorry",
        "the same",
    ),
    (
        "The flying machine",
        " is a small, lightweight, and lightweight aircraft that can be used for any type of",
        "transformers, test_modeling_tf_gpt2.py, test_lm_generate_gpt2_greedy_xla",
    ),
    (
        "Alan Turing theorized that computers would one day become",
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform "
        "complex calculations, and it can perform these calculations in a way that is very similar "
        "to the human brain.",
        "jaymody/picoGPT, README",
    ),
    (
        "Test",
        ".java:784) at net.minecraft.",
        "huggingface/text-generation-inference, server/tests/models/test_causal_lm.py",
    ),
]


def test_continuations_as_one_ragged_batch(run: Run) -> None:
    found = continue_greedily(run, [prompt for prompt, _, _ in CONTINUATIONS], 40)
    for (prompt, expected, source), text in zip(CONTINUATIONS, found, strict=True):
        assert text.startswith(expected), (prompt, text, source)


# llm.c's debug batch, 4 rows of 64 tokens and the one behind them: the head of its
# tiny_shakespeare_val.bin.
DEBUG_BATCH = """
    50256 5962 22307 25 198 8421 356 5120 597 2252 11 3285 502 2740 13 628 50256 3237 25 198
    5248 461 11 2740 13 628 50256 5962 22307 25 198 1639 389 477 12939 2138 284 4656 621 284
    1145 680 30 628 50256 3237 25 198 4965 5634 13 12939 13 628 50256 5962 22307 25 198 5962
    11 345 760 327 1872 385 1526 28599 318 4039 4472 284 262 661 13 628 50256 3237 25 198
    1135 760 470 11 356 760 470 13 628 50256 5962 22307 25 198 5756 514 1494 683 11 290 356
    1183 423 11676 379 674 898 2756 13 198 3792 470 257 15593 30 628 50256 3237 25 198 2949
    517 3375 319 470 26 1309 340 307 1760 25 1497 11 1497 0 628 50256 12211 22307 25 198
    3198 1573 11 922 4290 13 628 50256 5962 22307 25 198 1135 389 17830 3595 4290 11 262
    1458 1173 1547 922 13 198 2061 4934 969 5036 896 319 561 26958 514 25 611 484 198 19188
    7800 514 475 262 48713 414 11 981 340 547 198 1929 4316 462 11 356 1244 4724 484 22598
    514 31533 306 26 198 4360 484 892 356 389 1165 13674 25 262 10904 1108 326 198 2001
    42267 514 11 262 2134 286 674 24672 11 318 355 281 198 24807 284 1948 786 511 20038 26
    674 198 82 13712 590 318 257 4461 284 606 3914 514 15827 428 351 198 454 279
"""


def test_llmcs_losses(run: Run) -> None:
    """karpathy/llm.c, test_gpt2.c: AdamW steps on one batch, decay on every tensor."""
    expected = [5.270007, 4.059707, 3.375123, 2.800783, 2.315382]
    expected += [1.849029, 1.394656, 0.999147, 0.624080, 0.376511]
    ids = np.array(DEBUG_BATCH.split(), np.int32)
    windows = np.stack([ids[row * 64 : row * 64 + 65] for row in range(4)])
    cfg = model.resolve(run.config.model)
    optimizer = optax.adamw(1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    params, state = run.params, optimizer.init(run.params)
    value_and_grad = jax.jit(jax.value_and_grad(functools.partial(loss_fn, cfg)))
    for step, wanted in enumerate(expected):
        loss, grads = value_and_grad(params, windows)
        assert abs(float(loss) - wanted) <= 1e-2, (step, float(loss), wanted)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)


def read_file(name: str) -> str:
    path = FILES / name
    if not path.is_file():
        pytest.skip(f"needs {name}: GPTJAX_EVAL_DIR=FOLDER")
    return path.read_bytes().decode()


def evaluate(run: Run, task: str, text: str, context: int = 1024) -> dict[str, float]:
    cfg = model.resolve(run.config.model)
    score = functools.partial(scoring.score_texts, cfg, run.params, context=context, batch_size=8)
    settings = protocols.Settings(context, context, 0)
    found = getattr(protocols, task)(score, run.tokenizer, text, settings)
    assert None not in found.values(), found
    return found


def test_wikitext2(run: Run) -> None:
    """29.94 by transformers' method (its issue 13761), which leaves out each window's first token.

    We score that token too, 1 in 1024, from no context: 29.94 becomes about 30.
    """
    lines = read_file("wiki.test.raw").split("\n")[:-1]
    text = "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    found = evaluate(run, "wikitext2", text)
    assert found["tokens"] == 287_644
    assert abs(found["perplexity"] - 30.0) <= 0.2, found


@pytest.mark.parametrize(("context", "published"), [(1024, 29.17), (256, 43.34)])
def test_wikitext2_by_context(run: Run, context: int, published: float) -> None:
    """huggingface/transformers, issue 483, whose windows are not described to the token."""
    found = evaluate(run, "wikitext2", read_file("wiki.test.raw"), context)
    assert abs(found["perplexity"] / published - 1) <= 0.02, found


def test_lambada(run: Run) -> None:
    """Perplexity 40.06 and accuracy 0.3256: EleutherAI/lm-evaluation-harness, issue 2159."""
    found = evaluate(run, "lambada", read_file("lambada_test.jsonl"))
    assert abs(found["perplexity"] - 40.06) <= 0.5 and abs(found["acc"] - 0.3256) <= 0.005, found
