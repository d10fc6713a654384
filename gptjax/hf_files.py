"""The files of a tokenizer in Hugging Face's folders, read as transformers reads them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from gptjax.errors import DataError
from gptjax.gpt2_files import gpt2_tokens
from gptjax.hf_tokenizer import (
    FILES,
    SENTENCEPIECE,
    VOCABULARIES,
    HFTokenizer,
    read_library,
    read_object,
    refusing,
    special_tokens,
    vocabulary,
)
from gptjax.tokenizer import GPT2Tokenizer, Tokenizer
from gptjax.tokens import END_OF_TEXT

LIMIT = 2**27  # bytes of a file
# Beginnings of tokenizer_class: of the byte-level BPE in vocab.json, of the WordPiece in vocab.txt.
BPES = ("GPT2", "Roberta", "Bart", "Longformer", "PreTrainedTokenizerFast", "TokenizersBackend")
WORDPIECES = ("Bert", "DistilBert", "Electra", "PreTrainedTokenizerFast", "TokenizersBackend")
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # special tokens, in the order of adding
AS_IT_IS = ("lstrip", "rstrip", "single_word", "normalized", "special")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def read_hf_folder(folder: Path, n_ids: int | None = None) -> Tokenizer | None:
    """Return the tokenizer of a folder, None if there is none.

    GPT-2's own vocabulary, without added tokens, becomes a GPT2Tokenizer, which is faster.

    Args:
        folder: holds a tokenizer.json, vocab.json and merges.txt, or BERT's vocab.txt.
        n_ids: ids of the model, as far as they are known: special tokens that are named and have no
            id yet get the next ones, as transformers gives them, if the model has such.

    Raises:
        DataError: its files cannot be read, contradict each other, or are of another program.
    """
    paths = [folder / name for name in FILES if (folder / name).is_file()]
    files = {path.name: read_text(path) for path in paths}
    if not set(files) & set(VOCABULARIES):
        return None
    try:
        if tokens := own_gpt2(files, n_ids):
            return GPT2Tokenizer(tokens, str(folder))
        library = make_library(files)
        vocabulary(library)
        changed = add_tokens(library, files, n_ids)
        as_it_is = "" if changed else files.get("tokenizer.json", "")
        return HFTokenizer(as_it_is or library.to_str(), files)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error) if isinstance(error, DataError) else repr(error)
        raise DataError(f"cannot read the tokenizer ({folder}): {reason}") from error


def read_text(path: Path) -> str:
    """Return the text of a file byte for byte: what is no UTF-8 becomes lone surrogates."""
    try:
        if path.stat().st_size > LIMIT:
            raise DataError(f"cannot read {path}: larger than {LIMIT:,} bytes")
        return path.read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def make_library(files: Mapping[str, str]) -> Library:
    """Return the library's tokenizer of the first vocabulary among the files."""
    said = read_object(files.get("tokenizer_config.json", "{}"), "tokenizer_config.json")
    if "tokenizer.json" in files:
        return read_library(files["tokenizer.json"])
    if "vocab.json" in files and "merges.txt" in files:
        require_class(said, BPES, "vocab.json")
        return make_bpe(files, said.get("add_prefix_space") is True)
    if "vocab.txt" in files:
        require_class(said, WORDPIECES, "vocab.txt")
        return make_wordpiece(files, said)
    found = next(name for name in VOCABULARIES if name in files)
    what = "is of SentencePiece" if found in SENTENCEPIECE else "alone does not say how it is used"
    raise DataError(
        f"{found} {what}; save a tokenizer.json by transformers' "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def require_class(said: Mapping[str, Any], known: tuple[str, ...], file: str) -> None:
    """Raise DataError if tokenizer_config.json names a tokenizer that uses a file otherwise."""
    named = said.get("tokenizer_class")
    if named is not None and not str(named).startswith(known):
        raise DataError(
            f"tokenizer_class={named!r} uses {file} in a way of its own; save a tokenizer.json by "
            "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )


def make_bpe(files: Mapping[str, str], add_prefix_space: bool) -> Library:
    """Return a byte-level BPE as transformers' GPT2Tokenizer makes it."""
    vocab = read_object(files["vocab.json"], "vocab.json")
    lines = [line for line in files["merges.txt"].split("\n") if not line.startswith("#version")]
    merges: Any = [tuple(line.split()) for line in lines if line.strip()]
    with refusing("vocab.json and merges.txt are no BPE"):
        model = models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="")
        library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    library.decoder = decoders.ByteLevel()
    return library


def make_wordpiece(files: Mapping[str, str], said: Mapping[str, Any]) -> Library:
    """Return a WordPiece as transformers' BertTokenizer makes it."""
    words = files["vocab.txt"].removesuffix("\n").split("\n")
    vocab = {word.rstrip("\r"): i for i, word in enumerate(words)}
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= special_tokens(files)
    accents = said.get("strip_accents")
    with refusing("vocab.txt is no WordPiece"):
        library = Library(models.WordPiece(vocab, unk_token=names["unk_token"]))
        library.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=said.get("tokenize_chinese_chars", True) is not False,
            strip_accents=accents if type(accents) is bool else None,
            lowercase=said.get("do_lower_case", True) is not False,
        )
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece(prefix="##")
        around = [(names[name], vocab.get(names[name])) for name in ("cls_token", "sep_token")]
        if all(i is not None for _, i in around):
            (first, _), (last, _) = around
            library.post_processor = processors.TemplateProcessing(
                single=f"{first}:0 $A:0 {last}:0",
                pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
                special_tokens=around,
            )
    return library


