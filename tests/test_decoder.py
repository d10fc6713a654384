"""The fused decoder: its CUDA source, run on a CPU, computes what the plain decoder does.

tests/cuda_on_cpu.h is the GPU: a fiber for each of its threads, in any order. What it cannot show
(memory that other blocks see late, the time it takes) is for a machine with an H100.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import drafts, fused, model, sampling, speculative
from gptjax.config import GPTConfig, SampleConfig
from gptjax.drafts import Draft
from gptjax.kernels import cuda, decoder
from gptjax.kv_cache import KVCache, make_cache

from .cuda_on_cpu import compile_kernel, launch, needs_gxx
from .helpers import scaled_params, tiny

BLOCKS, LENGTHS = 3, (9, 1, 13, 4, 16, 2, 7, 11)
SOURCE = Path(decoder.__file__).with_name("decoder.cu").read_text(encoding="utf-8")
TOLERANCE = (
    0.02  # of logits of about 2: activations are rounded to bfloat16, at most 0.009 was seen
)


def on_cpu(
    folder: Path,
    cfg: GPTConfig,
    params: model.Params,
    token_B: np.ndarray,
    cache: KVCache,
    steps: int,
    *,
    logits: bool = False,
    count: int | None = None,
    source: str = SOURCE,
    blocks: int = BLOCKS,
    missing: int = 0,
    words: np.ndarray | None = None,
    packed: decoder.Packed | None = None,
    **changes: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Run the kernel; return tokens, values, whether each block gave up, and the keys it left.

    `words` are those of an earlier launch, and are changed in place; `changes` are of the plan.
    """
    sizes, B, S = fused.sizes_of(cfg), len(token_B), cache.k[0].shape[1]
    plan = decoder.plan(sizes, blocks, B)
    assert plan is not None
    assert plan.blocks == blocks
    plan = plan._replace(**changes)
    packed = packed or decoder.pack(sizes, plan, params)
    macros = decoder.macros(sizes, plan, B, steps, S, logits)
    few = min(3, macros["NSLOT"])  # slots, so that they come round
    macros |= {"SPINS": 1 << 12, "NSLOT": few}
    shape = (cfg.n_layer, B, S, cfg.n_embd)
    k, v = (np.array(jnp.stack(x).astype(jnp.bfloat16)).reshape(shape) for x in (cache.k, cache.v))
    tokens = np.full((steps, B), -1, np.int32)
    values = np.full((B, sizes.padded) if logits else (steps, B), np.nan, np.float32)
    given_up = np.full(blocks, -1, np.int32)
    if words is None:
        words = np.zeros(decoder.n_words(sizes, plan, B), np.uint32)
    read = [token_B.astype(np.int32), np.array(cache.length_B, np.int32)]
    read += [np.array(steps if count is None else count, np.int32), *map(np.array, packed)]
    shared, threads = decoder.shared_memory(sizes, plan, B)[1], 32 * plan.warps + 32
    # The kernel's outputs take the memory of its inputs.
    arrays = [*read, words, k, v, words, k, v, tokens, values, given_up]
    library = compile_kernel(folder, source, "decode", tuple(macros.items()))
    launch(library, arrays, grid=blocks - missing, block=threads, shared=shared)
    return tokens, values, given_up, k


def a_model(
    rows: int, n_embd: int = 64, **changes: Any
) -> tuple[GPTConfig, model.Params, np.ndarray, KVCache]:
    """Return a model whose weights are of bfloat16, and the caches of prompts of other lengths."""
    cfg = tiny(block_size=20, n_embd=n_embd, **changes)
    params = scaled_params(cfg, jax.random.key(0), 4.0)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    params = model.unstack_layers(params, cfg.n_layer)
    tokens_BT = np.array(jax.random.randint(jax.random.key(1), (rows, 16), 0, 61))
    length_B = jnp.array(LENGTHS[:rows])
    _, cache = next_logits(cfg, params, tokens_BT, make_cache(cfg, rows, 20), length_B)
    k, v = (tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in y) for y in cache[:2])
    return cfg, params, tokens_BT[:, -1], KVCache(k, v, cache.length_B)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels lie."""
    return tmp_path_factory.mktemp("kernels")


next_logits: Callable[..., Any] = jax.jit(model.next_logits, static_argnums=0)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of logits, infinite if others are -inf."""
    real = np.isfinite(expected)
    if not np.array_equal(real, np.isfinite(found)):
        return np.inf
    return float(np.abs(found[real] - expected[real]).max())


