"""A token of GPT-2 for one to eight rows as one CUDA kernel: weights stream while it computes.

`decoder.cu` says how. It is the counterpart of `model.next_logits` with a cache, and of the greedy
decoder; where `plan` finds no shape for it, or `cuda.available` says no, those are what runs.

B rows, L layers, S cache size, D width, H heads, K head dim, V vocabulary (padded), N blocks.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.kernels import cuda

ROWS = 8  # that one product of the tensor cores takes at once; each needs a warp, see `warps_of`
HEAD_DIMS = (16, 32, 64, 128)
SLOT = 40_000  # bytes of weights that are copied at once, at most, if a slot need not be larger
SHARED = 227 * 1024  # bytes of shared memory that a block may have on compute capability 9.0
Params = dict[str, Any]


class Sizes(NamedTuple):
    """What the kernel has to know of a model."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab: int
    padded: int  # rows of the embedding
    erf: bool  # GELU in its exact form


class Plan(NamedTuple):
    """How a model is cut into blocks: what `pack` and the kernel agree on.

    Plans of one model for other numbers of rows differ in warps and slot alone, so `pack`, which
    reads neither, makes the same weights for all of them.
    """

    blocks: int
    warps: int
    rows: tuple[int, int, int]  # that a block has of the matrices of 3D, D and 4D outputs
    head: tuple[int, int]  # rows of a group of the head, groups
    slot: int  # bytes: one for each warp of pieces of 32 columns of all rows, or several


