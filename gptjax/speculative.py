"""Speculative decoding: cheap guesses at the next tokens, checked by one pass of the model.

B batch, K tokens drafted at a time, J = K + 1 tokens read at a time, S tokens of a text (padded),
V vocabulary.

The model reads the newest token and a draft in one pass, draws its own token at each place, and
keeps them up to the first that differs from the draft. Each draw has the random key that the plain
decoder gives to it, so the text is the plain decoder's, token for token, whoever drafts and however
many: a draft changes the speed alone. (Products of another shape may round otherwise, so that in
half precision tokens can differ where two are as likely.) A small model drafts with the same keys,
and so draws the same token wherever chance decides between probabilities that are much alike.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", and
Chen et al. 2023, for the drafts that are checked in one pass. Their rejection sampling keeps a text
in distribution only; it kept 76 % of the tokens where common keys (Daliri et al. 2024, "Coupling
without Communication") kept 73 %, at temperature 0.8, of characters of TinyShakespeare.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax import fused
from gptjax.config import GPTConfig, SampleConfig
from gptjax.decoding import Scores, sample_token, score_token
from gptjax.drafts import Draft, draft_by_model, draft_by_ngram, make_draft_cache, read_prompts
from gptjax.errors import DAMAGED_WEIGHTS, NonFiniteError
from gptjax.filters import History, make_history, remember_each, remember_first
from gptjax.kernels.cuda import KernelError
from gptjax.kv_cache import KVCache, write
from gptjax.model import Params, forward
from gptjax.sampling import Piece, bucket, cut, key_parts, row_keys

CHUNK = 32  # tokens of a row for each call into JAX, at least


class Tally:
    """How many tokens were drafted for each row so far, and how many of them were right."""

    def __init__(self, rows: int) -> None:
        """Begin with none."""
        self.drafted, self.right = np.zeros(rows, int), np.zeros(rows, int)


class Text(NamedTuple):
    """What each row has read and drawn; behind its length is garbage, which new tokens replace."""

    ids_BS: Array
    scores: Scores | None  # of arrays (B, S, ...), where they are asked for


class State(NamedTuple):
    """The state that the loop carries from pass to pass."""

    cache: KVCache  # of the model; its length counts all tokens but the newest
    draft_cache: Any  # of the small model: see `drafts.make_draft_cache`
    text: Text
    length_B: Array  # tokens of the text
    n_drawn_B: Array  # tokens drawn since the prompt, which number the random keys
    history: History | None  # what the filters remember of prompt and text
    finite: Array  # whether the logits of all tokens so far were
    draft_ok: Array  # whether the small model's kernel never waited in vain
    drafted_B: Array  # tokens in this call into JAX
    right_B: Array  # how many of them were right


# ---- One pass ------------------------------------------------------------------------------------


def count_right(draft_BK: Array, token_BJ: Array) -> Array:
    """Return how many tokens of each draft come before its first mistake."""
    return jnp.cumprod(draft_BK == token_BJ[:, :-1], axis=1).sum(axis=1)


def one_pass(
    cfg: GPTConfig,
    how: SampleConfig,
    draft: Draft,
    params: Params,
    state: State,
    keys_B: Array,
    end_B: Array,
) -> State:
    """Return the state after a draft was made, read and kept up to its first mistake.

    A row whose length is end_B[b] stays as it is.
    """
    J = draft.n_tokens + 1
    fold = jax.vmap(jax.random.fold_in)
    keys_JB = jax.vmap(lambda j: fold(keys_B, state.n_drawn_B + j))(jnp.arange(J))
    draft_cache, draft_ok = state.draft_cache, state.draft_ok
    if draft.cfg is None:
        draft_BK = draft_by_ngram(state.text.ids_BS, state.length_B, draft.n_tokens)
    else:
        assert draft.params is not None
        draft_BK, draft_cache, now = draft_by_model(
            draft.cfg,
            how,
            draft.params,
            state.text.ids_BS,
            state.length_B,
            draft_cache,
            keys_JB[:-1],
            state.history,
            cfg.padded_vocab_size,
        )
        draft_ok &= now
    newest_B1 = jnp.take_along_axis(state.text.ids_BS, state.length_B[:, None] - 1, axis=1)
    cache = state.cache._replace(length_B=state.length_B - 1)
    read_BJ = jnp.concatenate([newest_B1, draft_BK], axis=1)
    logits_BJV, longer = forward(cfg, params, read_BJ, cache=cache)
    assert longer is not None
    # Each place has what the filters remember if the draft before it is right.
    histories = remember_each(state.history, draft_BK)
    pick = jax.vmap(functools.partial(sample_token, how=how))
    token_BJ = pick(logits_BJV.swapaxes(0, 1), keys_JB, histories).T
    right_B = count_right(draft_BK, token_BJ)
    count_B = jnp.minimum(right_B + 1, end_B - state.length_B)  # with the token that corrects it

    scores = None
    if state.text.scores is not None:
        n = state.text.scores.likeliest.shape[-1]
        scores = jax.vmap(lambda logits, token: score_token(logits, token, n))(logits_BJV, token_BJ)
    start_B = state.length_B
    text = jax.tree.map(lambda x, new: write(x, new, start_B), state.text, Text(token_BJ, scores))
    is_new_BJ = jnp.arange(J)[None] < count_B[:, None]
    is_open_B = count_B > 0
    finite = jnp.all(jnp.isfinite(logits_BJV.max(axis=-1)) | ~is_new_BJ)
    return State(
        cache=longer,  # with its length, it forgets what was not kept: see `cache` above
        draft_cache=draft_cache,
        text=text,
        length_B=state.length_B + count_B,
        n_drawn_B=state.n_drawn_B + count_B,
        history=remember_first(state.history, token_BJ, count_B),
        finite=state.finite & finite,
        draft_ok=draft_ok,
        drafted_B=state.drafted_B + draft.n_tokens * is_open_B,
        right_B=state.right_B + right_B * is_open_B,
    )


# ---- The two programs ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("cfg", "size", "n_likeliest"))
def begin(
    cfg: GPTConfig,
    draft: Draft,
    size: int,
    params: Params,
    tokens_BT: Array,
    length_B: Array,
    n_drawn_B: Array,
    history: History | None,
    n_likeliest: int | None = None,
) -> State:
    """Read prompts, padded on the right, into new caches, and draw nothing yet.

    Args:
        cfg: the model, without "auto".
        draft: who guesses.
        size: tokens that a row's context comes to at most, beside the newest.
        params: from `prepare_for_decoding`.
        tokens_BT: the prompts.
        length_B: their lengths without the padding.
        n_drawn_B: tokens drawn so far, which number the draws.
        history: what the filters remember of each row; None where they need nothing.
        n_likeliest: likeliest tokens to score beside each one drawn; None = score nothing.
    """
    B, room = len(tokens_BT), size + 1 + draft.n_tokens  # the last draft may reach over the end

    scores = None
    if n_likeliest is not None:
        none_BSN = jnp.zeros((B, room + 1, n_likeliest))
        scores = Scores(jnp.zeros((B, room + 1)), none_BSN.astype(jnp.int32), none_BSN)
    ids_BS = jnp.zeros((B, room + 1), jnp.int32).at[:, : tokens_BT.shape[1]].set(tokens_BT)
    text, none, yes = Text(ids_BS, scores), jnp.zeros(B, jnp.int32), jnp.array(True)
    small = make_draft_cache(draft, tokens_BT, room)
    cache = read_prompts(cfg, params, tokens_BT, room)
    return State(cache, small, text, length_B, n_drawn_B, history, yes, yes, none, none)


@functools.partial(jax.jit, static_argnames=("cfg", "how"), donate_argnames=("state",))
def go_on(
    cfg: GPTConfig,
    how: SampleConfig,
    draft: Draft,
    params: Params,
    state: State,
    keys_B: Array,
    goal_B: Array,
    end_B: Array,
) -> State:
    """Return the state once each row has goal_B[b] tokens; none has more than end_B[b]."""

    def goes_on(state: State) -> Array:
        return jnp.any(state.length_B < goal_B) & state.finite & state.draft_ok

    def step(state: State) -> State:
        return one_pass(cfg, how, draft, params, state, keys_B, end_B)

    state = state._replace(drafted_B=0 * state.drafted_B, right_B=0 * state.right_B)
    return jax.lax.while_loop(goes_on, step, state)


# ---- The host's loop -----------------------------------------------------------------------------


def generate_pieces(
    cfg: GPTConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    how: SampleConfig,
    *,
    draft: Draft,
    max_new_tokens: int,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    n_likeliest: int | None = None,
    tally: Tally | None = None,
) -> Iterator[Piece]:
    """Continue prompts as `sampling.generate_pieces` does, to the same tokens and scores.

    The arguments of that name are the same; `draft` guesses, and `tally` gets the counts.
    """
    assert all(len(prompt) for prompt in prompts), "a prompt must hold at least one token"
    limit = cfg.block_size
    contexts = [cut(list(prompt), limit) for prompt in prompts]
    samples = samples if samples is not None else [0] * len(prompts)
    keys_B = row_keys(*key_parts(seed, samples, prompts))
    size = bucket(max(map(len, contexts)) + max_new_tokens, limit)
    draft = draft.for_rows(len(prompts))
    drawn: list[list[int]] = [[] for _ in prompts]
    waiting: list[list[Piece]] = [[] for _ in prompts]  # of them, what was not yielded yet
    state: State | None = None
    yielded = 0
    while yielded < max_new_tokens:
        if state is None or any(len(context) > size for context in contexts):
            contexts = [cut(context, limit) for context in contexts]
            tokens_BT = np.zeros((len(contexts), bucket(max(map(len, contexts)), size)), np.int32)
            for row, context in zip(tokens_BT, contexts, strict=True):
                row[: len(context)] = context
            length_B, n_drawn_B = (np.array(list(map(len, x)), np.int32) for x in (contexts, drawn))
            begun_B = length_B - n_drawn_B
            end_B = np.minimum(size + 1, begun_B + max_new_tokens)
            most = bucket(max(map(len, prompts)) + int(n_drawn_B.max()) + size)
            history = make_history(how, cfg.padded_vocab_size, prompts, drawn, most)
            rows = (tokens_BT, length_B, n_drawn_B, history, n_likeliest)
            state = begin(cfg, draft, size, params, *rows)
        goal = yielded + CHUNK if yielded else 1  # the first token at once
        goal_B = np.minimum(end_B, begun_B + goal)
        try:
            state = go_on(cfg, how, draft, params, state, keys_B, goal_B, end_B)
            counts = (state.drafted_B, state.right_B)
            text, now_B, finite, draft_ok, (drafted_B, right_B) = jax.device_get(
                (state.text, state.length_B, state.finite, state.draft_ok, counts)
            )
            if not draft_ok:
                raise KernelError("blocks waited in vain")
        except (KernelError, jax.errors.JaxRuntimeError) as error:
            if not draft.by_kernel:
                raise
            fused.give_up(str(error).strip().partition("\n")[0])
            draft, state = draft.for_rows(len(prompts)), None
            continue  # with what was drawn before
        if not finite:
            raise NonFiniteError(DAMAGED_WEIGHTS)
        if tally is not None:
            tally.drafted += drafted_B
            tally.right += right_B
        for b, context in enumerate(contexts):
            new = cut_piece(Piece(*text), b, slice(len(context), now_B[b]))
            waiting[b].append(new)
            context.extend(new.ids.tolist())
            drawn[b].extend(new.ids.tolist())
        count = min(map(len, drawn)) - yielded
        if count > 0:
            whole = [jax.tree.map(lambda *parts: np.concatenate(parts), *row) for row in waiting]
            heads = [cut_piece(row, slice(count)) for row in whole]
            yield jax.tree.map(lambda *rows: np.stack(rows), *heads)
            waiting = [[cut_piece(row, slice(count, None))] for row in whole]
            yielded += count


def cut_piece(piece: Piece, *index: int | slice) -> Piece:
    """Return what an index takes of each array."""
    part: Piece = jax.tree.map(lambda x: x[index], piece)
    return part
