"""Evaluate a run: `gptjax evaluate RUN --task=lambada --data=lambada_test.jsonl`."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from gptjax import model
from gptjax.commands.protocols import Result, Scorer, Settings, hellaswag, lambada, wikitext2
from gptjax.config import AUTO_DTYPE, CACHE, CHECKPOINT, COMPILE_CACHE, DEBUG, WEIGHTS, DType
from gptjax.conversion.sources import load_run_or_own
from gptjax.errors import DataError, UsageError, did_you_mean
from gptjax.files import expand
from gptjax.scoring import score_texts
from gptjax.settings import once, require, require_range
from gptjax.terminal import cli, flags
from gptjax.terminal.console import show_progress
from gptjax.tokenizer import Tokenizer

TASKS: dict[str, Callable[[Scorer, Tokenizer, str, Settings], Result]] = {
    "wikitext2": wikitext2,
    "lambada": lambada,
    "hellaswag": hellaswag,
}
ABOUT = "Evaluate a model by a published protocol. The first word is its run folder, or novels."


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The settings of `gptjax evaluate`."""

    task: str = once("", "Evaluation: wikitext2, lambada or hellaswag.", section="Task")
    data: str = once(
        "", "File of the task: raw text for wikitext2, JSON lines for the others.", path=True
    )
    context: int = once(0, "Most tokens that a prediction sees; 0 = the model's block_size.")
    stride: int = once(
        0, "Tokens between windows of wikitext2; 0 = context, so that they do not overlap."
    )
    limit: int = once(0, "Number of first rows to use (tokens for wikitext2); 0 = all.")
    checkpoint: str = once("best", CHECKPOINT, section="Model and machine")
    batch_size: int = once(8, "Number of texts in a forward pass.")
    dtype: DType = once("auto", f"Data type of the computation. {AUTO_DTYPE}")
    weights: Literal["auto", "int8"] = once(
        "auto", f"{WEIGHTS} Here int8 rounds them in the same way, and saves no memory."
    )
    cache: Literal["auto", "int8"] = once("auto", CACHE)
    compile_cache: str = once("auto", COMPILE_CACHE, path=True)
    debug: bool = once(False, DEBUG)

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        require_range(self, "context stride limit", 0)
        require_range(self, "batch_size", 1)


def parse(argv: list[str]) -> tuple[Path, EvaluateConfig]:
    """Return the run folder and the flags behind it."""
    run_dir = ""
    if argv and not argv[0].startswith("-"):
        run_dir, *argv = argv
    config = flags.parse(argv, EvaluateConfig(), ABOUT, prog="gptjax evaluate RUN")
    if not run_dir:
        raise UsageError("no run folder: gptjax evaluate RUN --task=... --data=...")
    hint = did_you_mean(config.task, TASKS, f"must be one of {', '.join(TASKS)}")
    require(config.task in TASKS, "task", config.task, hint)
    require(
        config.stride == 0 or config.task == "wikitext2",
        "stride",
        config.stride,
        f"{config.task} has no windows; leave it out",
    )
    require(bool(config.data), "data", config.data, "name the task's file")
    return expand(run_dir), config


def make_settings(config: EvaluateConfig, block_size: int) -> Settings:
    """Return the flags with every 0 filled in; UsageError if the model cannot follow them."""
    rule = f"must be at most the model's block_size={block_size}"
    require(config.context <= block_size, "context", config.context, rule)
    context = config.context or block_size
    rule = f"must be at most the context, {context}, or it would skip tokens"
    require(config.stride <= context, "stride", config.stride, rule)
    return Settings(context, config.stride or context, config.limit)


def read_file(path: Path) -> tuple[str, str]:
    """Return the text of a file, every character as it is, and its sha256."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data={path}: cannot be read: {error.strerror}") from error
    try:
        return data.decode(), hashlib.sha256(data).hexdigest()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}") from error


def main(argv: list[str]) -> int:
    """Evaluate, print one line of JSON, and return the exit code."""
    began = time.monotonic()
    run_dir, config = parse(argv)
    text, sha256 = read_file(Path(config.data))
    cli.use_compile_cache(config.compile_cache)
    run = load_run_or_own(run_dir, config.checkpoint)
    # Any attention will do: what the run was trained with may not go with this dtype or machine.
    cfg = dataclasses.replace(run.config.model, dtype=config.dtype, dropout=0.0, attention="auto")
    cfg = model.resolve(dataclasses.replace(cfg, cache=config.cache))
    # Rounded weights in the compute dtype: the quality of int8 without its speed.
    params = model.round_matrices(run.params) if config.weights == "int8" else run.params
    settings = make_settings(config, cfg.block_size)
    unit = "windows" if config.task == "wikitext2" else "texts"
    with show_progress(unit=unit) as progress:
        score = functools.partial(
            score_texts,
            cfg,
            params,
            context=settings.context,
            batch_size=config.batch_size,
            progress=functools.partial(progress, ""),
        )
        try:
            result = TASKS[config.task](score, run.tokenizer, text, settings)
        except DataError as error:
            raise DataError(f"{config.data}: {error}") from error
    about = {
        "task": config.task,
        "data": config.data,
        "sha256": sha256,
        "run": str(run_dir),
        "step": run.step,
        "tokenizer": run.tokenizer.kind,
        "context": settings.context,
        "limit": config.limit,
        "batch_size": config.batch_size,
        "dtype": cfg.dtype,
        "weights": config.weights,
        "cache": config.cache,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(about | result | {"seconds": round(time.monotonic() - began, 2)}))
    return 0
