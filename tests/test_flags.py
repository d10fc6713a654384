"""A flag's value is what was written, or is refused in one clean line that says what it must be."""

import dataclasses
import io
import sys
from typing import Any

import pytest

import sample
from gptjax.config import TrainConfig
from gptjax.data.token_files import map_tokens
from gptjax.errors import DataError, UsageError, plural
from gptjax.settings import once, require_range
from gptjax.terminal import cli, flags
from gptjax.tokenizer import CharTokenizer

WORD = "unexpected word {!r}: flags are --name=value; see --help"
MISSING = "--{0}: its value is missing; write --{0}=VALUE"
CHOICES = "must be one of auto, float32, bfloat16, float16"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--n_layer=three", "--n_layer=three: must be a whole number"),
        ("--n-layer three", "--n_layer=three: must be a whole number"),
        ("--n_layer=2.5", "--n_layer=2.5: must be a whole number"),
        ("--n_layer=", "--n_layer=: must be a whole number"),
        ("--n_layer=" + "9" * 5000, "--n_layer=" + "9" * 60 + "...: must be a whole number"),
        ("--n_layer=1 --n_layer=x", "--n_layer=x: must be a whole number"),
        ("--n_layer", MISSING.format("n_layer")),
        ("--out_dir --seed=1", MISSING.format("out_dir")),
        ("--n_layer=2 3", WORD.format("3")),
        ("--n_layer 2 3", WORD.format("3")),
        ("--learning_rate=fast", "--learning_rate=fast: must be a number"),
        ("--learning_rate=-1e-4", "--learning_rate=-0.0001: must be above 0 and finite"),
        ("--learning_rate -1e-4", "--learning_rate=-0.0001: must be above 0 and finite"),
        ("--bias=maybe", "--bias=maybe: must be True or False"),
        ("--bias maybe", "--bias=maybe: must be True or False"),
        ("--bias=", "--bias=: must be True or False"),
        ("--dtype=float8", f"--dtype=float8: {CHOICES}"),
        ("--dtype=", f"--dtype=: {CHOICES}"),
        ("--dtype", MISSING.format("dtype")),
        ("--attention=│", "--attention=│: must be one of auto, xla, cudnn, flash"),
        ("gpt2", WORD.format("gpt2")),
        ("-n_layer=3", "unknown flag -n_layer: did you mean --n_layer?"),
        ("--", "unknown flag --: --help lists the flags"),
        ("--seed=4294967296", "--seed=4294967296: must be at least 0 and at most 4294967295"),
        ("--seed=-1", "--seed=-1: must be at least 0 and at most 4294967295"),
        ("--n_layer=-" + "9" * 400, "--n_layer=-" + "9" * 400 + ": must be at least 1"),
        (
            "--learning_rate=0.00012345678 --min_lr=1",
            "--min_lr=1.0: must be at least 0 and at most 0.00012345678",
        ),
    ],
    ids=lambda text: text[:30],
)
def test_a_bad_value_is_one_clean_line(
    argv: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(argv: list[str]) -> None:
        flags.parse(argv, TrainConfig(), "")

    assert cli.run(read, [word for word in argv.split(" ") if word]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_a_word_may_stand_for_0(capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig()
    assert flags.read(["--batch_size=auto"], config, "") == {"batch_size": 0}
    for argv in (["--batch_size=most"], ["--seed=auto"], ["--n_layer="]):
        with pytest.raises(UsageError, match="must be a whole number"):
            flags.read(argv, config, "")
    for size, shown in ((0, "auto"), (7, "7")):
        flags.print_help(dataclasses.replace(config, batch_size=size), "")
        said = " ".join(capsys.readouterr().out.split())
        assert f"(default: {shown}) --gradient_accumulation_steps" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--start"], MISSING.format("start")),
        (["--stop", "--seed=1"], MISSING.format("stop")),
        (["word"], WORD.format("word")),
        ([""], WORD.format("")),
        (["--interactive=ja"], "--interactive=ja: must be True or False"),
        (["--top_k=a", "--start"], "--top_k=a: must be a whole number"),
    ],
)
def test_a_bad_value_beside_tuples(argv: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        flags.parse(argv, sample.SamplerConfig(), "")
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("argv", "fields"),
    [
        (["--start", "a b", "c", "--seed=1"], {"start": ("a b", "c"), "seed": 1}),
        (["--start=a", "b"], {"start": ("a", "b")}),
        (["--start=", "--stop=--x=y"], {"start": ("",), "stop": ("--x=y",)}),
        (["--start=a", "--seed=2", "--start", "-b"], {"start": ("a", "-b"), "seed": 2}),
        (["--out_dir", "-x", "--out-dir=a=b"], {"out_dir": "a=b"}),
        (["--raw", "--interactive", "False"], {"raw": True}),
    ],
)
def test_values_arrive_as_they_were_written(argv: list[str], fields: dict[str, Any]) -> None:
    parsed = flags.parse(argv, sample.SamplerConfig(), "")
    assert parsed == dataclasses.replace(sample.SamplerConfig(), **fields)


def test_nested_settings_arrive_and_the_others_stay() -> None:
    base = sample.SamplerConfig(num_samples=3)
    parsed = flags.parse(["--top_k=4", "--temperature=0"], base, "")
    assert (parsed.sample.top_k, parsed.sample.temperature, parsed.num_samples) == (4, 0.0, 3)


def test_limits_are_shown_as_they_are() -> None:
    @dataclasses.dataclass
    class Limited:
        value: float = 7.0

    for low, high, said in (
        (0, 2**32 - 1, "at least 0 and at most 4294967295"),
        (12345678, 2**62 + 1, "at least 12345678 and at most 4611686018427387905"),
        (1e-9, 0.00012345678, "at least 1e-09 and at most 0.00012345678"),
    ):
        for value in (-1.0, 1e30, float("nan"), float("inf")):
            with pytest.raises(
                UsageError, match=f"--value={value}: must be {said}$".replace("+", r"\+")
            ):
                require_range(Limited(value), "value", low, high)


@pytest.mark.parametrize(("error", "code"), [(OSError("full"), 74), (BrokenPipeError(), 141)])
def test_help_that_cannot_be_written_is_no_success(
    error: OSError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(cli.output, "let_go", lambda stream: None)
    monkeypatch.setattr(cli.output, "flush_or_let_go", lambda stream: None)
    monkeypatch.setattr(cli.output, "prepare_streams", lambda: None)
    monkeypatch.setattr(cli.output, "show_warnings_briefly", lambda: None)
    assert cli.run(lambda argv: flags.print_help(TrainConfig(), "About."), []) == code


def test_help_shows_control_characters_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass
    class Config:
        """Texts that would break a line or a terminal."""

        one: str = once("a\nb\x1b[2J", "A text.")
        several: tuple[str, ...] = once(("\n", "\t"), "Texts, 100 % of them.")

    with pytest.raises(SystemExit) as ended:
        flags.parse(["--help"], Config(), "")
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert r"a\nb\x1b[2J" in out and r"'\n' '\t'" in out and "\x1b[2J" not in out


def test_one_is_no_plural(tmp_path: Any) -> None:
    assert [plural(n, "token") for n in (0, 1, 2)] == ["tokens", "token", "tokens"]
    assert [plural(n, "byte is", "bytes are") for n in (1, 2)] == ["byte is", "bytes are"]
    (tmp_path / "odd.bin").write_bytes(b"1")
    with pytest.raises(DataError, match="has 1 byte: not a multiple of 2"):
        map_tokens(tmp_path / "odd.bin")
    with pytest.raises(DataError, match=r"not in the vocabulary \(1 char\)"):
        CharTokenizer("a").encode("b")
    with pytest.raises(DataError, match=r"not in the vocabulary \(1 token\)"):
        CharTokenizer("a").decode_bytes([1])
