"""The evaluations of a model in training: its loss on held-back text, and a sample of its text."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import first_text, model, sampling, sharding
from gptjax.config import SampleConfig, TrainConfig
from gptjax.data.batches import Shards, eval_windows, read_windows
from gptjax.tokenizer import Tokenizer, decode

HOW = SampleConfig()  # how the samples are drawn


def validate(
    config: TrainConfig,
    shards: Shards,
    mesh: Mesh,
    batch_losses: Callable[[jax.Array], jax.Array],
    stopped: Callable[[], bool],
) -> float | None:
    """Return the mean loss over the fixed validation windows, in nats per token.

    Args:
        config: the settings.
        shards: the token arrays of the validation split.
        mesh: the devices that share each batch.
        batch_losses: windows (batch_size, T+1) on them -> the loss of each.
        stopped: called before each batch; if it returns True, None is returned.
    """
    cfg, rows = config.model, config.batch_size
    index, count = sharding.batch_share(mesh)
    share = rows // count
    first = share * index
    n_windows = config.eval_iters * (config.eval_batch_size or rows)
    starts = eval_windows(shards, cfg.block_size, n_windows)
    losses: list[jax.Array] = []
    for i in range(0, len(starts), rows):
        if stopped():
            return None
        windows = read_windows(shards, starts[i : i + rows], cfg.block_size, cfg.vocab_size)
        missing = rows - len(windows)  # in the last batch: one compiled shape serves all
        padded = np.concatenate([windows, np.repeat(windows[:1], missing, axis=0)])
        mine = sharding.place(padded[first : first + share], mesh, axis=0)
        losses.append(batch_losses(mine)[: len(windows)])
        jax.block_until_ready(losses[-2:-1])  # else all would be on their way before a signal
    return float(np.mean(np.concatenate(jax.device_get(losses))))


def write_sample(
    config: TrainConfig, params: model.Params, tokenizer: Tokenizer, stopped: Callable[[], bool]
) -> str | None:
    """Return a text of config.sample_tokens tokens, cut short when `stopped` returns True.

    Return None if that is before it begins, and in all processes but the first.
    """
    if stopped():
        return None
    params = sharding.on_one_device(params)  # all processes together
    if jax.process_index() > 0:
        return None
    cfg = config.model
    pieces = sampling.generate(
        cfg,
        model.prepare_for_decoding(cfg, params),
        [[tokenizer.start_id]],
        HOW,
        max_new_tokens=config.sample_tokens,
        seed=config.seed,
    )
    ids: list[int] = []
    for piece in pieces:
        ids += piece[0].tolist()
        if stopped():
            break
    return decode(tokenizer, np.array(ids, np.int32))


def compile_sampler(config: TrainConfig, abstract: model.Params) -> None:
    """Compile what `write_sample` calls, for parameters of these shapes."""
    device, *_ = sharding.mesh_of(abstract).local_devices
    with ThreadPoolExecutor() as pool:
        first_text.compile_programs(
            pool, config.model, device, [[0]], HOW, max_new_tokens=config.sample_tokens
        )
