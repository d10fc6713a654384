"""The GPT that the lessons build, as their last cells save it."""

# mypy: disable-error-code="no-untyped-def"

from functools import partial
from math import cos, pi

import jax
import jax.numpy as jnp
import numpy as np

# ---- Lesson 1 ------------------------------------------------------------------------------------


def embed(params, tokens_BT):
    """Return (B, T, D): the rows of wte for these tokens, plus the first T rows of wpe."""
    T = tokens_BT.shape[1]
    return params["wte"]["embedding"][tokens_BT] + params["wpe"]["embedding"][:T]


def softmax(x):
    """Return exp(x) / (sum of exp(x) over the last axis), without overflow; any shape."""
    e = jnp.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def causal_mask(T):
    """Return (T, T) booleans: True where query t (the row) may see key s (the column)."""
    return jnp.arange(T)[None, :] <= jnp.arange(T)[:, None]


def attention_weights(q_TK, k_TK, mask_TT):
    """Return (T, T): row t has the weights of all keys for query t, 0 where the mask is False."""
    scores_TT = q_TK @ k_TK.T / jnp.sqrt(q_TK.shape[-1])
    return softmax(jnp.where(mask_TT, scores_TT, -jnp.inf))


def attention_head(q_TK, k_TK, v_TK):
    """Return (T, K): for each token the values that it may see, added up by their weights."""
    return attention_weights(q_TK, k_TK, causal_mask(len(q_TK))) @ v_TK


def attend_heads(q_BTHK, k_BTHK, v_BTHK):
    """Return (B, T, H, K): attention_head for each head of each sequence."""
    of_heads = jax.vmap(attention_head, in_axes=1, out_axes=1)  # (T, H, K) in and out
    return jax.vmap(of_heads)(q_BTHK, k_BTHK, v_BTHK)


def linear(p, x):
    """Return (..., out): x (..., in) times p["kernel"] (in, out), plus p["bias"] (out)."""
    return x @ p["kernel"] + p["bias"]


