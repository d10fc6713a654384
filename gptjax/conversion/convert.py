"""From any format of GPT-2 to a run folder, and back."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax

from gptjax.checkpoints.run_folder import Run
from gptjax.checkpoints.save import Saver, check_space
from gptjax.checkpoints.steps import About
from gptjax.config_file import to_json
from gptjax.conversion import gguf, huggingface, llmc, llmc_vocabulary, nanogpt_export
from gptjax.conversion.new_folder import new_folder, refuse_existing
from gptjax.conversion.resize import resize
from gptjax.conversion.source_tokenizer import write_tokenizer
from gptjax.conversion.sources import SourceConfig, load_run_or_own, open_source, read_model
from gptjax.errors import OutputError, Refusal, UsageError, first_line
from gptjax.files import file_sha256
from gptjax.settings import require
from gptjax.tokenizer import HFTokenizer, save_tokenizer
from gptjax.tokenizer_files import OWN_TOKENIZER
from gptjax.tokens import CONFIG, published_ids


def import_run(
    name: str,
    out_dir: Path,
    config: SourceConfig,
    notify: Callable[[str], None] = lambda said: None,
    *,
    vocab_size: int = 0,
    block_size: int = 0,
) -> tuple[Run, dict[str, str]]:
    """Create a run folder from a model in any format, whole or not at all.

    Args:
        name: as of `open_source`.
        out_dir: the folder to make.
        config: how to open the model.
        notify: is told what the model's file does not say, and what was taken for it; and what
            another size does.
        vocab_size: as of `resize`.
        block_size: as of `resize`.

    Returns:
        The model, and the sha256 of each file that its weights came from.

    Raises:
        UsageError, DataError: the model cannot be opened, read or resized, or no tokenizer fits.
        OutputError: the folder exists already, or cannot be made.
        DiskError: there is not room enough for it.
    """
    refuse_existing(out_dir)
    source = open_source(name, config)
    source, notes = resize(source, vocab_size, block_size)
    for note in [source.assumed, *source.notes, *notes]:
        if note:
            notify(note)
    run = read_model(source, name, config)
    if isinstance(run.tokenizer, HFTokenizer) and (added := run.tokenizer.added_to_a_text()):
        notify(
            f"transformers adds {' '.join(added)} to a text for this model; gptjax adds nothing: "
            "write what a prompt needs, with --allow_special"
        )
    digests = {path.name: file_sha256(path) for path in source.files}
    del source  # with the pages of its files, before the writing takes its own memory
    about: About = {"val_loss": None, "imported": name, "files": digests}
    with new_folder(out_dir) as temporary:
        settings = dataclasses.replace(run.config, out_dir=str(out_dir))
        (temporary / "config.json").write_text(to_json(settings))
        save_tokenizer(run.tokenizer, temporary)
        try:
            check_space(temporary, run.params)
            # All at once would take as much memory again; one after another takes no longer.
            largest = max(leaf.nbytes for leaf in jax.tree.leaves(run.params))
            with Saver(temporary, strikes=1, largest=largest) as saver:
                saver.save(0, run.params, None, about)
        except Refusal:
            raise
        except Exception as error:  # orbax passes on whatever its threads met
            raise OutputError(
                f"cannot write the weights ({out_dir}): {first_line(error)}"
            ) from error
    return run, digests


# ---- Out -----------------------------------------------------------------------------------------


def write_hf(folder: Path, run: Run, dtype: str = "float32") -> list[str]:
    """Write a folder for transformers, with its tokenizer's files, or gptjax's own file."""
    special = published_ids(run.tokenizer)[CONFIG]
    huggingface.write_folder(folder, run.config.model, run.params, special, dtype)
    write_tokenizer(run.tokenizer, folder, run.config.model.block_size)
    if not (folder / OWN_TOKENIZER).is_file():
        return []
    return [f"transformers reads no tokenizer of this kind ({run.tokenizer.kind}); gptjax does"]


def write_llmc(folder: Path, run: Run) -> list[str]:
    """Write model.bin, and the vocabulary in llm.c's file; in ours too where that holds more."""
    llmc.write_file(folder / "model.bin", run.config.model, run.params)
    written, whole = llmc_vocabulary.write(folder / llmc_vocabulary.NAME, run.tokenizer)
    if not whole:
        save_tokenizer(run.tokenizer, folder, OWN_TOKENIZER)
    if written:
        return []
    return [f"llm.c can print no text of this model: {llmc_vocabulary.LIMIT}"]


# Each returns sentences on what the format cannot say of the run, if there are any.
EXPORTS: dict[str, Callable[[Path, Run], list[str]]] = {
    "hf": write_hf,
    "llmc": write_llmc,
    "gguf": lambda folder, run: gguf.write_file(
        folder / "model.gguf", run.config.model, run.params, run.tokenizer
    ),
    "nanogpt": nanogpt_export.write_folder,
}


def export_run(
    run_dir: Path,
    to: str,
    out_dir: Path,
    which: str = "best",
    notify: Callable[[str], None] = lambda said: None,
    *,
    dtype: str = "float32",
) -> None:
    """Write a run's model in another format, whole or not at all.

    Args:
        run_dir: the run folder, or the name of a model that comes with gptjax.
        to: a key of EXPORTS.
        out_dir: the folder to make.
        which: the step, as `load_run` takes it.
        notify: is told what the format cannot say of the run.
        dtype: of the tensors, float32; for hf also bfloat16.

    Raises:
        UsageError: there is no such format or run, or the format cannot say what the model is.
        OutputError: the folder exists already, or cannot be made.
        DiskError: there is not room enough for it.
    """
    if to not in EXPORTS:
        raise UsageError(f"--to={to}: must be one of {', '.join(EXPORTS)}")
    rule = "only --to=hf can store it; leave the flag out"
    require(dtype == "float32" or to == "hf", "dtype", dtype, rule)
    refuse_existing(out_dir)
    run = load_run_or_own(run_dir, which)
    write = functools.partial(write_hf, dtype=dtype) if to == "hf" else EXPORTS[to]
    with new_folder(out_dir) as temporary:
        check_space(temporary, run.params)
        notes = write(temporary, run)
    for said in notes:
        notify(said)
