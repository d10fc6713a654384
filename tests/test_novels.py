"""The model that comes with gptjax: its file, its text, its loss, and the commands that take it."""

import hashlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert_gpt2
import sample
import train
from gptjax import sampling
from gptjax.checkpoints.run_folder import Run
from gptjax.commands import evaluate
from gptjax.config import GPTConfig, SampleConfig
from gptjax.conversion import hub, verify
from gptjax.conversion.reference import load_reference
from gptjax.conversion.sources import SourceConfig, load_model, open_source
from gptjax.errors import UsageError
from gptjax.loss import loss_fn
from gptjax.model import Params, count_params, prepare_for_decoding
from gptjax.terminal import cli
from gptjax.tokenizer import decode

from .helpers import ROOT, need, tiny

FOLDER = ROOT / "gptjax" / "models" / "novels"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PROMPT = "It was a dark night, and"
GREEDY = ' the wind was so cold that it was cold.\n\n"I am afraid I shall be very sorry," said the'
# James Weldon Johnson, The Autobiography of an Ex-Colored Man (1912), chapter 1: of the texts for
# validation, on which the model was not trained.
PARAGRAPH = (
    "I was born in a little town of Georgia a few years after the close of the Civil War. I shall "
    "not mention the name of the town, because there are people still living there who could be "
    "connected with this narrative. I have only a faint recollection of the place of my birth. At "
    "times I can close my eyes and call up in a dreamlike way things that seem to have happened "
    "ages ago in some other world."
)
LOSS = 3.079  # nats per token of the paragraph, as measured; 5.650 with q and k swapped


def test_every_book_is_named() -> None:
    train_books, val_books = (
        part.splitlines()[2:]
        for part in (FOLDER / "books.txt")
        .read_text(encoding="utf-8")
        .split("\n\nValidation text, ")
    )
    assert f"{len(train_books)} English books" in README
    assert f"{len(val_books)} others" in README
    assert any(line.startswith("The Autobiography of an Ex-Colored Man") for line in val_books)
    assert not set(train_books) & set(val_books)


@pytest.fixture(scope="module")
def run() -> Run:
    assert hub.OWN["novels"] == FOLDER
    return load_model("novels")


def settings(run: Run) -> GPTConfig:
    """In float32 on any machine, so that the numbers are the same."""
    return tiny(**vars(run.config.model) | {"dtype": "float32", "attention": "xla"})


def greedy(run: Run, params: Params, count: int = 24) -> str:
    """What a model takes for the likeliest continuation of the prompt."""
    ids = run.tokenizer.encode(PROMPT).tolist()
    cfg, how = settings(run), SampleConfig(temperature=0)
    decoder = prepare_for_decoding(cfg, params)
    pieces = sampling.generate(cfg, decoder, [ids], how, max_new_tokens=count)
    return decode(run.tokenizer, np.concatenate(list(pieces), axis=1)[0])


def loss_of(run: Run, params: Params, text: str = PARAGRAPH) -> float:
    """The mean loss of a text, in nats per token."""
    ids = jnp.asarray(run.tokenizer.encode(text))[None]
    return float(jax.jit(loss_fn, static_argnums=0)(settings(run), params, ids))


