"""Train a GPT: `python train.py [preset] [--flag=value ...]`; `--help` lists the flags."""

import contextlib
import dataclasses
import functools
import math
import operator
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gptjax  # noqa: F401  (before jax: it sets up the allocator)

# isort: split
import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import distributed, files, model, sampling, sharding
from gptjax.checkpoints import restore as checkpoint
from gptjax.checkpoints import save as saving
from gptjax.checkpoints.record import check_record, make_record
from gptjax.config import GPTConfig, SampleConfig, TrainConfig
from gptjax.config_file import load_config, to_json
from gptjax.data import batches
from gptjax.data.datasets import load_dataset
from gptjax.errors import (
    REFUSALS,
    DiskError,
    NonFiniteError,
    OutOfMemoryError,
    PeerError,
    UsageError,
    plural,
)
from gptjax.presets import PRESETS
from gptjax.settings import names, once
from gptjax.terminal import cli, flags, output
from gptjax.terminal.console import TrainConsole, show_bytes
from gptjax.terminal.nanogpt_flags import config_file_problem
from gptjax.tokenizer import Tokenizer, decode, save_tokenizer
from gptjax.training import bad_steps, faults, metrics
from gptjax.training import step as training
from gptjax.training.adapt import adapt_preset, fit_batch
from gptjax.training.optimizer import make_optimizer, make_schedule
from gptjax.training.replay import replay
from gptjax.training.resume_check import resume_check
from gptjax.training.start import (
    choose_tokenizer,
    crop_context,
    find_start,
    model_of_source,
    name_settings,
    settings_to_go_on,
    with_shape_of,
)

SMALL_MODEL = 20_000_000  # parameters, below which a GPU waits for Python between steps


def parse(argv: list[str]) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the flags over the preset, or on resume over the run's settings; and the flags."""
    preset = "quickstart"
    if argv and not argv[0].startswith("-"):
        preset, *argv = argv
    if preset not in PRESETS:
        problem = config_file_problem(preset)
        raise UsageError(problem or f"unknown preset {preset}: there are {', '.join(PRESETS)}")
    about = f"Train a GPT. A first word picks a preset: {', '.join(PRESETS)}."
    config = PRESETS[preset]
    given = flags.read(TrainConfig, argv, config, about)
    run_dir = files.expand(given.get("out_dir") or config.out_dir)
    settings = settings_to_go_on(run_dir, given.get("init_from"), given.get("replay"))
    if settings is not None:
        fresh = {name: getattr(config, name) for name in names(TrainConfig, once)}
        config = dataclasses.replace(load_config(settings), **fresh)
    else:
        source = given.get("init_from", config.init_from)
        config = with_shape_of(config, str(files.expand(source)))
        config, notes = adapt_preset(config, given)
        for note in notes:
            output.note(note)
    with name_settings(settings, given):
        return flags.apply(config, given), given


def batch_of(config: TrainConfig, i: int, whole: bool = False) -> dict[str, int]:
    """What determines this process's rows of forward pass i, counted from the run's start.

    With `whole` those of all processes.
    """
    return {
        "seed": config.seed,
        "step": i,
        "batch_size": config.batch_size,
        "block_size": config.model.block_size,
        "process": 0 if whole else jax.process_index(),
        "n_processes": 1 if whole else jax.process_count(),
    }


