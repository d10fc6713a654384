"""The command `gptjax`, or `python -m gptjax`: its first word names what to do."""

import sys

from gptjax.commands import doctor, evaluate
from gptjax.errors import UsageError, did_you_mean
from gptjax.terminal import cli

COMMANDS = {"evaluate": evaluate.main, "doctor": doctor.main}
USAGE = f"gptjax COMMAND --help; the commands are {', '.join(COMMANDS)}"


def dispatch(argv: list[str]) -> int:
    """Run the command that the first word names; returns its exit code."""
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print(f"usage: {USAGE}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"usage: {USAGE}")
        raise UsageError(f"unknown command {name}: {hint}" if name else f"usage: {USAGE}")
    return COMMANDS[name](rest)


def main() -> int:
    """Run on this process's arguments; returns the exit code."""
    return cli.run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
