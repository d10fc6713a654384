"""GPT-2 in and out: `python convert_gpt2.py import|export|verify ...`; `--help` after each."""

import dataclasses
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import Literal, TypeVar

from gptjax import allocator, model, programs
from gptjax.config import CHECKPOINT, DEBUG
from gptjax.conversion import report
from gptjax.conversion.compared import compare_random, compare_run
from gptjax.conversion.convert import export_run, import_run
from gptjax.conversion.report import Compared
from gptjax.conversion.report_html import refuse_page, write_page
from gptjax.conversion.sources import SourceConfig
from gptjax.conversion.verify import first_failure
from gptjax.errors import DataError, UsageError
from gptjax.files import expand
from gptjax.settings import once, require
from gptjax.terminal import cli, flags
from gptjax.terminal.console import print_table, printable

PROG = "convert_gpt2.py"
T = TypeVar("T")
USAGE = """usage: {me} import SOURCE --out_dir=RUN
       {me} export RUN --to=hf|llmc|gguf|nanogpt --out_dir=DIR
       {me} verify RUN --against=SOURCE
       {me} verify --self_test
SOURCE is a name on the Hugging Face Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, ...),
a folder of its format or of OpenAI's original one, weights beside a config.json, a checkpoint of
nanoGPT, minGPT, makemore or build-nanogpt, a LoRA adapter, llm.c's .bin or a .gguf. RUN is a run
folder, which train.py --init_from=RUN and sample.py --out_dir=RUN read. For both, novels is a small
model that comes with gptjax. --help after a command lists its flags."""


