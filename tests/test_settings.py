"""Each setting says what it is, its choices are those of the code, and older runs lack none."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import convert_gpt2
import sample
from gptjax import attention, functions, presets, sharding, tokenizer
from gptjax.__main__ import COMMANDS
from gptjax.checkpoints.record import check_record
from gptjax.commands import evaluate
from gptjax.config import MESH_AXES, GPTConfig, SampleConfig, TrainConfig
from gptjax.config_file import RENAMED, complete, load_config, to_json
from gptjax.conversion import source_tokenizer
from gptjax.data import datasets
from gptjax.errors import UsageError
from gptjax.sampler_config import SamplerConfig
from gptjax.settings import Role, architecture, fields_of, flatten, names, once, run
from gptjax.terminal import flags, nanogpt_flags
from gptjax.training import muon, optimizer
from gptjax.training.run_settings import read_settings

from .test_resume import record

MODULES = [importlib.import_module(module) for module, _ in COMMANDS.values()]
PROGRAMS: list[Any] = [TrainConfig, SamplerConfig]  # and what each command has of its own
PROGRAMS += [
    config
    for module in MODULES
    for config in vars(module).values()
    if dataclasses.is_dataclass(config) and config.__module__ == module.__name__
]


def problems(config: Any) -> list[str]:
    """Return the settings that do not say what they are, in whole sentences."""
    found = []
    for name, field in fields_of(config).items():
        said = field.metadata
        sentences = re.fullmatch(r"\S.*[.]", said.get("help", ""), re.DOTALL)
        if not isinstance(said.get("role"), Role) or not sentences:
            found.append(name)
    return found


@pytest.mark.parametrize("config", [*PROGRAMS, GPTConfig, SampleConfig])
def test_every_setting_says_what_it_is(config: Any) -> None:
    assert problems(config) == []
    first = next(iter(fields_of(config).values()))
    assert first.metadata["section"]


def test_a_setting_that_does_not_is_found() -> None:
    @dataclasses.dataclass
    class Config:
        good: int = run(1, "A number.")
        bare: int = 1
        fragment: int = run(1, "of something")

    assert problems(Config) == ["bare", "fragment"]


def test_the_model_has_no_setting_of_one_start() -> None:
    """A checkpoint's record has them all."""
    assert names(GPTConfig, once) == []
    assert names(TrainConfig, architecture) == names(GPTConfig, architecture)


# ---- Choices


def choices(config: Any, name: str) -> set[str]:
    return set(get_args(fields_of(config)[name].type)) - {"auto"}


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("activation", functions.ACTIVATIONS),
        ("attention", attention.ATTENTION),
        ("optimizer", optimizer.OPTIMIZERS),
        ("muon_qkv", muon.QKV_PARTS),
        ("schedule", optimizer.SCHEDULES),
        ("reduce_dtype", {"float32": 4, "bfloat16": 2}),
        ("dtype", {"float32": 4, "bfloat16": 2, "float16": 2}),
    ],
)
def test_choices_are_the_keys(name: str, table: dict[str, Any]) -> None:
    assert choices(TrainConfig, name) == set(table)


def test_axes_of_the_mesh_are_the_layouts() -> None:
    assert tuple(sharding.LAYOUTS) == MESH_AXES


def test_the_kinds_of_tokenizers_are_in_the_help() -> None:
    """Besides them the flag takes a path, so that no type lists them."""
    about = fields_of(TrainConfig)["tokenizer"].metadata["help"]
    assert all(kind in about for kind in ("auto", *datasets.MAKERS))
    assert set(datasets.MAKERS) < set(tokenizer.READERS)
    about = fields_of(convert_gpt2.ImportConfig)["tokenizer"].metadata["help"]
    assert all(kind in about for kind in source_tokenizer.KINDS)


def test_every_choice_is_compared_with_its_code() -> None:
    """A new Literal needs a row above, or a place here: these are compared where they are used.

    The choices of an architecture option are computed one by one against the PyTorch twin.
    """
    used = {
        "decode_errors",
        "loss_axis",
        "distributed",
        "kernels",
        "cache",
        *names(TrainConfig, architecture),
    }
    literals = {n for n, f in fields_of(TrainConfig).items() if get_origin(f.type) is Literal}
    rows = {"activation", "attention", "optimizer", "muon_qkv", "schedule", "dtype"} | {
        "reduce_dtype"
    }
    assert literals <= rows | used and rows <= literals
    assert choices(convert_gpt2.VerifyConfig, "activation") == set(functions.ACTIVATIONS)
    assert choices(evaluate.EvaluateConfig, "dtype") == choices(TrainConfig, "dtype")
    assert choices(sample.SamplerConfig, "dtype") == choices(TrainConfig, "dtype")


