"""What the first text waits for: the sampler's programs, compiled by threads ahead of it."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from gptjax import decoding, model, sampling
from gptjax.config import GPTConfig, SampleConfig
from gptjax.filters import make_history
from gptjax.sharding import PyTree, abstract_tree

Programs = list[Future[Any]]
FIRST = 3  # programs without which there is no text


def compile_programs(
    pool: ThreadPoolExecutor,
    cfg: GPTConfig,
    device: jax.Device,
    prompts: Sequence[Sequence[int]],
    how: SampleConfig,
    *,
    weights: str = "auto",
    max_new_tokens: int,
    n_likeliest: int | None = None,
) -> Programs:
    """Begin to compile `prepare_for_decoding` and what `sampling.generate_pieces` calls first.

    JAX keeps what it compiled, so that the calls find it.

    Args:
        pool: the threads.
        cfg: the model, without "auto".
        device: where the parameters will lie.
        prompts: token ids of each row, as of `sampling.generate`.
        how: temperature and filters.
        weights: as of `model.prepare_for_decoding`.
        max_new_tokens: per row, at least 1.
        n_likeliest: likeliest tokens to score beside each; None = score nothing.

    Returns:
        The programs in the order in which they are needed: to prepare, FIRST in all for the first
        token of each row, and one for the next, if there are any.
    """

    def on_device(tree: PyTree) -> PyTree:
        """Return the shapes of arrays that lie on the device."""
        return abstract_tree(tree, jax.tree.map(lambda leaf: SingleDeviceSharding(device), tree))

    rows = len(prompts)
    longest = max(len(sampling.cut(list(prompt), cfg.block_size)) for prompt in prompts)
    left = min(max_new_tokens, cfg.block_size - longest + 1)
    size = sampling.first_size(cfg, rows, longest, left)
    tokens_BT = np.zeros((rows, sampling.bucket(longest, size)), np.int32)
    keys = sampling.row_keys.lower(*sampling.key_parts(0, [0] * rows, prompts))
    keys_B = keys.out_info
    length_B, n_drawn = np.ones(rows, np.int32), np.int32(0)
    most = sampling.bucket(max(map(len, prompts)) + cfg.block_size)
    history = make_history(how, cfg.padded_vocab_size, prompts, [[]] * rows, most)
    read = (tokens_BT, length_B, keys_B, n_drawn, history, n_likeliest)

    prepare = model.prepare.lower(cfg, on_device(model.param_shapes(cfg)), weights)
    programs: Programs = [pool.submit(prepare.compile), pool.submit(keys.compile)]
    params = on_device(prepare.out_info)
    prefill = decoding.prefill.lower(cfg, how, size, params, *read)
    programs.append(pool.submit(prefill.compile))
    if left > 1:
        state, chunk = on_device(prefill.out_info), sampling.chunk_size()
        count = sampling.count_of(chunk)
        decode = decoding.decode.lower(cfg, how, chunk, params, state, keys_B, count)
        programs.append(pool.submit(decode.compile))
    return programs


def wait(begun: list[Future[Programs]], count: int | None = None) -> None:
    """Return when the first `count` programs that were begun are compiled, or all of them.

    One that failed is compiled again, and fails again, when it is called.
    """
    for programs in begun:
        with contextlib.suppress(Exception):
            for program in programs.result()[:count]:
                program.exception()
