"""From any format of GPT-2 to a run folder, or back."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax

from gptjax import saving
from gptjax.config import TrainConfig, to_json
from gptjax.errors import REFUSALS, DataError, OutputError, UsageError
from gptjax.files import file_sha256
from gptjax.formats import gguf, hub, huggingface, llmc, nanogpt, openai
from gptjax.gpt2_tensors import Source, read_params
from gptjax.new_folder import new_folder, refuse_existing
from gptjax.run_folder import Run, load_run
from gptjax.tokenizer import (
    GPT2_FILES,
    ByteTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_gpt2_tokenizer,
    load_tokenizer,
    read_gpt2_files,
    save_tokenizer,
    write_gpt2_files,
)

OWN_TOKENIZER = "gptjax_tokenizer.json"  # ours, in a folder whose tokenizer.json is another's
GPT2_VOCAB = 50257  # tokens

# ---- In ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """How a source is opened."""

    revision: str = ""
    """branch, tag or commit of a model on the Hub; empty = main"""
    allow_pickle: bool = False
    """read pickles (.bin, .pt): their tensors only, with PyTorch 2.10 or newer"""
    tokenizer: str = "auto"
    """gpt2, byte, or a run folder to take it from; auto = the source's own, or gpt2 for a
    vocabulary of its size"""
    tokenizer_dir: str = ""
    """folder with vocab.bpe + encoder.json (or merges.txt + vocab.json), for gpt2 offline"""
    sha256: str = ""
    """what the weight file must have: a flipped bit is a valid number"""


def open_weights(name: str, config: SourceConfig) -> tuple[Source, Path]:
    """Open a model by what it is: a folder or file in one of the formats, or a name on the Hub.

    Returns:
        The source, without a tokenizer, and the folder where one may lie.

    Raises:
        UsageError: it is none of these, or is a pickle and pickles are not allowed.
        DataError: it is damaged, is not GPT-2, or cannot be downloaded.
    """
    path = Path(name)
    if path.is_file():
        return open_model_file(path, config), path.parent
    if path.is_dir():
        folder = path
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        weights = huggingface.WEIGHTS[: 2 if config.allow_pickle else 1]
        folder = hub.download(name, weights, config.revision or None)
    else:
        raise UsageError(f"no file or folder {name}")
    return open_model_folder(folder, config), folder


def open_source(name: str, config: SourceConfig) -> Source:
    """`open_weights` with a tokenizer that fits; DataError if none does."""
    source, folder = open_weights(name, config)
    tokenizer = choose_tokenizer(source, folder, config)
    if tokenizer.n_vocab != source.cfg.vocab_size:
        raise DataError(
            f"the model ({source.where}) has {source.cfg.vocab_size} tokens, its tokenizer "
            f"({tokenizer.kind}) has {tokenizer.n_vocab}; name another with --tokenizer"
        )
    return source._replace(tokenizer=tokenizer)


def check_sha256(files: Sequence[Path], expected: str) -> None:
    """Before a weight file is opened: DataError if its hash is another, unless none is expected.

    Raises:
        UsageError: one is expected, but there are several files.
    """
    if not expected:
        return
    if len(files) != 1:
        raise UsageError(f"--sha256={expected}: the weights are in {len(files)} files, not one")
    found = file_sha256(files[0])
    if found != expected.lower():
        raise DataError(f"{files[0]} has sha256 {found}, expected {expected}")


def check_memory(source: Source) -> None:
    """DataError if the model cannot fit: before anything is allocated for it."""
    parameters = sum(math.prod(shape) for shape, _ in source.tensors.values())
    needed = 4 * parameters  # float32
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise DataError(
            f"{source.where} has {parameters:,} parameters, which need {needed / 1e9:.0f} GB of "
            f"memory; this machine has {present / 1e9:.0f}"
        )


def open_model_file(path: Path, config: SourceConfig) -> Source:
    """A file: nanoGPT's or llm.c's."""
    check_sha256([path], config.sha256)
    if path.suffix == ".pt":
        return nanogpt.open_file(path, config.allow_pickle)
    if path.suffix == ".bin":
        return llmc.open_file(path)
    raise UsageError(
        f"{path}: a file must be nanoGPT's ckpt.pt or llm.c's .bin; for Hugging Face's and "
        "OpenAI's formats give the folder"
    )


def open_model_folder(path: Path, config: SourceConfig) -> Source:
    """A folder: OpenAI's, Hugging Face's, or nanoGPT's out_dir."""
    if (path / "hparams.json").is_file():
        check_sha256(sorted(path.glob("model.ckpt.[id]*")), config.sha256)
        return openai.open_folder(path)
    if (path / "checkpoints").is_dir():
        raise UsageError(f"{path} is a run folder already: sample.py and train.py read it")
    if (path / "config.json").is_file():
        check_sha256(huggingface.weight_files(path)[0], config.sha256)
        return huggingface.open_folder(path, config.allow_pickle)
    if (path / "ckpt.pt").is_file():
        return open_model_file(path / "ckpt.pt", config)
    raise DataError(f"no model in {path}: it has no config.json, hparams.json or ckpt.pt")


