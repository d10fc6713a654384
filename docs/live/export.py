"""Write a model as one file for the live page: `python docs/live/export.py RUN`.

RUN is a run folder, or any model that `sample.py --init_from` takes. The file is a JSON header
behind its length (4 bytes), then the arrays in bfloat16, all little-endian; gpt.js reads it.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gptjax.checkpoints.run_folder import Run
from gptjax.conversion.sources import load_model
from gptjax.errors import UsageError
from gptjax.gpt2_files import GPT2Tokenizer, gpt2_merges, gpt2_spelling
from gptjax.hf_tokenizer import HFTokenizer
from gptjax.model import unstack_layers
from gptjax.terminal import cli
from gptjax.tokens import Tokenizer

MODEL_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "tie_head", "activation")
LARGEST = 8_000_000  # bytes of the page with its model


def arrays_of(run: Run) -> dict[str, np.ndarray]:
    """Return the parameters in bfloat16 by name, layers apart, without the padding rows."""
    cfg = run.config.model
    tree = unstack_layers(jax.device_get(run.params), cfg.n_layer)
    found = {}
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows = cfg.vocab_size if name in ("wte.embedding", "lm_head.embedding") else len(leaf)
        found[name] = np.asarray(leaf[:rows]).astype(ml_dtypes.bfloat16)
    return found


def tokenizer_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what gpt.js needs of a tokenizer; UsageError if it has no code for this kind."""
    fields = {"start": tokenizer.start_id, "ends": list(tokenizer.eos)}
    if tokenizer.kind in ("char", "byte"):
        return fields | tokenizer.to_json()
    if isinstance(tokenizer, GPT2Tokenizer):
        tokens, merges = gpt2_spelling(tokenizer), gpt2_merges(tokenizer)
        return fields | bpe(tokens, merges, [tokenizer.start_id])
    if isinstance(tokenizer, HFTokenizer):
        stored = json.loads(tokenizer.backend.to_str())
        words = stored["pre_tokenizer"] or {}
        plain = words.get("type") == "ByteLevel" and words.get("use_regex", True)
        plain = plain and not words["add_prefix_space"] and not stored["normalizer"]
        if plain and stored["model"]["type"] == "BPE" and not stored["model"]["ignore_merges"]:
            named = [tokenizer.token(i) or "" for i in range(tokenizer.n_tokens)]
            merges = [" ".join(pair) for pair in stored["model"]["merges"]]
            return fields | bpe(named, merges, [token["id"] for token in stored["added_tokens"]])
    raise UsageError("the page reads characters, bytes and GPT-2's kind of byte-level BPE only")


def bpe(tokens: list[str], merges: list[str], special: list[int]) -> dict[str, Any]:
    """Return the fields of a byte-level BPE: tokens by id, merges in their order."""
    return {"kind": "bpe", "tokens": tokens, "merges": merges, "special": special}


def packed(run: Run) -> bytes:
    """Return the file of a model."""
    arrays = arrays_of(run)
    header = {
        "config": {name: dataclasses.asdict(run.config.model)[name] for name in MODEL_FIELDS},
        "tokenizer": tokenizer_fields(run.tokenizer),
        "arrays": [{"name": name, "shape": array.shape} for name, array in arrays.items()],
    }
    text = json.dumps(header).encode()  # in ASCII
    text += b" " * (len(text) % 2)  # arrays of two bytes begin at even places
    length = len(text).to_bytes(4, "little")
    return b"".join([length, text, *(array.tobytes() for array in arrays.values())])


def main(argv: list[str]) -> None:
    """Read the model, write the file, and say how large it is."""
    parser = argparse.ArgumentParser(description="Write a model for the live page.")
    parser.add_argument("run", help="a run folder, or a folder of Hugging Face")
    default = Path(__file__).parent / "model.bin"
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    args = parser.parse_args(argv)
    data = packed(load_model(args.run))
    args.out.write_bytes(data)
    print(f"{args.out}: {len(data):,} bytes")
    if len(data) > LARGEST:
        print(f"that is more than the {LARGEST:,} bytes that the page should have")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
