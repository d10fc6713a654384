"""Speculative decoding beside decoding without: `python -m benchmarks.speculative MODEL SMALL`.

Both are what `sample.py --init_from` takes, with the same tokens: gpt2-xl and gpt2, or run folders.
They continue prompts, one at a time, from the validation split of `--dataset`. Timed are the plain
decoder of MODEL, the one that is a single kernel where that runs, and drafts of SMALL, by its plain
decoder and by the kernel, and of earlier words (n-grams). Greedy texts are judged in float32 (see
`benchmarks.decode`), drawn ones are only compared with the plain decoder's.
"""

import argparse
import os
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import numpy as np

from gptjax import fused, model, sampling, speculative
from gptjax.config import SampleConfig
from gptjax.conversion import sources
from gptjax.data.datasets import load_dataset
from gptjax.drafts import Draft
from gptjax.speculative import Tally

from .decode import check

WAYS = {
    "greedy": SampleConfig(temperature=0),
    "temperature 0.8, top-k 200": SampleConfig(temperature=0.8, top_k=200),
}
PROMPT = 12  # tokens
Side = Callable[[list[int], Tally], np.ndarray]  # a prompt -> new tokens (1, n)


def main() -> None:
    """Print a table for each way to draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("small")
    parser.add_argument("--dataset", required=True, help="text file, folder or name")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=500, help="that continue each")
    parser.add_argument("--drafted", type=int, default=4, help="tokens at a time")
    args = parser.parse_args()
    large, small = (sources.load_model(name) for name in (args.model, args.small))
    data = load_dataset(args.dataset, block_size=PROMPT, tokenizer=large.tokenizer)
    places = np.linspace(0, len(data.val[0]) - PROMPT, args.prompts, dtype=int)
    prompts = [[int(i) for i in data.val[0][at : at + PROMPT]] for at in places]
    cfg, small_cfg = (model.resolve(run.config.model) for run in (large, small))
    plain = model.prepare_for_decoding(cfg, large.params)
    small_plain = model.prepare_for_decoding(small_cfg, small.params)
    kernel, small_kernel = fused.with_kernel(cfg, plain), fused.with_kernel(small_cfg, small_plain)

    def continued(params: model.Params, how: SampleConfig, draft: Draft | None) -> Side:
        """A function that continues a prompt."""

        def side(prompt: list[int], tally: Tally) -> np.ndarray:
            asked = {"max_new_tokens": args.tokens}
            if draft is None:
                pieces = list(sampling.generate(cfg, params, [prompt], how, **asked))
            else:
                drafted = speculative.generate_pieces(
                    cfg, params, [prompt], how, draft=draft, tally=tally, **asked
                )
                pieces = [piece.ids for piece in drafted]
            return np.concatenate(pieces, axis=1)[:, : args.tokens]

        return side

    device = jax.devices()[0].device_kind
    print(f"{os.cpu_count()} cores, {device}, {cfg.dtype}, jax {version('jax')}")
    for name, how in WAYS.items():
        drafts = {
            "no draft": (plain, None),
            "no draft, by the kernel": (kernel, None),
            f"{args.drafted} tokens by SMALL": (plain, Draft(args.drafted, small_cfg, small_plain)),
            f"{args.drafted} tokens by SMALL's kernel": (
                plain,
                Draft(args.drafted, small_cfg, small_kernel),
            ),
            f"{args.drafted} tokens by n-grams": (plain, Draft(args.drafted)),
        }
        if "kernel" not in kernel:
            del drafts["no draft, by the kernel"]
        if "kernel" not in small_kernel:
            del drafts[f"{args.drafted} tokens by SMALL's kernel"]
        print(f"\n| {name} | tokens/s | times plain | tokens a pass | as plain | in float32 |")
        print("|---|---|---|---|---|---|", flush=True)
        first: tuple[float, np.ndarray] | None = None
        for said, (params, draft) in drafts.items():
            side, tally = continued(params, how, draft), Tally(1)
            side(prompts[0], Tally(1))  # compiles
            began = time.perf_counter()
            new = np.concatenate([side(prompt, tally) for prompt in prompts])
            rate = new.size / (time.perf_counter() - began)
            first = first or (rate, new)
            greedy = how.temperature == 0
            verdict = check(cfg, large.params, how, prompts, new) if greedy else ""
            right = tally.right.sum() / max(1, tally.drafted.sum())
            each = 1 + args.drafted * right  # a token of MODEL's own comes with each pass
            print(
                f"| {said} | {rate:,.0f} | {rate / first[0]:.2f} | {each:.2f} "
                f"| {(new == first[1]).mean():.0%} | {verdict} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
