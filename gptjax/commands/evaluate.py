"""Evaluate a run: `gptjax evaluate RUN --task=lambada --data=lambada_test.jsonl`."""

import dataclasses
import difflib
import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from gptjax import model
from gptjax.checkpoints.run_folder import load_run
from gptjax.commands.protocols import Result, Scorer, Settings, hellaswag, lambada, wikitext2
from gptjax.config import require, require_range
from gptjax.errors import DataError, UsageError
from gptjax.files import expand
from gptjax.scoring import score_texts
from gptjax.terminal import cli, flags
from gptjax.terminal.console import show_count
from gptjax.tokenizer import Tokenizer

TASKS: dict[str, Callable[[Scorer, Tokenizer, str, Settings], Result]] = {
    "wikitext2": wikitext2,
    "lambada": lambada,
    "hellaswag": hellaswag,
}
ABOUT = "Evaluate a model by a published protocol. The first word is its run folder."


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What `gptjax evaluate` needs."""

    task: str = ""
    """wikitext2, lambada or hellaswag"""
    data: str = ""
    """the task's file: a raw text for wikitext2, JSON lines for the others"""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a step"""
    context: int = 0
    """tokens that a prediction sees at most; 0 = the model's block_size"""
    stride: int = 0
    """wikitext2: tokens between windows; 0 = context (they do not overlap)"""
    limit: int = 0
    """take the first rows only (wikitext2: tokens), so many; 0 = all"""
    batch_size: int = 8
    """texts per forward pass"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute dtype; auto = bfloat16 on GPU and TPU, float32 on CPU"""
    compile_cache: str = "auto"
    """folder of compiled programs; auto = xla in the cache folder, which is ~/.cache/gptjax or what
    the variable GPTJAX_CACHE names; off = compile every time"""
    debug: bool = False
    """show a traceback where an error would be one line"""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        require_range(self, "context stride limit", 0)
        require_range(self, "batch_size", 1)


def parse(argv: list[str]) -> tuple[Path, EvaluateConfig]:
    """Return the run folder and the flags behind it."""
    run_dir = ""
    if argv and not argv[0].startswith("-"):
        run_dir, *argv = argv
    config = flags.parse(EvaluateConfig, argv, EvaluateConfig(), ABOUT, prog="gptjax evaluate RUN")
    if not run_dir:
        raise UsageError("no run folder: gptjax evaluate RUN --task=... --data=...")
    near = difflib.get_close_matches(config.task, TASKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(TASKS)}"
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
    run = load_run(run_dir, config.checkpoint)
    # Any attention will do: what the run was trained with may not go with this dtype or machine.
    cfg = dataclasses.replace(run.config.model, dtype=config.dtype, dropout=0.0, attention="auto")
    cfg = model.resolve(cfg)
    settings = make_settings(config, cfg.block_size)
    with show_count("windows" if config.task == "wikitext2" else "texts") as progress:
        score = functools.partial(
            score_texts,
            cfg,
            run.params,
            context=settings.context,
            batch_size=config.batch_size,
            progress=progress,
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
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(about | result | {"seconds": round(time.monotonic() - began, 2)}))
    return 0
