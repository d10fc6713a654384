"""A model gets another vocabulary or a shorter context as it is imported."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import convert_gpt2
from gptjax import model
from gptjax.conversion import huggingface
from gptjax.conversion.convert import import_run
from gptjax.conversion.resize import resize
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import HEAD, Source, named_tensors, read_params
from gptjax.errors import DataError, UsageError
from gptjax.terminal import cli

from .helpers import scaled_params, tiny

CFG = tiny(vocab_size=300)


def source_of(cfg: Any, params: model.Params) -> Source:
    arrays = dict(named_tensors(cfg, params))
    table = {name: (array.shape, "float32") for name, array in arrays.items()}
    return Source(cfg, table, lambda name: arrays[name], "here", (Path("here/file"),))


@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize(("vocab_size", "block_size"), [(256, 0), (400, 0), (0, 8), (310, 8)])
def test_what_stays_is_the_same(tie_head: bool, vocab_size: int, block_size: int) -> None:
    cfg = dataclasses.replace(CFG, tie_head=tie_head)
    params = scaled_params(cfg, jax.random.key(0))
    source, notes = resize(source_of(cfg, params), vocab_size, block_size)
    assert len(notes) == (vocab_size > 0) + (block_size > 0)
    assert source.cfg.vocab_size == (vocab_size or 300)
    assert source.cfg.block_size == (block_size or 16)
    found = read_params(source)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, model.param_shapes(source.cfg))
    kept = {"wpe": source.cfg.block_size, "wte": min(source.cfg.vocab_size, 300)}
    kept |= {} if tie_head else {"lm_head": kept["wte"]}
    for name, rows in kept.items():
        one, other = (tree.pop(name)["embedding"][:rows] for tree in (found, params))
        np.testing.assert_array_equal(one, other)
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("tie_head", [True, False])
def test_new_rows_are_drawn_as_the_others_and_always_the_same(tie_head: bool) -> None:
    cfg = dataclasses.replace(CFG, tie_head=tie_head)
    params = jax.device_get(scaled_params(cfg, jax.random.key(0)))
    params["wte"]["embedding"] = params["wte"]["embedding"] * np.linspace(0.1, 2, 32) + 1
    first, second = (read_params(resize(source_of(cfg, params), 5000)[0]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for name in ["wte"] if tie_head else ["wte", "lm_head"]:
        old, new = params[name]["embedding"][:300], first[name]["embedding"][300:5000]
        assert np.abs(new.mean(axis=0) - old.mean(axis=0)).max() < 0.06 * old.std()
        assert np.allclose(new.std(axis=0), old.std(axis=0), rtol=0.06)
        assert len(np.unique(new[:, 0])) > 4000
    if not tie_head:
        rows = [first[name]["embedding"][300:5000].ravel() for name in ("wte", "lm_head")]
        assert abs(np.corrcoef(rows[0], rows[1])[0, 1]) < 0.2


def test_a_stored_head_that_is_tied_stays_equal() -> None:
    params = scaled_params(CFG, jax.random.key(0))
    source = source_of(CFG, params)
    arrays = dict(named_tensors(CFG, params))
    arrays[HEAD] = arrays["wte.weight"].copy()
    table = {**source.tensors, HEAD: ((300, 32), "float32")}
    source = source._replace(tensors=table, read=lambda name: arrays[name])
    assert read_params(resize(source, 400)[0])["wte"]["embedding"][300:400].all()


@pytest.mark.parametrize(
    ("sizes", "flag"),
    [
        ({"block_size": 17}, "--block_size=17"),
        ({"block_size": -1}, "--block_size=-1"),
        ({"vocab_size": -5}, "--vocab_size=-5"),
    ],
)
def test_other_sizes_are_refused(sizes: dict[str, int], flag: str) -> None:
    source = source_of(CFG, scaled_params(CFG, jax.random.key(0)))
    with pytest.raises(UsageError, match=flag):
        resize(source, **sizes)


def test_a_damaged_shape_is_still_named() -> None:
    source = source_of(CFG, scaled_params(CFG, jax.random.key(0)))
    source = source._replace(tensors={**source.tensors, "wte.weight": ((299, 32), "float32")})
    with pytest.raises(DataError, match=r"wte\.weight has shape \(299, 32\)"):
        read_params(resize(source, 400)[0])


@pytest.mark.usefixtures("restore_process")
def test_the_command_says_what_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    huggingface.write_folder(tmp_path / "hf", CFG, scaled_params(CFG, jax.random.key(0)), None)
    flags = ["import", f"{tmp_path}/hf", f"--out_dir={tmp_path}/run", "--tokenizer=byte"]
    assert cli.run(convert_gpt2.main, [*flags, "--vocab_size=256", "--block_size=8"]) == 0
    said = capsys.readouterr().out
    assert "rows 256 to 299" in said and "positions 8 to 15" in said
    same = SourceConfig(tokenizer="byte")
    run, _ = import_run(f"{tmp_path}/hf", tmp_path / "b", same, vocab_size=256, block_size=0)
    assert (run.config.model.vocab_size, run.config.model.block_size) == (256, 16)
