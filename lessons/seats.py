"""Put a student's functions in the place of gptjax's: the table SEATS, and an adapter for each.

An adapter has the arguments of gptjax's function and calls the student's. What the student's cannot
do (dropout, a second text shard, beam search) stays gptjax's, or is refused.

B batch, T tokens, D width, N tokens in all, V vocabulary.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from gptjax import attention, blocks, decoding, filters, functions, kv_cache, loss, model, sampling
from gptjax.config import GPTConfig, TrainConfig
from gptjax.conversion import hf_config, tensors
from gptjax.errors import UsageError
from gptjax.training import optimizer

# The function of my_gpt -> what of gptjax it replaces, or the student's function that calls it.
SEATS = {
    "embed": "model.embed",
    "softmax": "attention_weights",
    "causal_mask": "attention_head",
    "attention_weights": "attention_head",
    "attention_head": "attend_heads",
    "attend_heads": "attention.ATTENTION",
    "linear": "blocks.linear",
    "self_attention": "blocks.CausalSelfAttention",
    "gelu": "functions.ACTIVATIONS",
    "mlp": "blocks.MLP",
    "layer_norm": "functions.layer_norm",
    "block": "hidden_states",
    "hidden_states": "model.hidden_states",
    "head": "model.head",
    "forward": "model.forward",
    "count_params": "model.count_params",
    "cross_entropy": "loss.token_losses",
    "rate": "optimizer.make_schedule",
    "clip": "optimizer.make_optimizer",
    "is_decayed": "adamw",
    "adamw": "optimizer.make_optimizer",
    "published_name": "load_params",
    "load_params": "conversion.tensors.read_params",
    "narrow": "filters.narrow",
    "draw": "decoding.sample_token",
    "make_cache": "prefill",
    "cached_attention": "next_logits",
    "next_logits": "model.next_logits",
    "prefill": "model.next_logits",
    "generate": "sampling.generate_pieces",
}
# With these train.py computes what the lessons write.
FLAGS = ("--bias=True", "--dropout=0", "--dtype=float32", "--attention=xla", "--optimizer=adamw")


def take_seats(mine: ModuleType) -> None:
    """Replace gptjax's functions in this process, wherever they were imported to."""
    for replaced, adapter in [*model_seats(mine), *other_seats(mine)]:
        for name, module in list(sys.modules.items()):
            if name.startswith("gptjax"):
                for attribute, value in list(vars(module).items()):
                    if value is replaced:
                        setattr(module, attribute, adapter)
    attention.ATTENTION["xla"] = lambda q, k, v, **_: mine.attend_heads(q, k, v)
    functions.ACTIVATIONS["gelu_tanh"] = mine.gelu


def blocks_of(cfg: GPTConfig, params: model.Params) -> model.Params:
    """The parameters with h as a list; refuses a model that the lessons do not write."""
    if not (cfg.bias and cfg.tie_head and cfg.activation == "gelu_tanh") or cfg.dropout:
        raise UsageError(
            "my_gpt.py is GPT-2 with biases, a tied head, GELU by tanh and no dropout: "
            "--bias=True --activation=gelu_tanh --dropout=0"
        )
    is_list = isinstance(params["h"], list)
    return params if is_list else model.unstack_layers(params, cfg.n_layer)


# ---- The model -----------------------------------------------------------------------------------


