"""Train a GPT: `python train.py [preset] [--flag=value ...]`; `--help` lists the flags."""

import gptjax.quick_start

# isort: split
import math
import sys
from pathlib import Path

from gptjax import distributed, memory
from gptjax.checkpoints.save import About, Saver
from gptjax.errors import DiskError
from gptjax.terminal import cli
from gptjax.training import compiling, plan
from gptjax.training.feed import BatchFeed
from gptjax.training.replay import replay
from gptjax.training.resume_check import resume_check
from gptjax.training.run_log import RunLog, report_end
from gptjax.training.run_settings import read_settings
from gptjax.training.start import (
    TrainingRun,
    hold_folder,
    init_or_restore,
    open_run,
    prepare_folder,
)
from gptjax.training.step import abstract_state

gptjax.quick_start.imported()


def main(argv: list[str]) -> int:
    """Train as the flags say; return the exit code."""
    config, given = read_settings(argv)
    if config.resume_check:
        print(resume_check(Path(__file__), [*argv, "--resume_check=False"], config.max_iters))
        return 0
    run_dir = Path(config.out_dir)
    cli.make_run_dir(run_dir)
    memory.take_gpu_memory()
    if plan.needs_little_memory(config):
        memory.take_gpu_memory_as_needed()
    distributed.start(config)
    cli.use_compile_cache(config.compile_cache)
    distributed.agree_on_kernels()
    with hold_folder(config, run_dir, given):
        run = open_run(config, run_dir, given)
        return replay(run) if run.bad is not None else train(run)


def train(run: TrainingRun) -> int:
    """Train to the end of the run, or until a signal comes; return the exit code."""
    # ---- State: shapes first, then arrays where they belong --------------------------------------
    config, mesh = run.config, run.mesh
    abstract = abstract_state(config, mesh)
    memory.check_fits(abstract)
    train_step, validate, write_sample = compiling.begin(run, abstract)
    state, progress = init_or_restore(run, abstract)
    prepare_folder(run, abstract, progress)
    step = progress.step or 0
    per_call = plan.steps_per_call(config, step)
    feed = BatchFeed(config, run.dataset.train, mesh, per_call, run.fault)
    stop = distributed.StopVote(run.stop_signals, mesh)

    # ---- The loop: the metrics of a call are fetched when the next one is under way --------------
    val_loss = progress.val_loss  # after `step` steps, None where it is not known
    saver = Saver(run.run_dir, config.keep_checkpoints, run.console.note)
    saver.last = saved = progress.step
    with saver, RunLog(run, saver, progress.best, int(state.guard.skipped)) as log:
        windows = feed.windows(step)
        while True:
            leaving = windows is None or stop.count()
            if leaving or plan.is_anything_due(config, step):
                log.flush()

            with log.paused():
                missed = val_loss is None and plan.is_evaluation_due(config, step)  # by a signal
                fresh = step != progress.step or missed  # else both were done before
                if fresh and plan.is_evaluation_due(config, step):
                    val_loss = validate(state.params, stop.at_once)
                    log.validation(step, val_loss)
                if fresh and plan.is_sample_due(config, step):
                    log.sample(step, write_sample(state.params, stop.at_once))

                leaving = leaving or stop.at_once()  # a signal may have come meanwhile
                if step != saved and (leaving or plan.is_checkpoint_due(config, step)):
                    best = log.best if log.best < math.inf else None
                    about = About(val_loss=val_loss, best_val_loss=best, record=run.record)
                    saver.save(step, state.params, state.extra(), about)
                    if config.wait_for_checkpoints:
                        saver.settle()
                    saved = step

            if leaving or windows is None:
                break
            first, step, val_loss = step, step + len(windows), None
            state, values = train_step(state, windows)
            stop.cast()
            windows = feed.windows(step)
            log.push(first, values)
    if saver.last != step:
        raise DiskError(
            f"step {step} was not saved; the newest saved step is {saver.last} ({run.run_dir})"
        )
    return report_end(run, state, step, val_loss)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
