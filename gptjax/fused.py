"""The decoder by the kernel of `kernels.decoder`, where it runs: a drop-in for `decoding.decode`.

B batch (rows), S cache size, D width, L layers.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax import decoding
from gptjax.config import GPTConfig, SampleConfig
from gptjax.decoding import NOT_FINITE, SMALLEST, DecoderState, Scores, draw
from gptjax.kernels import cuda, decoder
from gptjax.kernels.int8 import Int8
from gptjax.kv_cache import KVCache
from gptjax.model import Params

GAVE_UP = -2  # in the place of tokens, when blocks waited in vain: see `decoder.decode`
# Layers, heads and width of a model -> for how many rows, and how large a vocabulary, the kernel
# was measured to be faster on an H100, up to a full context, and its texts were compared with the
# float32 model. Beside it are ms a token without and with the kernel.
FASTER = {
    (6, 6, 384): (8, 65),  # shakespeare_char: one row 0.145 -> 0.080, eight 0.132 -> 0.117
    # GPT-2 small: one row 0.42 -> 0.20, five at 1,024 tokens 0.51 -> 0.43. Six are faster at 512,
    # 0.44 -> 0.40, and not at 1,024, 0.50 -> 0.50; eight are slower there, 0.49 -> 0.52.
    (12, 12, 768): (5, 50304),
    (24, 16, 1024): (4, 50304),  # medium: two rows 0.90 -> 0.53, four 0.88 -> 0.67
    (36, 20, 1280): (2, 50304),  # large: two rows 1.55 -> 1.00
    (48, 25, 1600): (2, 50304),  # XL: two rows 2.51 -> 1.55
}
# Tokens of a row from which on sample.py takes it: NVRTC takes 1 to 2.5 s (on 2 CPU cores), once on
# a machine. In one row of GPT-2 small so many tokens save 2 s, in five rows 0.7 s.
MANY_STEPS = 8192
Cache = Any  # a decoder.Stacked, where the plain decoder has a KVCache
given_up: list[bool] = []  # not empty once that happened


def sizes_of(cfg: GPTConfig) -> decoder.Sizes:
    """Return what the kernel has to know of a model."""
    return decoder.Sizes(
        cfg.n_layer,
        cfg.n_head,
        cfg.n_embd,
        cfg.vocab_size,
        cfg.padded_vocab_size,
        cfg.activation == "gelu",
    )


def plan_of(cfg: GPTConfig, rows: int) -> decoder.Plan | None:
    """Return how the kernel would compute so many rows on the first GPU here, None if it cannot."""
    cores = getattr(jax.local_devices()[0], "core_count", 0)
    return decoder.plan(sizes_of(cfg), min(128, cores), rows)


def with_kernel(cfg: GPTConfig, params: Params) -> Params:
    """Return the parameters with the weights as the kernel reads them, if it is to run.

    It does with cfg.kernels=auto, for the shapes and on the kind of GPU where it was measured to be
    faster, in bfloat16 and without int8. The weights then lie in memory twice: prompts are read by
    the plain model.

    Args:
        cfg: the model, without "auto".
        params: from `prepare_for_decoding`.
    """
    wanted = cfg.kernels == "auto" and most_rows(cfg) > 0
    plain = cfg.dtype == "bfloat16" and cfg.cache == "auto"
    if not wanted or not plain or isinstance(params["wte"]["embedding"], Int8):
        return params
    if cuda.capability() != cuda.HOPPER or not cuda.available():
        return params
    plan = plan_of(cfg, most_rows(cfg))
    if plan is None:
        return params
    return {**params, "kernel": decoder.pack(sizes_of(cfg), plan, params)}


def without_kernel(params: Params) -> Params:
    """Return the parameters of `prepare_for_decoding` again."""
    return {name: part for name, part in params.items() if name != "kernel"}


def most_rows(cfg: GPTConfig) -> int:
    """Return up to how many rows the kernel was compared and measured to be faster for."""
    rows, tokens = FASTER.get((cfg.n_layer, cfg.n_head, cfg.n_embd), (0, 0))
    return rows if cfg.vocab_size <= tokens else 0


def takes(cfg: GPTConfig, rows: int) -> bool:
    """Return whether the kernel is to decode so many rows, where it runs."""
    return rows <= most_rows(cfg) and not given_up


def give_up(reason: str) -> None:
    """Leave decoding to the plain decoder for the rest of the process, and say so on stderr."""
    if not given_up:
        given_up.append(True)
        print(f"kernels: plain JAX instead, because {reason}", file=sys.stderr)


@functools.partial(jax.jit, static_argnames=("cfg",))
def stack_cache(cfg: GPTConfig, cache: KVCache) -> Cache:
    """Return the cache as the kernel takes it, with room for a context and no more."""
    B, S = cache.k[0].shape[:2]
    plan = plan_of(cfg, B)
    assert plan is not None
    room = ((0, 0), (0, 0), (0, max(0, cfg.block_size - S)), (0, 0))
    k, v = (
        jnp.pad(jnp.stack(x).reshape(cfg.n_layer, B, S, cfg.n_embd)[:, :, : cfg.block_size], room)
        for x in (cache.k, cache.v)
    )
    words = jnp.zeros(decoder.n_words(sizes_of(cfg), plan, B), jnp.uint32)
    return decoder.Stacked(k, v, cache.length_B, words)


def token_logits(
    cfg: GPTConfig, packed: decoder.Packed, token_B: Array, cache: Cache
) -> tuple[Array, Cache, Array]:
    """Return float32 logits (B, V) of the token after `token_B`, as `decoding.token_logits` does.

    Args:
        cfg: the model, without "auto".
        packed: params["kernel"] of `with_kernel`.
        token_B: the newest token of each row.
        cache: from `stack_cache`; rows that are full write their last position again.

    Returns:
        The logits, the cache one token longer, and whether the kernel waited for nothing in vain.
    """
    plan = plan_of(cfg, len(token_B))
    assert plan is not None
    token_B = jnp.maximum(token_B, 0)  # NOT_FINITE is the index of no row
    _, logits_BV, cache, ok = decoder.decode(
        sizes_of(cfg), plan, packed, token_B, cache, 1, logits=True
    )
    return logits_BV, cache, ok


@functools.partial(jax.jit, static_argnames=("cfg", "how", "n_steps"), donate_argnames=("state",))
def decode(
    cfg: GPTConfig,
    how: SampleConfig,
    n_steps: int,
    packed: decoder.Packed,
    state: DecoderState,
    keys_B: Array,
    count: Array | None = None,
) -> tuple[DecoderState, Array, Scores | None]:
    """Draw n_steps tokens for each row, as `decoding.decode` does.

    The likeliest tokens come from one launch, which chooses them itself; if tokens are drawn, each
    takes a launch that leaves all logits.

    Args:
        cfg: the model, without "auto".
        how: temperature and filters.
        n_steps: tokens.
        packed: params["kernel"] of `with_kernel`.
        state: from `stack_cache`.
        keys_B: a random key per row.
        count: if one launch chooses the tokens, choose only so many, 1 to n_steps; those after them
            are garbage. If each token takes a launch, n_steps are drawn whatever it says.

    Returns:
        The state, the tokens (n_steps, B), and their scores (n_steps, B, ...) if the state has any.
        All tokens are GAVE_UP if the kernel waited in vain: then all that is returned is garbage.
    """
    if how.temperature < SMALLEST and state.history is None and state.scores is None:
        cache: Cache = state.cache
        plan = plan_of(cfg, len(state.token_B))
        assert plan is not None
        n = n_steps if count is None else count
        new_nB, best_nB, cache, ok = decoder.decode(
            sizes_of(cfg), plan, packed, state.token_B, cache, n_steps, count, logits=False
        )
        new_nB = jnp.where(jnp.isfinite(best_nB), new_nB, NOT_FINITE)
        state = state._replace(cache=cache, token_B=new_nB[n - 1], n_drawn=state.n_drawn + n)
        return state, jnp.where(ok, new_nB, GAVE_UP), None
    n_likeliest = None if state.scores is None else state.scores.likeliest.shape[1]

    def step(state: DecoderState, _: None) -> tuple[DecoderState, tuple[Array, Array, Any]]:
        logits_BV, cache, ok = token_logits(cfg, packed, state.token_B, state.cache)
        state = draw(state._replace(cache=cache), logits_BV, keys_B, how, n_likeliest)
        return state, (state.token_B, ok, state.scores)

    state, (new_nB, ok_n, scores_n) = jax.lax.scan(step, state, length=n_steps)
    return state, jnp.where(jnp.all(ok_n), new_nB, GAVE_UP), scores_n


# The decoders by name: each takes weights and a cache of its own kind.
DECODE = {"plain": decoding.decode, "kernel": decode}
