"""Wrong input gets one clear line and its exit code; good input does what --help says."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import sample
import train
from gptjax import errors, sampling
from gptjax.commands.machine_checks import plugins
from gptjax.config import GPTConfig, SampleConfig, TrainConfig
from gptjax.config_file import load_config, to_json
from gptjax.errors import UsageError
from gptjax.presets import PRESETS
from gptjax.terminal import cli, flags

from .helpers import ROOT, start_process

pytestmark = pytest.mark.usefixtures("restore_process")


def refuse(script: object, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message; the message is one line on stderr and stdout has no traceback."""
    code = cli.run(script.main, argv)  # type: ignore[attr-defined]
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return code, err


TRAIN_MISTAKES = [
    (["--n_layr=3"], 2, "unknown flag --n_layr: did you mean --n_layer?"),
    (["--wombat=3"], 2, "unknown flag --wombat: --help lists the flags"),
    (["--n_layer=three"], 2, "--n_layer"),
    (["--n_layer=0"], 2, "--n_layer=0: must be at least 1"),
    (["--n_layer"], 2, "--n_layer"),
    (["--n_embd=100", "--n_head=3"], 2, "--n_head=3: must divide n_embd=100; take --n_head=2"),
    (["--dtype=float8"], 2, "float8"),
    (["--dtype=float32", "--loss_scale=1024"], 2, "--loss_scale=1024: is for float16"),
    (["--loss_scale=-1"], 2, "--loss_scale=-1.0: must be at least 0"),
    (["--attention=flash"], 2, "flash"),
    (["--bias=maybe"], 2, "maybe"),
    (["quickstat"], 2, "unknown preset quickstat: must be one of quickstart"),
    (["--warmup_iters=9999999"], 2, "--warmup_iters=9999999: must be at most max_iters"),
    (["--learning_rate=0"], 2, "--learning_rate=0.0: must be above 0"),
    (["--learning_rate=nan"], 2, "--learning_rate=nan"),
    (["--learning_rate=-1"], 2, "--learning_rate=-1.0"),
    (["--min_lr=1"], 2, "--min_lr=1.0: must be at least 0 and at most"),
    (["--beta1=1"], 2, "--beta1=1.0: must be at least 0 and below 1"),
    (["--beta2=-0.1"], 2, "--beta2=-0.1"),
    (["--eps=0"], 2, "--eps=0.0: must be above 0"),
    (["--grad_clip=-1"], 2, "--grad_clip=-1.0: must be at least 0"),
    (["--weight_decay=inf"], 2, "--weight_decay=inf: must be finite"),
    (["--dropout=1"], 2, "--dropout=1.0"),
    (["--batch_size=12"], 2, "--batch_size=12: must be divisible by 8 devices"),
    (["--optimizer=sgd"], 2, "sgd"),
    (["--dataset=tinyshakespear"], 2, "did you mean tinyshakespeare?"),
    (["--dataset=nowhere.txt"], 2, "no such name, file, folder or glob"),
    (["--dataset=tinyshakespeare"], 65, "cannot get tinyshakespeare"),
    (["--val_dataset=nowhere"], 2, "--val_dataset=nowhere: no such name"),
    (["--val_fraction=1"], 2, "--val_fraction=1.0: must be above 0 and below 1"),
    (["--dataset={tmp}/empty.txt"], 65, "0 characters"),
    (["--dataset={tmp}/one.txt"], 65, "1 character ("),
    (["--dataset={tmp}/latin.txt"], 65, "latin.txt is not UTF-8 at byte 3 (0xe9)"),
    (["--dataset={tmp}/short.txt"], 65, "the largest that fits is"),
    (["--dataset={tmp}/odd", "--tokenizer=byte"], 65, "train.bin has 5 bytes"),
    (["--dataset={tmp}/odd", "--tokenizer=char"], 2, "--tokenizer=char"),
    (["--init_from=resume"], 75, "no checkpoint"),
    (["--init_from=gpt5"], 65, "cannot reach the Hub for gpt5"),
    (["--out_dir={tmp}/empty.txt"], 73, "cannot write to --out_dir"),
    (["--out_dir=/proc/nowhere"], 73, "cannot write to --out_dir"),
]


