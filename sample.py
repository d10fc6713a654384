"""Sample text from a trained model: `python sample.py --out_dir=out --start="Once"`."""

import gptjax.quick_start

# isort: split
import dataclasses
import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from gptjax import first_text, fused, memory, model, programs, sampling
from gptjax.checkpoints.record import available_cpus
from gptjax.checkpoints.run_folder import Opened, load_run
from gptjax.config import GPTConfig
from gptjax.conversion import sources
from gptjax.drafts import Draft
from gptjax.errors import DataError, UsageError, plural
from gptjax.presets import PRESETS
from gptjax.sampler_config import SamplerConfig, refuse_contradictions
from gptjax.settings import require
from gptjax.terminal import cli, flags
from gptjax.terminal.output import note
from gptjax.terminal.prompts import default_start, encode_prompt, read_prompts, read_start
from gptjax.terminal.samples import Sample, draw, to_json, to_text, write
from gptjax.tokenizer import ByteTokenizer, Tokenizer, fingerprint

gptjax.quick_start.imported()
CORES = 4  # below, threads that compile take from the one that reads what it needs


def load_model(config: SamplerConfig, opened: Opened) -> tuple[GPTConfig, model.Params, Tokenizer]:
    """Return the model of the run folder, of another source, or an untrained one.

    `opened` is told what the model is and its tokenizer, before the parameters are read.
    """
    if config.init_from == "scratch":
        if config.preset not in PRESETS:
            raise UsageError(f"--preset={config.preset}: must be one of {', '.join(PRESETS)}")
        tokenizer = ByteTokenizer()
        cfg = dataclasses.replace(PRESETS[config.preset].model, vocab_size=tokenizer.n_vocab)
        opened(cfg, tokenizer)
        init_params = jax.jit(model.init_params, static_argnums=0)
        return cfg, init_params(cfg, jax.random.key(config.seed)), tokenizer
    if config.init_from == "resume":
        run = load_run(Path(config.out_dir), config.checkpoint, opened)
    else:
        run = sources.load_model(config.init_from, which=config.checkpoint, opened=opened)
    return run.config.model, run.params, run.tokenizer


def resolve(config: SamplerConfig, cfg: GPTConfig) -> GPTConfig:
    """Return the model as it is computed here."""
    # Any attention will do: what the run was trained with may not go with this dtype or machine.
    cfg = dataclasses.replace(cfg, dtype=config.dtype, dropout=0.0, attention="auto")
    return model.resolve(dataclasses.replace(cfg, cache=config.cache, kernels=config.kernels))


def compile_first(
    config: SamplerConfig,
    starts: list[str],
    pool: ThreadPoolExecutor,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
) -> first_text.Programs:
    """Begin to compile what the first samples call."""
    if config.beams > 1 or config.draft or config.max_new_tokens < 1:
        return []
    cfg, texts = resolve(config, cfg), starts or [default_start(tokenizer)]
    ids = [encode_prompt(text, tokenizer, config.allow_special) for text in texts]
    rows = [prompt for prompt in ids for _ in range(config.num_samples)]
    return first_text.compile_programs(
        pool,
        cfg,
        jax.devices()[0],
        rows[: config.batch_size],
        config.sample,
        weights=config.weights,
        max_new_tokens=config.max_new_tokens,
        n_likeliest=min(config.logprobs, cfg.vocab_size) if config.json else None,
    )


def load_draft(
    config: SamplerConfig, cfg: GPTConfig, tokenizer: Tokenizer, starts: list[str]
) -> Draft | None:
    """Return who drafts for the model; UsageError if what it drafts is no text of the model."""
    if not config.draft or config.draft == "ngram":
        return Draft(config.draft_tokens) if config.draft else None
    run = sources.load_model(config.draft)
    cfg_d = resolve(config, run.config.model)
    same = (
        fingerprint(run.tokenizer) == fingerprint(tokenizer) and cfg_d.vocab_size == cfg.vocab_size
    )
    rule = "its tokenizer is not the model's; take a model with the same, or --draft=ngram"
    require(same, "draft", config.draft, rule)
    rule = f"its context of {cfg_d.block_size} tokens is shorter than the model's {cfg.block_size}"
    require(cfg_d.block_size >= cfg.block_size, "draft", config.draft, rule)
    params = model.prepare_for_decoding(cfg_d, run.params, config.weights)
    if draws_long(config, cfg_d, starts):
        params = fused.with_kernel(cfg_d, params)
    return Draft(config.draft_tokens, cfg_d, params)


