"""Train a GPT: `python train.py [preset] [--flag=value ...]`; `--help` lists the flags."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gptjax  # noqa: F401  (before jax: it sets up the allocator)

# isort: split
import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import batches, checkpoint, cli, metrics, model, sampling, sharding, training
from gptjax.config import GPTConfig, SampleConfig, TrainConfig, load_config, to_json
from gptjax.console import TrainConsole, show_bytes
from gptjax.data import load_dataset
from gptjax.errors import NonFiniteError, UsageError
from gptjax.optimizer import make_optimizer, make_schedule
from gptjax.presets import PRESETS
from gptjax.run_folder import Run, load_run
from gptjax.tokenizer import Tokenizer, decode, save_tokenizer

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "vocab_multiple")
SMALL_MODEL = 20_000_000  # parameters, below which a GPU waits for Python between steps


def parse(argv: list[str]) -> TrainConfig:
    """Flags over the preset; on resume, over the settings that the run was started with."""
    preset = "quickstart"
    if argv and not argv[0].startswith("-"):
        preset, *argv = argv
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset}: there are {', '.join(PRESETS)}")
    about = f"Train a GPT. A first word picks a preset: {', '.join(PRESETS)}."
    config = cli.parse(TrainConfig, argv, PRESETS[preset], about)
    settings = Path(config.out_dir) / "config.json"
    if config.init_from not in ("resume", "auto") or not settings.is_file():
        return config
    saved = load_config(settings)
    config = cli.parse(TrainConfig, argv, saved, about)
    for name in SHAPE:
        old, new = getattr(saved.model, name), getattr(config.model, name)
        if old != new:
            raise UsageError(
                f"the checkpoint has {name}={old}, you asked for {new} ({settings}); leave "
                f"--{name} out, or take another --out_dir"
            )
    return config


def find_start(config: TrainConfig, run_dir: Path) -> tuple[int | None, Run | None]:
    """The step to resume from, or the run to take parameters and tokenizer from, or neither."""
    saved = checkpoint.steps(run_dir)
    if config.init_from == "resume" or (config.init_from == "auto" and saved):
        return checkpoint.require_steps(run_dir)[-1], None
    if saved:
        raise UsageError(
            f"--out_dir={run_dir}: holds a run up to step {saved[-1]}; take --init_from=resume to "
            "go on with it, or another --out_dir"
        )
    if config.init_from in ("scratch", "auto"):
        return None, None
    if not Path(config.init_from).is_dir():
        raise UsageError(
            f"--init_from={config.init_from}: is neither scratch, resume, auto nor a run folder"
        )
    return None, load_run(Path(config.init_from))


def read_batches(
    config: TrainConfig, shards: list[np.ndarray], step: int, count: int
) -> np.ndarray:
    """This process's windows (K, A, B, T+1) of `count` steps from `step` on."""
    passes = config.gradient_accumulation_steps
    windows = [
        batches.sample_batch(
            shards,
            seed=config.seed,
            step=i,
            batch_size=config.batch_size,
            block_size=config.model.block_size,
            n_vocab=config.model.vocab_size,
            process=jax.process_index(),
            n_processes=jax.process_count(),
        )
        for i in range(step * passes, (step + count) * passes)
    ]
    return np.stack(windows).reshape(count, passes, *windows[0].shape)


def evaluate(
    config: TrainConfig,
    shards: list[np.ndarray],
    mesh: Mesh,
    batch_losses: Callable[[jax.Array], jax.Array],
    stop_signals: list[int],
) -> float | None:
    """Mean loss over the fixed validation windows; None if a signal comes meanwhile."""
    cfg, rows = config.model, config.batch_size
    starts = batches.eval_windows(shards, cfg.block_size, config.eval_iters * rows)
    losses = []
    for i in range(0, len(starts), rows):
        if stop_signals:
            return None
        windows = batches.read_windows(shards, starts[i : i + rows], cfg.block_size, cfg.vocab_size)
        missing = rows - len(windows)  # in the last batch: one compiled shape serves all
        padded = np.concatenate([windows, np.repeat(windows[:1], missing, axis=0)])
        losses.append(batch_losses(sharding.place(padded, mesh, axis=0))[: len(windows)])
    return float(np.mean(np.concatenate(jax.device_get(losses))))


