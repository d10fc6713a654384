"""The files of a tokenizer in Hugging Face's folders, read as transformers reads them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Library
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

from gptjax.errors import DataError
from gptjax.gpt2_files import GPT2_VOCAB, gpt2_tokens
from gptjax.hf_tokenizer import (
    FILES,
    SENTENCEPIECE,
    VOCABULARIES,
    HFTokenizer,
    check_vocabulary,
    read_library,
    read_object,
    refusing,
    special_tokens,
    vocabulary,
)
from gptjax.tokenizer import GPT2Tokenizer, Tokenizer
from gptjax.tokens import END_OF_TEXT

LIMIT = 2**27  # bytes of a file
SAVE_IT = (
    "save a tokenizer.json by transformers' "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
# Beginnings of tokenizer_class: of the byte-level BPE in vocab.json, of the WordPiece in vocab.txt.
BPES = ("GPT2", "Roberta", "Bart", "Longformer", "PreTrainedTokenizerFast", "TokenizersBackend")
WORDPIECES = ("Bert", "DistilBert", "Electra", "PreTrainedTokenizerFast", "TokenizersBackend")
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # special tokens, in the order of adding
AS_IT_IS = ("lstrip", "rstrip", "single_word", "normalized", "special")
BERTS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Of a tokenizer.json: what GPT-2's own says, and options of a BPE that it has not.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
ONLY_ADDED = {
    "content": END_OF_TEXT,
    "special": True,
    **dict.fromkeys(("lstrip", "rstrip", "single_word"), False),
}
OTHER_BPES = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")


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
        alone = set(files) & {"tokenizer.json", "vocab.json", "merges.txt"} == {"vocab.json"}
        if alone and (tokens := gpt2_tokens(read_object(files["vocab.json"], "vocab.json"))):
            return GPT2Tokenizer(tokens, str(folder), files)  # whose ranks say the merges
        if tokens := own_gpt2(files):
            return GPT2Tokenizer(tokens, str(folder), files)
        library = make_library(files)
        vocabulary(library)
        before = library.to_str()
        set_prefix(library, files)
        add_tokens(library, files, n_ids)
        text = library.to_str()
        as_it_is = files.get("tokenizer.json") if text == before else None
        return HFTokenizer(as_it_is or text, files)
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
    if "tokenizer.json" in files:
        return read_library(files["tokenizer.json"])
    if "vocab.json" in files and "merges.txt" in files:
        require_class(files, BPES, "vocab.json")
        return make_bpe(files)
    if "vocab.txt" in files:
        require_class(files, WORDPIECES, "vocab.txt")
        return make_wordpiece(files)
    found = next(name for name in VOCABULARIES if name in files)
    what = "is of SentencePiece" if found in SENTENCEPIECE else "alone does not say how it is used"
    raise DataError(f"{found} {what}; {SAVE_IT}")


def read_config(files: Mapping[str, str]) -> dict[str, Any]:
    """Return what tokenizer_config.json says."""
    return read_object(files.get("tokenizer_config.json", "{}"), "tokenizer_config.json")


def require_class(files: Mapping[str, str], known: tuple[str, ...], file: str) -> None:
    """Raise DataError if tokenizer_config.json names a tokenizer that uses a file otherwise."""
    named = read_config(files).get("tokenizer_class")
    if named is not None and not str(named).startswith(known):
        raise DataError(f"tokenizer_class={named!r} uses {file} in a way of its own; {SAVE_IT}")


def set_prefix(library: Library, files: Mapping[str, str]) -> None:
    """Obey add_prefix_space of tokenizer_config.json where transformers' GPT2Tokenizer does."""
    said, words = read_config(files), library.pre_tokenizer
    wanted = said.get("add_prefix_space")
    is_gpt2 = str(said.get("tokenizer_class")).startswith("GPT2") or "tokenizer.json" not in files
    if is_gpt2 and type(wanted) is bool and isinstance(words, pre_tokenizers.ByteLevel):
        words.add_prefix_space = wanted


def make_bpe(files: Mapping[str, str]) -> Library:
    """Return a byte-level BPE as transformers' GPT2Tokenizer makes it."""
    vocab, merges = read_object(files["vocab.json"], "vocab.json"), read_merges(files)
    with refusing("vocab.json and merges.txt are no BPE"):
        made = ByteLevelBPETokenizer(vocab, merges)
        check_vocabulary(made.get_vocab())
        return read_library(made.to_str())


def read_merges(files: Mapping[str, str]) -> Any:
    """Return the pairs in merges.txt."""
    lines = [line for line in files["merges.txt"].split("\n") if not line.startswith("#version")]
    return [tuple(line.split()) for line in lines if line.strip()]


