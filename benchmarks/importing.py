"""Seconds and memory of an import: `python -m benchmarks.importing [preset [format ...]]`.

The source holds random float32 weights of the preset's size, in each of the formats. What
`import torch` alone takes is not counted.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from gptjax.config import GPTConfig
from gptjax.conversion import gguf, huggingface, llmc
from gptjax.conversion.hf_config import format_config
from gptjax.conversion.tensors import LIMITS, is_linear, read_params, slots
from gptjax.gpt2_files import load_gpt2_tokenizer
from gptjax.presets import PRESETS
from tests.test_tf_checkpoint import HEADER, block, entry, table

ROOT = Path(__file__).parent.parent
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def write_random(folder: Path, cfg: GPTConfig) -> None:
    """Write config.json and model.safetensors, a tensor at a time."""
    (folder / "config.json").write_text(json.dumps(format_config(cfg, {"eos_token_id": 50256})))
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
            file.write(rng.standard_normal(slot.shape, np.float32).data)


def read_random(folder: Path) -> dict[str, np.ndarray]:
    """The tensors that `write_random` wrote, by their published names."""
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("transformer."): array for name, array in tensors.items()}


def write_bin(folder: Path, cfg: GPTConfig) -> Path:
    """Hugging Face's older format."""
    import torch

    tensors = read_random(folder)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
    return path


def write_nanogpt(folder: Path, cfg: GPTConfig) -> Path:
    """nanoGPT's, without the state of an optimizer."""
    import torch

    model = {}
    for name, array in read_random(folder).items():
        tensor = torch.from_numpy(array)
        model[f"transformer.{name}"] = tensor.T.contiguous() if is_linear(name) else tensor
    model["lm_head.weight"] = model["transformer.wte.weight"]
    args = {name: getattr(cfg, name) for name in (*LIMITS, "bias")}
    path = folder / "ckpt.pt"
    torch.save({"model": model, "model_args": args}, path)
    return path


def write_llmc(folder: Path, cfg: GPTConfig) -> Path:
    """llm.c's."""
    path = folder / "model.bin"
    llmc.write_file(path, cfg, read_params(huggingface.open_folder(folder, False)))
    return path


def write_gguf(folder: Path, cfg: GPTConfig) -> Path:
    """llama.cpp's, with GPT-2's vocabulary."""
    path = folder / "model.gguf"
    params = read_params(huggingface.open_folder(folder, False))
    gguf.write_file(path, cfg, params, load_gpt2_tokenizer())
    return path


def write_tensorflow(folder: Path, cfg: GPTConfig) -> Path:
    """OpenAI's."""
    names = {"block_size": "n_ctx", "vocab_size": "n_vocab"}
    hparams = {names.get(name, name): getattr(cfg, name) for name in LIMITS}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    path, pairs, offset = folder / "model.ckpt.data-00000-of-00001", [HEADER], 0
    named = {openai_name(name): array for name, array in read_random(folder).items()}
    with path.open("wb") as file:
        for name, array in sorted(named.items()):
            pairs.append((name.encode(), entry(array, offset=offset)))
            offset += file.write(array.data)
    (folder / "model.ckpt.index").write_bytes(table([block(pairs)]))
    return path


def openai_name(name: str) -> str:
    """`h.0.attn.c_attn.weight` -> `model/h0/attn/c_attn/w`."""
    if name in ("wte.weight", "wpe.weight"):
        return f"model/{name[:3]}"
    name = re.sub(r"^h\.", "h", name).replace(".", "/").replace("/bias", "/b")
    return "model/" + name.replace("/weight", "/g" if "ln_" in name else "/w")


FORMATS: dict[str, Callable[[Path, GPTConfig], Path]] = {
    "safetensors": lambda folder, cfg: folder / "model.safetensors",
    "pytorch_model.bin": write_bin,
    "nanoGPT": write_nanogpt,
    "llm.c": write_llmc,
    "GGUF": write_gguf,
    "TensorFlow": write_tensorflow,
}
PICKLED = ("pytorch_model.bin", "nanoGPT")


def run_measured(*command: str) -> list[str]:
    """The words that a command prints, and after them its peak memory in bytes."""
    measured = [sys.executable, "-c", MEASURED, *command]
    return subprocess.run(measured, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def taken_by(module: str) -> int:
    """Bytes that importing a module takes, beside what Python and NumPy take."""
    codes = ("import numpy", f"import numpy, {module}")
    bare, full = (int(run_measured(sys.executable, "-c", code)[-1]) for code in codes)
    return full - bare


def measure(name: str, cfg: GPTConfig) -> tuple[int, float, int]:
    """Bytes of the weights in this format, seconds of their import, and its peak memory.

    The memory is without what `import torch` alone takes, where the format needs it: a build for
    CUDA takes a gigabyte and more, which says nothing about the import of a model.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, run = Path(temporary) / "source", Path(temporary) / "run"
        folder.mkdir()
        write_random(folder, cfg)
        path = FORMATS[name](folder, cfg)
        size = path.stat().st_size
        source = path if name in ("nanoGPT", "llm.c", "GGUF") else folder
        command = [sys.executable, str(ROOT / "convert_gpt2.py"), "import", str(source)]
        began = time.monotonic()
        peak = int(run_measured(*command, f"--out_dir={run}", "--allow_pickle")[-1])
        seconds = time.monotonic() - began
    if name in PICKLED:
        peak -= taken_by("torch")
    return size, seconds, peak


def main() -> None:
    """Print the table."""
    preset, *formats = sys.argv[1:] or ["gpt2"]
    cfg = PRESETS[preset].model
    print("| model | format | weights, GB | seconds | peak memory, GB | times the weights |")
    print("|---|---|---|---|---|---|")
    for name in formats or FORMATS:
        size, seconds, peak = measure(name, cfg)
        row = f"{size / 1e9:.2f} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / size:.2f}"
        print(f"| {preset} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