def read_batches(
    config: TrainConfig, shards: list[np.ndarray], step: int, count: int, whole: bool = False
) -> np.ndarray:
    """This process's windows (K, A, B, T+1) of `count` steps from `step` on, or all processes'."""
    passes = config.gradient_accumulation_steps
    windows = [
        batches.sample_batch(shards, n_vocab=config.model.vocab_size, **batch_of(config, i, whole))
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
    share = rows // jax.process_count()
    first = share * jax.process_index()
    starts = batches.eval_windows(shards, cfg.block_size, config.eval_iters * rows)
    losses = []
    for i in range(0, len(starts), rows):
        if stop_signals and jax.process_count() == 1:  # several must all come to the end
            return None
        windows = batches.read_windows(shards, starts[i : i + rows], cfg.block_size, cfg.vocab_size)
        missing = rows - len(windows)  # in the last batch: one compiled shape serves all
        padded = np.concatenate([windows, np.repeat(windows[:1], missing, axis=0)])
        mine = sharding.place(padded[first : first + share], mesh, axis=0)
        losses.append(batch_losses(mine)[: len(windows)])
        jax.block_until_ready(
            losses[-2:-1]
        )  # else all batches would be on their way before a signal
    return float(np.mean(np.concatenate(jax.device_get(losses))))


def write_sample(
    config: TrainConfig,
    cfg: GPTConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    stop_signals: list[int],
) -> str:
    """A text from the model as it is; cut short by a signal."""
    pieces = sampling.generate(
        cfg,
        model.prepare_for_decoding(cfg, params),
        [[tokenizer.start_id]],
        SampleConfig(),
        max_new_tokens=config.sample_tokens,
        seed=config.seed,
    )
    ids: list[int] = []
    for piece in pieces:
        ids += piece[0].tolist()
        if stop_signals:
            break
    return decode(tokenizer, np.array(ids, np.int32))


@contextlib.contextmanager
def unless_disk_fails(notify: Callable[[str], None]) -> Iterator[None]:
    """Go on without a line or picture that cannot be written: only checkpoints are worth ending."""
    try:
        yield
    except OSError as error:
        notify(f"warning: not written: {error.strerror or error}")


def check_host_memory(shapes: training.TrainState) -> None:
    """MemoryError if the state cannot fit the host it is computed on.

    XLA's CPU client may wait for ever for arrays that its threads could not allocate.
    """
    if jax.default_backend() != "cpu":
        return
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    present = present if limit == resource.RLIM_INFINITY else min(present, limit)
    needed = saving.tree_bytes(shapes)
    if needed > present:
        raise MemoryError(
            f"parameters and optimizer state take {saving.megabytes(needed)}, this process may "
            f"have {saving.megabytes(present)}"
        )


@contextlib.contextmanager
def explain_failures(config: TrainConfig) -> Iterator[None]:
    """Turn what JAX says of too little memory, or of a lost process, into what to do about it."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        said = str(error)
        if isinstance(error, REFUSALS):
            raise
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in said:
            lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in said
            if jax.process_count() > 1 and lost:
                raise PeerError(
                    f"another process of this run is gone ({said.partition(chr(10))[0][:200]}); "
                    "start them all again with --init_from=auto, in whatever number"
                ) from error
            raise
        cfg = config.model
        raise OutOfMemoryError(
            f"out of memory ({said.partition(chr(10))[0][:200]}) with batch_size="
            f"{config.batch_size}, block_size={cfg.block_size}, n_layer={cfg.n_layer}, n_embd="
            f"{cfg.n_embd}; lower --batch_size and raise --gradient_accumulation_steps, lower "
            "--block_size, or take --remat; what was saved is as it was"
        ) from error


def main(argv: list[str]) -> int:
    """Train; returns the exit code."""
    config, given = parse(argv)
    if config.resume_check:
        print(resume_check(Path(__file__), [*argv, "--resume_check=False"], config.max_iters))
        return 0
    run_dir = Path(config.out_dir)
    cli.make_run_dir(run_dir)
    distributed.start(config)
    cli.use_compile_cache(config.compile_cache)
    with contextlib.ExitStack() as stack:
        stack.enter_context(output.forgiving_output(run_dir / "unprinted.txt"))
        if jax.process_index() == 0:
            stack.enter_context(files.locked(run_dir / ".lock"))
        stack.enter_context(explain_failures(config))
        settings = settings_to_go_on(run_dir, config.init_from, config.replay)
        stack.enter_context(name_settings(settings, given))
        return train(config, run_dir, given)


def train(config: TrainConfig, run_dir: Path, given: Container[str]) -> int:
    """Train in a folder that is ours; returns the exit code.

    `given` holds the flags that the user gave: these must be honoured, or refused.
    """
    # ---- Settings, data, devices -----------------------------------------------------------------
    began = time.monotonic()
    fault = faults.planned_fault()
    bad = bad_steps.read_bad_step(Path(config.replay)) if config.replay else None
    steps, source = find_start(config, run_dir, bad)
    asked = {"max_iters": config.max_iters, "stop_step": config.stop_step or config.max_iters}
    for name, last in asked.items():
        if steps and bad is None and last < steps[-1]:
            raise UsageError(f"--{name}={last}: the run is at step {steps[-1]} already")
    for name in ("resume_step", "allow_change"):
        if name in given and config.init_from not in ("resume", "auto") and bad is None:
            raise UsageError(f"--{name}: goes with --init_from=resume or auto; leave the flag out")
    mesh = sharding.make_mesh()
    n_devices = mesh.devices.size
    how = " with --allow_change=batch_size" if steps else ""
    config, batch_note = fit_batch(config, n_devices, {"batch_size"} if steps else given, how)
    cfg = config.model if source is None else model_of_source(config, source, given)
    primary = jax.process_index() == 0
    console = TrainConsole(config.max_iters, quiet=not primary)
    if batch_note:
        console.note(batch_note)
    with show_bytes(console.console) as progress:
        dataset = load_dataset(
            config.dataset,
            block_size=cfg.block_size,
            val_dataset=config.val_dataset,
            val_fraction=config.val_fraction,
            tokenizer=choose_tokenizer(config, steps, source, run_dir),
            tokenizer_dir=config.tokenizer_dir,
            decode_errors=config.decode_errors,
            allow_special=config.allow_special,
            notify=console.note,
            progress=progress,
        )
    stop_signals = cli.catch_stop_signals()  # until here there is nothing to save
    tokenizer = dataset.tokenizer
    if "vocab_size" in given and cfg.vocab_size != tokenizer.n_vocab:
        raise UsageError(
            f"--vocab_size={cfg.vocab_size}: the tokenizer has {tokenizer.n_vocab} tokens, which "
            "decides; leave the flag out"
        )
    as_given = dataclasses.replace(
        config, model=dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    )
    if source is not None:  # whose tokenizer counts, also when this run is resumed
        as_given = dataclasses.replace(as_given, tokenizer="auto")
    if steps and (run_dir / "config.json").is_file():
        # What it was started from: a replay may have to start there again.
        started = load_config(run_dir / "config.json")
        as_given = dataclasses.replace(as_given, init_from=started.init_from)
    cfg = model.resolve(as_given.model)
    config = dataclasses.replace(as_given, model=cfg)
    shards = [*dataset.train, *dataset.val]
    record = make_record(config, cfg, shards, tokenizer, len(dataset.train))

    # ---- State: shapes first, then arrays where they belong --------------------------------------
    optimizer = make_optimizer(config)
    # Known beforehand: computed when it is shown, it would wait for the step that is under way.
    rates = np.asarray(jax.jit(jax.vmap(make_schedule(config)))(np.arange(config.max_iters)))
    init_state = functools.partial(training.init_state, cfg, optimizer)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(init_state, key)
    check_host_memory(shapes)
    shardings = sharding.tree_shardings(mesh, config.strategy, shapes)
    metrics_file = run_dir / "metrics.jsonl"
    val_loss, best, resume_step = None, math.inf, None
    if steps:
        abstract = checkpoint.abstract_tree(shapes, shardings)
        allowed = [name for name in config.allow_change.split(",") if name]

        def accept(meta: checkpoint.Meta) -> None:
            check_record(meta["record"], record, allowed, console.note)

        extra = {"opt_state": abstract.opt_state, "guard": abstract.guard}
        restored = checkpoint.restore_newest(
            run_dir, (abstract.params, extra), accept, notify=console.note, only=steps
        )
        resume_step, meta = restored.step, restored.meta
        step_array = jax.device_put(np.int32(resume_step), shardings.step)
        state = training.TrainState(step_array, restored.params, **restored.extra)
        val_loss, best = meta["val_loss"], meta["best_val_loss"] or math.inf
        console.note(f"resuming at step {resume_step}")
    else:
        # Run once: on CPU, XLA takes 1 s more for code that gives the same bits no sooner.
        on_cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 1} if on_cpu else None
        state = jax.jit(init_state, out_shardings=shardings, compiler_options=options)(key)
        if source is not None:
            params = crop_context(source.params, shapes.params)
            state = state._replace(params=jax.device_put(params, shardings.params))

    corrupt = faults.make_corrupt(fault)
    train_step = training.make_train_step(
        cfg, optimizer, mesh, shardings, config.seed, config.skip_spikes, corrupt
    )
    if bad is not None:
        windows_of = lambda step: read_batches(config, dataset.train, step, 1)[0]  # noqa: E731
        return replay(config, bad, state, train_step, windows_of, corrupt, mesh)
    saves = 2 + (
        config.max_iters // config.checkpoint_interval if config.checkpoint_interval else 0
    )
    if primary and not config.force:  # the newest, the best, and the one being written
        saving.check_space(
            run_dir,
            (shapes.params, shapes.opt_state),
            min(saves, config.keep_checkpoints + 2),
            "make room, lower --keep_checkpoints, or take --force to start all the same",
        )
    if primary:
        with files.replacing(run_dir / "config.json") as settings:
            settings.write(to_json(as_given).encode())
        save_tokenizer(tokenizer, run_dir)
        if resume_step is None:
            metrics_file.write_text("")
            (run_dir / "samples.txt").write_text("")
        else:
            metrics.drop_metrics_from(metrics_file, resume_step, console.note)
    if resume_step is not None:
        newer_steps = [step for step in checkpoint.steps(run_dir) if step > resume_step]
        sharding.all_agree(True)  # before one process renames them, all have looked
        for newer in newer_steps:
            name = checkpoint.set_aside(checkpoint.folder(run_dir) / str(newer), "aside")
            console.note(f"step {newer} is set aside as {name}")
    eval_step = training.make_eval_step(cfg, mesh, shardings.params)
    n_params = model.count_params(cfg)
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * cfg.block_size
    device = jax.devices()[0].device_kind
    peak = metrics.peak_flops(device, cfg.dtype)
    recorder = metrics.Recorder(
        metrics_file if primary else None,
        tokens_per_step,
        metrics.flops_per_token(cfg),
        peak and peak * n_devices,
    )
    console.note(
        f"{n_params:,} parameters, {cfg.dtype}, {cfg.attention} attention, on {n_devices} x "
        f"{device}; {dataset.name}: {sum(map(len, dataset.train)):,} + "
        f"{sum(map(len, dataset.val)):,} {tokenizer.kind} tokens; {tokens_per_step:,} per step"
    )
    if peak is None and jax.default_backend() != "cpu":
        console.note(f"mfu is left out: the peak of {device} in {cfg.dtype} is not known")

    # ---- The loop: step n's metrics are fetched after step n+1 was dispatched --------------------
    last_step = min(config.max_iters, config.stop_step or config.max_iters)
    intervals = (config.eval_interval, config.sample_interval, config.checkpoint_interval)
    small = jax.default_backend() != "cpu" and n_params < SMALL_MODEL
    per_dispatch = config.steps_per_dispatch or (10 if small else 1)
    alone = jax.process_count() == 1
    any_process = distributed.make_any_process(mesh)
    told_to_stop = False  # by a signal to any process, and known to all of them

    def due(step: int, interval: int) -> bool:
        return step == config.max_iters or (interval > 0 and step % interval == 0)

    def next_windows(step: int) -> jax.Array | None:
        """The windows of the next call, on their way: of all its steps, or of 1 if one is due."""
        if step >= last_step:
            return None
        faults.maybe_fail(fault, step)
        busy = any(due(step + n, i) for n in range(1, per_dispatch) for i in intervals)
        busy = busy or step + per_dispatch > last_step
        windows = read_batches(config, dataset.train, step, 1 if busy else per_dispatch)
        return sharding.place(windows, mesh, axis=2)

    fields: dict[str, str] = {"loss": "-", "val": "-"}
    skipped = int(state.guard.skipped)

    def report(first: int, values: dict[str, Any], stop_votes: Any) -> None:
        """Fetch, record and show the metrics of a call that began at step `first`."""
        nonlocal skipped, told_to_stop
        norms = values.pop("layer_norms")  # fetched only where they are wanted
        fetched, vote = jax.device_get((values, stop_votes))
        told_to_stop = told_to_stop or bool(vote)
        recorder.arrive(len(fetched["loss"]))
        console.arrive(first + len(fetched["loss"]))
        for i in range(len(fetched["loss"])):
            step, now = first + i, {name: fetched[name][i] for name in fetched}
            if now["skipped"] > skipped:
                capture(step, now | {"layer_norms": jax.tree.map(operator.itemgetter(i), norms)})
            skipped = int(now["skipped"])
            recorder.add(float(now["loss"]))
            log = due(step + 1, config.log_interval)
            if log:
                rate, norm = float(rates[max(0, step - skipped)]), float(now["grad_norm"])
                with unless_disk_fails(console.note):
                    written = recorder.write(step, rate, norm, skipped)
                    fields.update(metrics.describe(written))
            console.update(step + 1, fields, log=log)
            if now["in_a_row"] >= config.max_skips:
                saver.settle()
                n = int(now["in_a_row"])
                raise NonFiniteError(
                    f"the last {n} {plural(n, 'step')} up to {step} had to be skipped, their loss "
                    f"{now['loss']}, gradient norm {now['grad_norm']}; lower --learning_rate, or "
                    f"look at one by --replay; the last good checkpoint is step {saver.last}"
                )

    def capture(step: int, values: dict[str, Any]) -> None:
        """Say that a step was skipped, and write down what it takes to run it again."""
        text = (
            f"step {step} skipped: loss {values['loss']:.4g}, grad norm {values['grad_norm']:.4g}"
        )
        if primary:
            passes = config.gradient_accumulation_steps
            path = bad_steps.write_bad_step(
                run_dir,
                step=step,
                seed=config.seed,
                metrics=values,
                rows=[
                    start
                    for i in range(step * passes, (step + 1) * passes)
                    for start in batches.batch_starts(dataset.train, **batch_of(config, i, True))
                ],
                windows=read_batches(config, dataset.train, step, 1, whole=True)[0],
            )
            allowed = [f"--allow_change={config.allow_change}"] * bool(config.allow_change)
            words = [f"--out_dir={run_dir}", f"--replay={path}", *allowed]
            text += f"; {flags.command('train.py', *words)} runs it again"
        console.note(text)

    def draw() -> None:
        try:
            records = metrics.read_metrics(metrics_file)
            metrics.draw_losses(records, run_dir / "loss.png", config.loss_axis)
        except Exception as error:  # no picture is worth ending a run
            console.note(f"warning: loss.png is not drawn: {error}")

    painter = ThreadPoolExecutor(max_workers=1)  # matplotlib takes 1 s at first, 0.3 s after
    drawn: Future[None] | None = None
    step, saved_step = resume_step or 0, resume_step
    pending: tuple[int, dict[str, Any], Any] | None = None
    saver = saving.Saver(run_dir, config.keep_checkpoints, console.note)
    saver.last = resume_step
    try:
        windows = next_windows(step)
        while True:
            if pending and (step == last_step or any(due(step, i) for i in intervals)):
                report(*pending)
                pending = None
            stop = (bool(stop_signals) if alone else told_to_stop) or step >= last_step
            if pending and stop:
                report(*pending)
                pending = None
            paused = time.monotonic()
            news = not (stop_signals and alone) and (step != resume_step or val_loss is None)
            if step != resume_step and due(step, config.eval_interval):
                val_loss = None  # what is known is an older step's
            if news and due(step, config.eval_interval):
                batch_losses = functools.partial(eval_step, state.params)
                val_loss = evaluate(config, dataset.val, mesh, batch_losses, stop_signals)
                if val_loss is not None:
                    best = min(best, val_loss)
                    fields["val"] = f"{val_loss:.4f}"
                    console.note(f"step {step}: val loss {val_loss:.4f}, best {best:.4f}")
                if val_loss is not None and primary:
                    with unless_disk_fails(console.note):
                        metrics.append_metrics(metrics_file, {"step": step, "val_loss": val_loss})
                    if drawn is None or drawn.running() or drawn.done():
                        drawn = painter.submit(draw)  # one that waits will show this point too
            if news and due(step, config.sample_interval) and config.sample_tokens and primary:
                params = jax.tree.map(lambda x: x.addressable_data(0), state.params)
                text = write_sample(config, cfg, params, tokenizer, stop_signals)
                text = f"---- sample after {step} {plural(step, 'step')} ----\n{text}\n----"
                console.note(text)
                with unless_disk_fails(console.note):
                    files.append_line(run_dir / "samples.txt", text)
            stop = stop or (alone and bool(stop_signals))  # perhaps one came meanwhile
            if step != saved_step and (stop or (step and due(step, config.checkpoint_interval))):
                meta = {
                    "val_loss": val_loss if due(step, config.eval_interval) else None,
                    "best_val_loss": best if best < math.inf else None,
                    "record": record,
                }
                extra = {"opt_state": state.opt_state, "guard": state.guard}
                saver.save(step, state.params, extra, meta)
                if config.wait_for_checkpoints:
                    saver.settle()
                saved_step = step
            recorder.pause(time.monotonic() - paused)
            if stop or windows is None:
                break
            state, values = train_step(state, windows)
            votes = False if alone else any_process(bool(stop_signals))
            first, step = step, step + len(windows)
            windows = next_windows(step)
            if pending:
                report(*pending)
            pending = first, values, votes
    finally:
        try:
            saver.close()
        finally:
            painter.shutdown()
            console.close()

    # ---- The end ---------------------------------------------------------------------------------
    if saver.last != step:
        raise DiskError(f"step {step} is not saved, the last that is is {saver.last} ({run_dir})")
    if step < last_step or (step == config.max_iters and val_loss is None):
        number = stop_signals[0] if stop_signals else signal.SIGTERM
        console.note(f"saved step {step} after {cli.signal_name(number)}")
        return 128 + number
    if step < config.max_iters:
        console.note(f"saved step {step}, as --stop_step={step} says; --init_from=resume goes on")
        return 0
    console.note(
        f"val loss {val_loss:.4f} after {step} {plural(step, 'step')} in "
        f"{time.monotonic() - began:.1f} s\n"
        f"state sha256={training.digest(state)}\n"
        f"{run_dir}: checkpoints, metrics.jsonl, loss.png, samples.txt\n"
        f"next: {flags.command('sample.py', f'--out_dir={run_dir}')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