def make_wordpiece(files: Mapping[str, str]) -> Library:
    """Return a WordPiece as transformers' BertTokenizer makes it."""
    words = files["vocab.txt"].removesuffix("\n").split("\n")
    vocab = {word.rstrip("\r"): i for i, word in enumerate(words)}
    named: dict[str, Any] = {n: token for n, token in special_tokens(files).items() if n in BERTS}
    said = read_config(files)
    accents = said.get("strip_accents")
    with refusing("vocab.txt is no WordPiece"):
        made = BertWordPieceTokenizer(
            vocab,
            **named,
            handle_chinese_chars=said.get("tokenize_chinese_chars", True) is not False,
            strip_accents=accents if type(accents) is bool else None,
            lowercase=said.get("do_lower_case", True) is not False,
        )
        return read_library(made.to_str())


# ---- Added tokens --------------------------------------------------------------------------------


def listed_tokens(files: Mapping[str, str]) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield the added tokens that the files list, with their ids, and those they name, without."""
    config = read_config(files)
    special = special_tokens(files)
    ids = {int(i): dict(token) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    for content, i in read_object(
        files.get("added_tokens.json", "{}"), "added_tokens.json"
    ).items():
        is_special = {"special": True} if content in special.values() else {}
        same = ids.setdefault(i, {"content": content, **is_special})
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


def add_tokens(library: Library, files: Mapping[str, str], n_ids: int | None) -> None:
    """Add the listed tokens that the vocabulary lacks, and mark those in it as they are listed.

    Raises:
        DataError: a token has another id, or cannot have the one that it is listed with.
    """
    with refusing("cannot add the tokens"):
        for wanted, fields in listed_tokens(files):
            content = fields["content"]
            there = library.token_to_id(content)
            if there is None and wanted is None and library.get_vocab_size() >= (n_ids or 0):
                continue  # the model has no id for it
            added = None if there is None else library.get_added_tokens_decoder().get(there)
            before = {"normalized": False} if added is None else token_flags(added)
            flags = dict(before)
            if wanted is not None or added is None:
                flags |= {name: fields[name] for name in AS_IT_IS if name in fields}
            flags["special"] = before.get("special") or flags.get("special", False)
            if added is None or flags != before:
                library.add_tokens([AddedToken(content, **flags)])
            found = library.token_to_id(content)
            if wanted is not None and found != wanted:
                raise DataError(f"{content!r} is listed as id {wanted}, but gets id {found}")


def token_flags(token: AddedToken) -> dict[str, bool]:
    """Return how an added token is found in a text."""
    return {name: getattr(token, name) for name in AS_IT_IS}


# ---- GPT-2's own vocabulary ----------------------------------------------------------------------


def own_gpt2(files: Mapping[str, str]) -> list[bytes] | None:
    """Return GPT-2's tokens if the files say what tiktoken does with them, and no more; else None.

    The library would take 0.3 s more, so it is not asked; what is wrong it will say.
    """
    try:
        if "tokenizer.json" in files:
            fields = read_object(files["tokenizer.json"], "tokenizer.json")
        else:
            require_class(files, BPES, "vocab.json")
            vocab = read_object(files["vocab.json"], "vocab.json")
            bpe = {"vocab": vocab, "merges": read_merges(files)}
            fields = {"model": bpe, "pre_tokenizer": BYTE_LEVEL}
        model, words = fields["model"], {"use_regex": True, **fields["pre_tokenizer"]}
        frame = fields.get("post_processor") or BYTE_LEVEL  # what is put around a text
        added = [(token["id"], token) for token in fields.get("added_tokens", ())]
        alike = (
            model.get("type", "BPE") == "BPE"
            and not any(model.get(option) for option in OTHER_BPES)
            and all(words.get(name) == value for name, value in BYTE_LEVEL.items())
            and read_config(files).get("add_prefix_space") is not True
            and fields.get("normalizer") is None
            and frame["type"] in ("ByteLevel", "TemplateProcessing")
            and not frame.get("special_tokens")
            and all(is_end_of_text(*token) for token in [*added, *listed_tokens(files)])
        )
        if not alike:
            return None
        merged = [
            "".join(merge.split(" ") if isinstance(merge, str) else merge)
            for merge in model["merges"]
        ]
        in_order = sorted(model["vocab"], key=model["vocab"].get)
        return gpt2_tokens(model["vocab"]) if merged == in_order[256:-1] else None
    except (DataError, ValueError, LookupError, TypeError, AttributeError):
        return None


def is_end_of_text(i: int | None, token: Mapping[str, Any]) -> bool:
    """Return whether an added token is GPT-2's, found in a text as tiktoken finds it."""
    said = {name: token.get(name, False) for name in ONLY_ADDED}
    return i in (None, GPT2_VOCAB - 1) and said == ONLY_ADDED
