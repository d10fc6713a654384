"""Seconds and memory of tokenising a text: `python -m benchmarks.tokenising [megabytes ...]`.

The same words once in short lines, once in a single line, and letters without a space, at each size
(by default 4 and 8 MB): twice the text should take twice the time.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TEXTS = {
    "short lines": "the cat sat on the mat and the dog ran to the cat\n",
    "one line": "the cat sat on the mat and the dog ran to the cat, ",
    "no space": "ACGTTGCAAACCGGTTACGATCGATCGGGATATCCCGATAATCGCGATA",
}
MEASURED = """
import json, resource, sys, time
from gptjax.data.datasets import load_dataset
began = time.monotonic()
load_dataset(sys.argv[1], block_size=8, tokenizer=sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([time.monotonic() - began, peak]))
"""


def measure(path: Path, kind: str) -> tuple[float, int]:
    """Seconds and peak memory of a process that tokenises the file with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(path), kind],
            env={**os.environ, "GPTJAX_CACHE": cache},
            stdout=subprocess.PIPE,
            check=True,
        )
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def main() -> None:
    """Print the table."""
    sizes = [int(word) for word in sys.argv[1:]] or [4, 8]
    print("| text | tokenizer | MB | seconds | MB/s | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for name, unit in TEXTS.items():
        for kind in ("char", "byte", "gpt2"):
            for size in sizes:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "text.txt"
                    path.write_text(unit * (size * 10**6 // len(unit)))
                    seconds, peak = measure(path, kind)
                row = f"{size} | {seconds:.2f} | {size / seconds:.1f} | {peak / 1e6:.0f}"
                print(f"| {name} | {kind} | {row} |", flush=True)


if __name__ == "__main__":
    main()
