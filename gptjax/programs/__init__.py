"""The programs train.py, sample.py and convert_gpt2.py: their folder, and the commands to type.

In a checkout they are the scripts at its top, which people read and edit. A wheel holds the same
three files in this folder (see pyproject.toml). Either way they are modules of this package.
"""

import shlex
from pathlib import Path

HERE = Path(__file__).parent
INSTALLED = (HERE / "train.py").is_file()
FOLDER = HERE if INSTALLED else HERE.parent.parent
__path__ = [str(FOLDER)]

NAMES = {"train.py": "train", "sample.py": "sample", "convert_gpt2.py": "convert"}


def command(script: str, *words: str) -> str:
    """Return the shell command that runs a program from the current directory.

    Args:
        script: a key of NAMES.
        words: its arguments.
    """
    if INSTALLED:
        return shlex.join(["gptjax", NAMES[script], *words])
    here = Path(script).is_file() and (FOLDER / script).samefile(script)
    return shlex.join(["python", script if here else str(FOLDER / script), *words])
