"""From any format of GPT-2 to a run folder, or back."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax

from gptjax import programs
from gptjax.checkpoints.run_folder import Run, load_run
from gptjax.checkpoints.save import Saver, check_space
from gptjax.checkpoints.steps import About
from gptjax.config import TOKENIZER_DIR, Activation, TrainConfig
from gptjax.config_file import to_json
from gptjax.conversion import gguf, hub, huggingface, llmc, nanogpt, openai, signatures
from gptjax.conversion.new_folder import new_folder, refuse_existing
from gptjax.conversion.source_tokenizer import OWN_TOKENIZER, choose_tokenizer
from gptjax.conversion.tensors import Source, read_params, with_activation
from gptjax.errors import DataError, InputError, OutputError, Refusal, UsageError, first_line
from gptjax.files import file_sha256
from gptjax.memory import physical_memory
from gptjax.settings import once
from gptjax.tokenizer import GPT2Tokenizer, save_tokenizer, write_gpt2_files

WEIGHT_SUFFIXES = (
    ".pt",
    ".pth",
    ".ckpt",
    ".bin",
    ".safetensors",
)  # of files, not of the Hub's names
PART = re.compile(r"-\d+-of-\d+\.")  # in the name of a shard

# ---- In ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """How a source is opened."""

    revision: str = once(
        "", "Branch, tag or commit of a model on the Hub; empty = main.", section="Source"
    )
    allow_pickle: bool = once(
        False, "Read pickles (.bin, .pt): their tensors only, with PyTorch 2.10 or newer."
    )
    tokenizer: str = once(
        "auto",
        "gpt2, byte, or a run folder to take it from. auto takes the source's own, or gpt2 for a "
        "vocabulary of its size.",
        path=True,
    )
    tokenizer_dir: str = once("", TOKENIZER_DIR, path=True)
    activation: Literal["auto", Activation] = once(
        "auto",
        "Nonlinearity of the MLP, where the file does not say it: nanoGPT computes gelu, the exact "
        "one, since June 2023, and gelu_tanh before. auto takes gelu for nanoGPT, else gelu_tanh.",
    )
    sha256: str = once(
        "", "sha256 that the weight file must have, since a flipped bit is a valid number."
    )
    accept_fields: str = once(
        "",
        "Fields of its config.json that gptjax does not know and that you know to change nothing, "
        "with commas between.",
    )

    def accepted(self) -> list[str]:
        """The names in `accept_fields`."""
        names = (name.strip() for name in self.accept_fields.split(","))
        return [name for name in names if name]


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
        return with_activation(open_model_file(path, config), config.activation), path.parent
    if path.is_dir():
        folder = path
    elif path.suffix in WEIGHT_SUFFIXES:
        raise UsageError(f"no file {name}")
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        weights = huggingface.WEIGHTS[: 2 if config.allow_pickle else 1]
        folder = hub.download(name, weights, config.revision or None)
    else:
        raise UsageError(f"no file or folder {name}")
    return with_activation(open_model_folder(folder, config), config.activation), folder


def open_source(name: str, config: SourceConfig) -> Source:
    """`open_weights` with a tokenizer that fits; DataError if none does."""
    source, folder = open_weights(name, config)
    tokenizer = choose_tokenizer(source, folder, config.tokenizer, config.tokenizer_dir)
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
    present = physical_memory()
    if needed > present:
        raise DataError(
            f"{source.where} has {parameters:,} parameters, which need {needed / 1e9:.0f} GB of "
            f"memory; this machine has {present / 1e9:.0f}"
        )


def open_model_file(path: Path, config: SourceConfig) -> Source:
    """A file: nanoGPT's, llm.c's, or Hugging Face's weights with config.json beside them."""
    folder, strange = path.parent, signatures.stranger(path)
    kind = signatures.kind(path)
    pickle_of_hf = kind == "pickle" and (
        path.name in huggingface.WEIGHTS
        or (path.suffix == ".bin" and (folder / "config.json").is_file())
    )
    if path.name == "config.json" or path.name.endswith(".index.json") or PART.search(path.name):
        raise UsageError(f"{path}: is only a part of a model; give the folder")
    if (folder / huggingface.ADAPTER).is_file() and path.name.startswith("adapter_model."):
        huggingface.refuse_adapter(folder)
    if (kind == "safetensors" or pickle_of_hf) and not strange:
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{path}: weights alone, which do not say how many heads the model has; put its "
                "config.json beside them"
            )
        check_sha256([path], config.sha256)
        chosen = huggingface.weight_files(folder)[0] if path.name in huggingface.WEIGHTS else []
        file = None if chosen == [path] else path
        return huggingface.open_folder(folder, config.allow_pickle, config.accepted(), file)
    check_sha256([path], config.sha256)
    if kind == "pickle" or path.suffix in (".pt", ".pth", ".ckpt"):
        return nanogpt.open_file(path, config.allow_pickle, config.accepted())
    if strange:
        raise DataError(f"no model ({path}): it is {strange}")
    if path.suffix == ".bin":
        return llmc.open_file(path)
    raise UsageError(
        f"{path}: a file must be nanoGPT's ckpt.pt, llm.c's .bin, or Hugging Face's weights beside "
        "their config.json; for OpenAI's format give the folder"
    )


def open_model_folder(path: Path, config: SourceConfig) -> Source:
    """A folder: OpenAI's, Hugging Face's, or nanoGPT's out_dir."""
    if (path / "hparams.json").is_file():
        check_sha256(sorted(path.glob("model.ckpt.[id]*")), config.sha256)
        return openai.open_folder(path, config.accepted())
    if (path / "checkpoints").is_dir():
        raise UsageError(f"{path} is a run folder already: sample.py and train.py read it")
    if (path / huggingface.ADAPTER).is_file():  # transformers, too, looks at it first
        huggingface.refuse_adapter(path)
    if (path / "config.json").is_file():
        check_sha256(huggingface.weight_files(path)[0], config.sha256)
        return huggingface.open_folder(path, config.allow_pickle, config.accepted())
    if (path / "ckpt.pt").is_file():
        return open_model_file(path / "ckpt.pt", config)
    there = sorted(file.name for file in path.iterdir())
    listed = f"; it holds {', '.join(there[:5])}" if there else "; it is empty"
    if any(name in there for name in huggingface.WEIGHTS):
        listed += "; the config.json of these weights says how many heads the model has"
    elif any(Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors") for name in there):
        listed += "; a file of nanoGPT or llm.c give by its own name"
    raise DataError(f"no model in {path}: it has no config.json, hparams.json or ckpt.pt{listed}")


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
        UsageError, DataError, CheckpointError: as of `load_run` and `load_source`; a flag that
            only an import has is said with its command.
    """
    if (Path(name) / "checkpoints").is_dir():
        return load_run(Path(name))
    try:
        return load_source(name, config)
    except InputError as error:
        if not error.flag:
            raise
        command = programs.command("convert_gpt2.py", "import", name, "--out_dir=RUN", error.flag)
        raise type(error)(
            f"{error.reason}; import it by {command} ({error.note}), then take --init_from=RUN"
        ) from error


def import_run(
    name: str,
    out_dir: Path,
    config: SourceConfig,
    notify: Callable[[str], None] = lambda said: None,
) -> tuple[Run, dict[str, str]]:
    """Make a run folder of a model of any format: all of it, or nothing; tells what it assumed.

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
    if source.assumed:
        notify(source.assumed)
    run = read_source(source, name)
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
        check_space(temporary, run.params)
        EXPORTS[to](temporary, run)