def choose_tokenizer(source: Source, folder: Path, config: SourceConfig) -> Tokenizer:
    """The tokenizer that was asked for, or the one that belongs to the model."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer not in ("auto", "gpt2"):
        return load_tokenizer(Path(config.tokenizer))
    if config.tokenizer == "auto" and (folder / OWN_TOKENIZER).is_file():
        return load_tokenizer(folder, OWN_TOKENIZER)
    if config.tokenizer == "auto" and source.cfg.vocab_size != GPT2_VOCAB:
        raise UsageError(
            f"the model ({source.where}) has {source.cfg.vocab_size} tokens and no tokenizer that "
            "gptjax reads; name one: --tokenizer=byte, or a run folder that has it"
        )
    if any((folder / name).is_file() for name in GPT2_FILES):
        return read_gpt2_files(folder)
    return load_gpt2_tokenizer(config.tokenizer_dir)


def load_source(name: str, config: SourceConfig | None = None) -> Run:
    """Read a model of any format, without writing anything; errors as of `import_run`."""
    return read_source(open_source(name, config or SourceConfig()), name)


def read_source(source: Source, name: str) -> Run:
    """Read the parameters of an opened source."""
    assert source.tokenizer is not None
    check_memory(source)
    # Waiting for each copy, or several would be held twice.
    params = read_params(source, lambda array: jax.block_until_ready(jax.device_put(array)))
    settings = TrainConfig(model=source.cfg, tokenizer=source.tokenizer.kind, init_from=name)  # type: ignore[arg-type]
    return Run(settings, source.tokenizer, params, 0)


def load_start(name: str, config: SourceConfig | None = None) -> Run:
    """The model to start from: a run folder's best, or a model in any other format.

    Raises:
        UsageError, DataError, CheckpointError: as of `load_run` and `load_source`.
    """
    if (Path(name) / "checkpoints").is_dir():
        return load_run(Path(name))
    return load_source(name, config)


def import_run(name: str, out_dir: Path, config: SourceConfig) -> tuple[Run, dict[str, str]]:
    """Make a run folder of a model of any format: all of it, or nothing.

    Returns:
        The model, and the sha256 of each file that its weights came from.

    Raises:
        UsageError, DataError: as of `open_source`; or a tensor is missing, unknown, misshapen, not
            of floats or not finite.
        OutputError: the folder exists already, or cannot be made.
        DiskError: there is not room enough for it.
    """
    refuse_existing(out_dir)
    source = open_source(name, config)
    run = read_source(source, name)
    digests = {path.name: file_sha256(path) for path in source.files}
    del source  # with the pages of its files, before the writing takes its own memory
    meta = {"val_loss": None, "imported": name, "files": digests}
    with new_folder(out_dir) as temporary:
        settings = dataclasses.replace(run.config, out_dir=str(out_dir))
        (temporary / "config.json").write_text(to_json(settings))
        save_tokenizer(run.tokenizer, temporary)
        try:
            saving.check_space(temporary, run.params)
            # All at once would take as much memory again; one after another takes no longer.
            largest = max(leaf.nbytes for leaf in jax.tree.leaves(run.params))
            with saving.Saver(temporary, strikes=1, largest=largest) as saver:
                saver.save(0, run.params, None, meta)
        except REFUSALS:
            raise
        except Exception as error:  # orbax passes on whatever its threads met
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise OutputError(f"cannot write the weights ({out_dir}): {reason}") from error
    return run, digests


# ---- Out -----------------------------------------------------------------------------------------


def write_hf(folder: Path, run: Run) -> None:
    """A folder for transformers, with GPT-2's tokenizer files, or our own of another tokenizer."""
    huggingface.write_folder(folder, run.config.model, run.params, run.tokenizer.eot)
    if isinstance(run.tokenizer, GPT2Tokenizer):
        write_gpt2_files(run.tokenizer, folder)
        fields = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": run.config.model.block_size,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(fields) + "\n")
    else:
        save_tokenizer(run.tokenizer, folder, OWN_TOKENIZER)


EXPORTS = {
    "hf": write_hf,
    "llmc": lambda folder, run: llmc.write_file(folder / "model.bin", run.config.model, run.params),
    "gguf": lambda folder, run: gguf.write_file(
        folder / "model.gguf", run.config.model, run.params, run.tokenizer
    ),
}


def export_run(run_dir: Path, to: str, out_dir: Path, which: str = "best") -> None:
    """Write a run's model in another format: all of it, or nothing.

    Raises:
        UsageError: there is no such format or run, or the format cannot say what the model is.
        OutputError: the folder exists already, or cannot be made.
        DiskError: there is not room enough for it.
    """
    if to not in EXPORTS:
        raise UsageError(f"--to={to}: must be one of {', '.join(EXPORTS)}")
    refuse_existing(out_dir)
    run = load_run(run_dir, which)
    with new_folder(out_dir) as temporary:
        saving.check_space(temporary, run.params)
        EXPORTS[to](temporary, run)
