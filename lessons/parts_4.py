"""What is written in lesson 4, "Load GPT-2", in the order of the lesson."""

import jax
import jax.numpy as jnp
import reference_4 as theirs
from parts import Part
from reference_1 import CFG, noisy_params, normal

CLOSE = 1e-5  # of the largest value: float32, added up in another order

PARTS = {
    "published_name": Part(
        reference=theirs.published_name,
        cases=lambda: [
            (jax.tree_util.keystr(path, simple=True, separator="/"),)
            for path, _ in jax.tree.leaves_with_path(noisy_params())
        ],
        tolerance=0,
        hint="Dots for slashes, and as the last word weight for kernel, scale and embedding; bias "
        "stays bias.",
        why="PyTorch calls the matrix of every module weight, be it a linear layer, an embedding "
        "or a LayerNorm. Flax has a name for each kind, and the rest of the path is the same.",
        mistake=lambda path: path.replace("/", ".").replace("kernel", "weight"),
    ),
    "load_params": Part(
        reference=theirs.load_params,
        cases=lambda: [
            (theirs.published_tensors(transposed), theirs.template(), transposed)
            for transposed in (False, True)
        ],
        tolerance=0,
        hint="Take `transformer.` off the names and leave out the masks (`.attn.bias`) and the "
        "tied lm_head.weight; transpose every kernel of a file of nn.Linear, the square one too, "
        "and none of another; put zeros behind wte's rows.",
        why="The template drives the loop, so that no parameter can be forgotten, and each tensor "
        "is popped, so that what is left over is noticed. Whether kernels are transposed is known "
        "from the program that wrote the file; it cannot be seen from the shape of a square one.",
        mistake=theirs.by_shape,
    ),
    "narrow": Part(
        reference=theirs.narrow,
        cases=lambda: [(normal(0, 9), 0.7, 0), (normal(1, 9), 1.5, 3)],
        tolerance=CLOSE,
        hint="Divide by the temperature, then set all below the k-th largest to -inf; top_k=0 "
        "keeps all.",
        why="A temperature below 1 makes the differences of the logits larger, and so the likely "
        "tokens likelier. Top-k cuts off the many unlikely tokens, which together would be drawn "
        "often enough to spoil a text.",
        mistake=lambda logits_V, temperature, top_k: theirs.narrow(
            logits_V, 1 / temperature, top_k
        ),
        look=jax.nn.softmax,
    ),
    "draw": Part(
        reference=theirs.draw,
        cases=theirs.draws,
        tolerance=0,
        hint="jax.random.categorical(key, logits) takes logits, not probabilities; at temperature "
        "0 it is the likeliest token, without a division.",
        why="categorical adds a random number to each logit and takes the largest, which draws "
        "with the probabilities of the softmax without computing it. Temperature 0 is the limit "
        "in which only the likeliest token is left.",
        mistake=theirs.draw_from_probabilities,
    ),
    "make_cache": Part(
        reference=theirs.make_cache,
        cases=lambda: [(2, 3, 4, 8)],
        tolerance=0,
        hint="A list with a dict for each layer, whose k and v are zeros of shape (size, n_head, "
        "head_dim).",
        why="JAX compiles for fixed shapes, so the cache has its full size from the start, and the "
        "position says how much of it is filled.",
        mistake=lambda n_layer, n_head, head_dim, size: theirs.make_cache(
            n_layer, size, head_dim, n_head
        ),
    ),
    "cached_attention": Part(
        reference=theirs.cached_attention,
        cases=lambda: [
            (noisy_params()["h"][0]["attn"], normal(3, CFG.n_embd), theirs.filled_cache()[0], 5, 3)
        ],
        tolerance=CLOSE,
        hint="Write this token's k and v at place t, then let its q attend to the places up to t: "
        "the others get the score -inf.",
        why="What earlier tokens put into attention does not change when a token is added, so "
        "their keys and values are kept. Only one query is new, and it sees all that came before.",
        mistake=theirs.without_mask,
    ),
    "next_logits": Part(
        reference=theirs.next_logits,
        cases=lambda: [
            (noisy_params(), theirs.filled_cache(), jnp.int32(7), 5, *theirs.SIZE),
            (noisy_params(), theirs.make_cache(2, 3, 4, 8), jnp.int32(3), 0, *theirs.SIZE),
        ],
        tolerance=CLOSE,
        hint="The embedding is wte[token] + wpe[t]; then every block with cached_attention in the "
        "place of attention, ln_f and the head.",
        why="It is the forward pass for one token at position t. Each layer reads its own cache "
        "and gives it back longer, and nothing of earlier tokens is computed again.",
        mistake=theirs.always_first,
    ),
    "prefill": Part(
        reference=theirs.prefill,
        cases=lambda: [
            (noisy_params(), theirs.prompt_T(), 6, *theirs.SIZE, 8),
            (noisy_params(), theirs.prompt_T(), theirs.PROMPT, *theirs.SIZE, 8),
        ],
        tolerance=CLOSE,
        hint="One forward pass over all tokens that keeps each layer's k and v at the front of its "
        "cache; the logits are those of token length - 1.",
        why="A prompt is known as a whole, so it takes one pass with large matrix products and not "
        "one pass a token. What padding wrote into the cache lies behind the prompt, and is "
        "replaced before any query sees it.",
        mistake=theirs.of_the_last,
        look=theirs.without_padding,
    ),
    "generate": Part(
        reference=theirs.generate,
        cases=lambda: [
            (noisy_params(), theirs.prompt_T()[:3], 3, 5, jax.random.key(1), 1.0, 0, *theirs.SIZE),
            (noisy_params(), theirs.prompt_T()[:3], 2, 4, jax.random.key(2), 0, 0, *theirs.SIZE),
        ],
        tolerance=0,
        hint="Token i is drawn with fold_in(key, i); the first comes from prefill, and token i - 1 "
        "is read at position length + i - 1 to get the logits of token i.",
        why="scan compiles the step once and runs it n_new - 1 times, with the cache and the "
        "newest token as what goes from step to step. fold_in makes a key for each token, so that "
        "the draws are independent and the same text comes again from the same key.",
        mistake=theirs.after_padding,
    ),
}
