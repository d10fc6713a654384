"""The tokenizer in a file or folder, whoever wrote it."""

from pathlib import Path

from gptjax.errors import DataError, UsageError, did_you_mean
from gptjax.gpt2_files import read_gpt2_files
from gptjax.hf_files import read_hf_folder, read_text
from gptjax.hf_tokenizer import FILES, read_object
from gptjax.meta_pickle import META, read_meta
from gptjax.tokenizer import Tokenizer, load_tokenizer

OWN_TOKENIZER = "gptjax_tokenizer.json"  # ours, in a folder whose tokenizer.json is another's


def read_folder(folder: Path, n_ids: int | None = None) -> Tokenizer | None:
    """Return the tokenizer of a folder in any form, None if it has none.

    Args:
        folder: a run folder, one of Hugging Face's, of OpenAI's, or nanoGPT's with meta.pkl.
        n_ids: as of `read_hf_folder`.

    Raises:
        DataError: it cannot be read.
    """
    if (folder / OWN_TOKENIZER).is_file():
        return load_tokenizer(folder, OWN_TOKENIZER)
    if is_ours(folder / "tokenizer.json"):
        return load_tokenizer(folder)
    if found := read_hf_folder(folder, n_ids):
        return found
    if (folder / "encoder.json").is_file():
        return read_gpt2_files(folder)
    return read_meta(folder / META) if (folder / META).is_file() else None


def is_ours(path: Path) -> bool:
    """Return whether a file is a tokenizer.json of gptjax; False if there is none."""
    return path.is_file() and "kind" in read_object(read_text(path), str(path))


def named_tokenizer(word: str, kinds: tuple[str, ...], n_ids: int | None = None) -> Tokenizer:
    """Return the tokenizer in the file or folder that --tokenizer names.

    Args:
        word: what the flag says.
        kinds: what it may say besides.
        n_ids: as of `read_hf_folder`.

    Raises:
        UsageError: there is no such file or folder.
        DataError: it holds no tokenizer, or cannot be read.
    """
    path = Path(word)
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long; a NUL
        is_dir = is_file = False
    if not is_dir and not is_file:
        hint = did_you_mean(word, kinds, f"the names are {', '.join(kinds)}")
        raise UsageError(f"--tokenizer={word}: no such tokenizer, file or folder; {hint}")
    if is_file and path.suffix == ".pkl":
        return read_meta(path)
    if is_file and path.name not in (*FILES, "encoder.json", OWN_TOKENIZER):
        return load_tokenizer(path.parent, path.name)
    found = read_folder(path if is_dir else path.parent, n_ids)
    if found is None:
        raise DataError(
            f"cannot read the tokenizer ({path}): it holds no tokenizer.json, no vocab.json with "
            f"merges.txt, no vocab.txt and no {META}"
        )
    return found