def model_seats(mine: ModuleType) -> Iterator[tuple[Any, Any]]:
    """What is replaced of the model, and by what."""
    embed, hidden_states, forward = model.embed, model.hidden_states, model.forward
    count_params, attend, mlp = model.count_params, blocks.CausalSelfAttention, blocks.MLP

    def my_embed(
        cfg: GPTConfig, params: model.Params, tokens_BT: Array, cache: Any = None
    ) -> Array:
        if cache is not None:
            return embed(cfg, params, tokens_BT, cache)
        return mine.embed(params, tokens_BT).astype(cfg.dtype)

    def my_hidden_states(
        cfg: GPTConfig, params: model.Params, tokens_BT: Array, *, cache: Any = None, **how: Any
    ) -> tuple[Array, Any]:
        params = blocks_of(cfg, params)
        if cache is not None:
            return hidden_states(cfg, params, tokens_BT, cache=cache, **how)
        return mine.hidden_states(params, tokens_BT, cfg.n_head), None

    def my_head(cfg: GPTConfig, params: model.Params, x: Array, dtype: Any = None) -> Array:
        return mine.head(params, x, cfg.vocab_size)

    def my_forward(
        cfg: GPTConfig, params: model.Params, tokens_BT: Array, *, cache: Any = None
    ) -> tuple[Array, Any]:
        if cache is not None:
            return forward(cfg, params, tokens_BT, cache=cache)
        return mine.forward(blocks_of(cfg, params), tokens_BT, cfg.n_head, cfg.vocab_size), None

    def my_count(cfg: GPTConfig, without: Any = ()) -> int:
        if without or not (cfg.bias and cfg.tie_head):
            return count_params(cfg, without)
        return mine.count_params(cfg.n_layer, cfg.n_embd, cfg.block_size, cfg.vocab_size)

    class MyLinear(nn.Module):
        features: int
        kernel_init: Callable[..., Array]

        @nn.compact
        def __call__(self, x: Array) -> Array:
            p = {
                "kernel": self.param("kernel", self.kernel_init, (x.shape[-1], self.features)),
                "bias": self.param("bias", nn.initializers.zeros, (self.features,)),
            }
            return mine.linear(p, x)

    def my_linear(cfg: GPTConfig, x: Array, features: int, name: str) -> Array:
        std = blocks.INIT_STD / (2 * cfg.n_layer) ** 0.5 if name == "c_proj" else blocks.INIT_STD
        return MyLinear(features, nn.initializers.normal(std), name=name)(x)

    class MyAttention(attend):  # type: ignore[misc, valid-type]
        def __call__(self, x_BTD: Array, cache: Any = None, *rest: Any) -> Any:
            if cache is not None or self.is_initializing():
                return super().__call__(x_BTD, cache, *rest)
            return mine.self_attention(self.variables["params"], x_BTD, self.cfg.n_head), None

    class MyMLP(mlp):  # type: ignore[misc, valid-type]
        def __call__(self, x_BTD: Array, *rest: Any) -> Any:
            if self.is_initializing():
                return super().__call__(x_BTD, *rest)
            return mine.mlp(self.variables["params"], x_BTD)

    def my_layer_norm(x_ND: Array, scale_D: Array) -> Array:
        return mine.layer_norm({"scale": scale_D, "bias": jnp.zeros_like(scale_D)}, x_ND)

    yield embed, my_embed
    yield hidden_states, my_hidden_states
    yield model.head, my_head
    yield forward, my_forward
    yield count_params, my_count
    yield blocks.linear, my_linear
    yield attend, MyAttention
    yield mlp, MyMLP
    yield functions.layer_norm, my_layer_norm


# ---- Training, loading, sampling -----------------------------------------------------------------


def other_seats(mine: ModuleType) -> Iterator[tuple[Any, Any]]:
    """What else is replaced, of what the student has written."""
    if hasattr(mine, "cross_entropy"):
        yield (
            loss.token_losses,
            lambda logits_NV, targets_N: mine.cross_entropy(
                logits_NV.astype(jnp.float32), targets_N
            ),
        )
        make_schedule, make_optimizer = optimizer.make_schedule, optimizer.make_optimizer
        yield make_schedule, lambda config, peak=None: my_schedule(mine, make_schedule, config)
        yield make_optimizer, lambda config: my_optimizer(mine, make_optimizer, config)
    if hasattr(mine, "generate"):
        yield tensors.read_params, lambda source, *place: my_read_params(mine, source, *place)
        parse = hf_config.parse_config  # a file without biases has zeros for them: they are read
        yield parse, lambda *fields: dataclasses.replace(parse(*fields), bias=True)
        yield from sampler_seats(mine)


def my_schedule(mine: ModuleType, theirs: Any, config: TrainConfig) -> optax.Schedule:
    """The student's rate as a table, since its steps are plain numbers."""
    if config.schedule != "cosine" or config.lr_decay_iters:
        return theirs(config)
    peak, steps = config.learning_rate, config.max_iters
    table = [
        float(mine.rate(step, peak, config.min_lr, config.warmup_iters, steps))
        for step in range(steps)
    ]
    table.append(config.min_lr)
    return lambda step: jnp.asarray(np.array(table, np.float32))[jnp.clip(step, 0, steps)]


def my_optimizer(
    mine: ModuleType, theirs: Any, config: TrainConfig
) -> optax.GradientTransformation:
    """The student's clip and adamw on the state that gptjax's optimizer has."""
    standard = (config.beta1, config.beta2, config.eps, config.weight_decay)
    if config.optimizer != "adamw" or standard != (0.9, 0.95, 1e-8, 0.1):
        raise UsageError(
            "my_gpt.py has AdamW with beta1 0.9, beta2 0.95, eps 1e-8 and weight decay 0.1: leave "
            "these flags as they are"
        )
    inner, schedule = theirs(config), optimizer.make_schedule(config)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu, nu = (optax.tree.get(state, name) for name in ("mu", "nu"))
        n = optax.tree.get_all_with_path(state, "count")[0][1]
        grads, _ = mine.clip(grads, config.grad_clip or float("inf"))
        new, mu, nu = mine.adamw(params, grads, mu, nu, n + 1, schedule(n))
        state = optax.tree.set(state, mu=mu, nu=nu, count=n + 1)
        return jax.tree.map(jnp.subtract, new, params), state

    return optax.GradientTransformation(inner.init, update)