@needs_gxx
@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (1, {"n_head": 4}),
        (8, {"n_head": 1, "activation": "gelu", "bias": False, "tie_head": False}),
    ],
)
def test_logits_and_cache_equal_the_plain_decoders(
    rows: int, changes: dict[str, Any], folder: Path
) -> None:
    cfg, params, token_B, cache = a_model(rows, **changes)
    expected, longer = next_logits(cfg, params, token_B[:, None], cache)
    _, found, given_up, k = on_cpu(folder, cfg, params, token_B, cache, 1, logits=True)
    assert not given_up.any()
    assert difference(found, np.asarray(expected)) <= TOLERANCE
    keys = np.asarray(jnp.stack(longer.k)).reshape(k.shape)
    assert np.abs(k.astype(np.float32) - keys).max() <= TOLERANCE


@needs_gxx
def test_more_rows_than_one_row_has_warps(folder: Path) -> None:
    """The weights are those that one row reads with its six warps."""
    cfg, params, token_B, cache = a_model(7, n_embd=384, n_head=3, n_layer=1)
    one, seven = (decoder.plan(fused.sizes_of(cfg), 20, rows) for rows in (1, 7))
    assert one is not None and seven is not None and (one.warps, seven.warps) == (6, 12)
    expected, _ = next_logits(cfg, params, token_B[:, None], cache)
    packed = decoder.pack(fused.sizes_of(cfg), one, params)
    how: Any = {"blocks": 20, "packed": packed}
    _, found, given_up, _ = on_cpu(folder, cfg, params, token_B, cache, 1, logits=True, **how)
    assert not given_up.any()
    assert difference(found, np.asarray(expected)) <= 2.5 * TOLERANCE  # of logits up to 5.2


@needs_gxx
@pytest.mark.parametrize(("width", "heads"), [(160, 10), (64, 1)])
def test_matrices_in_several_segments(width: int, heads: int, folder: Path) -> None:
    """As of large models: with the last one shorter, and a cache that is read in several rounds."""
    cfg, params, token_B, cache = a_model(1, n_embd=width, n_head=heads)
    expected, _ = next_logits(cfg, params, token_B[:, None], cache)
    assert "constexpr int U = 3;" in SOURCE
    source = SOURCE.replace("constexpr int U = 3;", "constexpr int U = 1;")
    slot = 64 * 2 * -(-4 * width // BLOCKS)  # a piece of 32 columns for each of 2 warps
    how: Any = {"source": source, "warps": 2, "slot": slot}
    _, found, given_up, _ = on_cpu(folder, cfg, params, token_B, cache, 1, logits=True, **how)
    assert not given_up.any()
    assert difference(found, np.asarray(expected)) <= TOLERANCE


# A lane merges one, four, two and four numbers of a head; a context has 3, 3, 6 and 1 splits at
# most. In the third case a block has rows of one matrix alone; in the last, blocks have several
# items of attention.
@needs_gxx
@pytest.mark.parametrize(
    ("width", "heads", "rows", "blocks"),
    [(32, 1, 1, 3), (128, 1, 3, 9), (64, 1, 3, 19), (256, 2, 4, 7)],
)
def test_splits_of_a_context(width: int, heads: int, rows: int, blocks: int, folder: Path) -> None:
    """Of up to 16 keys; so few are not split, if it is left to the kernel."""
    cfg, params, token_B, cache = a_model(rows, n_embd=width, n_head=heads)
    expected, _ = next_logits(cfg, params, token_B[:, None], cache)
    at_once = "(n + U * KPP - 1) / (U * KPP)"
    assert at_once in SOURCE
    source = SOURCE.replace(at_once, "(n + 3) / 4")
    _, found, given_up, _ = on_cpu(
        folder, cfg, params, token_B, cache, 1, logits=True, source=source, blocks=blocks
    )
    assert not given_up.any()
    assert difference(found, np.asarray(expected)) <= TOLERANCE


@needs_gxx
@pytest.mark.parametrize("late", [0, 18])
def test_a_block_may_be_late(late: int, folder: Path) -> None:
    """The last of 19 has rows of one matrix alone, so that the others go on without it."""
    cfg, params, token_B, cache = a_model(1, n_head=1, n_layer=4)
    expected, _ = next_logits(cfg, params, token_B[:, None], cache)
    at = "      constexpr int WPH = NW / B,"
    assert at in SOURCE
    pause = f"if (id == {late}) for (int i = 0; i < 600; i++) pause_fiber();\n"
    source = SOURCE.replace(at, pause + at)
    _, found, given_up, _ = on_cpu(
        folder, cfg, params, token_B, cache, 1, logits=True, source=source, blocks=19
    )
    assert not given_up.any()
    assert difference(found, np.asarray(expected)) <= TOLERANCE


@needs_gxx
def test_a_trained_model_is_as_near_to_float32_as_in_plain_jax(folder: Path) -> None:
    """Scales of its LayerNorms are from 0.16 to 2.4, and the kernel has them in its matrices."""
    run = gptjax.load_model("novels")
    cfg = dataclasses.replace(model.resolve(run.config.model), dtype="float32", dropout=0.0)
    ids = run.tokenizer.encode("It was a dark night, and nobody in the house was awake. " * 3)
    tokens_BT = np.array([ids[:16], ids[5:21], ids[9:25]], np.int32)
    params = model.unstack_layers(run.params, cfg.n_layer)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if p.ndim > 1 else p, params)
    _, cache = next_logits(cfg, params, tokens_BT[:, :-1], make_cache(cfg, 3, 24), jnp.full(3, 15))
    expected, _ = next_logits(cfg, params, tokens_BT[:, -1:], cache)

    def error(logits: Any) -> float:
        difference = (np.asarray(logits, np.float32) - expected)[:, : cfg.vocab_size]
        return float(np.sqrt(np.mean(difference**2)))

    k, v = (tuple(x.astype(jnp.bfloat16) for x in y) for y in cache[:2])
    plain, _ = next_logits(
        dataclasses.replace(cfg, dtype="bfloat16"),
        low,
        tokens_BT[:, -1:],
        KVCache(k, v, cache.length_B),
    )
    _, found, given_up, _ = on_cpu(
        folder, cfg, low, tokens_BT[:, -1], KVCache(k, v, cache.length_B), 1, logits=True, blocks=24
    )
    assert not given_up.any()
    assert 0.001 < error(found) <= 1.5 * error(plain)


