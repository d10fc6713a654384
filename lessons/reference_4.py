"""The functions of lesson 4 by gptjax, arguments to try them on, and typical mistakes.

T tokens, D width, H heads, K head width, S size of the cache, V vocabulary.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from reference_1 import CFG, noisy_params, normal

from gptjax import blocks, decoding, filters, kv_cache, model
from gptjax.config import SampleConfig
from gptjax.conversion import tensors as published

Cache = list[dict[str, Array]]  # of one sequence: keys and values (S, H, K) of each layer
SIZE = (CFG.n_head, CFG.vocab_size)


# ---- Names and tensors ---------------------------------------------------------------------------


def published_name(path: str) -> str:
    """By gptjax's table, whose paths have no number of the layer."""
    layer = re.search(r"\d+", path)
    name = published.TENSORS[re.sub(r"/\d+", "", path)]
    return name.replace("#", layer[0]) if layer else name


def published_tensors(transposed: bool) -> dict[str, np.ndarray]:
    """The file of a small model: Hugging Face's with masks, or nanoGPT's with its tied head."""
    found = {}
    for keys, leaf in jax.tree.leaves_with_path(noisy_params()):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        array = np.asarray(leaf)
        array = array[: CFG.vocab_size] if path == "wte/embedding" else array
        array = array.T if transposed and path.endswith("kernel") else array
        found["transformer." + published_name(path)] = array
    if transposed:
        return {**found, "lm_head.weight": found["transformer.wte.weight"]}
    mask = np.tri(CFG.block_size, dtype=np.float32)[None, None]
    masks = {f"transformer.h.{i}.attn.bias": mask for i in range(CFG.n_layer)}
    return {**found, **masks}


def load_params(
    tensors: dict[str, np.ndarray], template: Any, transposed: bool = False
) -> model.Params:
    """By the reader of convert_gpt2.py."""
    names = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    kept = {name: x for name, x in names.items() if not name.endswith(".attn.bias")}
    if transposed:
        kept = {name: x.T if published.is_linear(name) else x for name, x in kept.items()}
    table = {name: (x.shape, str(x.dtype)) for name, x in kept.items()}
    source = published.Source(CFG, table, kept.__getitem__, "the tensors", (Path(),))
    return model.unstack_layers(published.read_params(source), CFG.n_layer)


def by_shape(
    tensors: dict[str, np.ndarray], template: Any, transposed: bool = False
) -> model.Params:
    """Transposes where the shape does not fit, so not what is square."""
    params = load_params(tensors, template, transposed)
    for layer in params["h"] if transposed else ():
        kernel = layer["attn"]["c_proj"]["kernel"]
        layer["attn"]["c_proj"]["kernel"] = kernel.T
    return params


def template() -> Any:
    return jax.eval_shape(noisy_params)


# ---- The sampler ---------------------------------------------------------------------------------


def narrow(logits_V: Array, temperature: float, top_k: int) -> Array:
    how = SampleConfig(temperature=temperature, top_k=top_k)
    return filters.narrow(logits_V[None], how)[0]


def draw(key: Array, logits_V: Array, temperature: float, top_k: int) -> Array:
    how = SampleConfig(temperature=temperature, top_k=top_k)
    return decoding.sample_token(logits_V[None], key[None], None, how)[0]


def draw_from_probabilities(key: Array, logits_V: Array, temperature: float, top_k: int) -> Array:
    """Gives probabilities to a function that takes logits."""
    if temperature == 0:
        return logits_V.argmax()
    return jax.random.categorical(key, jax.nn.softmax(narrow(logits_V, temperature, top_k)))


def make_cache(n_layer: int, n_head: int, head_dim: int, size: int) -> Cache:
    return [
        {name: jnp.zeros((size, n_head, head_dim)) for name in ("k", "v")} for _ in range(n_layer)
    ]


def to_theirs(cache: Cache, length: Any) -> kv_cache.KVCache:
    k, v = (tuple(layer[name][None] for layer in cache) for name in ("k", "v"))
    return kv_cache.KVCache(k, v, jnp.asarray(length, jnp.int32)[None])


def to_ours(cache: kv_cache.KVCache) -> Cache:
    return [{"k": k[0], "v": v[0]} for k, v in zip(cache.k, cache.v, strict=True)]


def cached_attention(
    p: model.Params, x_D: Array, layer: dict[str, Array], t: int, n_head: int
) -> tuple[Array, dict[str, Array]]:
    module = blocks.CausalSelfAttention(CFG)
    y_BTD, cache = model.apply(module, p, x_D[None, None], to_theirs([layer], t))
    return y_BTD[0, 0], to_ours(cache)[0]


