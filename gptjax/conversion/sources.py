"""Models in any format, opened by name as a `Source` or loaded as a `Run`."""

import dataclasses
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax

from gptjax import programs
from gptjax.checkpoints.run_folder import Opened, Run, load_run
from gptjax.config import TOKENIZER_DIR, Activation, TrainConfig
from gptjax.conversion import (
    gguf,
    gguf_file,
    hub,
    huggingface,
    llmc,
    lora,
    nanogpt,
    openai,
    state_dict,
)
from gptjax.conversion.copies import copier
from gptjax.conversion.model_words import about_model, fields_beside, is_hugging_faces, said_fields
from gptjax.conversion.other_heads import leave_out_other_heads
from gptjax.conversion.source_checks import check_memory, check_sha256, with_activation
from gptjax.conversion.source_tokenizer import KINDS, find_tokenizer
from gptjax.conversion.tensors import Source, read_params
from gptjax.conversion.weight_check import weight_format, why_no_weights
from gptjax.errors import DataError, InputError, UsageError
from gptjax.file_kinds import read_head
from gptjax.files import read_json
from gptjax.settings import once, require

NANOGPT_SUFFIXES = (".pt", ".pth", ".ckpt")
# Of files, not of the Hub's names.
WEIGHT_SUFFIXES = (*NANOGPT_SUFFIXES, ".bin", ".gguf", ".safetensors")
PART = re.compile(r"-\d+-of-\d+\.")  # in the name of a shard


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """The settings of opening a source."""

    revision: str = once(
        "", "Branch, tag or commit of a model on the Hub; empty = main.", section="Source"
    )
    allow_pickle: bool = once(
        False,
        "Read pickle files (.bin, .pt): tensors and plain settings, with PyTorch 2.10 or newer.",
    )
    tokenizer: str = once(
        "auto",
        "auto, gpt2, byte, ids (which reads and prints numbers), or a FILE_OR_FOLDER that has a "
        "tokenizer: a tokenizer.json, one of Hugging Face's folders, nanoGPT's meta.pkl, a run "
        "folder. auto is the source's own, or gpt2 if the vocabulary has its size.",
        path=True,
    )
    tokenizer_dir: str = once("", TOKENIZER_DIR, path=True)
    activation: Literal["auto", Activation] = once(
        "auto",
        "Activation function of the MLP, if the file does not say it: nanoGPT computes gelu, the "
        "exact form, since June 2023, and computed gelu_tanh before. auto is gelu for nanoGPT's "
        "files that have a bias setting and for minGPT's names of 2020, else gelu_tanh.",
    )
    config: str = once(
        "",
        "JSON file that says what the model is, where its own file does not: in the words of "
        'nanoGPT, minGPT or Hugging Face, at least {"n_head": 12}. empty is the config.json beside '
        "the weights, if there is one.",
        path=True,
    )
    base: str = once(
        "",
        "Model that a LoRA adapter changes, as any SOURCE; the two are merged. empty is the one "
        "that adapter_config.json names, if it is a path.",
        path=True,
    )
    drop_heads: bool = once(
        False,
        "Import a model with the head of another task, such as classification, without that head.",
    )
    sha256: str = once(
        "", "Expected sha256 of the weight file; without it a flipped bit goes unnoticed."
    )
    accept_fields: str = once(
        "",
        "Fields of config.json, separated by commas, that gptjax does not know and that you know "
        "not to change the computation.",
    )

    def accepted(self) -> list[str]:
        """Return the names in `accept_fields`."""
        names = (name.strip() for name in self.accept_fields.split(","))
        return [name for name in names if name]


def load_model(
    name: str,
    config: SourceConfig | None = None,
    which: str = "best",
    opened: Opened = lambda *known: None,
) -> Run:
    """Return a model for use, from a run folder or any format that `open_source` reads.

    Args:
        name: the path of a folder or file, or the name of a model (see `hub.download_model`).
        config: how to open a model that is not a run folder.
        which: the step of a run folder, as `load_run` takes it.
        opened: is told the model and the tokenizer, before the parameters are read.

    Raises:
        UsageError, DataError, CheckpointError: it cannot be loaded. Where a flag of
            `convert_gpt2.py import` would help, the message has the command.
    """
    if (Path(name) / "checkpoints").is_dir():
        return load_run(Path(name), which, opened)
    config = config or SourceConfig()
    try:
        return read_model(open_source(name, config), name, config, opened)
    except InputError as error:
        if not error.flag:
            raise
        command = programs.command("convert_gpt2.py", "import", name, "--out_dir=RUN", error.flag)
        raise type(error)(
            f"{error.reason}; import it by {command} ({error.note}), then take --init_from=RUN"
        ) from error


