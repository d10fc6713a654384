"""Sample text from a trained model: `python sample.py --out_dir=out --start="Once"`."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from gptjax import model, programs, sampling
from gptjax.checkpoints.run_folder import load_run
from gptjax.config import GPTConfig
from gptjax.conversion import sources
from gptjax.errors import DataError, UsageError, plural
from gptjax.presets import PRESETS
from gptjax.sampler_config import SamplerConfig, refuse_contradictions
from gptjax.settings import require
from gptjax.terminal import cli, flags
from gptjax.terminal.output import note
from gptjax.terminal.prompts import default_start, encode_prompt, read_prompts, read_start
from gptjax.terminal.samples import Sample, draw, to_json, to_text, write
from gptjax.tokenizer import ByteTokenizer, Tokenizer


def load_model(config: SamplerConfig) -> tuple[GPTConfig, model.Params, Tokenizer]:
    """Return the model of the run folder, of another source, or an untrained one."""
    if config.init_from == "scratch":
        if config.preset not in PRESETS:
            raise UsageError(f"--preset={config.preset}: must be one of {', '.join(PRESETS)}")
        tokenizer = ByteTokenizer()
        cfg = dataclasses.replace(PRESETS[config.preset].model, vocab_size=tokenizer.n_vocab)
        init_params = jax.jit(model.init_params, static_argnums=0)
        return cfg, init_params(cfg, jax.random.key(config.seed)), tokenizer
    if config.init_from == "resume":
        run = load_run(Path(config.out_dir), config.checkpoint)
    else:
        run = sources.load_model(config.init_from, which=config.checkpoint)
    return run.config.model, run.params, run.tokenizer


def write_samples(
    config: SamplerConfig,
    cfg: GPTConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    texts: list[str],
) -> None:
    """Print the samples of these prompts: a single one as it comes, several one by one."""
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
            for piece in draw(config, cfg, params, batch, interrupted):
                for i, sample in enumerate(batch):
                    scores = jax.tree.map(lambda x, i=i: x[i], piece.scores)
                    text = sample.feed(piece.ids[i].tolist(), scores)
                    if alone:
                        write(text, config.raw)
                if interrupted or all(sample.ended for sample in batch):
                    break
        if interrupted:
            raise KeyboardInterrupt
        for sample in batch:
            rest = sample.finish()
            several = to_json(sample) if config.json else to_text(sample, not config.no_echo)
            write(f"{rest}\n" if alone else several, config.raw)


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
    given = flags.read(SamplerConfig, argv, SamplerConfig(), about, prog)
    config = flags.apply(SamplerConfig(), given)
    refuse_contradictions(config, given)
    starts = [] if config.interactive else read_prompts(config.start, config.prompts)
    cli.use_compile_cache(config.compile_cache)
    cfg, params, tokenizer = load_model(config)
    cfg = model.resolve(dataclasses.replace(cfg, dtype=config.dtype, dropout=0.0))
    params = model.prepare_for_decoding(cfg, params)
    for i in config.stop_id:
        require(0 <= i < cfg.vocab_size, "stop_id", i, f"must be 0 to {cfg.vocab_size - 1}")
    sample = functools.partial(write_samples, config, cfg, params, tokenizer)
    if config.interactive:
        return converse(config, sample)
    sample(starts or [default_start(tokenizer)])
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
