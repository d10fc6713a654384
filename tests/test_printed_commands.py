"""Every command that a program prints runs as it stands, whatever the paths and the vocabulary."""

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import jax
import pytest

import convert_gpt2
import sample
import train
from gptjax import programs
from gptjax.checkpoints.restore import require_extra
from gptjax.checkpoints.run_folder import Run
from gptjax.checkpoints.steps import FORMAT
from gptjax.commands import run_checks
from gptjax.config import TrainConfig
from gptjax.conversion import compared
from gptjax.conversion.sources import SourceConfig
from gptjax.errors import CheckpointError
from gptjax.terminal import cli, flags
from gptjax.tokenizer import ByteTokenizer

from .helpers import ROOT, scaled_params, tiny
from .test_formats import save_nanogpt

pytestmark = pytest.mark.usefixtures("restore_process")
SCRIPTS = {"train.py": train, "sample.py": sample, "convert_gpt2.py": convert_gpt2}
ODD = "-it's my $HOME run"  # a flag, a quote, blanks and a variable for a shell that is not told


def run_line(line: str, *more: str) -> int:
    """The exit code of a command line as a shell in the current directory would read it."""
    program, script, *words = shlex.split(line)
    assert program == "python" and Path(script).resolve() == ROOT / Path(script).name
    return cli.run(SCRIPTS[Path(script).name].main, [*words, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, str]:
    """Where a model of DNA, whose vocabulary has no newline, was trained; what that printed."""
    folder = tmp_path_factory.mktemp("dna")
    (folder / "my dna.txt").write_text("GATTACAC" * 400)
    argv = ["--dataset=my dna.txt", f"--out_dir={ODD}", "--compile_cache=off", "--sample_tokens=5"]
    argv += ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=8", "--batch_size=8"]
    argv += ["--max_iters=3", "--warmup_iters=0", "--eval_iters=1"]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setenv("GPTJAX_CACHE", str(cache / "gptjax"))
        patch.setenv("GPTJAX_FAULT", "nan_grad@1")
        assert cli.run(train.main, argv) == 0
    return folder, said.getvalue()


def test_the_next_command_samples_without_a_newline(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = trained
    monkeypatch.chdir(folder)
    assert re.search(r"---- sample after 3 steps ----\n[ACGT]{5}\n----", said)
    (line,) = re.findall(r"^next: (.*)", said, re.MULTILINE)
    assert run_line(line, "--max_new_tokens=6") == 0
    assert re.fullmatch(r"[ACGT]{6}\n", capsys.readouterr().out)
    assert run_line(line, "--start=\n") == 65
    assert "character '\\n' (U+000A) at 0 is not in the vocabulary" in capsys.readouterr().err


def test_a_skipped_step_is_replayed_as_it_says(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = trained
    monkeypatch.chdir(folder)
    (line,) = re.findall(r"step 1 skipped: .*?; (python .*) runs it again", said)
    assert run_line(line) == 0
    assert "step 1: the same tokens" in capsys.readouterr().out


def test_a_run_resumed_from_elsewhere_says_where_its_path_is_from(
    trained: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained
    monkeypatch.chdir(tmp_path)
    argv = [f"--out_dir={folder / ODD}", "--init_from=resume", "--max_iters=4"]
    assert cli.run(train.main, argv) == 2
    said = capsys.readouterr().err
    assert "--dataset=my dna.txt: no such name" in said and said.count("\n") == 1
    assert f"--dataset comes from {folder / ODD / 'config.json'}" in said
    assert cli.run(train.main, [*argv, "--dataset=none.txt"]) == 2  # not of one that was given
    assert "config.json" not in capsys.readouterr().err
    assert cli.run(train.main, [*argv, f"--dataset={folder / 'my dna.txt'}", "--stop_step=3"]) == 0


def test_a_script_is_named_from_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert programs.command("sample.py", "--out_dir=a b") == "python sample.py '--out_dir=a b'"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample.py").write_text("")  # another program's
    path = shlex.quote(str(ROOT / "sample.py"))
    assert programs.command("sample.py", "-x") == f"python {path} -x"
    monkeypatch.setattr(programs, "INSTALLED", True)
    line = programs.command("convert_gpt2.py", "verify", "it's")
    assert shlex.split(line) == ["gptjax", "convert", "verify", "it's"]


def test_the_commands_after_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pickle, a tokenizer that is not found, and paths that a shell would take apart."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "it's a source"
    source.mkdir()
    cfg = tiny(vocab_size=256, vocab_multiple=1)
    save_nanogpt(source / "ckpt.pt", cfg, scaled_params(cfg, jax.random.key(0), scale=1.0))
    argv = ["import", str(source), f"--out_dir={ODD}", "--allow_pickle", "--tokenizer=byte"]
    assert cli.run(convert_gpt2.main, argv) == 0
    said = capsys.readouterr().out
    following, verify = re.findall(r"^(?:next|  or): (.*)", said, re.MULTILINE)
    assert run_line(following, "--max_new_tokens=1") == 0
    assert run_line(verify, "--json") == 0


@pytest.mark.parametrize(
    "given",
    [
        SourceConfig(),
        SourceConfig(revision="v1", sha256="0" * 64, tokenizer_dir="my vocabulary"),
        SourceConfig(allow_pickle=True, tokenizer="it's byte"),
    ],
)
def test_verify_is_given_what_import_was(
    given: SourceConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[SourceConfig] = []

    def stop(name: str, config: SourceConfig) -> None:
        opened.append(config)
        raise CheckpointError(name)

    imported = Run(TrainConfig(model=tiny()), ByteTokenizer(), {}, 0)
    monkeypatch.setattr(convert_gpt2, "import_run", lambda *args, **sizes: (imported, {}))
    monkeypatch.setattr(compared, "open_source", stop)
    argv = ["import", "some/gpt2", "--out_dir=r", *flags.changed(given, SourceConfig())]
    assert cli.run(convert_gpt2.main, argv) == 0
    (line,) = re.findall(r"^  or: (.*)", capsys.readouterr().out, re.MULTILINE)
    assert run_line(line) == CheckpointError.exit_code
    assert capsys.readouterr().err == "error: some/gpt2\n"
    for name, value in vars(given).items():
        assert getattr(opened[0], name) == value


def test_doctors_remedies(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    subprocess.run(["sh", "-c", run_checks.check_folder(folder).remedy], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert run_checks.check_folder(folder).status == "ok"


def test_a_start_from_a_run_without_optimizer_state(tmp_path: Path) -> None:
    run_dir = tmp_path / ODD
    with pytest.raises(CheckpointError) as refused:
        require_extra(run_dir, {"format": FORMAT, "step": 0, "leaves": {}})
    flags = re.findall(r"from it with (.*) and another", str(refused.value))
    assert [shlex.split(flag) for flag in flags] == [[f"--init_from={run_dir}"]]
