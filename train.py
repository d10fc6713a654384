"""Train a GPT: `python train.py [preset] [--flag=value ...]`; `--help` lists the flags."""

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import gptjax  # noqa: F401  (before jax: it sets up the allocator)

# isort: split
import jax
import numpy as np

from gptjax import batches, checkpoint, cli, metrics, model, sampling, sharding, training
from gptjax.config import PRESETS, SampleConfig, TrainConfig, load_config, to_json
from gptjax.console import TrainConsole, show_bytes
from gptjax.data import load_dataset
from gptjax.errors import NonFiniteError, UsageError
from gptjax.optimizer import make_optimizer, make_schedule
from gptjax.run_folder import Run, load_run
from gptjax.tokenizer import decode, save_tokenizer

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
    first_step = resume_step or 0
    console = TrainConsole(first_step, config.max_iters)

    cfg = config.model
    if source is not None:  # its shape, with this run's dropout; a shorter context is cut
        shape = {name: getattr(source.config.model, name) for name in SHAPE}
        shape["block_size"] = min(cfg.block_size, shape["block_size"])
        cfg = dataclasses.replace(cfg, **shape)
    with show_bytes(console.console) as progress:
        dataset = load_dataset(
            config.dataset,
            block_size=cfg.block_size,
            tokenizer=config.tokenizer if source is None else source.tokenizer,
            tokenizer_dir=config.tokenizer_dir,
            decode_errors=config.decode_errors,
            notify=console.note,
            progress=progress,
        )
    tokenizer = dataset.tokenizer
    if resume_step is not None and tokenizer.n_vocab != cfg.vocab_size:
        raise UsageError(
            f"the checkpoint has {cfg.vocab_size} tokens, {dataset.name} has {tokenizer.n_vocab}; "
            "resume with the dataset of the run"
        )
    cfg = dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    config = dataclasses.replace(config, model=cfg)
    (run_dir / "config.json").write_text(to_json(config))
    save_tokenizer(tokenizer, run_dir)

    cfg = model.resolve(cfg)
    mesh = sharding.make_mesh()
    n_devices = mesh.devices.size
    if config.batch_size % n_devices:
        raise UsageError(
            f"--batch_size={config.batch_size}: must be divisible by {n_devices} devices"
        )
    device = jax.devices()[0].device_kind

    # ---- State: shapes first, then arrays where they belong --------------------------------------
    optimizer = make_optimizer(config)
    schedule = make_schedule(config)
    key = jax.random.key(config.seed)
    init_state = functools.partial(training.init_state, cfg, optimizer)
    shapes = jax.eval_shape(init_state, key)
    shardings = sharding.tree_shardings(mesh, config.strategy, shapes)
    val_loss, best = None, float("inf")
    if resume_step is not None:
        target = checkpoint.abstract_tree(shapes, shardings)
        params, opt_state, meta = checkpoint.restore_state(
            run_dir, resume_step, target.params, target.opt_state
        )
        step = jax.device_put(np.int32(resume_step), shardings.step)
        state = training.TrainState(step, params, opt_state)
        val_loss = meta["val_loss"]
        best = meta["best_val_loss"] if meta["best_val_loss"] is not None else best
        metrics.drop_metrics_from(run_dir / "metrics.jsonl", resume_step)
    else:
        state = jax.jit(init_state, out_shardings=shardings)(key)
        (run_dir / "metrics.jsonl").write_text("")
        (run_dir / "samples.txt").write_text("")
        if source is not None:
            params = source.params
            params["wpe"]["embedding"] = params["wpe"]["embedding"][: cfg.block_size]
            state = state._replace(params=jax.device_put(params, shardings.params))

    train_step = training.make_train_step(cfg, optimizer, mesh, shardings, config.seed)
    eval_step = training.make_eval_step(cfg, mesh, shardings.params)
    n_params = model.count_params(cfg)
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * cfg.block_size
    flops_per_token = metrics.flops_per_token(cfg, n_params)
    peak = metrics.peak_flops(device, cfg.dtype)
    console.note(
        f"{n_params:,} parameters, {cfg.dtype}, {cfg.attention} attention, on {n_devices} x "
        f"{device}; {dataset.name}: {sum(map(len, dataset.train)):,} + "
        f"{sum(map(len, dataset.val)):,} {tokenizer.kind} tokens; {tokens_per_step:,} per step"
    )
    if resume_step is not None:
        console.note(f"resuming at step {resume_step}")

    # ---- What happens between steps --------------------------------------------------------------
    eval_windows = batches.eval_windows(
        dataset.val, cfg.block_size, config.eval_iters * config.batch_size
    )

    def evaluate() -> float | None:
        """Mean loss over the fixed validation windows; None if told to stop meanwhile."""
        losses = []
        for i in range(0, len(eval_windows), config.batch_size):
            if stop_signals:
                return None
            windows = batches.read_windows(
                dataset.val, eval_windows[i : i + config.batch_size], cfg.block_size, cfg.vocab_size
            )
            n = len(windows)
            padded = np.concatenate([windows, np.repeat(windows[:1], config.batch_size - n, 0)])
            losses.append(eval_step(state.params, sharding.place(padded, mesh, axis=0))[:n])
        return float(np.mean(np.concatenate(jax.device_get(losses))))

    def show_sample(step: int) -> None:
        """A text from the model as it is, on screen and in samples.txt."""
        if config.sample_tokens == 0:
            return
        new = sampling.generate(
            cfg,
            model.prepare_for_decoding(cfg, state.params),
            [[tokenizer.start_id]],
            SampleConfig(),
            max_new_tokens=config.sample_tokens,
            seed=config.seed,
        )
        text = decode(tokenizer, np.concatenate(list(new), axis=1)[0])
        text = f"---- sample after {step} steps " + "-" * 40 + f"\n{text}\n" + "-" * 70
        console.note(text)
        with (run_dir / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def due(step: int, interval: int) -> bool:
        return step == config.max_iters or (interval > 0 and step % interval == 0)

    intervals = (config.eval_interval, config.sample_interval, config.checkpoint_interval)
    per_dispatch = config.steps_per_dispatch
    if per_dispatch == 0:
        on_cpu = jax.default_backend() == "cpu"
        per_dispatch = 1 if on_cpu or n_params > SMALL_MODEL else 10

    def next_windows(step: int) -> Any:
        """The windows (K, A, B, T+1) from `step` on, on their way to the devices.

        K is as many steps as go into one call without passing something that is due, or 1.
        """
        count = next(
            (n for n in range(1, per_dispatch) if any(due(step + n, i) for i in intervals)),
            per_dispatch,
        )
        count = per_dispatch if count == per_dispatch else 1
        passes = config.gradient_accumulation_steps
        windows = [
            batches.sample_batch(
                dataset.train,
                seed=config.seed,
                step=pass_,
                batch_size=config.batch_size,
                block_size=cfg.block_size,
                n_vocab=cfg.vocab_size,
                process=jax.process_index(),
                n_processes=jax.process_count(),
            )
            for pass_ in range(step * passes, (step + count) * passes)
        ]
        stacked = np.stack(windows).reshape(count, passes, *windows[0].shape)
        return sharding.place(stacked, mesh, axis=2)

    recent: list[float] = []  # losses since the last line of metrics
    fields: dict[str, str] = {"loss": "-", "val": "-"}
    clock = [time.monotonic(), 0]  # since when, how many steps: training alone

    def report(first: int, values: dict[str, Any]) -> None:
        """Fetch and show the metrics of a dispatch that began at step `first`."""
        for i, (loss, norm) in enumerate(
            zip(*jax.device_get((values["loss"], values["grad_norm"])), strict=True)
        ):
            step = first + i
            recent.append(float(loss))
            clock[1] += 1
            log = due(step + 1, config.log_interval)
            if log:
                pace = clock[1] * tokens_per_step / (time.monotonic() - clock[0])
                clock[:] = [time.monotonic(), 0]
                mfu = None if peak is None else pace * flops_per_token / (peak * n_devices)
                record = {
                    "step": step,
                    "loss": float(np.mean(recent)),
                    "grad_norm": float(norm),
                    "learning_rate": float(schedule(step)),
                    "tokens_per_second": round(pace),
                    "mfu": mfu,
                    "seconds": round(time.monotonic() - began, 2),
                }
                metrics.append_metrics(run_dir / "metrics.jsonl", record)
                fields.update(
                    {
                        "loss": f"{record['loss']:.4f}",
                        "lr": f"{record['learning_rate']:.2e}",
                        "tok/s": f"{pace:,.0f}",
                        "mfu": "unknown device" if mfu is None else f"{mfu:.1%}",
                    }
                )
                recent.clear()
            console.update(step + 1, fields, log=log)
            if not np.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of step {step} is {loss}; lower --learning_rate, or resume from "
                    f"the last checkpoint ({checkpoint.folder(run_dir)})"
                )

    # ---- The loop: step n's metrics are fetched after step n+1 was dispatched --------------------
    step, saved_step = first_step, resume_step
    windows = next_windows(step) if step < config.max_iters else None
    pending: tuple[int, Any] | None = None
    manager = checkpoint.open_manager(run_dir, config.keep_checkpoints)
    try:
        while True:
            news = step != resume_step or val_loss is None
            interrupted = news and any(due(step, i) for i in intervals)
            if pending is not None and (interrupted or stop_signals):
                report(*pending)
                pending = None
            paused = time.monotonic()
            if interrupted and due(step, config.eval_interval) and not stop_signals:
                val_loss = evaluate()
                if val_loss is not None:
                    best = min(best, val_loss)
                    record = {"step": step, "val_loss": val_loss}
                    metrics.append_metrics(run_dir / "metrics.jsonl", record)
                    metrics.draw_losses(
                        metrics.read_metrics(run_dir / "metrics.jsonl"),
                        run_dir / "loss.png",
                        config.loss_scale,
                    )
                    fields["val"] = f"{val_loss:.4f}"
                    console.note(f"step {step}: val loss {val_loss:.4f}, best {best:.4f}")
            if interrupted and due(step, config.sample_interval) and not stop_signals:
                show_sample(step)
            stop = bool(stop_signals) or step == config.max_iters
            if step != saved_step and (
                stop or (step > 0 and due(step, config.checkpoint_interval))
            ):
                meta = {
                    "val_loss": val_loss if due(step, config.eval_interval) else None,
                    "best_val_loss": None if np.isinf(best) else best,
                }
                checkpoint.save(manager, step, state.params, state.opt_state, meta)
                saved_step = step
            if stop:
                break
            clock[0] += time.monotonic() - paused
            count = windows.shape[0]
            state, values = train_step(state, windows)
            step += count
            windows = next_windows(step) if step < config.max_iters else None
            if pending is not None:
                report(*pending)
            pending = (step - count, values)
    finally:
        manager.close()
        console.close()

    # ---- The end ---------------------------------------------------------------------------------
    if stop_signals:
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