def write_sample(
    config: TrainConfig, cfg: GPTConfig, params: model.Params, tokenizer: Tokenizer
) -> str:
    """A text from the model as it is."""
    pieces = sampling.generate(
        cfg,
        model.prepare_for_decoding(cfg, params),
        [[tokenizer.start_id]],
        SampleConfig(),
        max_new_tokens=config.sample_tokens,
        seed=config.seed,
    )
    return decode(tokenizer, np.concatenate(list(pieces), axis=1)[0])


def main(argv: list[str]) -> int:
    """Train; returns the exit code."""
    # ---- Settings, data, devices -----------------------------------------------------------------
    began = time.monotonic()
    config = parse(argv)
    run_dir = Path(config.out_dir)
    cli.make_run_dir(run_dir)
    cli.use_compile_cache(config.compile_cache)
    stop_signals = cli.catch_stop_signals()
    resume_step, source = find_start(config, run_dir)
    mesh = sharding.make_mesh()
    n_devices = mesh.devices.size
    if config.batch_size % n_devices:
        raise UsageError(
            f"--batch_size={config.batch_size}: must be divisible by {n_devices} devices"
        )

    cfg = config.model
    if source is not None:  # its shape, with this run's dropout; a shorter context is cut
        shape = {name: getattr(source.config.model, name) for name in SHAPE}
        shape["block_size"] = min(cfg.block_size, shape["block_size"])
        cfg = dataclasses.replace(cfg, **shape)
    console = TrainConsole(config.max_iters)
    with show_bytes(console.console) as progress:
        dataset = load_dataset(
            config.dataset,
            block_size=cfg.block_size,
            tokenizer=config.tokenizer if source is None else source.tokenizer,
            tokenizer_dir=config.tokenizer_dir,
            decode_errors=config.decode_errors,
            allow_special=config.allow_special,
            notify=console.note,
            progress=progress,
        )
    tokenizer = dataset.tokenizer
    if resume_step is not None and tokenizer.n_vocab != cfg.vocab_size:
        raise UsageError(
            f"the checkpoint has {cfg.vocab_size} tokens, {dataset.name} has {tokenizer.n_vocab}; "
            "resume with the dataset of the run"
        )
    config = dataclasses.replace(
        config, model=dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    )
    cfg = model.resolve(config.model)
    (run_dir / "config.json").write_text(to_json(config))
    save_tokenizer(tokenizer, run_dir)

    # ---- State: shapes first, then arrays where they belong --------------------------------------
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    init_state = functools.partial(training.init_state, cfg, optimizer)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(init_state, key)
    shardings = sharding.tree_shardings(mesh, config.strategy, shapes)
    metrics_file = run_dir / "metrics.jsonl"
    val_loss, best = None, math.inf
    if resume_step is not None:
        target = checkpoint.abstract_tree(shapes, shardings)
        params, opt_state, meta = checkpoint.restore_state(
            run_dir, resume_step, target.params, target.opt_state
        )
        step_array = jax.device_put(np.int32(resume_step), shardings.step)
        state = training.TrainState(step_array, params, opt_state)
        val_loss, best = meta["val_loss"], meta["best_val_loss"] or math.inf
        metrics.drop_metrics_from(metrics_file, resume_step)
        console.note(f"resuming at step {resume_step}")
    else:
        state = jax.jit(init_state, out_shardings=shardings)(key)
        if source is not None:
            params = source.params
            params["wpe"]["embedding"] = params["wpe"]["embedding"][: cfg.block_size]
            state = state._replace(params=jax.device_put(params, shardings.params))
        metrics_file.write_text("")
        (run_dir / "samples.txt").write_text("")

    train_step = training.make_train_step(cfg, optimizer, mesh, shardings, config.seed)
    eval_step = training.make_eval_step(cfg, mesh, shardings.params)
    n_params = model.count_params(cfg)
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * cfg.block_size
    device = jax.devices()[0].device_kind
    peak = metrics.peak_flops(device, cfg.dtype)
    recorder = metrics.Recorder(
        metrics_file,
        tokens_per_step,
        metrics.flops_per_token(cfg, n_params),
        peak and peak * n_devices,
    )
    console.note(
        f"{n_params:,} parameters, {cfg.dtype}, {cfg.attention} attention, on {n_devices} x "
        f"{device}; {dataset.name}: {sum(map(len, dataset.train)):,} + "
        f"{sum(map(len, dataset.val)):,} {tokenizer.kind} tokens; {tokens_per_step:,} per step"
    )

    # ---- The loop: step n's metrics are fetched after step n+1 was dispatched --------------------
    intervals = (config.eval_interval, config.sample_interval, config.checkpoint_interval)
    small = jax.default_backend() != "cpu" and n_params < SMALL_MODEL
    per_dispatch = config.steps_per_dispatch or (10 if small else 1)

    def due(step: int, interval: int) -> bool:
        return step == config.max_iters or (interval > 0 and step % interval == 0)

    def next_windows(step: int) -> jax.Array | None:
        """The windows of the next call, on their way: of all its steps, or of 1 if one is due."""
        if step == config.max_iters:
            return None
        busy = any(due(step + n, i) for n in range(1, per_dispatch) for i in intervals)
        windows = read_batches(config, dataset.train, step, 1 if busy else per_dispatch)
        return sharding.place(windows, mesh, axis=2)

    fields: dict[str, str] = {"loss": "-", "val": "-"}

    def report(first: int, values: dict[str, jax.Array]) -> None:
        """Fetch, record and show the metrics of a call that began at step `first`."""
        fetched = jax.device_get((values["loss"], values["grad_norm"]))
        for step, (loss, norm) in enumerate(zip(*fetched, strict=True), start=first):
            recorder.add(float(loss))
            log = due(step + 1, config.log_interval)
            if log:
                record = recorder.write(step, float(schedule(step)), float(norm))
                fields.update(metrics.describe(record, peak is not None))
            console.update(step + 1, fields, log=log)
            if not np.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of step {step} is {loss}; lower --learning_rate, or resume from "
                    f"the last checkpoint ({checkpoint.folder(run_dir)})"
                )

    step, saved_step = resume_step or 0, resume_step
    windows = next_windows(step)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    manager = checkpoint.open_manager(run_dir, config.keep_checkpoints)
    try:
        while True:
            stop = bool(stop_signals) or step == config.max_iters
            if pending and (stop or any(due(step, i) for i in intervals)):
                report(*pending)
                pending = None
            paused = time.monotonic()
            news = not stop_signals and (step != resume_step or val_loss is None)
            if news and due(step, config.eval_interval):
                batch_losses = functools.partial(eval_step, state.params)
                val_loss = evaluate(config, dataset.val, mesh, batch_losses, stop_signals)
                if val_loss is not None:
                    best = min(best, val_loss)
                    metrics.append_metrics(metrics_file, {"step": step, "val_loss": val_loss})
                    records = metrics.read_metrics(metrics_file)
                    metrics.draw_losses(records, run_dir / "loss.png", config.loss_scale)
                    fields["val"] = f"{val_loss:.4f}"
                    console.note(f"step {step}: val loss {val_loss:.4f}, best {best:.4f}")
            if news and due(step, config.sample_interval) and config.sample_tokens:
                text = write_sample(config, cfg, state.params, tokenizer)
                text = f"---- sample after {step} steps ----\n{text}\n----"
                console.note(text)
                with (run_dir / "samples.txt").open("a", encoding="utf-8") as file:
                    file.write(text + "\n")
            if step != saved_step and (stop or (step and due(step, config.checkpoint_interval))):
                meta = {
                    "val_loss": val_loss if due(step, config.eval_interval) else None,
                    "best_val_loss": best if best < math.inf else None,
                }
                checkpoint.save(manager, step, state.params, state.opt_state, meta)
                saved_step = step
            recorder.pause(time.monotonic() - paused)
            if stop or windows is None:
                break
            state, values = train_step(state, windows)
            first, step = step, step + len(windows)
            windows = next_windows(step)
            if pending:
                report(*pending)
            pending = first, values
    finally:
        manager.close()
        console.close()

    # ---- The end ---------------------------------------------------------------------------------
    if step < config.max_iters or val_loss is None:
        console.note(f"saved step {step} after {cli.signal_name(stop_signals[0])}")
        return 128 + stop_signals[0]
    console.note(
        f"val loss {val_loss:.4f} after {step} steps in {time.monotonic() - began:.1f} s\n"
        f"state sha256={training.digest(state)}\n"
        f"{run_dir}: checkpoints, metrics.jsonl, loss.png, samples.txt\n"
        f"next: python sample.py --out_dir={run_dir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
