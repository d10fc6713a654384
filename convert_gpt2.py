"""GPT-2 in and out: `python convert_gpt2.py import|export|verify ...`; `--help` after each."""

import dataclasses
import json
import math
import signal
import sys
import tempfile
import time
from pathlib import Path

import gptjax  # before jax: it sets up the allocator

# isort: split
from gptjax import model
from gptjax.checkpoints.run_folder import load_run
from gptjax.config import require
from gptjax.conversion.convert import export_run, import_run
from gptjax.conversion.reference import load_reference, write_random_model
from gptjax.conversion.sources import SourceConfig, open_source
from gptjax.conversion.tensors import read_params
from gptjax.conversion.verify import Check, check_sizes, first_failure, verify
from gptjax.errors import DataError, UsageError
from gptjax.files import expand
from gptjax.presets import PRESETS
from gptjax.terminal import cli, flags
from gptjax.terminal.console import print_table

PROG = "convert_gpt2.py"
USAGE = """usage: python convert_gpt2.py import SOURCE --out_dir=RUN
       python convert_gpt2.py export RUN --to=hf|llmc|gguf --out_dir=DIR
       python convert_gpt2.py verify RUN --against=SOURCE
       python convert_gpt2.py verify --self_test
SOURCE is a name on the Hugging Face Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, ...),
a folder of its format or of OpenAI's original one, weights beside their config.json, nanoGPT's
ckpt.pt or llm.c's .bin. RUN is a run folder, which train.py --init_from=RUN and sample.py
--out_dir=RUN read. --help after a command lists its flags."""


@dataclasses.dataclass(frozen=True)
class ImportConfig(SourceConfig):
    """Make a run folder of a model in any format."""

    out_dir: str = ""
    """the run folder to make"""
    debug: bool = False
    """show a traceback where an error would be one line"""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a run's model in another format."""

    to: str = "hf"
    """hf (transformers), llmc (llm.c's .bin) or gguf (llama.cpp)"""
    out_dir: str = ""
    """the folder to make"""
    checkpoint: str = "best"
    """best, latest or the number of a step"""
    debug: bool = False
    """show a traceback where an error would be one line"""


@dataclasses.dataclass(frozen=True)
class VerifyConfig(SourceConfig):
    """Compare a run with transformers' model of the same weights."""

    against: str = ""
    """the source that the run was imported from, or was exported to"""
    checkpoint: str = "best"
    """best, latest or the number of a step"""
    self_test: bool = False
    """compare on random weights, which needs neither a run nor the network"""
    size: str = "gpt2"
    """of the self-test: tiny, distilgpt2, or a preset such as gpt2 or gpt2_xl"""
    verbose: bool = False
    """every comparison, not only those that fail"""
    json: bool = False
    """the report as JSON, with every comparison"""
    debug: bool = False
    """show a traceback where an error would be one line"""


def import_command(name: str, argv: list[str]) -> int:
    """Import, and say what came out."""
    config = flags.parse(
        ImportConfig, argv, ImportConfig(), "Import a GPT-2.", f"{PROG} import SOURCE"
    )
    require(bool(config.out_dir), "out_dir", config.out_dir, "name the run folder to make")
    began = time.monotonic()
    run, digests = import_run(name, Path(config.out_dir), config, print)
    for file, digest in digests.items():
        print(f"sha256 {digest} {file}")
    out_dir = config.out_dir if config.out_dir[0] != "-" else f"./{config.out_dir}"  # no flag
    against = [f"--against={name}", *flags.changed(config, SourceConfig())]
    print(
        f"{model.count_params(run.config.model):,} parameters, {run.tokenizer.kind} tokenizer, "
        f"in {time.monotonic() - began:.1f} s\n"
        f"next: {flags.command('sample.py', f'--out_dir={config.out_dir}')}\n"
        f"  or: {flags.command(PROG, 'verify', out_dir, *against)}"
    )
    return 0


def export_command(name: str, argv: list[str]) -> int:
    """Export, and list the files."""
    config = flags.parse(ExportConfig, argv, ExportConfig(), "Export a run.", f"{PROG} export RUN")
    require(bool(config.out_dir), "out_dir", config.out_dir, "name the folder to make")
    export_run(Path(name), config.to, Path(config.out_dir), config.checkpoint)
    for path in sorted(Path(config.out_dir).iterdir()):
        print(f"{path.stat().st_size:>14,} {path}")
    return 0


