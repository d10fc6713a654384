"""Check this machine: `gptjax doctor [RUN]`; the exit code is 1 if a check FAILs, else 0."""

import dataclasses
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from gptjax.commands.machine_checks import JAX, MACHINE
from gptjax.commands.run_checks import RUN, Finding, check_disk, mend
from gptjax.errors import UsageError, first_line
from gptjax.files import expand
from gptjax.settings import once, require
from gptjax.terminal import flags
from gptjax.terminal.console import printable

ABOUT = (
    "Check this machine, and a run folder if the first word names one. "
    "The exit code is 1 if a check FAILs, else 0."
)


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """The settings of `gptjax doctor`."""

    json: bool = once(False, "Print the findings as JSON.", section="Findings")
    mend: bool = once(
        False, "Before the checks, merge the steps of RUN that were saved but never merged."
    )
    debug: bool = once(False, "Stop at a check that raises an exception, and show its traceback.")


def attempt(check: Callable[..., Finding], *args: Path, debug: bool) -> tuple[str, Finding]:
    """Return the name of a check and what it finds, which is FAIL if it raises."""
    name = check.__name__.removeprefix("check_")
    try:
        return name, check(*args)
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {first_line(error)}"
        return name, Finding("FAIL", text, "gptjax doctor --debug")


def examine(run_dir: Path | None, *, debug: bool = False) -> Iterator[tuple[str, Finding]]:
    """Yield the names and findings of all checks that make sense.

    The first check of JAX and of RUN says whether the others of its kind do.
    """
    for check in MACHINE:
        yield attempt(check, debug=debug)
    run = ((check_disk,), (Path(),)) if run_dir is None else (RUN, (run_dir,))
    for (first, *others), args in ((JAX, ()), run):
        name, finding = attempt(first, *args, debug=debug)
        yield name, finding
        if finding.status != "FAIL":
            for other in others:
                yield attempt(other, *args, debug=debug)


def show(name: str, finding: Finding) -> None:
    """Print a finding on one line, or on a terminal wrapped, with the remedy below it."""
    head = f"{finding.status:<4}  {name:<9}  "
    parts = [finding.found] + [f"try: {finding.remedy}"] * bool(finding.remedy)
    separator = "; "
    if sys.stdout.isatty():
        separator = "\n" + " " * len(head)
        width = max(20, shutil.get_terminal_size().columns - len(head))
        wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        parts = [line for part in parts for line in wrapper.wrap(part)]
    print(printable(head + separator.join(parts)), flush=True)


def main(argv: list[str]) -> int:
    """Check and print the findings; return the exit code, 1 if a check FAILs."""
    run_dir = None
    if argv and not argv[0].startswith("-"):
        require(bool(argv[0]), "RUN", "", "is empty; name the run folder, or leave it out")
        run_dir, argv = expand(argv[0]), argv[1:]
    config = flags.parse(argv, DoctorConfig(), ABOUT, prog="gptjax doctor [RUN]")
    # A run that goes on meanwhile may have left little memory of the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if config.mend:
        if run_dir is None:
            raise UsageError("--mend: name the run folder before the flags")
        for line in mend(run_dir):
            print(line, file=sys.stderr)
    findings = []
    for name, finding in examine(run_dir, debug=config.debug):
        findings.append({"check": name, **finding._asdict()})
        if not config.json:
            show(name, finding)
    if config.json:
        print(json.dumps(findings, indent=2))
    return int(any(finding["status"] == "FAIL" for finding in findings))
