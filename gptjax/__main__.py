"""The command `gptjax`, or `python -m gptjax`: its first word names what to do."""

import importlib
import sys

from gptjax.errors import UsageError, did_you_mean
from gptjax.terminal import cli

COMMANDS = {  # the module whose main(argv) it is, of which only one is imported; what it does
    "train": ("gptjax.programs.train", "train a GPT"),
    "sample": ("gptjax.programs.sample", "write text from a model"),
    "convert": ("gptjax.programs.convert_gpt2", "import, export and verify GPT-2"),
    "tokenize": ("gptjax.commands.tokenize", "make a byte-level BPE of a text"),
    "evaluate": ("gptjax.commands.evaluate", "measure a model: WikiText-2, LAMBADA, HellaSwag"),
    "doctor": ("gptjax.commands.doctor", "check this machine, and a run"),
}
USAGE = f"gptjax COMMAND --help; the commands are {', '.join(COMMANDS)}"


def dispatch(argv: list[str]) -> int:
    """Run the command that the first word names; return its exit code."""
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print("usage: gptjax COMMAND ...\n")
        for command, (_, does) in COMMANDS.items():
            print(f"  {command:<10}{does}")
        print("\ngptjax COMMAND --help lists its flags.")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"usage: {USAGE}")
        raise UsageError(f"unknown command {name}: {hint}" if name else f"usage: {USAGE}")
    code: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return code


def main() -> int:
    """Run on this process's arguments; return the exit code."""
    return cli.run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