def my_read_params(mine: ModuleType, source: Any, place: Any = lambda x: x) -> model.Params:
    """The student's loader, behind gptjax's checks of names, shapes and types."""
    tensors.check_tensors(source)
    cfg = source.cfg
    shapes = jax.eval_shape(lambda p: model.unstack_layers(p, cfg.n_layer), model.param_shapes(cfg))
    named = {name: np.asarray(source.read(name), np.float32) for name in source.tensors}
    params = blocks_of(cfg, mine.load_params(named, shapes))
    stacked = jax.tree.map(lambda *layers: np.stack(layers), *params["h"])
    return jax.tree.map(lambda x: place(np.asarray(x)), {**params, "h": stacked})


def sampler_seats(mine: ModuleType) -> Iterator[tuple[Any, Any]]:
    """The sampler, for which each row is a sequence of its own."""
    narrow, sample_token = filters.narrow, decoding.sample_token
    theirs_pieces = sampling.generate_pieces
    sizes = ("n_new", "temperature", "top_k", "n_head", "vocab_size")
    write = jax.jit(mine.generate, static_argnames=sizes)

    def my_narrow(logits_BV: Array, how: Any) -> Array:
        if how.top_p < 1 or how.min_p > 0:
            return narrow(logits_BV, how)
        return jax.vmap(lambda row: mine.narrow(row, how.temperature, how.top_k))(logits_BV)

    def my_token(logits_BV: Array, keys_B: Array, history: Any, how: Any) -> Array:
        if history is not None or how.top_p < 1 or how.min_p > 0:
            return sample_token(logits_BV, keys_B, history, how)

        def of_row(key: Array, logits_V: Array) -> Array:
            return mine.draw(key, logits_V, how.temperature, how.top_k)

        return jax.vmap(of_row)(keys_B, logits_BV).astype(jnp.int32)

    def my_next_logits(
        cfg: GPTConfig, params: model.Params, tokens_BT: Array, cache: Any, length_B: Any = None
    ) -> tuple[Array, Any]:
        (B, T), size = tokens_BT.shape, cache.k[0].shape[1]
        params, counts = blocks_of(cfg, params), (cfg.n_head, cfg.vocab_size)
        layers = [{"k": k, "v": v} for k, v in zip(cache.k, cache.v, strict=True)]

        def one(layers: Any, tokens_T: Array, t: Array) -> Any:
            return mine.next_logits(params, layers, tokens_T[0], t, *counts)

        def prompt(tokens_T: Array, length: Array) -> Any:
            return mine.prefill(params, tokens_T, length, *counts, size)

        if length_B is None and T == 1:
            logits_BV, layers = jax.vmap(one)(layers, tokens_BT, cache.length_B)
            length_B = 1
        else:
            length_B = jnp.full(B, T) if length_B is None else length_B
            logits_BV, layers = jax.vmap(prompt)(tokens_BT, length_B)
        k, v = (tuple(layer[name] for layer in layers) for name in ("k", "v"))
        return logits_BV, kv_cache.KVCache(k, v, cache.length_B + length_B)

    def my_pieces(
        cfg: GPTConfig, params: model.Params, prompts: Any, how: Any, **rest: Any
    ) -> Iterator[Any]:
        n_new, plain = rest["max_new_tokens"], how == type(how)(how.temperature, how.top_k)
        fits = max(map(len, prompts)) + n_new <= cfg.block_size
        if not (plain and fits and n_new > 1) or rest.get("n_likeliest") is not None:
            yield from theirs_pieces(cfg, params, prompts, how, **rest)
            return
        params, rows = blocks_of(cfg, params), []
        numbers = rest.get("samples") or [0] * len(prompts)
        keys = sampling.row_keys(*sampling.key_parts(rest.get("seed", 0), numbers, prompts))
        for ids, key in zip(prompts, keys, strict=True):
            tokens_T = jnp.asarray(ids, jnp.int32)
            drawing = (n_new, key, how.temperature, how.top_k, cfg.n_head, cfg.vocab_size)
            rows.append(np.asarray(write(params, tokens_T, len(ids), *drawing), np.int32))
        yield sampling.Piece(np.stack(rows), None)

    yield narrow, my_narrow
    yield sample_token, my_token
    yield model.next_logits, my_next_logits
    yield theirs_pieces, my_pieces
