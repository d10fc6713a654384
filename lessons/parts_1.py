"""What is written in lesson 1, "Build the model", in the order of the lesson."""

import math

import jax
import jax.numpy as jnp
from parts import Part
from reference_1 import (
    CFG,
    B,
    D,
    H,
    K,
    T,
    attend_heads,
    attend_over_heads,
    attention_head,
    attention_weights,
    attn_params,
    block,
    causal_mask,
    count_params,
    forward,
    hidden_states,
    init_params,
    keys_first,
    layer_norm,
    linear,
    mlp,
    noisy_params,
    norm_behind,
    normal,
    sample_variance,
    self_attention,
    softmax,
    statistics,
    tokens_BT,
    unscaled,
    visible_TS,
    without_ln_f,
)

from gptjax import functions, model

CLOSE = 1e-5  # of the largest value: float32, added up in another order

PARTS = {
    "embed": Part(
        reference=lambda params, tokens_BT: model.embed(CFG, params, tokens_BT),
        cases=lambda: [(noisy_params(), tokens_BT())],
        tolerance=CLOSE,
        hint='It is the sum of two look-ups: a row of params["wte"]["embedding"] by the token, and '
        'a row of params["wpe"]["embedding"] by the place, from 0 to T - 1.',
        why="An array of ids in square brackets picks rows, (B, T) of them. The first T rows of "
        "wpe are the same for every sequence of the batch, and broadcasting adds them to each.",
        mistake=lambda params, tokens_BT: params["wte"]["embedding"][tokens_BT],
    ),
    "softmax": Part(
        reference=softmax,
        cases=lambda: [(normal(0, 3, 5),), (1000 * normal(1, 2, 3, 4),)],
        tolerance=CLOSE,
        hint="Subtract the maximum of the last axis before exp, which overflows from 89 on, and "
        "divide by the sum over the last axis.",
        why="Subtracting the same number from all scores of a row changes numerator and "
        "denominator by the same factor. With the maximum the largest exponent is 0, so nothing "
        "overflows. keepdims=True keeps the axis, so that the division broadcasts over rows.",
        mistake=lambda x: jnp.exp(x) / jnp.exp(x).sum(axis=-1, keepdims=True),
    ),
    "causal_mask": Part(
        reference=causal_mask,
        cases=lambda: [(1,), (6,)],
        tolerance=0,
        hint="Query t (the row) may see key s (the column) where s <= t: the diagonal is True, and "
        "everything above it is False.",
        why="Two ranges, one as a row and one as a column, are compared by broadcasting, which "
        "gives a (T, T) array of booleans. A token must see itself, or the first one would see "
        "nothing.",
        mistake=lambda T: jnp.tril(jnp.ones((T, T), bool), k=1),
    ),
    "attention_weights": Part(
        reference=attention_weights,
        cases=lambda: [
            (normal(0, 6, K), normal(1, 6, K), visible_TS(jnp.arange(6))),
            (normal(2, 6, K), normal(3, 6, K), visible_TS(jnp.array([2, 0, 5, 4, 1, 3]))),
        ],
        tolerance=CLOSE,
        hint="The scores are q times k transposed, divided by sqrt(K); they are -inf where the "
        "mask is False; then comes the softmax of each row.",
        why="A scalar product of K random numbers has the standard deviation sqrt(K), so the "
        "division keeps scores of size 1 at any width. Where the score is -inf the weight is "
        "exactly 0, because exp(-inf) is 0, and what is left still sums to 1.",
        mistake=lambda q_TK, k_TK, mask_TT: softmax(jnp.where(mask_TT, q_TK @ k_TK.T, -jnp.inf)),
    ),
    "attention_head": Part(
        reference=attention_head,
        cases=lambda: [tuple(normal(seed, 6, K) for seed in range(3))],
        tolerance=CLOSE,
        hint="It is the weights under the causal mask, (T, T), times the values, (T, K).",
        why="Row t of the weights says how much of each token's value goes to token t, so the "
        "product with the values is the weighted mean of what token t may see.",
        mistake=lambda q_TK, k_TK, v_TK: softmax(q_TK @ k_TK.T / math.sqrt(K)) @ v_TK,
    ),
    "attend_heads": Part(
        reference=attend_heads,
        cases=lambda: [tuple(normal(seed, B, T, H, K) for seed in range(3))],
        tolerance=CLOSE,
        hint="The heads are axis 2 of (B, T, H, K): without the batch axis 1, so the inner vmap "
        "takes in_axes=1 and out_axes=1, and the outer one takes the batch.",
        why="vmap turns a function of one head into one of many, without a loop and without "
        "writing the axes into the function. The inner one maps over axis 1 of (T, H, K), the "
        "outer one over axis 0 of (B, T, H, K).",
        mistake=attend_over_heads,
    ),
    "linear": Part(
        reference=linear,
        cases=lambda: [
            (attn_params()["c_attn"], normal(3, B, T, D)),
            (attn_params()["c_proj"], normal(4, D)),
        ],
        tolerance=CLOSE,
        hint='It is x @ p["kernel"] + p["bias"], the kernel being (in, out).',
        why="The kernel's rows are the inputs and its columns the outputs, so x stands on the left "
        "and nothing is transposed. The bias has one number for each output and broadcasts.",
        mistake=lambda p, x: x @ p["kernel"],
    ),
    "self_attention": Part(
        reference=self_attention,
        cases=lambda: [
            (attn_params(), normal(3, B, T, D), H),
            (attn_params(), normal(4, 1, T, D), 2),
        ],
        tolerance=CLOSE,
        hint="c_attn's 3D columns are q, then k, then v, each D wide; each is reshaped to (B, T, "
        "n_head, D / n_head), attended, reshaped back to (B, T, D) and sent through c_proj.",
        why="One product for queries, keys and values is faster than three, and it is how GPT-2's "
        "file stores them. The reshape gives the first K columns to head 0, the next K to head 1, "
        "and so on.",
        mistake=keys_first,
    ),
    "gelu": Part(
        reference=functions.gelu_tanh,
        cases=lambda: [(jnp.linspace(-4, 4, 81),), (normal(0, 2, 3),)],
        tolerance=CLOSE,
        hint="GPT-2's is 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), not the one with erf.",
        why="The tanh form approximates x times the probability that a normal number is at most x. "
        "The two forms differ by up to 5e-4, and GPT-2's weights were trained with this one.",
        mistake=lambda x: 0.5 * x * (1 + jax.scipy.special.erf(x / math.sqrt(2))),
    ),
    "mlp": Part(
        reference=mlp,
        cases=lambda: [(noisy_params()["h"][0]["mlp"], 3 * normal(3, B, T, D))],
        tolerance=CLOSE,
        hint="c_fc, from D to 4D, then gelu, then c_proj, from 4D to D.",
        why="The first layer makes 4D features of a token, GELU keeps the positive ones and damps "
        "the others, and the second layer adds them up into D numbers. No token sees another here.",
        mistake=lambda p, x: linear(p["c_proj"], linear(p["c_fc"], x)),
    ),
    "layer_norm": Part(
        reference=layer_norm,
        cases=lambda: [
            (noisy_params()["h"][0]["ln_1"], 3 + normal(3, B, T, D)),
            (noisy_params()["h"][0]["ln_1"], 0.01 * normal(4, T, D)),
        ],
        tolerance=CLOSE,
        hint="Subtract the mean of the last axis, multiply by 1 / sqrt(variance + 1e-5), where the "
        "variance divides by D; then times scale, plus bias.",
        why="The epsilon stands under the root, and keeps a token whose numbers are all equal from "
        "being divided by 0. The variance is the mean of the squares once the mean is subtracted.",
        mistake=sample_variance,
    ),
    "block": Part(
        reference=block,
        cases=lambda: [(noisy_params()["h"][1], normal(3, B, T, D), H)],
        tolerance=CLOSE,
        hint="x + attention(ln_1(x)), then that plus mlp(ln_2 of it): the norm stands in front of "
        "each part, and x itself is added.",
        why="GPT-2 normalises what a part reads, not what the block puts out. So x passes all "
        "blocks by additions alone, and a gradient comes back the same way.",
        mistake=norm_behind,
    ),
    "hidden_states": Part(
        reference=hidden_states,
        cases=lambda: [(noisy_params(), tokens_BT(), H)],
        tolerance=CLOSE,
        hint="embed, then every block of params['h'] in turn, then layer_norm with params['ln_f'].",
        why="The blocks have the same form and different parameters, so a loop over the list is "
        "all there is. The last LayerNorm brings the sum of all that was added back to size 1.",
        mistake=without_ln_f,
    ),
    "head": Part(
        reference=lambda params, x_BTD, vocab_size: model.head(CFG, params, x_BTD),
        cases=lambda: [(noisy_params(), normal(3, B, T, D), CFG.vocab_size)],
        tolerance=CLOSE,
        hint="x times wte transposed, (B, T, rows of wte); columns from vocab_size on are -inf.",
        why="A token's score is the scalar product of the final vector with that token's own "
        "embedding, so the head needs no parameters. Padding rows belong to no token, and -inf "
        "gives them the probability 0.",
        mistake=lambda params, x_BTD, vocab_size: x_BTD @ params["wte"]["embedding"].T,
    ),
    "forward": Part(
        reference=forward,
        cases=lambda: [(noisy_params(), tokens_BT(), H, CFG.vocab_size)],
        tolerance=CLOSE,
        hint="It is head of hidden_states: logits, without a softmax.",
        why="The softmax is left to the loss and the sampler. Both need the logarithm of the "
        "probabilities or a temperature, and get them more exactly from logits.",
        mistake=lambda *arguments: softmax(forward(*arguments)),
    ),
    "count_params": Part(
        reference=count_params,
        cases=lambda: [(2, 12, 8, 17), (12, 768, 1024, 50257)],
        tolerance=0,
        hint="wte has vocab_size rows (the padding does not count, and the head is wte), wpe has "
        "block_size; a block has 12 D^2 + 13 D; ln_f has 2 D.",
        why="Attention has D x 3D and D x D numbers in its kernels, the MLP D x 4D twice: 12 D^2. "
        "Their biases are 3D + D + 4D + D = 9D, and two LayerNorms have 4D.",
        mistake=lambda n_layer, n_embd, block_size, vocab_size: (
            count_params(n_layer, n_embd, block_size, vocab_size) + vocab_size * n_embd
        ),
    ),
    "init_params": Part(
        reference=init_params,
        cases=lambda: [(jax.random.key(3), 2, 64, 64, 300)],
        tolerance=0.08,
        hint="Embeddings and kernels are N(0, 0.02), but both c_proj of a block N(0, 0.02 / "
        "sqrt(2 n_layer)); biases 0, scales 1; wte has a multiple of 128 rows, 0 from vocab_size "
        "on; every array needs a key of its own.",
        why="The two c_proj of a block write into the residual stream, 2 n_layer times in all, and "
        "the variances of what they write add up; the factor keeps the sum at the size of one. "
        "split makes independent keys of one: the same key would give the same numbers twice.",
        mistake=unscaled,
        look=statistics,
    ),
}
