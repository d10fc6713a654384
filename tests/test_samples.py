"""What sample.py prints: text or JSON, of prompts from anywhere, until something ends it."""

import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import sample
from gptjax import beam_search, model
from gptjax.config import GPTConfig, SampleConfig
from gptjax.sampler_config import SamplerConfig
from gptjax.scoring import Text, score_texts
from gptjax.terminal import cli, flags
from gptjax.terminal.prompts import read_prompts
from gptjax.terminal.samples import Sample
from gptjax.tokenizer import ByteTokenizer

from .helpers import scaled_params, tiny

CFG = tiny(vocab_size=256, vocab_multiple=128, block_size=32)
PARAMS = scaled_params(CFG, jax.random.key(3), scale=16.0)


class Lines(ByteTokenizer):
    """Bytes, of which the newline ends a text."""

    eos = (10,)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch, restore_process: None) -> None:
    monkeypatch.setattr(sample, "load_model", lambda config, opened: (CFG, PARAMS, Lines()))


def say(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What sample.py prints."""
    code = cli.run(sample.main, ["--compile_cache=off", *argv])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return str(out)


def say_json(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in say(capsys, "--json", *argv).splitlines()]


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refusal, which has exit code 2."""
    assert cli.run(sample.main, ["--compile_cache=off", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return str(err)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    yield content


# ---- What ends a sample --------------------------------------------------------------------------


def feed(*parts: str, **fields: Any) -> tuple[list[str], Sample]:
    """The text shown after each part of a sample, and the sample."""
    tokenizer = ByteTokenizer()
    one = Sample(tokenizer, "", [], 0, **fields)
    return [one.feed(tokenizer.encode(part).tolist()) for part in parts], one


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces, one = feed("aE", "Nb E", "ND", "x", stop=("END", "\n\n", ""))
    assert pieces == ["a", "ENb ", "", ""]
    assert one.finish() == "" and (one.text, one.ended, one.ended_by) == ("aENb ", "stop", "END")
    pieces, one = feed("is E", stop=("END",))
    assert pieces[0] + one.finish() == "is E" and one.ended == "length"


def test_the_first_stop_string_that_is_whole_ends_it_however_it_comes() -> None:
    for parts in (["abcdef"], list("abcdef")):
        _, one = feed(*parts, stop=("abcdef", "cd"))
        assert (one.text, one.ended_by, len(one.ids)) == ("ab", "cd", 4)


def test_an_id_ends_it_and_is_counted_not_shown() -> None:
    _, one = feed("é\xe9a\0bc", ends={0: "stop_id", ord("b"): "eot"})
    assert (one.text, one.ended, one.ended_by) == ("éé" + "a", "stop_id", 0)
    assert len(one.ids) == 6 and one.finish() == ""
    _, one = feed("aEN\n", ends={10: "eot"}, stop=("END",))
    assert (one.text, one.ended, one.ended_by) == ("aEN", "eot", 10)
    tokenizer = ByteTokenizer()
    half = Sample(tokenizer, "", [], 0, ends={10: "eot"})
    assert half.feed([0xC3, 10]) == "\ufffd"  # half a character


def test_stop_id_and_eot_in_the_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--start=ab", "--max_new_tokens=60", "--temperature=2", "--ignore_eot"]
    (whole,) = say_json(capsys, *common)
    assert whole["ended"] == "length" and whole["ended_by"] is None
    ids = whole["ids"]
    other = next(i for i in ids[1:] if i != ids[0])
    (one,) = say_json(capsys, *common, "--stop_id", str(other), "255")
    assert one["ids"] == ids[: ids.index(other) + 1]
    assert (one["ended"], one["ended_by"]) == ("stop_id", other)
    assert one["text"] == bytes(one["ids"][:-1]).decode(errors="replace")
    assert "must be 0 to 255" in refuse(capsys, "--stop_id=256")
    assert "must be a whole number" in refuse(capsys, "--stop_id=a")
    (greedy,) = say_json(capsys, "--start=ab", "--temperature=0", "--max_new_tokens=3")
    monkeypatch.setattr(Lines, "eos", (10, greedy["ids"][0]))
    (ended,) = say_json(capsys, "--start=ab", "--temperature=0", "--max_new_tokens=3")
    assert (ended["ids"], ended["ended"], ended["text"]) == (greedy["ids"][:1], "eot", "")


# ---- JSON ----------------------------------------------------------------------------------------


def test_json_has_the_models_own_log_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--temperature=3", "--top_k=40", "--logprobs=3", "--max_new_tokens=9"]
    lines = say_json(capsys, *flags, "--start", "ab", "cde", "--num_samples=2")
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        *(("ab", 0), ("ab", 1), ("cde", 0), ("cde", 1))
    ]
    for line in lines:
        assert line["prompt_ids"] == list(line["prompt"].encode())
        text = Text(np.array([*line["prompt_ids"], *line["ids"]]), len(line["ids"]))
        (score,) = score_texts(CFG, PARAMS, [text], context=32, batch_size=1)
        assert np.abs(score.logprobs - line["logprobs"]).max() <= 2e-5
        for hit, logprob, likeliest in zip(
            score.hits, line["logprobs"], line["likeliest"], strict=True
        ):
            assert len(likeliest) == 3 and set(likeliest[0]) == {"id", "text", "logprob"}
            assert (likeliest[0]["logprob"] == logprob) == hit


def test_json_is_ascii_and_the_text_is_that_of_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--start=\u00e9\x7f", "--temperature=0", "--max_new_tokens=20"]
    out = say(capsys, "--json", *argv)
    assert out.isascii() and out[:-1].isprintable()
    assert "likeliest" not in out
    assert say(capsys, *argv) == "\u00e9\x7f" + json.loads(out)["text"] + "\n"


def test_many_samples_come_in_batches_and_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--start", "a", "bcd", "--num_samples=3", "--max_new_tokens=5"]
    assert say(capsys, *argv) == say(capsys, *argv, "--batch_size=4")


def test_nothing_to_draw_is_an_empty_sample(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = say_json(capsys, "--start=a", "--max_new_tokens=0")
    assert (line["ids"], line["text"], line["ended"]) == ([], "", "length")


def test_without_echo(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--max_new_tokens=5", "--start"]
    assert say(capsys, *argv, "ab") == "ab" + say(capsys, "--no_echo", *argv, "ab")
    with_it, without = say(capsys, *argv, "ab", "c"), say(capsys, "--no_echo", *argv, "ab", "c")
    assert with_it.replace("sample 0\nab", "sample 0\n").replace("sample 0\nc", "sample 0\n") == (
        without
    )


# ---- Prompts -------------------------------------------------------------------------------------


def test_standard_input_is_one_prompt_or_one_a_line(
    stdin: io.BytesIO, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stdin.write("ab\n\ncd\u2028e\r\nf".encode())
    stdin.seek(0)
    (line,) = say_json(capsys, "--start=-", "--max_new_tokens=1")
    assert line["prompt"] == "ab\n\ncd\u2028e\r\nf"
    stdin.seek(0)
    lines = say_json(capsys, "--prompts=-", "--max_new_tokens=1", "--num_samples=2")
    assert [line["prompt"] for line in lines] == [*("ab", "ab", "cd\u2028e", "cd\u2028e", "f", "f")]
    (tmp_path / "prompts.txt").write_bytes(stdin.getvalue())
    assert read_prompts([], str(tmp_path / "prompts.txt")) == ["ab", "cd\u2028e", "f"]


def test_prompts_that_cannot_be_read(
    stdin: io.BytesIO,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").write_text("\n\r\n\n")
    assert "every line is empty" in refuse(capsys, f"--prompts={tmp_path}/empty")
    assert "cannot read" in refuse(capsys, f"--prompts={tmp_path}/none")
    stdin.write(b"ab\xff")
    stdin.seek(0)
    assert "not UTF-8 at byte 2" in refuse(capsys, "--start=-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in refuse(capsys, "--start=-")


@pytest.mark.parametrize(
    "argv",
    [
        ("--interactive", "--json"),
        ("--interactive", "--prompts=p.txt"),
        ("--interactive", "--start=-"),
        ("--interactive", "--start=a"),
        ("--prompts=p.txt", "--start=a"),
        ("--start=-", "--start=-"),
        ("--beams=2", "--num_samples=2"),
        ("--beams=2", "--temperature=0.8"),
        ("--beams=2", "--top_k=1"),
        ("--logprobs=2", "--json=False"),
        ("--length_penalty=2", "--beams=1"),
    ],
    ids=" ".join,
)
def test_flags_that_contradict_each_other_are_named(
    argv: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refuse(capsys, *argv)
    assert all(word.partition("=")[0] in message for word in argv)
    assert "(" not in message  # a value as it was typed


def test_flags_that_do_not_are_read() -> None:
    for argv in (["--beams=1", "--temperature=1"], ["--json=False", "--interactive"]):
        given = flags.read(argv, sample.SamplerConfig(), "")
        sample.refuse_contradictions(flags.apply(sample.SamplerConfig(), given), given)


# ---- Beams ---------------------------------------------------------------------------------------


def test_beams_in_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--beams=3", "--start", "ab", "cde", "--max_new_tokens=8", "--length_penalty=0.5"]
    decoder = model.prepare_for_decoding(CFG, PARAMS)
    lines = say_json(capsys, *argv, "--logprobs=2", "--no_repeat_ngram=2")
    for line in lines:
        found = beam_search.search(
            CFG,
            decoder,
            line["prompt_ids"],
            SampleConfig(no_repeat_ngram=2),
            beams=3,
            max_new_tokens=8,
            ends=[10],
            length_penalty=0.5,
        )[0]
        assert line["ids"] == found.ids.tolist() and abs(line["score"] - found.score) <= 1e-5
        assert len(line["likeliest"]) == len(line["logprobs"]) == len(line["ids"])
    (alone,) = say_json(capsys, *argv[:2], "ab", *argv[4:])
    assert say(capsys, *argv[:2], "ab", *argv[4:]) == f"ab{alone['text']}\n"


def test_beams_say_where_the_context_ended_them(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--compile_cache=off", "--beams=2", f"--start={'a' * 30}", "--json", "--ignore_eot"]
    assert cli.run(sample.main, argv) == 0
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert (len(line["ids"]), line["ended"]) == (3, "length")
    assert err.startswith("note: ") and "32 tokens" in err and err.count("\n") == 1


def test_ctrl_c_ends_a_search(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    search = beam_search.search

    def interrupted(*args: Any, **kwargs: Any) -> list[beam_search.Found]:
        signal.raise_signal(signal.SIGINT)  # as a terminal sends it
        found = search(*args, **kwargs)
        assert found == []
        return found

    monkeypatch.setattr(beam_search, "search", interrupted)
    assert cli.run(sample.main, ["--compile_cache=off", "--beams=2", "--start=ab"]) == 130
    assert capsys.readouterr() == ("ab", "error: interrupted\n")


def test_a_run_of_another_attention_can_be_sampled() -> None:
    """Trained with cuDNN's, sampled on a CPU, or in float32."""
    trained = GPTConfig(attention="cudnn", dropout=0.0)
    assert sample.resolve(SamplerConfig(), trained).attention == "xla"