def load_run_or_own(run_dir: Path, which: str = "best") -> Run:
    """Return the model of a run folder; or, if there is none, of that name in `hub.OWN`.

    Raises:
        UsageError, DataError, CheckpointError: as of `load_run`.
    """
    name = str(run_dir)
    if name not in hub.OWN or run_dir.exists():
        return load_run(run_dir, which)
    require(which == "best", "checkpoint", which, f"{name} has one state and no steps")
    return load_model(name)


def read_model(
    source: Source, name: str, config: SourceConfig, opened: Opened = lambda *known: None
) -> Run:
    """Return the parameters of an opened source with a tokenizer that fits.

    Raises:
        UsageError, DataError: there is no such tokenizer, or the tensors are not as `read_params`
            expects them.
    """
    tokenizer = find_tokenizer(source, config.tokenizer, config.tokenizer_dir)
    check_memory(source)
    opened(source.cfg, tokenizer)
    with ThreadPoolExecutor(1) as pool:
        copies = read_params(source, copier(pool))
        params = jax.tree.map(Future.result, copies)
    kind = tokenizer.kind if tokenizer.kind in ("char", "byte", "gpt2") else "auto"
    settings = TrainConfig(model=source.cfg, tokenizer=kind, init_from=name)
    return Run(settings, tokenizer, params, 0)


def open_source(name: str, config: SourceConfig) -> Source:
    """Open a model that is not a run folder, in the format that it has.

    Of the tensors, only those are read that decide what the model is: masks, wte beside a head.

    Args:
        name: a folder or file in one of the formats, or a name of `hub.download_model`.
        config: how to open it.

    Raises:
        UsageError: it is none of these, or is a pickle and pickles are not allowed.
        DataError: it is damaged, is not GPT-2, or cannot be downloaded.
    """
    path = Path(name)
    if not (path.is_file() or path.is_dir()):
        if path.suffix in WEIGHT_SUFFIXES or not hub.NAME.fullmatch(name):
            raise UsageError(f"no file or folder {name}; with gptjax comes {', '.join(hub.OWN)}")
        weights = huggingface.WEIGHTS[: 2 if config.allow_pickle else 1]
        path = hub.download_model(name, weights, config.revision or None)
    adapter = (path / huggingface.ADAPTER).is_file() or path.name in lora.FILES
    rule = f"{name} is not a LoRA adapter; leave the flag out"
    require(adapter or not config.base, "base", config.base, rule)
    opened = open_folder(path, config) if path.is_dir() else open_file(path, config)
    rule = f"{name} says itself what the model is; leave the flag out"
    said = opened.format in ("gguf", "llmc", "openai")
    require(not (said and config.config), "config", config.config, rule)
    return leave_out_other_heads(with_activation(opened, config.activation), config.drop_heads)