def warps_of(sizes: Sizes, rows: int) -> int:
    """Return how many warps of a block compute: one for each row, or more.

    They take pieces of 32 columns in turn: as little idle time as possible, then few warps. For one
    row of GPT-2 small, 4, 6, 8 and 12 of them take 0.243, 0.198, 0.202 and 0.212 ms a token on an
    H100.
    """
    pieces = sizes.n_embd // 32
    if pieces < 8:
        return 8
    return min(range(max(6, rows), 17), key=lambda n: (-(-pieces // n) * n, n))


def plan(sizes: Sizes, blocks: int, rows: int = 1) -> Plan | None:
    """Return how to cut the model into so many blocks or fewer, for so many rows of text.

    None if the kernel does not take its shape.
    """
    D, H = sizes.n_embd, sizes.n_head
    if D % 32 or D // H not in HEAD_DIMS or blocks < 1:
        return None
    # Each has rows of the matrix of 4D outputs: nobody would wait for a block without.
    blocks = -(-4 * D // -(-4 * D // blocks))
    cut = (-(-3 * D // blocks), -(-D // blocks), -(-4 * D // blocks))
    per_block, most = -(-sizes.padded // blocks), min(max(cut), 32 * warps_of(sizes, 1) // ROWS)
    least = -(-per_block // most)
    groups = min(range(least, least + 8), key=lambda n: (-(-per_block // n) * n, n))
    head = (-(-per_block // groups), groups)
    warps = warps_of(sizes, rows)
    at_once = 64 * warps * max(*cut, head[0])
    found = Plan(blocks, warps, cut, head, at_once * max(1, SLOT // at_once))
    return found if shared_memory(sizes, found, rows)[0] > 0 else None


# ---- The weights ---------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Weights as the kernel reads them."""

    stream: Array  # (N, bytes / 2) uint16: of each block, in the order of use
    wte: Array  # (V, D) bfloat16
    wpe: Array  # (context, D) bfloat16


@functools.partial(jax.jit, static_argnames=("sizes", "plan"))
def pack(sizes: Sizes, plan: Plan, params: Params) -> Packed:
    """Return the weights of unstacked params (see `model.unstack_layers`) for the kernel.

    The kernel has no scale and shift of a LayerNorm: the scale multiplies the matrix that follows,
    and the shift becomes a part of that matrix's bias, since
    W (scale * x + shift) + b = (W * scale) x + (W shift + b).
    """
    (qkv, d, f), (group, groups) = plan.rows, plan.head

    def part(matrix: Params, norm: Params, per_group: int, groups: int = 1) -> Array:
        """Cut a matrix and its bias, a float32 for each row, into (N, -1).

        Each group has biases, filled up to 16 bytes, then pieces of 32 columns: rows, columns. As
        uint16, which no compiler takes for numbers.
        """
        rows = matrix["kernel"].T if "kernel" in matrix else matrix["embedding"]  # (out, in)
        bias = matrix.get("bias", jnp.zeros(len(rows))).astype(jnp.float32)
        if "bias" in norm:
            shift = norm["bias"].astype(jnp.float32)
            bias += jnp.matmul(rows.astype(jnp.float32), shift, precision="highest")
        if norm:
            rows = rows.astype(jnp.float32) * norm["scale"].astype(jnp.float32)[None]
        count = plan.blocks * groups * per_group
        rows = jnp.pad(rows.astype(jnp.bfloat16), ((0, count - len(rows)), (0, 0)))
        rows = rows.reshape(plan.blocks, groups, per_group, -1, 32).swapaxes(2, 3)
        bias = jnp.pad(bias, (0, count - len(bias))).reshape(plan.blocks, groups, per_group)
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, -per_group % 4)))
        bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (bias, rows))
        both = jnp.concatenate([x.reshape(plan.blocks, groups, -1) for x in bits], axis=2)
        return both.reshape(plan.blocks, -1)

    parts = []
    for layer in params["h"]:
        attn, mlp = layer["attn"], layer["mlp"]
        parts += [
            part(attn["c_attn"], layer["ln_1"], qkv),
            part(attn["c_proj"], {}, d),
            part(mlp["c_fc"], layer["ln_2"], f),
            part(mlp["c_proj"], {}, d),
        ]
    head = params["lm_head"] if "lm_head" in params else params["wte"]
    parts.append(part(head, params["ln_f"], group, groups))
    wte, wpe = (params[name]["embedding"].astype(jnp.bfloat16) for name in ("wte", "wpe"))
    return Packed(jnp.concatenate(parts, axis=1), wte, wpe)


# ---- The kernel ----------------------------------------------------------------------------------


def splits(sizes: Sizes, plan: Plan, rows: int) -> int:
    """Return into how many parts the context of a head is split at most."""
    return max(1, min(16, plan.blocks // (rows * sizes.n_head)))


def shared_memory(sizes: Sizes, plan: Plan, rows: int) -> tuple[int, int]:
    """Return the slots for weights and the bytes of shared memory, as decoder.cu lays it out."""
    F, K = 4 * sizes.n_embd, sizes.n_embd // sizes.n_head
    most = max(*plan.rows, plan.head[0])
    sums = -(-plan.warps * rows * most // 4) * 4
    row = 2 * F + (0 if F // 32 % 2 else 64)
    fixed = rows * row + 8 * max(sums, plan.warps * (K + 4)) + 8 * plan.warps
    fixed += 8 * rows + 8 + 4 * rows * plan.rows[1] + 8 * most
    slot = plan.slot + -(-most // 4) * 16 + 16  # with biases, and two barriers
    slots = (SHARED - fixed) // slot
    return slots, fixed + slots * slot


def n_words(sizes: Sizes, plan: Plan, rows: int) -> int:
    """Return how many words the blocks exchange, as decoder.cu lays them out."""
    D, H = sizes.n_embd, sizes.n_head
    parts = H * splits(sizes, plan, rows) * (D // H + 4)
    return 16 + rows * (3 * D + parts + 2 * D + 2 * 4 * D + 2 * plan.blocks)


def source() -> str:
    """Return the kernel's CUDA C++, after what it needs of a GPU."""
    files = ("gpu_primitives.cuh", "decoder.cu")
    return "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in files)


def macros(
    sizes: Sizes, plan: Plan, rows: int, steps: int, cache: int, logits: bool
) -> dict[str, int]:
    """Return what decoder.cu is compiled with."""
    names = ("L", "H", "D", "VOCAB", "VPAD", "EXACT")
    slots, _ = shared_memory(sizes, plan, rows)
    return {
        **dict(zip(names, map(int, sizes), strict=True)),
        "K": sizes.n_embd // sizes.n_head,
        "ROWS": rows,
        "STEPS": steps,
        "S": cache,
        "NB": plan.blocks,
        "NW": plan.warps,
        "NS": splits(sizes, plan, rows),
        **dict(zip(("RQ", "RD", "RF"), plan.rows, strict=True)),
        "RG": plan.head[0],
        "NG": plan.head[1],
        "SLOT": plan.slot,
        "NSLOT": slots,
        "LOGITS": int(logits),
        "SPINS": 1 << 21,
    }


class Stacked(NamedTuple):
    """A cache as the kernel writes it: that of all layers in one array, and the blocks' words."""

    k: Array  # (L, B, S, D)
    v: Array
    length_B: Array
    words: Array  # uint32, zero at first


def decode(
    sizes: Sizes,
    plan: Plan,
    packed: Packed,
    token_B: Array,
    cache: Stacked,
    steps: int,
    count: Array | None = None,
    *,
    logits: bool,
    changed: dict[str, int] | None = None,
    grid: int | None = None,
) -> tuple[Array, Array, Stacked, Array]:
    """Compute `steps` tokens for each row in one launch, or the first `count` of them.

    Args:
        sizes: of the model.
        plan: for so many rows.
        packed: the weights.
        token_B: the newest token of each row, not in the cache yet; at most 8 rows.
        cache: of the tokens before; rows that are full write their last position again.
        steps: 1 with logits.
        count: int32, 1 to `steps`; None means all. It is an operand, so one program serves all.
        logits: whether to return logits, and to choose no token.
        changed: macros to compile with other values, for tests and benchmarks.
        grid: blocks to launch, for the test that a wrong number does no harm.

    Returns:
        The greedy tokens (steps, B) and their logits (steps, B), garbage after the first `count`;
        with `logits` zeros (1, B) and all logits (B, V); the longer cache; whether all blocks had
        what they waited for. If not, the rest is garbage, but for what the cache held before.
    """
    _, B, S, _ = cache.k.shape
    assert steps == 1 or not logits
    assert min(ROWS, plan.warps) >= B
    values = {**macros(sizes, plan, B, steps, S, logits), **(changed or {})}
    options = tuple(f"-D{name}={value}" for name, value in values.items())
    ptx = cuda.compile_ptx(source(), cuda.architecture(), options)
    shape = jax.ShapeDtypeStruct
    count = jnp.int32(steps) if count is None else count
    inputs = [token_B, cache.length_B, count, *packed]
    outputs = [
        *(shape(x.shape, x.dtype) for x in (cache.words, cache.k, cache.v)),
        shape((steps, B), jnp.int32),
        shape((B, sizes.padded) if logits else (steps, B), jnp.float32),
        shape((plan.blocks,), jnp.int32),
    ]
    words, k, v, tokens_nB, values_BV, given_up_N = cuda.call(
        "decode",
        ptx,
        [*inputs, cache.words, cache.k, cache.v],
        outputs,
        grid=grid or plan.blocks,
        block=32 * plan.warps + 32,
        shared=shared_memory(sizes, plan, B)[1],
        aliases={6: 0, 7: 1, 8: 2},
    )
    length_B = jnp.minimum(cache.length_B + count, S)
    return tokens_nB, values_BV, Stacked(k, v, length_B, words), jnp.all(given_up_N == 0)