# ---- Added tokens --------------------------------------------------------------------------------


def listed_tokens(files: Mapping[str, str]) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield the added tokens that the files list, with their ids, and those they name, without."""
    config = read_object(files.get("tokenizer_config.json", "{}"), "tokenizer_config.json")
    special = special_tokens(files)
    ids = {int(i): dict(token) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    for content, i in read_object(
        files.get("added_tokens.json", "{}"), "added_tokens.json"
    ).items():
        same = ids.setdefault(i, {"content": content, "special": content in special.values()})
        if same["content"] != content:
            raise DataError(f"id {i} is {same['content']!r} in one file and {content!r} in another")
    yield from sorted(ids.items())
    defaults: dict[str, str] = {}  # of the classes that transformers makes of the other files
    if "tokenizer.json" not in files and "vocab.json" in files:
        defaults = dict.fromkeys(("bos", "eos", "unk"), END_OF_TEXT)
    elif "tokenizer.json" not in files:
        defaults = {name: f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    for name in NAMED:
        if content := special.get(f"{name}_token", defaults.get(name, "")):
            yield None, {"content": content, "special": True}
    for field in ("extra_special_tokens", "additional_special_tokens"):
        more = config.get(field) or []
        for token in more.values() if isinstance(more, dict) else more:
            one = token.get("content") if isinstance(token, dict) else token
            yield None, {"content": str(one), "special": True}


def add_tokens(library: Library, files: Mapping[str, str], n_ids: int | None) -> bool:
    """Add the listed tokens that the vocabulary lacks, and mark those in it as added.

    Returns:
        Whether there were any.

    Raises:
        DataError: a token has another id, or cannot have the one that it is listed with.
    """
    changed = False
    with refusing("cannot add the tokens"):
        for wanted, fields in listed_tokens(files):
            content = fields["content"]
            there = library.token_to_id(content)
            if there is None and wanted is None and library.get_vocab_size() >= (n_ids or 0):
                continue  # the model has no id for it
            if there is None or there not in library.get_added_tokens_decoder():
                flags = {name: fields[name] for name in AS_IT_IS if name in fields}
                library.add_tokens([AddedToken(content, **{"normalized": False, **flags})])
                changed = True
            found = library.token_to_id(content)
            if wanted is not None and found != wanted:
                raise DataError(f"{content!r} is listed as id {wanted}, but gets id {found}")
    return changed


def own_gpt2(files: Mapping[str, str], n_ids: int | None) -> list[bytes] | None:
    """Return GPT-2's tokens if that is what the files hold, and nothing beside; else None."""
    fields: dict[str, Any] = {}
    if "tokenizer.json" in files:
        fields = read_object(files["tokenizer.json"], "tokenizer.json")
        vocab = fields.get("model", {}).get("vocab")
    elif "vocab.json" in files:
        vocab = read_object(files["vocab.json"], "vocab.json")
    else:
        return None
    said = read_object(files.get("tokenizer_config.json", "{}"), "tokenizer_config.json")
    words = fields.get("pre_tokenizer", BYTE_LEVEL)
    alike = isinstance(words, dict) and all(words.get(k, v) == v for k, v in BYTE_LEVEL.items())
    if not alike or fields.get("normalizer") or said.get("add_prefix_space") is True:
        return None
    added = [token["content"] for token in fields.get("added_tokens") or []]
    room = n_ids is not None and n_ids > 50257  # for tokens without an id
    added += [token["content"] for i, token in listed_tokens(files) if i is not None or room]
    if set(added) - {END_OF_TEXT} or not isinstance(vocab, dict):
        return None
    return gpt2_tokens(vocab)