@needs_gxx
def test_a_mistake_in_the_kernel_shows(folder: Path) -> None:
    """The newest key, which no cache has, is left out."""
    right, wrong = "a.newest = split == 0 &&", "a.newest = split < 0 &&"
    cfg, params, token_B, cache = a_model(3, n_head=2)
    expected, _ = next_logits(cfg, params, token_B[:, None], cache)
    assert right in SOURCE
    source = SOURCE.replace(right, wrong)
    _, found, _, _ = on_cpu(folder, cfg, params, token_B, cache, 1, logits=True, source=source)
    assert not difference(found, np.asarray(expected)) <= TOLERANCE


@needs_gxx
def test_several_tokens_in_one_launch(folder: Path) -> None:
    """The cache, of 20, is full for one of the rows before the end: it stays in its last place."""
    cfg, params, token_B, cache = a_model(5, n_head=2)
    found, best, given_up, _ = on_cpu(folder, cfg, params, token_B, cache, 6, logits=False)
    assert not given_up.any()
    for i in range(6):
        logits_BV, cache = next_logits(cfg, params, token_B[:, None], cache)
        rows = np.array(cache.length_B) <= 20
        chosen_B = np.take_along_axis(np.asarray(logits_BV), found[i][:, None], axis=1)[:, 0]
        assert np.all((logits_BV.max(-1) - chosen_B)[rows] <= TOLERANCE)  # its likeliest, or a tie
        assert np.all(np.abs(best[i] - chosen_B)[rows] <= TOLERANCE)
        token_B = found[i]


@needs_gxx
def test_a_launch_may_end_before_its_last_token(folder: Path) -> None:
    """The next one goes on with the blocks' words as they were left."""
    cfg, params, token_B, cache = a_model(2, n_head=2)
    plan = decoder.plan(fused.sizes_of(cfg), BLOCKS, 2)
    assert plan is not None
    words = np.zeros(decoder.n_words(fused.sizes_of(cfg), plan, 2), np.uint32)
    for count in (3, 1, 2):
        how: Any = {"count": count, "words": words}
        found, best, given_up, _ = on_cpu(folder, cfg, params, token_B, cache, 4, **how)
        assert not given_up.any()
        assert np.all(found[count:] == -1)  # not written
        for i in range(count):
            logits_BV, cache = next_logits(cfg, params, token_B[:, None], cache)
            assert np.abs(best[i] - logits_BV.max(-1)).max() <= TOLERANCE
            token_B = found[i]