def open_file(path: Path, config: SourceConfig) -> Source:
    """Open a file: a checkpoint of PyTorch, weights in safetensors, GGUF, or llm.c's."""
    head = read_head(path)
    if head.startswith(gguf_file.MAGIC):
        check_sha256([path], config.sha256)
        return gguf.open_file(path, config.accepted())
    kind, wrong = weight_format(head), why_no_weights(path)
    named = path.name in ("config.json", huggingface.ADAPTER)
    if named or path.name.endswith(".index.json") or PART.search(path.name):
        raise UsageError(f"{path} is only a part of a model; give the folder")
    if path.name in lora.FILES:
        return open_adapter(path.parent, config)
    check_sha256([path], config.sha256)
    given, beside = said_fields(config.config), fields_beside(path) if kind else None
    own = path.name in huggingface.WEIGHTS and beside and is_hugging_faces(beside) and not given
    if own and huggingface.weight_files(path.parent)[0] == [path]:
        return huggingface.open_folder(path.parent, config.allow_pickle, config.accepted())
    own_tokens = config.tokenizer not in KINDS
    if kind == "safetensors" and not wrong:
        tensors = huggingface.open_file(path, config.allow_pickle)
        fields = about_model(beside or {}) | about_model(given or {})
        return state_dict.open_state(tensors, fields, path, config.accepted(), own_tokens)
    if kind == "pickle" or path.suffix in NANOGPT_SUFFIXES:
        allowed, accept = config.allow_pickle, config.accepted()
        return nanogpt.open_file(path, allowed, accept, given, beside, own_tokens)
    if wrong:
        raise DataError(f"{path} holds no model: it is {wrong}")
    if path.suffix == ".bin":
        return llmc.open_file(path)
    raise UsageError(
        f"{path}: a file must be a checkpoint of PyTorch such as nanoGPT's ckpt.pt, llm.c's .bin, "
        "a .gguf, or weights in safetensors; for OpenAI's format give the folder"
    )


def open_folder(folder: Path, config: SourceConfig) -> Source:
    """Open a folder: OpenAI's, Hugging Face's, or where nanoGPT or minGPT saved a checkpoint."""
    if (folder / "hparams.json").is_file():
        check_sha256(sorted(folder.glob("model.ckpt.[id]*")), config.sha256)
        return openai.open_folder(folder, config.accepted())
    if (folder / "checkpoints").is_dir():
        raise UsageError(f"{folder} is a run folder already: sample.py and train.py read it")
    if (folder / huggingface.ADAPTER).is_file():  # transformers, too, looks at it first
        return open_adapter(folder, config)
    beside = fields_beside(folder / "config.json")
    if beside is not None and is_hugging_faces(beside) and not config.config:
        check_sha256(huggingface.weight_files(folder)[0], config.sha256)
        return huggingface.open_folder(folder, config.allow_pickle, config.accepted())
    known = ("ckpt.pt", "model.pt", *(huggingface.WEIGHTS if beside or config.config else ()))
    for name in known:
        if (folder / name).is_file():
            return open_file(folder / name, config)
    if len(found := [path for path in folder.glob("*.gguf") if path.is_file()]) == 1:
        return open_file(found[0], config)
    names = sorted(path.name for path in folder.iterdir())
    holds = f"holds {', '.join(names[:5])}" if names else "is empty"
    if any(name in names for name in huggingface.WEIGHTS):
        holds += "; the config.json of these weights says how many heads the model has"
    elif any(Path(name).suffix in WEIGHT_SUFFIXES for name in names):
        holds += "; give one of these files by its own name"
    raise DataError(
        f"no model in {folder}: it has no config.json of Hugging Face, hparams.json, ckpt.pt or "
        f"model.pt; it {holds}"
    )


def open_adapter(folder: Path, config: SourceConfig) -> Source:
    """Open a folder with a LoRA adapter, merged into its base: --base, or the one it names."""
    fields = read_json(folder / huggingface.ADAPTER)
    named, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    base = config.base or lora.path_of(named)
    if not base:
        known = isinstance(named, str) and len(named) < 100 and hub.NAME.fullmatch(named)
        raise UsageError(
            f"{folder} holds an adapter of the model {str(named)[:100]!r}, not a model",
            f"--base={named if known else 'SOURCE'}",
            "which names that model: a folder, a file, or a name on the Hub",
        )
    if (Path(base) / huggingface.ADAPTER).is_file():
        raise UsageError(f"--base={base}: it is an adapter itself; name the model that it changes")
    check_sha256([f for name in lora.FILES if (f := folder / name).is_file()][:1], config.sha256)
    revision = revision if isinstance(revision, str) else ""  # of the base, not the adapter's own
    theirs = dataclasses.replace(config, base="", sha256="", revision=revision)
    source = open_source(base, theirs)
    if named and Path(str(named)).name != Path(base).name:
        said = f"the adapter names {str(named)[:100]!r} as its base, not {base}"
        source = source._replace(notes=(*source.notes, said))
    return lora.open_adapter(folder, source, config.allow_pickle, config.accepted())