@pytest.mark.parametrize(("argv", "code", "said"), TRAIN_MISTAKES, ids=lambda x: str(x)[:40])
def test_train_refuses(
    argv: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1") * 99)
    (tmp_path / "short.txt").write_text("to be or not to be")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "train.bin").write_bytes(b"12345")
    (tmp_path / "odd" / "val.bin").write_bytes(b"1234")
    argv = [word.format(tmp=tmp_path) for word in argv]
    if not any(word.startswith("--out_dir") for word in argv):
        argv.append(f"--out_dir={tmp_path / 'out'}")
    if not any(word.startswith("--dataset") for word in argv):
        argv.append("--dataset=pydocs")
    found, message = refuse(train, argv, capsys)
    assert said in message
    assert found == code


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "corpus.txt").write_text("to be or not to be, that is the question\n" * 40)
    argv = [
        f"--dataset={folder / 'corpus.txt'}",
        f"--out_dir={folder / 'out'}",
        *["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=8", "--batch_size=8"],
        *["--max_iters=3", "--warmup_iters=0", "--eval_iters=1", "--sample_tokens=5"],
        "--compile_cache=off",
    ]
    assert cli.run(train.main, argv) == 0
    return folder / "out"


SAMPLE_MISTAKES = [
    (["--temprature=1"], 2, "did you mean --temperature?"),
    (["--temperature=-1"], 2, "--temperature=-1.0: must be at least 0"),
    (["--temperature=nan"], 2, "--temperature=nan"),
    (["--temperature=inf"], 2, "--temperature=inf"),
    (["--top_k=-1"], 2, "--top_k=-1: must be at least 0"),
    (["--top_p=0"], 2, "--top_p=0.0: must be above 0 and at most 1"),
    (["--top_p=1.5"], 2, "--top_p=1.5: must be above 0 and at most 1"),
    (["--min_p=2"], 2, "--min_p=2.0"),
    (["--repetition_penalty=0"], 2, "--repetition_penalty=0.0"),
    (["--num_samples=0"], 2, "--num_samples=0: must be at least 1"),
    (["--max_new_tokens=-1"], 2, "--max_new_tokens=-1"),
    (["--dtype=float8"], 2, "float8"),
    (["--out_dir=/nowhere"], 2, "/nowhere is not a run folder"),
    (["--checkpoint=77"], 2, "--checkpoint=77: must be best, latest or one of [3]"),
    (["--start=to\u00e9"], 65, "character 'é' (U+00E9) at 2 is not in the vocabulary"),
    (["--start=FILE:missing.txt"], 2, "cannot read the prompt (missing.txt)"),
    (["--init_from=gpt5"], 65, "cannot reach the Hub for gpt5"),
]