@needs_gxx
def test_a_missing_block_ends_all_waiting(folder: Path) -> None:
    cfg, params, token_B, cache = a_model(5, n_head=2)
    before = np.asarray(jnp.stack(cache.k).astype(jnp.bfloat16)).reshape(2, 5, 20, 64)
    _, _, given_up, k = on_cpu(folder, cfg, params, token_B, cache, 6, logits=False, missing=1)
    assert given_up[:2].all()
    for row in range(5):
        assert np.array_equal(k[:, row, : LENGTHS[row]], before[:, row, : LENGTHS[row]])


@pytest.mark.skipif(
    cuda.capability() != cuda.HOPPER,
    reason="needs an H100: JAX_PLATFORMS=cuda pytest -n 0 tests/test_decoder.py -k gpt2_small",
)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_gpt2_small_on_a_gpu(rows: int) -> None:
    """Each token is the likeliest one of the float32 model, or a tie, behind the tokens before."""
    cfg, n = GPTConfig(dtype="bfloat16"), 200
    params = scaled_params(cfg, jax.random.key(0), 2.0)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    decoding = model.prepare_for_decoding(cfg, params)
    sizes, plan = fused.sizes_of(cfg), fused.plan_of(cfg, rows)
    assert plan is not None
    packed = decoder.pack(sizes, plan, decoding)
    k = jnp.zeros((cfg.n_layer, rows, cfg.block_size, cfg.n_embd), jnp.bfloat16)
    state = jnp.zeros(decoder.n_words(sizes, plan, rows), jnp.uint32)
    cache = decoder.Stacked(k, k, jnp.zeros(rows, jnp.int32), state)
    first_B = jnp.array([50256, 11, 198, 383, 464, 1212, 8, 40])[:rows]
    found_nB, _, _, ok = decoder.decode(sizes, plan, packed, first_B, cache, n, logits=False)
    assert ok
    tokens_BT = jnp.concatenate([first_B[:, None], found_nB.T[:, :-1]], axis=1)
    reference = dataclasses.replace(cfg, dtype="float32", attention="xla")
    with jax.default_matmul_precision("highest"):
        logits_BTV, _ = jax.jit(model.forward, static_argnums=0)(reference, params, tokens_BT)
    chosen_BT = jnp.take_along_axis(logits_BTV, found_nB.T[:, :, None], axis=2)[:, :, 0]
    assert float((logits_BTV.max(-1) - chosen_BT).max()) <= TOLERANCE * float(
        jnp.abs(chosen_BT).max()
    )


# ---- Where it runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "heads", "taken"),
    [(768, 12, True), (1600, 25, True), (128, 4, True), (96, 4, False), (80, 5, False)],
)
def test_which_shapes_it_takes(width: int, heads: int, taken: bool) -> None:
    assert (decoder.plan(decoder.Sizes(2, heads, width, 61, 64, False), 128) is not None) == taken