def verify_command(name: str, argv: list[str]) -> int:
    """Compare; exit code 65 and the first difference unless every gate holds."""
    config = flags.parse(VerifyConfig, argv, VerifyConfig(), "Verify a run.", f"{PROG} verify RUN")
    if config.self_test:
        sizes = {
            "tiny": dataclasses.replace(PRESETS["quickstart"].model, n_layer=2, vocab_size=256)
        }
        sizes |= {name: preset.model for name, preset in PRESETS.items() if name != "finetune_gpt2"}
        sizes["distilgpt2"] = dataclasses.replace(sizes["gpt2"], n_layer=6)
        size = config.size.replace("-", "_")  # as Hugging Face writes them
        require(size in sizes, "size", config.size, f"must be one of {', '.join(sizes)}")
        cfg = dataclasses.replace(sizes[size], bias=True)
        if config.activation != "auto":
            cfg = dataclasses.replace(cfg, activation=config.activation)
        with tempfile.TemporaryDirectory() as folder:
            write_random_model(cfg, Path(folder))
            source = open_source(folder, config)
            checks = verify(source.cfg, read_params(source), load_reference(source))
        name = config.size
    else:
        require(bool(name), "against", config.against, "name a run folder before the flags")
        require(bool(config.against), "against", config.against, "name what to compare with")
        source = open_source(config.against, config)
        run = load_run(Path(name), config.checkpoint)
        check_sizes(run.config.model, source)
        checks = verify(run.config.model, run.params, load_reference(source))
    first = first_failure(checks)
    if config.json:
        report = [{**check._asdict(), "ok": check.ok} for check in checks]
        for entry in report:  # JSON has no NaN
            for key in ("difference", "allowed"):
                entry[key] = entry[key] if math.isfinite(entry[key]) else None
        where = None if first is None else f"{first.group} {first.name}"
        print(json.dumps({"ok": first is None, "first_difference": where, "checks": report}))
    else:
        show(checks, config.verbose)
    if first is not None:
        raise DataError(
            f"{name} is not the model it is compared with: they part at {first.group} "
            f"{first.name}, difference {first.difference:.2g}, allowed {first.allowed:.2g}"
        )
    return 0


def show(checks: list[Check], verbose: bool) -> None:
    """Print the report for people: a line for each group, then what fails, or everything.

    A group's numbers are those of its first failure, or of what comes nearest to being one.
    """
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.group.removesuffix("s") + "s", []).append(check)
    rows = []
    for group, members in groups.items():
        at = first_failure(members) or max(members, key=lambda c: c.difference / (c.allowed or 1))
        count = f"{sum(check.ok for check in members)} of {len(members)}"
        rows.append([group, count, f"{at.difference:.2g}", f"{at.allowed:.2g}", at.name])
    failed = [first_failure(members) is not None for members in groups.values()]
    print_table(["what", "hold", "difference", "allowed", "at"], rows, failed)
    for group, members in groups.items():
        shown = [check for check in members if verbose or not check.ok]
        rows = [
            [c.name, c.ours, f"{c.difference:.2g}", f"{c.allowed:.2g}", "ok" if c.ok else "NO"]
            for c in shown
        ]
        if rows:
            print()
            header = [group, "in gptjax" if any(c.ours for c in shown) else ""]
            failed = [not check.ok for check in shown]
            print_table([*header, "difference", "allowed", ""], rows, failed)
    print(f"\n{sum(check.ok for check in checks)} of {len(checks)} comparisons hold")


COMMANDS = {"import": import_command, "export": export_command, "verify": verify_command}


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    # As an exception, so that nothing is left behind.
    for number in set(cli.stop_signals()) - {signal.SIGINT}:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    command, *rest = argv
    if command not in COMMANDS:
        raise UsageError(f"unknown command {command}: there are {', '.join(COMMANDS)}")
    name = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    name = str(expand(name)) if name.startswith("~") else name
    if not name and command != "verify" and "--help" not in rest:
        raise UsageError(f"{command}: name what to {command}; --help shows how")
    return COMMANDS[command](name, rest)


if __name__ == "__main__":
    if sys.argv[1:2] != ["verify"]:  # which computes
        gptjax.return_freed_memory()
    sys.exit(cli.run(main, sys.argv[1:]))