def test_words_in_the_help_are_the_codes() -> None:
    for config, name, words in (
        (evaluate.EvaluateConfig, "task", evaluate.TASKS),
        (convert_gpt2.ExportConfig, "to", convert_gpt2.export_run.__globals__["EXPORTS"]),
    ):
        assert all(word in fields_of(config)[name].metadata["help"] for word in words)


# ---- Older runs


def old_file(path: Path, **changes: Any) -> Path:
    """Write a config.json as an older version did: other names, and some missing."""
    stored = json.loads(to_json(presets.PRESETS["quickstart"]))
    stored["loss_scale"] = stored.pop("loss_axis")
    del stored["loss_scale_growth_interval"]
    del stored["val_dataset"], stored["model"]["activation"]
    path.write_text(json.dumps(stored | changes))
    return path


def test_an_older_file_has_todays_settings(tmp_path: Path) -> None:
    found = load_config(old_file(tmp_path / "config.json", loss_scale="log"))
    assert found == dataclasses.replace(presets.PRESETS["quickstart"], loss_axis="log")
    with pytest.raises(UsageError, match="--loss_axis='cubic': must be"):
        load_config(old_file(tmp_path / "config.json", loss_scale="cubic"))
    # Today's setting of that name is a number.
    found = load_config(old_file(tmp_path / "config.json", loss_scale=1024, loss_axis="log"))
    assert (found.loss_scale, found.loss_axis) == (1024, "log")


def test_a_setting_that_is_gone_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old_file(tmp_path / "config.json", fast=True)
    with pytest.raises(UsageError, match="--fast=True: this version"):
        load_config(path)
    monkeypatch.setitem(RENAMED, "fast", "")
    assert load_config(path) == presets.PRESETS["quickstart"]
    with pytest.raises(UsageError, match="--fast=1: no longer exists"):
        flags.parse(["--fast=1"], TrainConfig(), "")


def test_the_old_flag_names_the_new_one() -> None:
    with pytest.raises(UsageError, match=r"--loss_scale=log: .* is called --loss_axis now"):
        read_settings(["--loss_scale=log"])
    assert set(RENAMED) & {*flatten(TrainConfig()), *nanogpt_flags.FLAGS} <= {"loss_scale"}


def test_a_run_older_than_a_setting_has_what_was_computed_then() -> None:
    @dataclasses.dataclass
    class Config:
        width: int = architecture(1, "Width.")
        shape: str = architecture("round", "Shape, which was square before it could be chosen.")
        angle: int = architecture(1, "Angle.", older=0)

    assert complete(Config, {"width": 2}) == {"width": 2, "shape": "round", "angle": 0}
    assert complete(Config, {"angle": 3})["angle"] == 3


@pytest.mark.parametrize("name", names(TrainConfig, architecture))
def test_a_record_without_a_setting_locks_nobody_out(name: str) -> None:
    """Unless the run now has another value than it had then."""
    old, value = record(), getattr(GPTConfig(), name)
    changes = {name: value} if name != "n_embd" else {"n_embd": value, "n_head": 12}
    del old["settings"][name]
    if name == "n_embd":
        old["settings"]["n_head"] = 12
    elif name == "n_head":
        changes, old["settings"]["n_embd"] = {"n_head": 12, "n_embd": 48}, 48
    check_record(old, record(**changes), [], lambda said: pytest.fail(said))


# ---- --help


@pytest.mark.parametrize("columns", [50, 80, 200])
@pytest.mark.parametrize("config", PROGRAMS)
def test_help_fits_the_terminal(
    config: Any, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        flags.parse(["--seed=x", "--help"], config(), "About.", "convert_gpt2.py SOURCE")
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    shown = [match[1] for line in lines if (match := re.match(r"  --(\w+)", line))]
    assert shown == list(flatten(config()))
    defaults = " ".join(" ".join(lines).split())
    assert defaults.count("(default: ") == len(shown)
    sections = [line for line in lines if re.fullmatch(r"[A-Z][a-z ]+:", line)]
    wanted = [f.metadata["section"] for f in fields_of(config).values() if f.metadata["section"]]
    assert [line[:-1] for line in sections] == wanted


def test_help_of_train_is_in_sections_and_has_the_presets_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        read_settings(["gpt2", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    order = [
        "Data: --dataset",
        "Model: --n_layer",
        "Length and batch:",
        "Optimizer:",
        "Checkpoints:",
    ]
    places = [out.index(words) for words in order]
    assert places == sorted(places)
    assert "Number of optimizer steps. (default: 600000)" in out and "(default: empty)" in out