@pytest.mark.parametrize("width", [768, 1024, 1280, 1600])
def test_every_block_has_rows_of_the_matrix_that_widens(width: int) -> None:
    """Nobody waits for a block without, so others may write over what it has not read."""
    sizes = decoder.Sizes(12, width // 64, width, 50257, 50304, False)
    for blocks in range(60, 129):
        plan = decoder.plan(sizes, blocks)
        assert plan is not None
        assert (plan.blocks - 1) * plan.rows[2] < 4 * width, blocks


def test_a_model_too_wide_for_the_shared_memory_is_refused() -> None:
    assert decoder.plan(decoder.Sizes(48, 25, 1600, 50257, 50304, False), 16) is None


@pytest.mark.parametrize("width", [32, 128, 768, 1024, 1280, 1600])
@pytest.mark.parametrize("rows", range(1, 9))
def test_a_block_has_the_shared_memory(width: int, rows: int) -> None:
    sizes = decoder.Sizes(12, max(1, width // 64), width, 50257, 50304, False)
    plan = decoder.plan(sizes, 128, rows)
    assert plan is not None
    assert plan.warps >= rows
    slots, size = decoder.shared_memory(sizes, plan, rows)
    assert size <= decoder.SHARED
    assert slots >= 2  # one is copied while the other is read
    assert plan.head[0] * rows <= 32 * plan.warps  # a thread for each logit of a group


@pytest.mark.parametrize("width", [96, 256, 384, 768, 1024, 1280, 1600])
@pytest.mark.parametrize("blocks", [100, 128])
def test_plans_for_all_rows_read_the_same_weights(width: int, blocks: int) -> None:
    sizes = decoder.Sizes(12, width // 32, width, 50257, 50304, False)
    plans = [decoder.plan(sizes, blocks, rows) for rows in range(1, 9)]
    read = {(plan.blocks, plan.rows, plan.head) for plan in plans if plan is not None}
    assert None not in plans
    assert len(read) == 1


def pretend(monkeypatch: pytest.MonkeyPatch, cfg: GPTConfig, give_up_at: int = -1) -> list[int]:
    """Put plain JAX in the kernel's place, as on a GPU; return the steps that it is asked for."""
    asked: list[int] = []

    def decode(
        sizes: object,
        plan: decoder.Plan,
        packed: model.Params,
        token_B: jax.Array,
        cache: decoder.Stacked,
        steps: int,
        count: jax.Array | int = 1,
        *,
        logits: bool,
    ) -> tuple[jax.Array, jax.Array, decoder.Stacked, jax.Array]:
        asked.append(steps)
        if give_up_at == 0:
            raise cuda.KernelError("a block waited in vain for its compiler")
        _, B, S, _ = cache.k.shape
        assert plan.warps == B
        k, v = (tuple(x.reshape(-1, B, S, cfg.n_head, cfg.head_dim)) for x in cache[:2])
        plain = KVCache(k, v, cache.length_B)
        if logits:
            values_BV, plain = model.next_logits(cfg, packed, token_B[:, None], plain)
            new_nB, values = jnp.zeros((1, B), jnp.int32), values_BV
        else:

            def step(state: tuple[jax.Array, KVCache], _: None) -> tuple[Any, Any]:
                logits_BV, plain = model.next_logits(cfg, packed, state[0][:, None], state[1])
                token_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
                return (token_B, plain), (token_B, logits_BV.max(-1))

            (_, plain), (new_nB, values) = jax.lax.scan(step, (token_B, plain), length=steps)
            new_nB = jnp.where(jnp.arange(steps)[:, None] < count, new_nB, 7)  # garbage
        k_LBSD, v_LBSD = (jnp.stack(x).reshape(cache.k.shape) for x in plain[:2])
        stacked = decoder.Stacked(k_LBSD, v_LBSD, cache.length_B + count, cache.words)
        ok = jnp.array(len(asked) != give_up_at)
        return new_nB, values, stacked, ok

    def plan_of(cfg: GPTConfig, rows: int) -> decoder.Plan:
        plan = decoder.plan(fused.sizes_of(cfg), 128, rows)
        assert plan is not None
        return plan._replace(warps=rows)  # which says for how many rows it is

    monkeypatch.setattr(decoder, "decode", decode)
    monkeypatch.setattr(decoder, "pack", lambda sizes, plan, params: dict(params))
    monkeypatch.setattr(cuda, "capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(fused, "plan_of", plan_of)
    monkeypatch.setattr(fused, "given_up", [])
    monkeypatch.setattr(fused, "FASTER", {(2, 2, 64): (2, 61)})
    jax.clear_caches()  # programs with the plain decoder's names
    return asked


CFG = tiny(n_embd=64, block_size=24, dtype="bfloat16")
PROMPTS = [[1, 2, 3, 4, 5], [6]]


def texts(cfg: GPTConfig, params: model.Params, how: SampleConfig, n: int = 40) -> np.ndarray:
    pieces = sampling.generate(cfg, params, PROMPTS, how, max_new_tokens=n, seed=3)
    return np.concatenate(list(pieces), axis=1)


HOWS = [SampleConfig(temperature=0.0), SampleConfig(temperature=1.0, repetition_penalty=1.2)]


@pytest.mark.parametrize(
    ("how", "give_up_at"), [(HOWS[0], -1), (HOWS[0], 1), (HOWS[1], -1), (HOWS[1], 0)]
)
def test_texts_are_the_same(
    how: SampleConfig,
    give_up_at: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Past the context's end; and if the kernel gives up in the middle, or does not compile."""
    params = model.prepare_for_decoding(CFG, scaled_params(CFG, jax.random.key(0)))
    expected = texts(CFG, params, how)
    asked = pretend(monkeypatch, CFG, give_up_at)
    found = texts(CFG, fused.with_kernel(CFG, params), how)
    assert asked
    assert np.array_equal(found, expected)
    assert capsys.readouterr().err.count("waited in vain") == (give_up_at >= 0)
    jax.clear_caches()


@pytest.mark.parametrize(
    "change",
    [{"kernels": "off"}, {"dtype": "float32"}, {"n_embd": 128}, {"cache": "int8"}],
    ids=lambda change: next(iter(change)),
)
def test_when_the_plain_decoder_stays(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, CFG)
    params: model.Params = {"h": [], "wte": {"embedding": jnp.zeros((2, 2))}}
    assert "kernel" in fused.with_kernel(CFG, params)
    assert fused.with_kernel(dataclasses.replace(CFG, **change), params) is params


def test_models_and_rows_that_it_takes() -> None:
    """Those for which it was measured to be faster."""
    small = GPTConfig()
    assert fused.takes(small, 1)
    assert fused.takes(small, 5)
    assert not fused.takes(small, 6)
    xl = dataclasses.replace(small, n_layer=48, n_head=25, n_embd=1600)
    assert fused.takes(xl, 2)
    assert not fused.takes(xl, 3)
    assert not fused.takes(dataclasses.replace(small, n_layer=11), 1)
    char = dataclasses.replace(small, n_layer=6, n_head=6, n_embd=384, vocab_size=65)
    assert fused.takes(char, 8)
    assert not fused.takes(dataclasses.replace(char, vocab_size=50257), 1)


def test_it_drafts_for_fewer_rows_than_it_decodes() -> None:
    draft = Draft(3, GPTConfig(), {"kernel": jnp.zeros(1)})
    assert draft.for_rows(4).by_kernel
    assert not draft.for_rows(5).by_kernel


@pytest.mark.parametrize(
    ("how", "give_up_at"), [(HOWS[0], -1), (HOWS[1], -1), (HOWS[0], 1), (HOWS[1], 0)]
)
def test_it_drafts_as_the_plain_decoder_does(
    how: SampleConfig,
    give_up_at: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From texts of one token on, past the context's end; and where the kernel gives up."""
    cfg, small = tiny(dtype="bfloat16", block_size=24), CFG
    large = model.prepare_for_decoding(cfg, scaled_params(cfg, jax.random.key(1)))
    params = model.prepare_for_decoding(small, scaled_params(small, jax.random.key(0)))

    def drafted(params: model.Params) -> tuple[np.ndarray, list[int]]:
        tally, draft = speculative.Tally(len(PROMPTS)), Draft(3, small, params)
        pieces = speculative.generate_pieces(
            cfg, large, PROMPTS, how, draft=draft, max_new_tokens=40, seed=3, tally=tally
        )
        return np.concatenate([piece.ids for piece in pieces], axis=1), tally.right.tolist()

    expected, right = drafted(params)
    asked = pretend(monkeypatch, small, give_up_at)
    found, right_too = drafted(fused.with_kernel(small, params))
    assert asked and set(asked) == {1}
    assert np.array_equal(found, expected)
    assert right_too == right or give_up_at >= 0
    assert capsys.readouterr().err.count("waited in vain") == (give_up_at >= 0)
    jax.clear_caches()


def test_a_draft_behind_one_token_or_more_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    params = model.prepare_for_decoding(CFG, scaled_params(CFG, jax.random.key(0)))
    text_BS, length_B = jnp.array([[6, 9, 9, 9, 9, 9], [1, 2, 3, 4, 9, 9]]), jnp.array([1, 4])
    keys_KB = jax.random.split(jax.random.key(1), (3, 2))

    def draft(params: model.Params) -> tuple[np.ndarray, np.ndarray, bool]:
        cache = drafts.make_draft_cache(Draft(3, CFG, params), text_BS, 12)
        ids_BK, cache, ok = drafts.draft_by_model(
            CFG, HOWS[0], params, text_BS, length_B, cache, keys_KB, None, CFG.padded_vocab_size
        )
        return np.asarray(ids_BK), np.asarray(cache.length_B), bool(ok)

    ids, length, _ = draft(params)
    pretend(monkeypatch, CFG)
    ids_too, length_too, ok = draft(fused.with_kernel(CFG, params))
    assert ok and np.array_equal(ids_too, ids)
    assert length.tolist() == length_too.tolist() == [3, 6]
    jax.clear_caches()