@pytest.mark.parametrize(("argv", "code", "said"), SAMPLE_MISTAKES, ids=lambda x: str(x)[:40])
def test_sample_refuses(
    argv: list[str], code: int, said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, message = refuse(sample, [f"--out_dir={run_dir}", *argv], capsys)
    assert said in message
    assert found == code


def say(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What sample.py prints."""
    assert cli.run(sample.main, argv) == 0
    return capsys.readouterr().out


def test_sample_starts_from_nothing_a_newline_or_a_file(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--out_dir={run_dir}", "--max_new_tokens=4"]
    for start in ("", "\n", "   "):
        text = say([*common, f"--start={start}"], capsys)
        assert text.startswith(start) and len(text) == len(start) + 4 + 1
    (tmp_path / "prompt.txt").write_text("to be ")
    assert say([*common, f"--start=FILE:{tmp_path}/prompt.txt"], capsys).startswith("to be ")


def test_samples_do_not_depend_on_the_batch(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--out_dir={run_dir}", "--max_new_tokens=12", "--seed=4"]
    alone = say([*common, "--start=question"], capsys)
    both = say([*common, "--num_samples=2", "--start", "be", "question"], capsys)
    assert f"---- 'question', sample 0\n{alone}" in both
    assert len([line for line in both.splitlines() if line.startswith("----")]) == 4


def test_stop_string_ends_the_sample(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"--out_dir={run_dir}", "--max_new_tokens=40", "--start=to"]
    whole = say(common, capsys)
    stop = whole[15:18]
    said = say([*common, f"--stop={stop}"], capsys)
    assert said == whole[: whole.index(stop, 2)] + "\n"


def test_scratch_speaks_gibberish(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(say(["--init_from=scratch", "--max_new_tokens=9"], capsys)) > 3


def talk(prompts: list[object], run_dir: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """The exit code of an interactive session; an exception among the prompts is raised."""
    said = iter(prompts)

    def answer(_: str) -> object:
        prompt = next(said)
        if isinstance(prompt, BaseException):
            raise prompt
        return prompt

    monkeypatch.setattr("builtins.input", answer)
    argv = (f"--out_dir={run_dir}", "--interactive", "--max_new_tokens=3", *argv)
    code = cli.run(sample.main, list(argv))
    assert next(said, None) is None
    return code


def test_interactive_answers_prompt_after_prompt(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(["to", "to\u00e9", "or not", ""], run_dir, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert next(line[:6] for line in out.splitlines()).startswith("to")
    assert "or not" in out
    assert err.startswith("error: character 'é'")


def test_ctrl_c_stops_the_text_and_at_the_prompt_the_session(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(*args: object, **kwargs: object) -> Iterator[sampling.Piece]:
        signal.raise_signal(signal.SIGINT)  # as a terminal sends it
        yield sampling.Piece(np.full((1, 1), 5), None)
        pytest.fail("goes on")

    def interrupted_twice(*args: object, **kwargs: object) -> Iterator[sampling.Piece]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield sampling.Piece(np.full((1, 1), 5), None)

    generate = sampling.generate_pieces
    kinds = iter([interrupted, generate, interrupted_twice, generate])
    monkeypatch.setattr(sampling, "generate_pieces", lambda *args, **kw: next(kinds)(*args, **kw))
    assert talk(["to", "or not", "be", "that", EOFError()], run_dir, monkeypatch) == 0
    written = capsys.readouterr().out.split("\n")
    assert [len(line) for line in written[:2]] == [len("to") + 1, len("or not") + 3]
    assert any(line.startswith("that") for line in written)
    assert talk([KeyboardInterrupt()], run_dir, monkeypatch) == 130
    assert capsys.readouterr() == ("\n", "")


def test_a_long_prompt_says_that_it_is_cut(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--out_dir={run_dir}", "--max_new_tokens=1", "--start"]
    for starts, said in (
        (["question"], []),  # as long as the context
        (["question" * 3, "to", "is the question"], [24, 15]),
    ):
        assert cli.run(sample.main, [*argv, *starts]) == 0
        notes = capsys.readouterr().err.splitlines()
        numbers = [list(map(int, re.findall(r"\d+", note))) for note in notes]
        assert numbers == [[n, 8, 4] for n in said]  # tokens, context, and what is read


def test_top_k_above_the_vocabulary_keeps_all(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--out_dir={run_dir}", "--max_new_tokens=9", "--start=to"]
    texts = {say([*common, f"--top_k={k}"], capsys) for k in (0, 2**40)}
    assert len(texts) == 1


# ---- Flags ---------------------------------------------------------------------------------------


def test_both_spellings_and_bare_booleans() -> None:
    base = TrainConfig()
    for argv in (["--batch_size=16", "--debug"], ["--batch-size", "16", "--debug=True"]):
        parsed = flags.parse(argv, base, "")
        assert parsed == dataclasses.replace(base, batch_size=16, debug=True)
    assert flags.parse(["--bias=False"], base, "").model.bias is False


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(PRESETS[name]))
    assert load_config(path) == PRESETS[name]


DAMAGED = [
    *["", "[]", "{}", "[" * 10**5, '{"model": 3}', '{"model": {"n_layers": 3}}'],
    *['{"model": {"n_layer": 2.5}}', '{"model": {"bias": 1}}', '{"model": {"dtype": "float8"}}'],
    *[
        '"model"',
        '{"model": []}',
        '{"model_type": "gpt2", "n_layer": 2}',  # Hugging Face's
        '{"model": {}, "model_2": {}}',
        '{"model": {}, "seed": true}',
        f'{{"model": {{}}, "learning_rate": {10**400}}}',
    ],
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:40])
def test_damaged_config_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"cannot read the settings .*config.json"):
        load_config(path)


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {
        name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")
    }
    assert codes == {
        "UsageError": 2,
        "DataError": 65,
        "PeerError": 70,
        "OutOfMemoryError": 71,
        "OutputError": 73,
        "DiskError": 74,
        "CheckpointError": 75,
        "NonFiniteError": 76,
    }


def test_greedy_and_all_tokens_are_allowed() -> None:
    SampleConfig(temperature=0, top_k=0, top_p=1.0, min_p=0.0)
    assert GPTConfig(n_head=12).head_dim == 64


def test_json_has_no_nan(run_dir: Path) -> None:
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_given_flags_are_the_last_of_each_however_they_are_written() -> None:
    def given(*argv: str) -> dict[str, object]:
        return flags.read(list(argv), TrainConfig(), "")

    assert given("--seed=1") == {"seed": 1}
    assert given("--out-dir", "a", "--seed=1") == {"out_dir": "a", "seed": 1}
    assert given("--out_dir=a", "--out-dir=b=c") == {"out_dir": "b=c"}
    assert given("--seed", "1", "--seed=2", "--debug") == {"seed": 2, "debug": True}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("JAX_PLATFORMS=cuda", "JAX_PLATFORMS=cuda: "),
        ("JAX_PLATFORMS=no_such", "JAX_PLATFORMS=no_such: "),
        ("JAX_PLATFORM_NAME=gpu", "JAX_PLATFORM_NAME=gpu: "),
    ],
)
def test_a_platform_that_is_not_here_is_one_line(
    variables: str, said: str, environment: dict[str, str], tmp_path: Path
) -> None:
    if jax.devices()[0].platform != "cpu" or plugins():
        pytest.skip("there is a GPU or TPU; run it on a machine without: pytest -k platform")
    name, value = variables.split("=")
    environment = {**environment, "JAX_PLATFORMS": "", name: value}
    argv = ["--init_from=scratch", "--max_new_tokens=1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), *argv],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}JAX finds no such device") and "gptjax doctor" in line


def test_the_second_interrupt_is_at_once_and_the_second_sigterm_is_none() -> None:
    """Also where Python does not come to its handlers: here in C, as in XLA's compiler."""
    code = (
        "import ctypes, signal; from gptjax.terminal.cli import catch_stop_signals;"
        "received = catch_stop_signals();"
        "[signal.raise_signal(n) for n in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)];"
        "print(received, flush=True); libc = ctypes.CDLL(None);"
        "[libc.usleep(500000) for _ in range(100)]; libc.sleep(60)"
    )
    process = start_process(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "[15, 15, 2]\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert said == "error: interrupted twice, nothing was saved\n"


def test_a_refusal_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> int:
        raise UsageError("a file says\x1b[2J and\nmore")

    assert cli.run(main, []) == 2
    assert capsys.readouterr().err == "error: a file says\\x1b[2J and more\n"