@dataclasses.dataclass(frozen=True)
class ImportConfig(SourceConfig):
    """The settings of import."""

    out_dir: str = once("", "Run folder to create.", section="Result", path=True)
    vocab_size: int = once(
        0,
        "Change the vocabulary to so many tokens: rows that are too many are left out, new ones "
        "are drawn as the others are distributed. 0 keeps it.",
    )
    block_size: int = once(0, "Shorten the context to so many positions. 0 keeps it.")
    debug: bool = once(False, DEBUG)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The settings of export."""

    to: str = once(
        "hf",
        "Format: hf (transformers), llmc (llm.c), gguf (llama.cpp) or nanogpt (its ckpt.pt).",
        section="Result",
    )
    out_dir: str = once("", "Folder to create.", path=True)
    dtype: Literal["float32", "bfloat16"] = once(
        "float32", "Type of the stored numbers; bfloat16, half as large and rounded, for hf only."
    )
    checkpoint: str = once("best", CHECKPOINT)
    debug: bool = once(False, DEBUG)


@dataclasses.dataclass(frozen=True)
class VerifyConfig(SourceConfig):
    """The settings of verify."""

    against: str = once(
        "",
        "Source to compare with: what the run was imported from, or exported to.",
        section="Comparison",
        path=True,
    )
    checkpoint: str = once("best", CHECKPOINT)
    self_test: bool = once(
        False, "Compare a model with random weights, which needs neither a run nor the network."
    )
    size: str = once(
        "gpt2", "Model of the self-test: tiny, distilgpt2, or a preset such as gpt2 or gpt2_xl."
    )
    resized: bool = once(
        False, "Compare the tokens and positions that both have, if one has more of them."
    )
    verbose: bool = once(False, "Show every comparison, not only a line for each part.")
    json: bool = once(False, "Print the report as JSON, with every comparison.")
    html: str = once("", "Write the report as a web page to this file.", path=True)
    debug: bool = once(False, DEBUG)


def parse(config_class: type[T], argv: list[str], about: str, *words: str) -> T:
    """Return the settings of a command, which is typed with these words, from its flags."""
    return flags.parse(argv, config_class(), about, programs.command(PROG, *words))


def import_command(name: str, argv: list[str]) -> int:
    """Import a model and print what was imported; return the exit code."""
    config = parse(ImportConfig, argv, "Import a GPT-2.", "import", "SOURCE")
    require(bool(config.out_dir), "out_dir", config.out_dir, "name the run folder to create")
    began = time.monotonic()
    allocator.return_freed_memory()
    sizes = {"vocab_size": config.vocab_size, "block_size": config.block_size}
    run, digests = import_run(name, Path(config.out_dir), config, print, **sizes)
    for file, digest in digests.items():
        print(f"sha256 {digest} {file}")
    out_dir = config.out_dir if config.out_dir[0] != "-" else f"./{config.out_dir}"  # no flag
    against = [f"--against={name}", *flags.changed(config, SourceConfig())]
    against += ["--resized"] if any(sizes.values()) else []
    print(
        f"{model.count_params(run.config.model):,} parameters, {run.tokenizer.kind} tokenizer, "
        f"in {time.monotonic() - began:.1f} s\n"
        f"next: {programs.command('sample.py', f'--out_dir={config.out_dir}')}\n"
        f"  or: {programs.command(PROG, 'verify', out_dir, *against)}"
    )
    return 0


def export_command(name: str, argv: list[str]) -> int:
    """Export a run and list the files; return the exit code."""
    config = parse(ExportConfig, argv, "Export a run.", "export", "RUN")
    require(bool(config.out_dir), "out_dir", config.out_dir, "name the folder to create")
    allocator.return_freed_memory()
    where = Path(config.out_dir)
    export_run(Path(name), config.to, where, config.checkpoint, print, dtype=config.dtype)
    for path in sorted(path for path in Path(config.out_dir).rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>14,} {path}")
    return 0


def verify_command(name: str, argv: list[str]) -> int:
    """Compare a run with a source and print the report; return the exit code.

    Raises:
        DataError: a comparison fails; the first one is named.
    """
    config = parse(VerifyConfig, argv, "Verify a run.", "verify", "RUN")
    page = Path(config.html) if config.html else None
    if page:
        refuse_page(page)
    if config.self_test:
        rule = "reads no run and no source; leave them out, or leave --self_test out"
        require(not (name or config.against), "self_test", True, rule)
        name, compared = config.size, compare_random(config.size, config, hashes=bool(page))
    else:
        require(bool(name), "against", config.against, "name a run folder before the flags")
        require(bool(config.against), "against", config.against, "name what to compare with")
        compared = compare_run(
            *(name, config.checkpoint, config.against, config),
            resized=config.resized,
            hashes=bool(page),
        )
    if page:
        write_page(page, compared)
    if config.json:
        print(report.to_json(compared.checks))
    else:
        show(compared, config.verbose)
    first = first_failure(compared.checks)
    if first is not None:
        raise DataError(
            f"{name} is not the model it is compared with: the first that differs is {first.group} "
            f"{first.name}, by {first.difference:.2g}, where {first.allowed:.2g} is allowed"
        )
    return 0


def show(compared: Compared, verbose: bool) -> None:
    """Print the report for people: a line for each part of the computation, or all comparisons."""
    about = (compared.ours, f"compared with {compared.theirs}", *compared.notes)
    print(*map(wrapped, about), "", sep="\n")
    parts = report.parts(compared.checks)
    failed = [not part.at.ok for part in parts]
    print_table([*report.HEADER], [part.row for part in parts], failed)
    if verbose:
        for group in dict.fromkeys(check.group for check in compared.checks):
            checks = [check for check in compared.checks if check.group == group]
            rows = [
                [c.name, c.ours, f"{c.difference:.2g}", f"{c.allowed:.2g}", "ok" if c.ok else "NO"]
                for c in checks
            ]
            header = [group, "in gptjax" if any(c.ours for c in checks) else ""]
            print()
            print_table([*header, "difference", "allowed", ""], rows, [not c.ok for c in checks])
    print()
    if said := report.parting(compared.checks):
        print(wrapped(said))
    print(report.total(compared.checks))


def wrapped(sentence: str) -> str:
    """Return a sentence in lines of 80 columns, names whole."""
    return textwrap.fill(printable(sentence), 80, break_long_words=False, break_on_hyphens=False)


COMMANDS = {"import": import_command, "export": export_command, "verify": verify_command}


def main(argv: list[str]) -> int:
    """Run the command that the first word names; return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(me=programs.command(PROG)))
        return 0 if argv else 2
    # As an exception, so that nothing is left behind.
    for number in set(cli.stop_signals()) - {signal.SIGINT}:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    command, *rest = argv
    if command not in COMMANDS:
        raise UsageError(f"unknown command {command}: must be one of {', '.join(COMMANDS)}")
    name = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    name = str(expand(name)) if name.startswith("~") else name
    if not name and command != "verify" and not {"-h", "--help"} & set(rest):
        raise UsageError(f"{command}: name what to {command}; --help shows how")
    return COMMANDS[command](name, rest)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
