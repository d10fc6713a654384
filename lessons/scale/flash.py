"""Section 5: attention that never holds all scores, equal to the naive one.

B rows, T query time, S context time, H heads, K head dim.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.attention import attend, attend_xla
from scale.measuring import Measured, fastest, xla_memory


def online_softmax(scores: list[float], values: list[float], tile: int) -> list[tuple[float, ...]]:
    """The running (top, total, mixed) after each tile; mixed / total at the end is attention."""
    top, total, mixed = -math.inf, 0.0, 0.0
    history: list[tuple[float, ...]] = []
    for start in range(0, len(scores), tile):
        end = start + tile
        new_top = max(top, *scores[start:end])
        shrink = math.exp(top - new_top)  # what was summed so far used the old largest score
        total, mixed = total * shrink, mixed * shrink
        for score, value in zip(scores[start:end], values[start:end], strict=True):
            total += math.exp(score - new_top)
            mixed += math.exp(score - new_top) * value
        top = new_top
        history.append((top, shrink, total, mixed))
    return history


def blocked_attention(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, block: int = 64) -> Array:
    """Causal attention that holds `block` x `block` scores at a time, never T x T."""
    B, T, H, K = q_BTHK.shape
    n = T // block
    within = jnp.arange(block)

    def split(x_BTHK: Array) -> Array:
        return x_BTHK.reshape(B, n, block, H, K).transpose(1, 0, 3, 2, 4)  # n of (B, H, block, K)

    keys_and_values = jnp.arange(n), split(k_BTHK), split(v_BTHK)

    def attend_queries(i: Array, q: Array) -> Array:
        def add_keys(carry: Any, keys: Any) -> Any:
            top, total, mixed = carry  # the largest score so far; sums of e^(score - top), and v
            j, k, v = keys
            scores = jnp.einsum("BHTK,BHSK->BHTS", q, k) / math.sqrt(K)
            visible = (j * block + within)[None] <= (i * block + within)[:, None]
            scores = jnp.where(visible[None, None], scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - new_top)
            shrink = jnp.exp(top - new_top)  # what was summed so far used the old largest score
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            return (new_top, total, mixed * shrink + weights @ v), None

        zeros = jnp.zeros((B, H, block, 1))
        start = zeros - jnp.inf, zeros, jnp.zeros_like(q)
        (_, total, mixed), _ = jax.lax.scan(jax.checkpoint(add_keys), start, keys_and_values)
        return mixed / total

    # Checkpoints: the backward pass computes the scores again, block by block, from q, k and v.
    mixed = jax.lax.map(
        lambda x: jax.checkpoint(attend_queries)(*x), (jnp.arange(n), split(q_BTHK))
    )
    return mixed.transpose(1, 0, 3, 2, 4).reshape(B, T, H, K)


def naive_attention(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array) -> Array:
    """gptjax's reference."""
    return attend(q_BTHK, k_BTHK, v_BTHK, jnp.arange(q_BTHK.shape[1])[None])


ATTENTION = {"naive": naive_attention, "gptjax": attend_xla, "blocked": blocked_attention}