def without_mask(
    p: model.Params, x_D: Array, layer: dict[str, Array], t: int, n_head: int
) -> tuple[Array, dict[str, Array]]:
    """Attends to the zeros behind the last token too."""
    q_HK, k_HK, v_HK = (
        part.reshape(n_head, -1)
        for part in jnp.split(x_D @ p["c_attn"]["kernel"] + p["c_attn"]["bias"], 3)
    )
    k_SHK, v_SHK = layer["k"].at[t].set(k_HK), layer["v"].at[t].set(v_HK)
    scores_HS = jnp.einsum("HK,SHK->HS", q_HK, k_SHK) / q_HK.shape[-1] ** 0.5
    y_HK = jnp.einsum("HS,SHK->HK", jax.nn.softmax(scores_HS), v_SHK)
    y_D = y_HK.reshape(-1) @ p["c_proj"]["kernel"] + p["c_proj"]["bias"]
    return y_D, {"k": k_SHK, "v": v_SHK}


def next_logits(
    params: model.Params, cache: Cache, token: Array, t: int, n_head: int, vocab_size: int
) -> tuple[Array, Cache]:
    token_BT = jnp.asarray(token)[None, None]
    logits_BV, longer = model.next_logits(CFG, params, token_BT, to_theirs(cache, t))
    return logits_BV[0], to_ours(longer)


def always_first(
    params: model.Params, cache: Cache, token: Array, t: int, n_head: int, vocab_size: int
) -> tuple[Array, Cache]:
    """Gives each new token, which is alone in its call, the position 0."""
    wpe_SD = params["wpe"]["embedding"]
    params = {**params, "wpe": {"embedding": jnp.broadcast_to(wpe_SD[:1], wpe_SD.shape)}}
    return next_logits(params, cache, token, t, n_head, vocab_size)


def prefill(
    params: model.Params, tokens_T: Array, length: int, n_head: int, vocab_size: int, size: int
) -> tuple[Array, Cache]:
    empty = kv_cache.make_cache(CFG, 1, size)
    length_B = jnp.asarray(length)[None]
    logits_BV, cache = model.next_logits(CFG, params, tokens_T[None], empty, length_B)
    return logits_BV[0], to_ours(cache)


def of_the_last(
    params: model.Params, tokens_T: Array, length: int, n_head: int, vocab_size: int, size: int
) -> tuple[Array, Cache]:
    """The logits of the last token, be it padding."""
    return prefill(params, tokens_T, len(tokens_T), n_head, vocab_size, size)


PROMPT = 4  # tokens of the shorter prompt


def without_padding(result: tuple[Array, Cache]) -> Any:
    """What the prompt left in the cache; what the padding behind it wrote is never read."""
    logits_V, cache = result
    return logits_V, jax.tree.map(lambda x_SHK: x_SHK[:PROMPT], cache)


def generate(
    params: model.Params,
    tokens_T: Array,
    length: int,
    n_new: int,
    key: Array,
    temperature: float,
    top_k: int,
    n_head: int,
    vocab_size: int,
) -> Array:
    how = SampleConfig(temperature=temperature, top_k=top_k)
    size, length_B = len(tokens_T) + n_new, jnp.asarray(length)[None]
    start = (params, tokens_T[None], length_B, key[None], jnp.int32(0), None)
    state = decoding.prefill(CFG, how, size, *start)
    first = np.asarray(state.token_B)  # decode takes the state for itself
    _, rest_nB, _ = decoding.decode(CFG, how, n_new - 1, params, state, key[None])
    return jnp.concatenate([first, rest_nB[:, 0]])


def after_padding(
    params: model.Params, tokens_T: Array, length: int, n_new: int, *rest: Any
) -> Array:
    """Takes the padding behind a prompt for a part of it."""
    return generate(params, tokens_T, len(tokens_T), n_new, *rest)


# ---- Arguments -----------------------------------------------------------------------------------


def prompt_T() -> Array:
    return jnp.asarray(np.random.default_rng(5).integers(0, CFG.vocab_size, 6))


def filled_cache() -> Cache:
    """After five tokens; three places are empty."""
    shape, is_filled_S11 = (8, CFG.n_head, CFG.head_dim), jnp.arange(8)[:, None, None] < 5
    return [
        {name: normal(7 + i, *shape) * is_filled_S11 for i, name in enumerate(("k", "v"))}
        for _ in range(CFG.n_layer)
    ]


def draws() -> list[tuple]:
    logits_V = 3 * normal(6, 17)
    keys = [jax.random.key(i) for i in range(6)]
    return [(key, logits_V, 0.8, 5) for key in keys] + [(keys[0], logits_V, 0, 0)]
