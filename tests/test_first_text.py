"""What is compiled ahead of the first text is what the sampler then calls."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest

import sample
from gptjax import first_text, model, sampling
from gptjax.config import SampleConfig
from gptjax.conversion import huggingface, sources
from gptjax.errors import NonFiniteError
from gptjax.terminal import cli

from .helpers import BYTES, scaled_params, tiny

HOW = SampleConfig(temperature=0.9, repetition_penalty=1.1)  # of this file alone: nothing is found


def compiled_by_calls(
    caplog: pytest.LogCaptureFixture, width: int, ahead: list[list[int]], called: list[list[int]]
) -> set[str]:
    """Return the sampler's programs that its calls compile, after those of `ahead` were."""
    cfg = tiny(n_embd=width, block_size=128)
    (device, *_) = jax.devices()
    with ThreadPoolExecutor() as pool:
        programs = first_text.compile_programs(pool, cfg, device, ahead, HOW, max_new_tokens=30)
        assert len([program.result() for program in programs]) == 4
    params = jax.device_put(scaled_params(cfg, jax.random.key(0)), device)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    with jax.log_compiles():
        decoder = model.prepare_for_decoding(cfg, params)
        for _ in sampling.generate(cfg, decoder, called, HOW, max_new_tokens=30):
            pass
    lines = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    names = ("prepare", "row_keys", "prefill", "decode")
    return {name for name in names if any(f"jit({name})" in line for line in lines)}


def test_the_sampler_calls_what_was_compiled(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [[3] * 40, [5]]
    assert compiled_by_calls(caplog, 20, prompts, prompts) == set()


def test_compiled_ahead_gate_turns_red(caplog: pytest.LogCaptureFixture) -> None:
    """The mistake: programs of another number of rows."""
    assert {"prefill", "decode"} <= compiled_by_calls(caplog, 28, [[3]], [[3], [5]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    huggingface.write_folder(tmp_path, BYTES, scaled_params(BYTES, jax.random.key(0)), None)
    return tmp_path


def say(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    run = ["--compile_cache=off", f"--init_from={folder}", "--start=abc", "--max_new_tokens=9"]
    code = cli.run(sample.main, run)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return str(out)


def test_the_text_is_the_same_whether_or_not_it_was_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    restore_process: None,
) -> None:
    """Also where compiling fails: the calls compile again."""
    load_model = sources.load_model

    def load(name: str, **rest: Any) -> Any:
        return load_model(name, sources.SourceConfig(tokenizer="byte"), **rest)

    compile_programs, calls = first_text.compile_programs, []

    def note(*args: Any, **rest: Any) -> Any:
        calls.append("compiled")
        return compile_programs(*args, **rest)

    monkeypatch.setattr(sources, "load_model", load)
    monkeypatch.setattr(first_text, "compile_programs", note)
    texts = []
    for cores in (1, 4):
        monkeypatch.setattr(sample, "available_cpus", lambda cores=cores: cores)
        texts.append(say(capsys, folder))

    def fail(*args: object, **rest: object) -> Any:
        calls.append("failed")
        raise NonFiniteError("not compiled")

    monkeypatch.setattr(first_text, "compile_programs", fail)
    texts.append(say(capsys, folder))
    assert texts[0] == texts[1] == texts[2] != ""
    assert calls == ["compiled", "failed"]  # on four cores alone
