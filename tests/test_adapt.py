"""Defaults make room for what was given; what was given is honoured or refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import convert_gpt2
import sample
import train
from gptjax.checkpoints.run_folder import Run
from gptjax.commands import doctor, evaluate
from gptjax.config import GPTConfig, TrainConfig
from gptjax.config_file import to_json
from gptjax.errors import UsageError
from gptjax.presets import PRESETS
from gptjax.terminal import cli, flags
from gptjax.tokenizer import ByteTokenizer
from gptjax.training import adapt, origin
from gptjax.training.run_settings import read_settings


def parse(tmp_path: Path, *argv: str) -> TrainConfig:
    return read_settings([*argv, f"--out_dir={tmp_path / 'out'}"])[0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [0, 1, 50])
def test_a_short_run_of_any_preset(preset: str, steps: int, tmp_path: Path) -> None:
    config = parse(tmp_path, preset, f"--max_iters={steps}")
    own = PRESETS[preset].warmup_iters
    assert config.max_iters == steps
    assert config.warmup_iters == own <= steps or config.warmup_iters == steps // 10


@pytest.mark.parametrize("preset", PRESETS)
def test_a_low_rate_in_any_preset(preset: str, tmp_path: Path) -> None:
    config = parse(tmp_path, preset, "--learning_rate=1e-5")
    assert config.learning_rate == 1e-5
    assert config.min_lr == pytest.approx(min(1e-6, PRESETS[preset].min_lr))


def test_what_fits_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(tmp_path, "--max_iters=100", "--learning_rate=2e-3", "--n_embd=192")
    assert (config.warmup_iters, config.min_lr, config.model.n_head) == (100, 1.5e-4, 3)
    assert capsys.readouterr().err == ""


def test_heads_and_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(tmp_path, "--n_embd=128", "--lr_decay_iters=40")
    assert (config.model.n_embd, config.model.n_head) == (128, 2)
    assert config.warmup_iters == 4
    said = capsys.readouterr().err
    assert "n_head is 2" in said and "warmup_iters is 4" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max_iters=50", "--warmup_iters=60"], "--warmup_iters=60"),
        (["--warmup_iters=2000"], "--warmup_iters=2000"),
        (["--learning_rate=1e-4", "--min_lr=2e-4"], "--min_lr=0.0002"),
        (["--min_lr=1"], "--min_lr=1.0"),
        (["--n_embd=128", "--n_head=3"], "--n_head=3"),
        (["--n_head=5"], "--n_head=5"),
        (["--max_iters=-1"], "--max_iters=-1"),
        (["--learning_rate=-1"], "--learning_rate=-1"),
        (["--learning_rate=nan"], "--learning_rate=nan"),
        (["--max_iters=some"], "--max_iters"),
        (["--max_iters=nan"], "--max_iters=nan"),
        (["--lr_decay_iters=inf"], "--lr_decay_iters=inf"),
        (["--n_embd=inf"], "--n_embd=inf"),
        (["--n_embd=0"], "--n_embd=0"),
    ],
)
def test_what_was_given_is_refused(argv: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        parse(tmp_path, *argv)


# ---- The batch and the devices


def batch(config: TrainConfig, devices: int, *fixed: str) -> tuple[int, int, bool]:
    config, note = adapt.fit_batch(config, devices, fixed)
    return config.batch_size, config.gradient_accumulation_steps, note is not None


def test_every_preset_starts_on_any_number_of_devices() -> None:
    finetune = PRESETS["finetune_gpt2"]
    assert batch(finetune, 1) == (1, 32, False)
    assert batch(finetune, 2) == (2, 16, True)
    assert batch(finetune, 8) == (8, 4, True)
    assert batch(finetune, 3) == (3, 11, True)  # 32 windows a step cannot be shared by 3
    assert batch(PRESETS["quickstart"], 16) == (16, 1, True)
    assert batch(finetune, 2, "gradient_accumulation_steps") == (2, 32, True)
    for preset in PRESETS.values():
        for devices in (1, 2, 3, 4, 6, 8, 64):
            size, passes, _ = batch(preset, devices)
            assert size % devices == 0 and size * passes >= preset.batch_size
    for name in ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"):
        for devices in (1, 2, 4, 8, 64, 256):
            size, passes, _ = batch(PRESETS[name], devices)
            assert size * passes * 1024 == 524_288 and size <= max(16, devices)


@pytest.mark.parametrize(
    ("size", "devices", "choices"), [(12, 8, "take 8 or 16"), (3, 8, "take 8"), (17, 4, "16 or 20")]
)
def test_a_batch_that_was_given_is_refused_with_its_neighbours(
    size: int, devices: int, choices: str
) -> None:
    config = TrainConfig(batch_size=size)
    with pytest.raises(UsageError, match=f"{choices}$"):
        adapt.fit_batch(config, devices, {"batch_size"})


HALF_A_MILLION = TrainConfig(batch_size=12, batch_tokens=524_288)  # context 1024: 512 sequences


@pytest.mark.parametrize(
    ("settings", "devices", "fitted"),
    [
        ({}, 1, (8, 64)),  # the largest below 12 that divides 512
        ({}, 4, (8, 64)),
        ({}, 16, (16, 32)),
        ({}, 512, (512, 1)),
        ({"batch_size": 64}, 8, (64, 8)),
        ({"gradient_accumulation_steps": 2}, 8, (256, 2)),
        ({"gradient_accumulation_steps": 8, "batch_size": 64}, 8, (64, 8)),
        ({"batch_tokens": 96 * 1024}, 3, (12, 8)),
        ({"batch_tokens": 1024}, 1, (1, 1)),
        ({"batch_tokens": 0}, 1, (12, 1)),
    ],
    ids=str,
)
def test_a_step_of_so_many_tokens(
    settings: dict[str, int], devices: int, fitted: tuple[int, int]
) -> None:
    config = dataclasses.replace(HALF_A_MILLION, **settings)  # type: ignore[arg-type]
    size, passes, _ = batch(config, devices, "batch_tokens", *settings)
    assert (size, passes) == fitted
    tokens = size * passes * 1024
    assert config.batch_tokens in (0, tokens)
    found, _ = adapt.fit_batch(config, devices, {"batch_tokens", *settings})
    assert adapt.fit_batch(found, devices, ()) == (found, None)  # as a resumed run


@pytest.mark.parametrize(
    ("settings", "devices", "said"),
    [
        ({"batch_tokens": 500_000}, 1, "multiple of 1024 .*take 499712 or 500736$"),
        ({"batch_tokens": 500_000}, 8, "multiple of 8192 .*take 499712 or 507904$"),
        ({"batch_tokens": 5}, 8, "multiple of 8192 .*take 8192$"),
        ({"batch_size": 48}, 8, "multiple of 49152 .*batch_size=48.*take 491520 or 540672$"),
        ({"gradient_accumulation_steps": 3}, 2, "multiple of 6144 .*take 522240 or 528384$"),
        (
            {"gradient_accumulation_steps": 4, "batch_size": 64},
            8,
            r"--batch_tokens=524288: must be 262144 \(block_size=1024 x batch_size=64 x grad",
        ),
        ({"batch_size": 12}, 8, "--batch_size=12: must be divisible by 8 devices; take 8 or 16$"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_are_refused_with_their_neighbours(
    settings: dict[str, int], devices: int, said: str
) -> None:
    config = dataclasses.replace(HALF_A_MILLION, **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=said):
        adapt.fit_batch(config, devices, {"batch_tokens", *settings})


def test_a_preset_s_tokens_make_room_for_what_was_given() -> None:
    gpt2 = PRESETS["gpt2"]
    for settings, devices, tokens in (
        ({"gradient_accumulation_steps": 1}, 1, 16 * 1024),
        ({"gradient_accumulation_steps": 40, "batch_size": 12}, 1, 480 * 1024),
        ({"batch_size": 48}, 1, 11 * 48 * 1024),
        ({}, 3, 28 * 18 * 1024),
    ):
        config = dataclasses.replace(gpt2, **settings)  # type: ignore[arg-type]
        found, note = adapt.fit_batch(config, devices, settings)
        assert found.batch_tokens == tokens and note is not None
        assert found.batch_size * found.gradient_accumulation_steps * 1024 == tokens
    short = dataclasses.replace(gpt2, model=dataclasses.replace(gpt2.model, block_size=1000))
    found, note = adapt.fit_batch(short, 1, {"block_size"})
    assert found.batch_tokens == 524_000 and note is not None and "524,000" in note


def test_evaluations_do_not_depend_on_the_devices() -> None:
    finetune = PRESETS["finetune_gpt2"]
    for devices in (1, 2, 8):
        config, _ = adapt.fit_batch(finetune, devices, ())
        assert (config.eval_batch_size or config.batch_size) == 1
    given = dataclasses.replace(PRESETS["gpt2"], batch_size=64)
    assert adapt.fit_batch(given, 8, {"batch_size"})[0].eval_batch_size == 0  # 64, as asked for


# ---- The batch of a run that goes on


def resumed(tmp_path: Path, *argv: str, **stored: int) -> TrainConfig:
    """The settings of a run of 8 sequences a step, as it goes on with these flags."""
    (tmp_path / "out").mkdir(exist_ok=True)
    settings = to_json(TrainConfig(**{"batch_size": 8, **stored}))  # type: ignore[arg-type]
    (tmp_path / "out" / "config.json").write_text(settings)
    config, given = read_settings(
        [f"--out_dir={tmp_path / 'out'}", "--init_from=resume", *argv],
    )
    return adapt.fit_batch(config, 4, given, resumed=True)[0]


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ([], (8, 1, 0)),
        (["--batch_size=4"], (4, 2, 8)),  # the same tokens, and the same evaluations
        (["--batch_size=4", "--gradient_accumulation_steps=2"], (4, 2, 8)),
        (["--batch_size=4", "--allow_change=batch_size"], (4, 1, 0)),
        (["--batch_size=auto"], (0, 1, 8)),
        (["--batch_size=4", "--eval_batch_size=2"], (4, 2, 2)),
    ],
    ids=str,
)
def test_a_run_that_goes_on_keeps_the_tokens_of_a_step(
    argv: list[str], found: tuple[int, int, int], tmp_path: Path
) -> None:
    config = resumed(tmp_path, *argv)
    sizes = config.batch_size, config.gradient_accumulation_steps, config.eval_batch_size
    assert sizes == found


def test_a_run_that_goes_on_fits_its_batch_to_the_devices(tmp_path: Path) -> None:
    config = resumed(tmp_path, batch_size=6, gradient_accumulation_steps=2)
    assert (config.batch_size, config.gradient_accumulation_steps) == (4, 3)
    with pytest.raises(UsageError, match="by 4 devices; take 4 or 8 with --allow_change=batch_"):
        resumed(tmp_path, batch_size=6)


# ---- Another model's parameters


SOURCE = Run(
    TrainConfig(model=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256)),
    ByteTokenizer(),
    {},
    0,
)


def combine(*given: str, **changes: Any) -> GPTConfig:
    tokenizer = changes.pop("tokenizer", "auto")
    model = dataclasses.replace(GPTConfig(vocab_size=256, dropout=0.1), **changes)
    config = TrainConfig(model=model, tokenizer=tokenizer, init_from="out/other")
    return origin.model_of_source(config, SOURCE, given or set(changes))


def test_a_source_brings_its_model() -> None:
    expected = dataclasses.replace(SOURCE.config.model, dropout=0.1)
    assert combine("dropout") == expected
    assert combine(block_size=8) == dataclasses.replace(expected, block_size=8)
    assert combine(block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True) == expected
    assert combine("tokenizer", tokenizer="byte") == expected


@pytest.mark.parametrize(
    "changes",
    [
        *({"block_size": 17}, {"n_layer": 3}, {"n_head": 1}, {"n_embd": 36}, {"bias": False}),
        *({"vocab_size": 257}, {"vocab_multiple": 1}, {"tokenizer": "char"}),
        {"activation": "gelu"},
    ],
    ids=str,
)
def test_a_flag_that_a_source_cannot_honour_is_refused(changes: dict[str, Any]) -> None:
    (name, value) = next(iter(changes.items()))
    with pytest.raises(UsageError, match=f"--{name}={value}: .*--init_from=out/other"):
        combine(name, **changes)


def test_a_vocabulary_that_no_tokenizer_has_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--dataset={folder}/corpus.txt", f"--out_dir={tmp_path}/out", "--block_size=8"]
    assert cli.run(train.main, [*argv, "--vocab_size=99", "--compile_cache=off"]) == 2
    assert "--vocab_size=99: must be the tokenizer's" in capsys.readouterr().err


def test_flags_are_checked_against_the_model_that_there_will_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    theirs = TrainConfig(model=GPTConfig(n_layer=3, n_head=5, n_embd=50, vocab_size=256))
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(theirs)))
    argv = [f"--init_from={tmp_path / 'run'}", "--n_head=5", "--n_embd=50", "--unroll=3"]
    model = parse(tmp_path, *argv).model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (3, 5, 50, 96)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["resume_step=1", "allow_change=seed"])
def test_what_is_for_resuming_is_refused_elsewhere(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--dataset={folder}/corpus.txt", f"--out_dir={tmp_path}/out", "--compile_cache=off"]
    assert cli.run(train.main, [*argv, f"--{name}"]) == 2
    assert "needs --init_from=resume" in capsys.readouterr().err


# ---- Words of nanoGPT


@pytest.mark.parametrize(
    ("argv", "instead"),
    [
        (["--device=cpu"], "JAX_PLATFORMS=cpu"),
        (["--device", "cuda"], "JAX_PLATFORMS"),
        (["--compile=False"], "leave the flag out"),
        (["--eval_only=True"], "--max_iters=0"),
        (["--decay_lr=False"], "--schedule=constant"),
        (["--wandb_log=True"], "metrics.jsonl"),
        (["--wandb-project=x"], "metrics.jsonl"),
        (["--backend=nccl"], "leave the flag out"),
        (["--always_save_checkpoint=True"], "--checkpoint_interval"),
        (
            ["config/train_shakespeare_char.py", "--compile=False"],
            "python train.py shakespeare_char",
        ),
        (["--seed=1", "config/train_gpt2.py"], "python train.py gpt2"),
        (["config/mine.py"], "presets.py"),
    ],
)
def test_what_people_type_who_know_nanogpt(argv: list[str], instead: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        parse(tmp_path, *argv)
    assert instead in str(error.value)


def test_sample_knows_the_words_too() -> None:
    for word in ("--device=cpu", "config/eval_gpt2.py"):
        with pytest.raises(UsageError, match=r"take|JAX"):
            flags.parse(["--seed=3", word], sample.SamplerConfig(), "")


def test_a_text_may_be_a_python_file(tmp_path: Path) -> None:
    assert parse(tmp_path, "--dataset", "model.py").dataset == "model.py"


def test_the_named_commands_exist(tmp_path: Path) -> None:
    from gptjax.terminal.nanogpt_flags import CONFIGS

    for command in CONFIGS.values():
        python, script, *argv = command.split()
        assert (python, script) == ("python", "train.py")
        parse(tmp_path, *argv)


# ---- Paths


def test_every_path_knows_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(dataclasses.asdict(TrainConfig(seed=7)))
    )
    names = ("out_dir", "dataset", "tokenizer_dir", "init_from", "compile_cache", "replay")
    config = read_settings([f"--{name}=~/{name}" for name in names])[0]
    for name in names:
        assert getattr(config, name) == f"{tmp_path}/{name}"
    resumed = read_settings(["--out_dir", "~/run", "--init_from=resume"])[0]
    assert (resumed.seed, resumed.out_dir) == (7, f"{tmp_path}/run")


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (train.main, ["--out_dir=~nobody_at_all/x"]),
        (sample.main, ["--out_dir=~nobody_at_all/x"]),
        (convert_gpt2.main, ["import", "~nobody_at_all/x", "--out_dir=y"]),
        (doctor.main, ["~nobody_at_all/x"]),
        (evaluate.main, ["~nobody_at_all/x", "--task=lambada", "--data=x"]),
        (doctor.main, [""]),
    ],
)
@pytest.mark.usefixtures("restore_process")
def test_a_home_that_is_not_there(
    main: Any, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(main, argv) == 2
    assert re.search(r"no such home folder|is empty", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["out_dir", "dataset", "init_from", "compile_cache"])
@pytest.mark.parametrize("argv", ["--{}=", "--{} ''"])
def test_an_empty_path_is_refused(name: str, argv: str) -> None:
    with pytest.raises(UsageError, match=f"--{name}"):
        read_settings(argv.format(name).replace("''", "").split(" "))[0]