def with_q_and_k_swapped(params: Params) -> Params:
    """The same numbers in another place."""

    def swap(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array:
        if "c_attn" not in jax.tree_util.keystr(path):
            return leaf
        q, k, v = jnp.split(leaf, 3, axis=-1)
        return jnp.concatenate([k, q, v], axis=-1)

    return jax.tree.map_with_path(swap, params)


def test_the_file_is_the_one_that_its_readme_describes(run: Run) -> None:
    weights = FOLDER / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in README
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    assert f"{count_params(run.config.model):,} parameters" in README
    header = json.loads(
        weights.read_bytes()[8:][: int.from_bytes(weights.read_bytes()[:8], "little")]
    )
    assert {about["dtype"] for name, about in header.items() if name != "__metadata__"} == {"BF16"}


def test_it_writes_the_committed_text_and_predicts_a_novel(run: Run) -> None:
    assert greedy(run, run.params) == GREEDY
    assert abs(loss_of(run, run.params) - LOSS) <= 0.01
    # The planted mistake: q and k swapped.
    wrong = with_q_and_k_swapped(run.params)
    assert greedy(run, wrong) != GREEDY and loss_of(run, wrong) > LOSS + 0.5
    assert loss_of(run, run.params, " ".join(sorted(PARAGRAPH.split()))) > LOSS + 0.5


def test_it_is_the_model_that_transformers_reads(run: Run) -> None:
    need("transformers")
    ids = np.asarray(run.tokenizer.encode(PARAGRAPH))[None, :48]
    reference = load_reference(open_source("novels", SourceConfig()))
    for params, fails in ((run.params, False), (with_q_and_k_swapped(run.params), True)):
        checks = list(verify.compare_outputs(settings(run), params, reference, ids))
        assert (verify.first_failure(checks) is not None) == fails


@pytest.mark.slow
def test_verify_holds(capsys: pytest.CaptureFixture[str]) -> None:
    need("transformers")
    assert convert_gpt2.main(["verify", "novels", f"--against={FOLDER}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_every_command_that_takes_a_model_knows_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = "--compile_cache=off"
    argv = ["--init_from=novels", f"--start={PROMPT}", "--temperature=0", "--dtype=float32", quiet]
    assert sample.main([*argv, "--max_new_tokens=24"]) == 0
    assert capsys.readouterr().out == f"{PROMPT}{GREEDY}\n"
    (tmp_path / "text.txt").write_text(PARAGRAPH)
    task = ["--task=wikitext2", f"--data={tmp_path / 'text.txt'}", "--dtype=float32", quiet]
    assert evaluate.main(["novels", *task]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["run"] == "novels" and abs(said["nll"] - LOSS) <= 0.01
    assert convert_gpt2.main(["export", "novels", f"--out_dir={tmp_path / 'hf'}"]) == 0
    assert convert_gpt2.main(["import", "novels", f"--out_dir={tmp_path / 'run'}"]) == 0
    assert "--against=novels" in capsys.readouterr().out


def test_training_goes_on_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(f"{PARAGRAPH}\n\n" * 40)
    argv = [
        f"--dataset={tmp_path / 'text.txt'}",
        f"--out_dir={tmp_path / 'out'}",
        "--dtype=float32",
    ]
    short = ["--max_iters=0", "--block_size=32", "--batch_size=8", "--eval_iters=1"]
    quiet = ["--sample_tokens=0", "--compile_cache=off"]
    assert cli.run(train.main, [*argv, *short, *quiet, "--init_from=novels"]) == 0
    *_, found = re.findall(r"val loss (\d\.\d+)", capsys.readouterr().out)
    assert float(found) < LOSS + 1


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novels").mkdir()
    with pytest.raises(UsageError, match="novels is not a run folder"):
        convert_gpt2.main(["export", "novels", f"--out_dir={tmp_path / 'hf'}"])


def test_an_unknown_name_is_told_which_one_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file or folder /no/such; with gptjax comes novels"):
        convert_gpt2.main(["import", "/no/such", f"--out_dir={tmp_path / 'run'}"])
    with pytest.raises(UsageError, match="--revision=main: novels has none"):
        convert_gpt2.main(["import", "novels", "--revision=main", f"--out_dir={tmp_path / 'run'}"])


def test_the_heads_that_lesson_4_names_are_those_of_its_table() -> None:
    page = (ROOT / "docs" / "lessons" / "4_load_gpt2.md").read_text(encoding="utf-8")
    prose = " ".join(page.split())
    table = re.findall(r"layer (\d), head (\d) +(\d+)% +(\d+)%", page)
    assert len(table) == 3
    for layer, head, share, mean in table:
        assert re.search(f"[Hh]ead {head} of layer {layer} ", prose)
        told = (
            f"{share} % of its attention to the token before, where the mean of all heads is {mean}"
        )
        assert f"({share} %, mean {mean} %)" in prose or f"{told} %" in prose
    times = count_params(GPTConfig()) // count_params(load_model("novels").config.model)
    assert f"GPT-2 124M has {times} times as many" in prose
