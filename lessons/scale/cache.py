"""Section 4: time per token with the KV cache and without; the tokens are the same.

B rows, T time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax import decoding, kv_cache, model, sampling
from gptjax.config import GPTConfig, SampleConfig
from scale.measuring import Measured, fastest, replace


def measure(quick: bool) -> Measured:
    """Milliseconds per token at growing context, with the cache and without; greedy tokens."""
    width, layers, contexts = (32, 1, [32, 64]) if quick else (256, 4, [64, 128, 256, 512, 1024])
    rounds, steps = (2, 8) if quick else (7, 16)
    shape = GPTConfig(n_layer=layers, n_head=4, n_embd=width, block_size=contexts[-1], bias=False)
    cfg = model.resolve(replace(shape, vocab_size=128))
    params = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    # Fresh weights repeat the last token for ever. With larger ones attention has its say.
    params["h"] = jax.tree.map(lambda p: 10 * p, params["h"])
    decoder = model.prepare_for_decoding(cfg, params)
    greedy, keys = SampleConfig(temperature=0), jax.random.split(jax.random.key(0), 1)

    # All tokens, each from the cache; then all at once without one. Causality makes the logits of
    # position t those of the first t tokens alone, so one pass judges every token.
    prompt = list(b"What scale demands: ")
    new = contexts[-1] - len(prompt)
    drawn = sampling.generate(cfg, decoder, [prompt], greedy, max_new_tokens=new)
    tokens = np.array([[*prompt, *np.concatenate(list(drawn), axis=1)[0]]])
    logits, _ = jax.jit(functools.partial(model.forward, cfg))(params, tokens)
    uncached = np.asarray(logits.argmax(axis=-1))[0, len(prompt) - 1 : -1]
    different = int(np.sum(uncached != tokens[0, len(prompt) :]))
    ok = different == 0
    assert ok, different
    kinds = len(np.unique(tokens))

    def last_token(params: model.Params, tokens_BT: Array) -> Array:
        x_BTD, _ = model.hidden_states(cfg, params, tokens_BT)
        return model.head(cfg, params, x_BTD[:, -1]).argmax(axis=1)

    def full_cache(context: int) -> decoding.DecoderState:
        cache = kv_cache.make_cache(cfg, 1, context)
        zero = jnp.zeros(1, jnp.int32)
        return decoding.DecoderState(
            cache.advance(context - steps),
            zero,
            jnp.int32(0),
            None,
        )

    calls: dict[str, Callable[[], Any]] = {}
    forward = jax.jit(last_token)
    for context in contexts:
        states = iter([full_cache(context) for _ in range(rounds + 1)])  # decode donates its state
        calls[f"recomputed {context}"] = functools.partial(forward, params, tokens[:, :context])
        calls[f"cached {context}"] = lambda states=states: decoding.decode(  # type: ignore[misc]
            cfg, greedy, steps, decoder, next(states), keys
        )
    seconds = fastest(calls, rounds)
    n = model.count_params(cfg)
    rows = []
    for context in contexts:
        recomputed, cached = seconds[f"recomputed {context}"], seconds[f"cached {context}"] / steps
        attention = 4 * layers * context * width  # FLOPs of q kᵀ and of weights times v, per token
        cache_bytes = 2 * 4 * layers * width * context
        rows.append(
            {
                "context": context,
                "recomputed_ms": 1e3 * recomputed,
                "cached_ms": 1e3 * cached,
                "recomputed_intensity": context * (2 * n + attention / 2) / (4 * n),
                "cached_intensity": (2 * n + attention) / (4 * n + cache_bytes),
                "cache_bytes": cache_bytes,
            }
        )
    shape_of = {"layers": layers, "width": width, "parameters": n}
    return {**shape_of, "rows": rows, "tokens": new, "kinds": kinds, "different": different}


def table(measured: Measured) -> str:
    """Time per token and size of the cache."""
    m = measured["cache"]
    lines = [
        "| tokens of context | recomputed, ms per token | cached, ms per token | times as fast "
        "| FLOPs a byte, recomputed | FLOPs a byte, cached | cache |",
        "|---" * 7 + "|",
    ]
    for r in m["rows"]:
        lines.append(
            f"| {r['context']} | {r['recomputed_ms']:.2f} | {r['cached_ms']:.2f} "
            f"| {r['recomputed_ms'] / r['cached_ms']:.1f} | {r['recomputed_intensity']:.0f} "
            f"| {r['cached_intensity']:.2f} | {r['cache_bytes'] / 1e6:.1f} MB |"
        )
    lines += [
        "",
        f"{m['layers']} layers, {m['width']} wide, {m['parameters'] / 1e6:.1f} million parameters, "
        f"float32, one row. Of {m['tokens']:,} greedy tokens with the cache, {m['different']} "
        f"differ from those without it; {m['kinds']} different ones are among them.",
    ]
    return "\n".join(lines)