def self_attention(p, x_BTD, n_head):
    """Return (B, T, D): c_attn, cut into q, k, v of n_head heads, attention, c_proj."""
    B, T, D = x_BTD.shape
    qkv = jnp.split(linear(p["c_attn"], x_BTD), 3, axis=-1)
    q_BTHK, k_BTHK, v_BTHK = (part.reshape(B, T, n_head, D // n_head) for part in qkv)
    y_BTHK = attend_heads(q_BTHK, k_BTHK, v_BTHK)
    return linear(p["c_proj"], y_BTHK.reshape(B, T, D))


def gelu(x):
    """Return x * P(X <= x) by GPT-2's tanh approximation; any shape."""
    return 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


def mlp(p, x_BTD):
    """Return (B, T, D): c_fc to 4D, gelu, c_proj back to D."""
    return linear(p["c_proj"], gelu(linear(p["c_fc"], x_BTD)))


def layer_norm(p, x, epsilon=1e-5):
    """Return x (..., D), each row with mean 0 and variance 1, times p["scale"], plus p["bias"]."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    return x * p["scale"] + p["bias"]


def block(p, x_BTD, n_head):
    """Return (B, T, D): x plus attention of ln_1 of it, then that plus the MLP of ln_2 of it."""
    x_BTD = x_BTD + self_attention(p["attn"], layer_norm(p["ln_1"], x_BTD), n_head)
    return x_BTD + mlp(p["mlp"], layer_norm(p["ln_2"], x_BTD))


def hidden_states(params, tokens_BT, n_head):
    """Return (B, T, D): embeddings, all blocks of params["h"], and the last LayerNorm, ln_f."""
    x_BTD = embed(params, tokens_BT)
    for p in params["h"]:
        x_BTD = block(p, x_BTD, n_head)
    return layer_norm(params["ln_f"], x_BTD)


def head(params, x_BTD, vocab_size):
    """Return (B, T, rows of wte): x times wte transposed, -inf from column vocab_size on."""
    logits_BTV = x_BTD @ params["wte"]["embedding"].T
    is_token_V = jnp.arange(logits_BTV.shape[-1]) < vocab_size
    return jnp.where(is_token_V, logits_BTV, -jnp.inf)


def forward(params, tokens_BT, n_head, vocab_size):
    """Return the logits (B, T, rows of wte) of GPT-2: the scores of the token after each token."""
    return head(params, hidden_states(params, tokens_BT, n_head), vocab_size)


def count_params(n_layer, n_embd, block_size, vocab_size):
    """Return the number of parameters, padding rows of wte not counted."""
    D = n_embd
    attn = D * 3 * D + 3 * D + D * D + D
    mlp = D * 4 * D + 4 * D + 4 * D * D + D
    layer_norm = 2 * D
    return (vocab_size + block_size) * D + n_layer * (attn + mlp + 2 * layer_norm) + layer_norm


def init_params(key, n_layer, n_embd, block_size, vocab_size):
    """Return a fresh GPT-2: the nested dict of its parameters, with h a list of n_layer blocks.

    wte has vocab_size rows, and rows of zeros behind them up to a multiple of 128.
    """
    D, rows = n_embd, -(-vocab_size // 128) * 128
    keys = iter(jax.random.split(key, 2 + 4 * n_layer))

    def normal(std, *shape):
        return std * jax.random.normal(next(keys), shape)

    def layer(inputs, outputs, std=0.02):
        return {"kernel": normal(std, inputs, outputs), "bias": jnp.zeros(outputs)}

    def norm():
        return {"scale": jnp.ones(D), "bias": jnp.zeros(D)}

    def fresh_block():
        std = 0.02 / (2 * n_layer) ** 0.5  # of what writes into the residual stream
        attn = {"c_attn": layer(D, 3 * D), "c_proj": layer(D, D, std)}
        mlp = {"c_fc": layer(D, 4 * D), "c_proj": layer(4 * D, D, std)}
        return {"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp}

    return {
        "wte": {"embedding": normal(0.02, rows, D).at[vocab_size:].set(0)},
        "wpe": {"embedding": normal(0.02, block_size, D)},
        "h": [fresh_block() for _ in range(n_layer)],
        "ln_f": norm(),
    }


# ---- Lesson 2 ------------------------------------------------------------------------------------


BETA1 = 0.9
BETA2 = 0.95
EPS = 1e-08
WEIGHT_DECAY = 0.1


def bigram_log_probs(tokens, vocab_size):
    """Return (V, V): row c, column v is log P(next = v | current = c), from counts of pairs plus 1.

    tokens: (n,) ids.
    """
    counts = np.ones((vocab_size, vocab_size))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    return np.log(counts / counts.sum(axis=1, keepdims=True))


def windows_of(tokens, seed, step, batch_size, block_size):
    """Return (batch_size, block_size + 1) of int32: the windows of a step.

    These are rows step * batch_size to (step + 1) * batch_size of the long list.
    tokens: (n,) ids.
    """
    n_windows = (len(tokens) - 1) // block_size - 1  # one fewer than fit: room for the offset
    windows = []
    for row in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(row, n_windows)
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order, offset = rng.permutation(n_windows), rng.integers(block_size)
        start = order[place] * block_size + offset
        windows.append(tokens[start : start + block_size + 1])
    return np.stack(windows).astype(np.int32)


def cross_entropy(logits_NV, targets_N):
    """Return (N,): minus the log-probability of each target, in nats."""
    target_logit_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits_NV, axis=1) - target_logit_N


def rate(step, peak, floor, warmup, steps):
    """Return the learning rate of a step: a straight line up to the peak, then half a cosine."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)  # step 0 trains too
    done = (step - warmup) / (steps - warmup)
    return floor + (peak - floor) * (1 + cos(pi * done)) / 2


def clip(grads, max_norm):
    """Return gradients of the same direction, at most max_norm long, and their norm before."""
    norm = jnp.sqrt(sum(jnp.sum(grad**2) for grad in jax.tree.leaves(grads)))
    scale = jnp.minimum(1, max_norm / norm)
    return jax.tree.map(lambda grad: grad * scale, grads), norm


def is_decayed(name):
    """Return whether weight decay applies to the parameter of this name."""
    return name.endswith(("kernel", "embedding"))


def adamw(params, grads, mu, nu, n, rate):
    """Return the parameters after step n (the first is 1), and the new mu and nu.

    params, grads, mu, nu: nested dicts of the same form.
    """
    mu = jax.tree.map(lambda mean, grad: BETA1 * mean + (1 - BETA1) * grad, mu, grads)
    nu = jax.tree.map(lambda mean, grad: BETA2 * mean + (1 - BETA2) * grad**2, nu, grads)

    def move(path, param, mu, nu):
        step = (mu / (1 - BETA1**n)) / (jnp.sqrt(nu / (1 - BETA2**n)) + EPS)
        if is_decayed(jax.tree_util.keystr(path, simple=True, separator="/")):
            step = step + WEIGHT_DECAY * param
        return param - rate * step

    return jax.tree.map_with_path(move, params, mu, nu), mu, nu


@partial(jax.jit, static_argnums=0)
def train_step(loss_fn, state, batch, rate, max_norm):
    """Return the next state, and (loss before the update, gradient norm before clipping).

    loss_fn: (params, batch) -> loss. state: (params, mu, nu, steps done).
    """
    params, mu, nu, n = state
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    grads, norm = clip(grads, max_norm)
    params, mu, nu = adamw(params, grads, mu, nu, n + 1, rate)
    return (params, mu, nu, n + 1), (value, norm)


# ---- Lesson 4 ------------------------------------------------------------------------------------


def published_name(path):
    """Return the published name of a path: h/0/ln_1/scale -> h.0.ln_1.weight."""
    *parts, last = path.split("/")
    return ".".join([*parts, "bias" if last == "bias" else "weight"])


def load_params(tensors, template, transposed=False):
    """Return the tree of `template` (arrays or shapes), filled with float32 arrays.

    tensors: arrays by their published names, with or without `transformer.` in front; the masks
    (`.attn.bias`) and the tied `lm_head.weight` are left out.
    transposed: whether linear layers are stored as (out, in).
    """
    left = {}
    for name, tensor in tensors.items():
        if not name.endswith(".attn.bias") and name != "lm_head.weight":
            left[name.removeprefix("transformer.")] = tensor

    def take(keys, wanted):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        tensor = left.pop(published_name(path))
        if transposed and path.endswith("kernel"):
            tensor = tensor.T
        if path == "wte/embedding":  # the padding
            tensor = np.pad(tensor, ((0, wanted.shape[0] - len(tensor)), (0, 0)))
        assert tensor.shape == wanted.shape, (path, tensor.shape, wanted.shape)
        return jnp.asarray(tensor, jnp.float32)

    params = jax.tree.map_with_path(take, template)
    assert not left, sorted(left)  # every tensor was used
    return params


def narrow(logits_V, temperature, top_k):
    """Return the logits (V,) to draw from, after the temperature and top-k (0 = all tokens)."""
    logits_V = logits_V / temperature
    if top_k:
        threshold = jax.lax.top_k(logits_V, min(top_k, len(logits_V)))[0][-1]
        logits_V = jnp.where(logits_V >= threshold, logits_V, -jnp.inf)
    return logits_V


def draw(key, logits_V, temperature, top_k):
    """Return a token drawn from the narrowed logits; at temperature 0 the likeliest."""
    if temperature == 0:
        return logits_V.argmax()
    return jax.random.categorical(key, narrow(logits_V, temperature, top_k))


def make_cache(n_layer, n_head, head_dim, size):
    """Return a list with a dict {"k": zeros (S, H, K), "v": the same} for each layer; S = size."""
    shape = (size, n_head, head_dim)
    return [{"k": jnp.zeros(shape), "v": jnp.zeros(shape)} for _ in range(n_layer)]


def cached_attention(p, x_D, layer, t, n_head):
    """Return attention's output (D,) for the token at position t, and its layer's longer cache.

    p: parameters of attention; x_D: the token's normalised vector; layer: {"k": ..., "v": ...}.
    """
    qkv = jnp.split(linear(p["c_attn"], x_D), 3)
    q_HK, k_HK, v_HK = (part.reshape(n_head, -1) for part in qkv)
    k_SHK, v_SHK = layer["k"].at[t].set(k_HK), layer["v"].at[t].set(v_HK)
    scores_HS = jnp.einsum("HK,SHK->HS", q_HK, k_SHK) / q_HK.shape[-1] ** 0.5
    is_filled_S = jnp.arange(len(k_SHK)) <= t
    weights_HS = softmax(jnp.where(is_filled_S, scores_HS, -jnp.inf))
    y_HK = jnp.einsum("HS,SHK->HK", weights_HS, v_SHK)
    return linear(p["c_proj"], y_HK.reshape(-1)), {"k": k_SHK, "v": v_SHK}


def next_logits(params, cache, token, t, n_head, vocab_size):
    """Return the logits (rows of wte,) after the token at position t, and the longer cache."""
    x_D = params["wte"]["embedding"][token] + params["wpe"]["embedding"][t]
    longer = []
    for p, layer in zip(params["h"], cache, strict=True):
        y_D = layer_norm(p["ln_1"], x_D)
        y_D, layer = cached_attention(p["attn"], y_D, layer, t, n_head)
        x_D = x_D + y_D
        x_D = x_D + mlp(p["mlp"], layer_norm(p["ln_2"], x_D))
        longer.append(layer)
    x_D = layer_norm(params["ln_f"], x_D)
    return head(params, x_D, vocab_size), longer


def prefill(params, tokens_T, length, n_head, vocab_size, size):
    """Return the logits (rows of wte,) after the first `length` tokens, and a cache of `size`.

    tokens_T: the prompt, and maybe padding. All T tokens are written into the cache; what the
    padding wrote stands behind the prompt, where later tokens replace it.
    """
    T, x_BTD = len(tokens_T), embed(params, tokens_T[None])
    D, cache = x_BTD.shape[-1], []
    for p in params["h"]:
        y_BTD = layer_norm(p["ln_1"], x_BTD)
        _, k_BTD, v_BTD = jnp.split(linear(p["attn"]["c_attn"], y_BTD), 3, axis=-1)
        layer = {"k": k_BTD, "v": v_BTD}
        shape, padding = (T, n_head, D // n_head), ((0, size - T), (0, 0), (0, 0))
        cache.append({name: jnp.pad(x[0].reshape(shape), padding) for name, x in layer.items()})
        x_BTD = block(p, x_BTD, n_head)
    x_D = layer_norm(params["ln_f"], x_BTD[0, length - 1])
    return head(params, x_D, vocab_size), cache


def generate(params, tokens_T, length, n_new, key, temperature, top_k, n_head, vocab_size):
    """Return n_new tokens (n_new,) that follow the first `length` tokens of a prompt."""
    size = len(tokens_T) + n_new
    logits_V, cache = prefill(params, tokens_T, length, n_head, vocab_size, size)
    first = draw(jax.random.fold_in(key, 0), logits_V, temperature, top_k)

    def step(carry, i):
        cache, token = carry  # token i - 1, which is not in the cache yet
        t = length + i - 1
        logits_V, cache = next_logits(params, cache, token, t, n_head, vocab_size)
        token = draw(jax.random.fold_in(key, i), logits_V, temperature, top_k)
        return (cache, token), token

    _, rest = jax.lax.scan(step, (cache, first), jnp.arange(1, n_new))
    return jnp.concatenate([first[None], rest])
