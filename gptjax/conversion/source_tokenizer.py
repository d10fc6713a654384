"""The tokenizer of a model that others trained."""

from pathlib import Path

from gptjax.conversion.tensors import Source
from gptjax.errors import DataError, UsageError, plural
from gptjax.gpt2_files import GPT2_FILES, load_gpt2_tokenizer, read_gpt2_files
from gptjax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

OWN_TOKENIZER = "gptjax_tokenizer.json"  # ours, in a folder whose tokenizer.json is another's
GPT2_VOCAB = 50257  # tokens


def find_tokenizer(source: Source, wanted: str, vocab_dir: str) -> Tokenizer:
    """Return the tokenizer that was asked for, or the one that belongs to the model.

    Args:
        source: the model, beside whose files its tokenizer may lie.
        wanted: auto, gpt2, byte or a run folder.
        vocab_dir: as of `load_gpt2_tokenizer`.

    Raises:
        UsageError: no tokenizer is known, so the user must name one.
        DataError: it has another number of tokens than the model, or cannot be read.
    """
    folder, size = source.files[0].parent, source.cfg.vocab_size
    by_size = {ByteTokenizer.n_vocab: "byte", GPT2_VOCAB: "gpt2"}
    folder_too = "a run folder that has the model's own"
    how = (
        f"--tokenizer={by_size.get(size, 'FOLDER')}",
        f"or {folder_too}" if size in by_size else folder_too,
    )
    model = f"the model ({source.where}) has {size} {plural(size, 'token')}"
    if wanted == "byte":
        found: Tokenizer = ByteTokenizer()
    elif wanted not in ("auto", "gpt2"):
        found = load_tokenizer(Path(wanted))
    elif wanted == "auto" and source.tokenizer is not None:
        found = source.tokenizer()
    elif wanted == "auto" and (folder / OWN_TOKENIZER).is_file():
        found = load_tokenizer(folder, OWN_TOKENIZER)
    elif wanted == "gpt2" and size != GPT2_VOCAB:
        raise DataError(f"{model}, its tokenizer (gpt2) has {GPT2_VOCAB}", *how)
    elif size != GPT2_VOCAB:
        raise UsageError(f"{model} and no tokenizer that gptjax reads", *how)
    elif any((folder / name).is_file() for name in GPT2_FILES):
        found = read_gpt2_files(folder)
    else:
        found = load_gpt2_tokenizer(vocab_dir)
    if found.n_vocab != size:
        raise DataError(f"{model}, its tokenizer ({found.kind}) has {found.n_vocab}", *how)
    return found