def draws_long(config: SamplerConfig, cfg: GPTConfig, starts: list[str]) -> bool:
    """Return whether so much is to be drawn that a kernel may be compiled for it."""
    rows = max(1, len(starts)) * config.num_samples
    calls = -(-rows // config.batch_size)
    taken = fused.takes(cfg, min(rows, config.batch_size))
    taken = taken and config.beams == 1
    return taken and (config.interactive or calls * config.max_new_tokens >= fused.MANY_STEPS)


def write_samples(
    config: SamplerConfig,
    cfg: GPTConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    begun: list[Future[first_text.Programs]],
    draft: Draft | None,
    texts: list[str],
) -> None:
    """Print the samples of these prompts: a single one as it comes, several one by one.

    Once the first tokens are printed, the last of the programs begun is needed.
    """
    ends = dict.fromkeys(config.stop_id, "stop_id")
    ends |= {} if config.ignore_eot else dict.fromkeys(tokenizer.eos, "eot")
    samples = []
    for text in texts:
        ids = encode_prompt(text, tokenizer, config.allow_special)
        left = len(sampling.cut(ids, cfg.block_size))
        if left < len(ids):
            note(
                f"note: a prompt has {len(ids)} tokens, but the context holds {cfg.block_size}: "
                f"only its last {left} {plural(left, 'token')} will be used"
            )
        samples += [
            Sample(tokenizer, text, ids, i, config.stop, ends) for i in range(config.num_samples)
        ]
    alone = len(samples) == 1 and not config.json
    if alone and not config.no_echo:
        write(samples[0].prompt, config.raw)
    size = config.batch_size if config.beams == 1 else 1
    for batch in (samples[i : i + size] for i in range(0, len(samples), size)):
        with cli.delay_interrupt() as interrupted:
            for piece in draw(config, cfg, params, batch, interrupted, draft):
                for i, sample in enumerate(batch):
                    scores = jax.tree.map(lambda x, i=i: x[i], piece.scores)
                    text = sample.feed(piece.ids[i].tolist(), scores)
                    if alone:
                        write(text, config.raw)
                first_text.wait(begun)
                if interrupted or all(sample.ended for sample in batch):
                    break
        if interrupted:
            raise KeyboardInterrupt
        for sample in batch:
            rest = sample.finish()
            several = to_json(sample) if config.json else to_text(sample, not config.no_echo)
            write(f"{rest}\n" if alone else several, config.raw)
        if drafted := sum(sample.drafted or 0 for sample in batch):
            share = sum(sample.right for sample in batch) / drafted
            note(f"note: {share:.0%} of {drafted} drafted tokens were right")


def converse(config: SamplerConfig, sample: Callable[[list[str]], None]) -> int:
    """Sample one prompt after another until an empty one; return the exit code."""
    while True:
        try:
            start = input("prompt> ")
        except (EOFError, KeyboardInterrupt) as end:
            write("\n", config.raw)
            return 130 if isinstance(end, KeyboardInterrupt) else 0
        if not start:
            return 0
        try:
            sample([read_start(start)])
        except (DataError, UsageError) as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            write("\n", config.raw)


def main(argv: list[str]) -> int:
    """Sample text as the flags say; return the exit code."""
    about, prog = "Sample text from a trained GPT.", programs.command("sample.py")
    given = flags.read(argv, SamplerConfig(), about, prog)
    config = flags.apply(SamplerConfig(), given)
    refuse_contradictions(config, given)
    starts = [] if config.interactive else read_prompts(config.start, config.prompts)
    cli.use_compile_cache(config.compile_cache)
    memory.take_gpu_memory_as_needed()
    # Threads that read weights and trace programs take turns after 0.5 ms, not 5: the first text
    # came 0.1 s sooner on a host of an H100.
    sys.setswitchinterval(0.0005)
    with ThreadPoolExecutor() as pool:
        pool.submit(jax.devices)  # CUDA takes seconds to start
        begun: list[Future[first_text.Programs]] = []

        def opened(cfg: GPTConfig, tokenizer: Tokenizer) -> None:
            if available_cpus() >= CORES:
                compiled = pool.submit(compile_first, config, starts, pool, cfg, tokenizer)
                begun.append(compiled)

        cfg, params, tokenizer = load_model(config, opened)
        cfg = resolve(config, cfg)
        first_text.wait(begun, first_text.FIRST)
        params = jax.device_put(params, jax.devices()[0])
        params = model.prepare_for_decoding(cfg, params, config.weights)
        if not config.draft and draws_long(config, cfg, starts):
            params = fused.with_kernel(cfg, params)
        draft = load_draft(config, cfg, tokenizer, starts)
        for i in config.stop_id:
            require(0 <= i < cfg.vocab_size, "stop_id", i, f"must be 0 to {cfg.vocab_size - 1}")
        sample = functools.partial(write_samples, config, cfg, params, tokenizer, begun, draft)
        if config.interactive:
            return converse(config, sample)
        sample(starts or [default_start(tokenizer)])
        return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