def measure(quick: bool) -> Measured:
    """Memory and time of attention, forward and backward, as T grows."""
    H, K = (2, 16) if quick else (4, 64)
    lengths, timed = ([128, 256], 256) if quick else ([256, 512, 1024, 2048, 4096, 8192], 2048)

    def inputs(T: int) -> list[Array]:
        return [
            jax.random.normal(key, (1, T, H, K)) for key in jax.random.split(jax.random.key(0), 3)
        ]

    def total(attention: Any, q: Array, k: Array, v: Array, direction: Array) -> Array:
        return (attention(q, k, v) * direction).sum()

    gradients = {
        name: jax.jit(jax.grad(functools.partial(total, attention), argnums=(0, 1, 2)))
        for name, attention in ATTENTION.items()
    }
    q, k, v = inputs(256)
    direction = jax.random.normal(jax.random.key(1), q.shape)
    difference = float(jnp.abs(blocked_attention(q, k, v) - naive_attention(q, k, v)).max())
    pairs = zip(
        *(gradients[name](q, k, v, direction) for name in ("blocked", "naive")), strict=True
    )
    gradient_difference = max(float(jnp.abs(a - b).max()) for a, b in pairs)
    ok = difference <= 2e-6 and gradient_difference <= 2e-5
    assert ok, (difference, gradient_difference)

    rows: list[Measured] = []
    for T in lengths:
        args = [jax.ShapeDtypeStruct((1, T, H, K), jnp.float32)] * 4
        said = {n: xla_memory(g, *args).temp_size_in_bytes for n, g in gradients.items()}
        seconds = {}
        if timed >= T:
            arrays = [*inputs(T), inputs(T)[0]]
            calls = {n: functools.partial(g, *arrays) for n, g in gradients.items()}
            seconds = fastest(calls, 2 if quick else 5)
        rows.append({"T": T, "bytes": said, "ms": {n: 1e3 * s for n, s in seconds.items()}})
    growth = {n: rows[-1]["bytes"][n] / rows[-2]["bytes"][n] for n in ATTENTION}
    ok = quick or (growth["naive"] > 3.5 and growth["blocked"] < 2.2)
    assert ok, growth
    return {
        "heads": H,
        "head_dim": K,
        "rows": rows,
        "growth": growth,
        "difference": difference,
        "gradient_difference": gradient_difference,
    }


SCORES, VALUES, TILE = [1.0, 3.0, 2.0, 4.0], [10.0, 20.0, 30.0, 40.0], 2


def online_table(measured: Measured) -> str:
    """Four scores in two tiles, and the softmax of all at once."""
    lines = [
        "| after | keys read | largest score | old sums times | total | mixed |",
        "|---" * 6 + "|",
    ]
    history = online_softmax(SCORES, VALUES, TILE)
    for i, (top, shrink, total, mixed) in enumerate(history):
        keys = f"{i * TILE + 1} and {i * TILE + 2}"
        lines.append(
            f"| tile {i + 1} | {keys} | {top:.0f} | {shrink:.3f} | {total:.3f} | {mixed:.2f} |"
        )
    weights = [math.exp(score) for score in SCORES]
    at_once = sum(w * v for w, v in zip(weights, VALUES, strict=True)) / sum(weights)
    ok = math.isclose(mixed / total, at_once)
    assert ok, (mixed / total, at_once)
    lines += [
        "",
        f"At the end {mixed:.2f} / {total:.3f} = **{mixed / total:.2f}**, and the softmax of all "
        f"four scores at once gives {at_once:.2f}.",
    ]
    return "\n".join(lines)


def table(measured: Measured) -> str:
    """Temporaries and time by length."""
    m = measured["flash"]
    lines = [
        "| T | naive, MB | `attend_xla`, MB | blocked, MB | naive, ms | `attend_xla`, ms "
        "| blocked, ms |",
        "|---" * 7 + "|",
    ]
    for r in m["rows"]:
        mega = [f"{r['bytes'][n] / 1e6:,.1f}" for n in ATTENTION]
        ms = [f"{r['ms'][n]:.1f}" if n in r["ms"] else "" for n in ATTENTION]
        lines.append(f"| {r['T']:,} | {' | '.join([*mega, *ms])} |")
    lines += [
        "",
        f"One row, {m['heads']} heads of {m['head_dim']}, float32, forward and backward. The last "
        f"doubling of T multiplies the temporaries by {m['growth']['naive']:.2f} (naive) and "
        f"{m['growth']['blocked']:.2f} (blocked). Results differ by at most "
        f"{m['difference']:.1e}, gradients by at most {m['gradient_difference']:.1e}.",
    ]
    return "\n".join(lines)
