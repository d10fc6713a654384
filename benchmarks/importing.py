"""Seconds and memory of an import: `python -m benchmarks.importing [preset ...]`.

The source is a folder in Hugging Face's format with random float32 weights of the preset's size.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gptjax.config import GPTConfig
from gptjax.formats.huggingface import format_config
from gptjax.gpt2_tensors import slots
from gptjax.presets import PRESETS

ROOT = Path(__file__).parent.parent
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def write_random(folder: Path, cfg: GPTConfig) -> int:
    """Write config.json and model.safetensors, a tensor at a time; the size of the weights."""
    (folder / "config.json").write_text(json.dumps(format_config(cfg, 50256)))
    header, offset = {}, 0
    for slot in slots(cfg):
        end = offset + 4 * math.prod(slot.shape)
        entry = {"dtype": "F32", "shape": list(slot.shape), "data_offsets": [offset, end]}
        header[f"transformer.{slot.name}"] = entry
        offset = end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for slot in slots(cfg):
            file.write(rng.standard_normal(slot.shape, np.float32).tobytes())
        return file.tell()


def main() -> None:
    """Print the table."""
    print("| model | weights, GB | seconds | peak memory, GB | times the weights |")
    print("|---|---|---|---|---|")
    for preset in sys.argv[1:] or ["gpt2"]:
        with tempfile.TemporaryDirectory() as temporary:
            source, run = Path(temporary) / "source", Path(temporary) / "run"
            source.mkdir()
            size = write_random(source, PRESETS[preset].model)
            command = [sys.executable, str(ROOT / "convert_gpt2.py"), "import", str(source)]
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", MEASURED, *command, f"--out_dir={run}"],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            seconds = time.monotonic() - began
            peak = int(done.stdout.split()[-1])
            row = f"{size / 1e9:.2f} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / size:.2f}"
            print(f"| {preset} | {row} |", flush=True)


if __name__ == "__main__":
    main()
