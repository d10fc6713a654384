"""The command `gptjax`, or `python -m gptjax`: its first word names what to do."""

import importlib
import sys

from gptjax.errors import UsageError, did_you_mean
from gptjax.terminal import cli

COMMANDS = {  # the module whose main(argv) it is; only one of them is imported
    "train": "gptjax.programs.train",
    "sample": "gptjax.programs.sample",
    "convert": "gptjax.programs.convert_gpt2",
    "tokenize": "gptjax.commands.tokenize",
    "evaluate": "gptjax.commands.evaluate",
    "doctor": "gptjax.commands.doctor",
}
USAGE = f"gptjax COMMAND --help; the commands are {', '.join(COMMANDS)}"


def dispatch(argv: list[str]) -> int:
    """Run the command that the first word names; return its exit code."""
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print(f"usage: {USAGE}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"usage: {USAGE}")
        raise UsageError(f"unknown command {name}: {hint}" if name else f"usage: {USAGE}")
    code: int = importlib.import_module(COMMANDS[name]).main(rest)
    return code


def main() -> int:
    """Run on this process's arguments; return the exit code."""
    return cli.run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
