"""Cheap guesses at the next tokens of a text, which `speculative` lets the model check.

B batch, K tokens drafted at a time, S tokens of a text (padded), V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax import fused
from gptjax.config import GPTConfig, SampleConfig
from gptjax.decoding import sample_token
from gptjax.filters import History, remember
from gptjax.kv_cache import KVCache, make_cache
from gptjax.model import Params, hidden_states, next_logits

# Rows that a kernel drafts for, at most: it reads the two newest tokens one by one, where plain JAX
# reads them at once, so it has to be much faster.
KERNEL_ROWS = 4
NGRAM = 3  # most tokens at a text's end that are looked for in the text before


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["n_tokens", "cfg"]
)
@dataclasses.dataclass(frozen=True)
class Draft:
    """Who guesses, and how much at a time."""

    n_tokens: int
    cfg: GPTConfig | None = None  # of a small model, without "auto"; None looks into the text
    # Of the small model, from `prepare_for_decoding`, maybe with `fused.with_kernel`
    params: Params | None = None

    @property
    def by_kernel(self) -> bool:
        """Return whether the fused decoder's kernel computes the small model."""
        return self.params is not None and "kernel" in self.params

    def for_rows(self, rows: int) -> "Draft":
        """Return the draft, without the kernel where that is not to draft for so many rows."""
        if self.cfg is None or self.params is None:
            return self
        if rows <= KERNEL_ROWS and fused.takes(self.cfg, rows):
            return self
        return dataclasses.replace(self, params=fused.without_kernel(self.params))


def make_draft_cache(draft: Draft, tokens_BT: Array, room: int) -> Any:
    """Return what the small model remembers of prompts, None without one.

    Args:
        draft: who guesses.
        tokens_BT: the prompts, padded on the right.
        room: tokens that the cache has room for.
    """
    if draft.cfg is None or draft.params is None:
        return None
    cache = read_prompts(draft.cfg, draft.params, tokens_BT, room)
    return fused.stack_cache(draft.cfg, cache) if draft.by_kernel else cache


def read_prompts(cfg: GPTConfig, params: Params, tokens_BT: Array, room: int) -> KVCache:
    """Return a new cache with room for so many tokens of each row, which holds the prompts."""
    cache = make_cache(cfg, len(tokens_BT), room)
    _, longer = hidden_states(cfg, params, tokens_BT, cache=cache)
    assert longer is not None
    return longer


def draft_by_ngram(text_BS: Array, length_B: Array, n_tokens: int) -> Array:
    """Return what followed the last place where a row's text ended as it does now, (B, n_tokens).

    The place is the one with the most equal tokens before it, up to NGRAM, of these the last; where
    the text ends sooner, it is taken to repeat itself.
    """
    S = text_BS.shape[1]
    index_1S = jnp.arange(S)[None]
    matched_BS = jnp.zeros(text_BS.shape, jnp.int32)
    same_BS = (index_1S > 0) & (index_1S < length_B[:, None])
    for j in range(1, NGRAM + 1):
        last_B1 = jnp.take_along_axis(text_BS, length_B[:, None] - j, axis=1, mode="clip")
        same_BS &= (index_1S >= j) & (jnp.roll(text_BS, j, axis=1) == last_B1)
        matched_BS += same_BS
    inside_BS = index_1S < length_B[:, None]
    place_B1 = jnp.argmax(jnp.where(inside_BS, matched_BS * S + index_1S, 0), axis=1)[:, None]
    index_BK = place_B1 + jnp.arange(n_tokens)[None] % (length_B[:, None] - place_B1)
    return jnp.take_along_axis(text_BS, index_BK, axis=1)


def draft_by_model(
    cfg: GPTConfig,
    how: SampleConfig,
    params: Params,
    text_BS: Array,
    length_B: Array,
    cache: Any,
    keys_KB: Array,
    history: History | None,
    n_columns: int,
) -> tuple[Array, Any, Array]:
    """Return a small model's next tokens of each row (B, K), its cache, and whether all went well.

    If not, the fused decoder's kernel waited in vain, and the tokens are garbage.

    Args:
        cfg: the small model, without "auto".
        how: temperature and filters, the same as the large model's.
        params: as of `Draft`.
        text_BS: the text so far, padded on the right.
        length_B: its length. The last two tokens are read first: where all of the last draft was
            kept, both are new to the cache.
        cache: of the small model, from `make_draft_cache`; it holds all tokens before these two.
        keys_KB: the keys with which the large model will draw.
        history: what the filters remember of each row; None where they need nothing.
        n_columns: columns of the large model's logits, which may be padded otherwise.
    """

    def at(place_B: Array) -> Array:
        return jnp.take_along_axis(text_BS, place_B[:, None], axis=1)[:, 0]

    def read(token_B: Array, cache: Any) -> tuple[Array, Any, Array]:
        if "kernel" in params:
            return fused.token_logits(cfg, params["kernel"], token_B, cache)
        return *next_logits(cfg, params, token_B[:, None], cache), jnp.array(True)

    def pick(logits_BV: Array, keys_B: Array, history: History | None) -> Array:
        wider = max(0, n_columns - logits_BV.shape[1])
        logits_BV = jnp.pad(logits_BV, ((0, 0), (0, wider)), constant_values=-jnp.inf)
        return sample_token(logits_BV[:, :n_columns], keys_B, history, how)

    start_B = jnp.maximum(length_B - 2, 0)
    cache, first_B = cache._replace(length_B=start_B), at(start_B)
    if "kernel" in params:
        _, cache, ok = read(first_B, cache)
        # A text of one token has read it by now, and reads it again at its place.
        cache = cache._replace(length_B=length_B - 1)
        logits_BV, cache, now = read(at(length_B - 1), cache)
        ok &= now
    else:
        ok, newest_B2 = jnp.array(True), jnp.stack([first_B, at(start_B + 1)], axis=1)
        logits_BV, cache = next_logits(cfg, params, newest_B2, cache, jnp.minimum(length_B, 2))
    token_B = pick(logits_BV, keys_KB[0], history)

    def step(carry: Any, keys_B: Array) -> tuple[Any, Array]:
        cache, history, token_B, ok = carry
        history = None if history is None else remember(history, token_B)
        logits_BV, cache, now = read(token_B, cache)
        token_B = pick(logits_BV, keys_B, history)
        return (cache, history, token_B, ok & now), token_B

    carry: Any = (cache, history, token_B, ok)
    (cache, *_, ok), later_KB = jax.lax.scan(step, carry, keys_KB[1:])
    return jnp.concatenate([token_B[None], later_KB]).T, cache, ok
