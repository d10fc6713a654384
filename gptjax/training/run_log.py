"""The log of a run: on the console, and in the files of its folder."""

import contextlib
import functools
import math
import operator
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from gptjax import model, programs
from gptjax.checkpoints.save import Saver
from gptjax.errors import NonFiniteError, plural
from gptjax.files import append_line
from gptjax.precision import describe
from gptjax.training import bad_steps, bands, feed, metrics, plan
from gptjax.training.start import TrainingRun
from gptjax.training.step import Metrics, TrainState, digest

Sink = Callable[[metrics.Record], None]  # takes a record with `step`; see `metrics.Recorder`


class RunLog:
    """The log of a run, which fetches the metrics of a call when the next one is under way.

    Only the first of several processes shows and writes anything; all of them fetch.
    """

    def __init__(self, run: TrainingRun, saver: Saver, best: float, skipped: int) -> None:
        """Take the run, what saves its steps, its least validation loss, and its skipped steps."""
        config, cfg = run.config, run.config.model
        self.run, self.config, self.saver, self.skipped = run, config, saver, skipped
        self.best = best
        self.fields = {"loss": "-", "val": "-"}  # shown beside the bar
        self.pending: tuple[int, Metrics] | None = None  # first step and metrics of the last call
        self.metrics_file = run.run_dir / "metrics.jsonl"
        # What a tracker needs is a function here.
        self.sinks: list[Sink] = [functools.partial(metrics.append_metrics, self.metrics_file)]
        device, n_devices = jax.devices()[0].device_kind, run.mesh.devices.size
        peak = metrics.peak_flops(device, cfg.dtype)
        n_params = model.count_params(cfg)
        tokens = config.batch_size * config.gradient_accumulation_steps * cfg.block_size
        self.recorder = metrics.Recorder(
            tokens, metrics.flops_per_token(cfg), peak and peak * n_devices
        )
        self.painter = ThreadPoolExecutor(max_workers=1)  # matplotlib takes 1 s at first, then 0.3
        self.drawn: Future[None] | None = None
        self.undrawn = False  # whether `paused` is to draw loss.png anew
        data = run.dataset
        self.band = bands.find_band(config, data)
        self.where = ""  # the last validation loss, beside the band
        self.note(
            f"{n_params:,} parameters, {describe(cfg)}, {cfg.attention} attention, on "
            f"{n_devices} x {device}; {data.name}: {sum(map(len, data.train)):,} + "
            f"{sum(map(len, data.val)):,} {data.tokenizer.kind} tokens; {tokens:,} per step"
        )
        if peak is None and jax.default_backend() != "cpu":
            self.note(f"mfu is not shown: the peak FLOP/s of {device} in {cfg.dtype} is unknown")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the picture and leave the last state of the bar on the screen."""
        self.painter.shutdown()
        self.run.console.close()

    def note(self, text: str) -> None:
        """Show a line, or several."""
        self.run.console.note(text)

    # ---- Steps -----------------------------------------------------------------------------------

    def push(self, first: int, values: Metrics) -> None:
        """Take the metrics of a call that began at step `first`, and report the call before it.

        Raises:
            NonFiniteError: as of `flush`.
        """
        self.flush()
        self.pending = first, values

    def flush(self) -> None:
        """Fetch, record and show the metrics that were pushed last; waits for their call.

        Raises:
            NonFiniteError: too many steps in a row had to be skipped.
        """
        if self.pending is None:
            return
        (first, values), self.pending = self.pending, None
        norms = values.pop("gradient_norms")  # fetched only where they are wanted
        fetched = jax.device_get(values)
        count = len(fetched["loss"])
        self.recorder.arrive(count)
        self.run.console.arrive(first + count)
        for i in range(count):
            now = {name: column[i] for name, column in fetched.items()}
            scale, after = now.get("loss_scale", 0), now.get("next_loss_scale", 0)
            if scale != after:
                self.note(f"step {first + i}: loss scale {scale:.9g} -> {after:.9g}")
            if now["skipped"] > self.skipped and after >= scale:  # it falls where that was all
                self._capture(first + i, now, jax.tree.map(operator.itemgetter(i), norms))
            self.skipped = int(now["skipped"])
            self._report(first + i, now)

    def _report(self, step: int, now: dict[str, Any]) -> None:
        """Record and show a step; raise NonFiniteError if too many in a row were skipped."""
        self.recorder.add(float(now["loss"]))
        log = plan.is_due(self.config, step + 1, self.config.log_interval)
        if log:
            record = self.recorder.record(
                step, float(now["learning_rate"]), float(now["grad_norm"]), self.skipped
            )
            if "loss_scale" in now:
                record["loss_scale"] = float(now["loss_scale"])
                record["good_steps"] = int(now["good_steps"])
            self._emit(record)
            self.fields |= metrics.describe(record)
        self.run.console.update(step + 1, self.fields, log=log)
        if now["in_a_row"] >= self.config.max_skips:
            self.saver.settle()
            n = int(now["in_a_row"])
            fixed = "loss_scale" in now and self.config.loss_scale > 0
            lower = "--learning_rate or --loss_scale" if fixed else "--learning_rate"
            raise NonFiniteError(
                f"the last {n} {plural(n, 'step')} up to {step} had to be skipped (the last had "
                f"loss {now['loss']}, gradient norm {now['grad_norm']}); lower {lower}, or "
                f"examine one with --replay; the last good checkpoint is step {self.saver.last}"
            )

    def _capture(self, step: int, now: dict[str, Any], norms: model.Params) -> None:
        """Report that a step was skipped, and write the record by which it can be run again."""
        text = f"step {step} skipped: loss {now['loss']:.4g}, grad norm {now['grad_norm']:.4g}"
        if self.run.primary:
            shards, config = self.run.dataset.train, self.config
            path = bad_steps.write_bad_step(
                self.run.run_dir,
                step=step,
                seed=config.seed,
                loss=float(now["loss"]),
                grad_norm=float(now["grad_norm"]),
                loss_scale=float(now["loss_scale"]) if "loss_scale" in now else None,
                gradient_norms=norms,
                rows=feed.step_starts(config, shards, step),
                windows=feed.step_windows(config, shards, [step])[0],
            )
            allowed = [f"--allow_change={config.allow_change}"] * bool(config.allow_change)
            words = [f"--out_dir={self.run.run_dir}", f"--replay={path}", *allowed]
            text += f"; {programs.command('train.py', *words)} runs it again"
        self.note(text)

    def _emit(self, record: metrics.Record) -> None:
        """Hand a record to all sinks."""
        if self.run.primary:
            for sink in self.sinks:
                with self._unless_disk_fails():
                    sink(record)

    @contextlib.contextmanager
    def _unless_disk_fails(self) -> Iterator[None]:
        """Turn a failed write into a warning: only checkpoints are worth ending a run."""
        try:
            yield
        except OSError as error:
            self.note(f"warning: a log file was not written: {error.strerror or error}")

    # ---- Between steps ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out of the time of training.

        A validation loss that comes in it is drawn when it ends: drawing beside the save of a step
        made a pause of 0.3 s out of one of 0.1.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            if self.undrawn and (self.drawn is None or self.drawn.running() or self.drawn.done()):
                self.drawn = self.painter.submit(self._draw)  # one that still waits shows all too
            self.undrawn = False
        self.recorder.pause(time.monotonic() - began)

    def validation(self, step: int, val_loss: float | None) -> None:
        """Record and show the validation loss after `step` steps, unless it is None."""
        if val_loss is None:
            return
        self.best = min(self.best, val_loss)
        self.fields["val"] = f"{val_loss:.4f}"
        self.note(f"step {step}: val loss {val_loss:.4f}, best {self.best:.4f}")
        self._compare(step, val_loss)
        self.run.console.update(step, self.fields, log=False)  # the bar stays as it was last
        self._emit({"step": step, "val_loss": val_loss if math.isfinite(val_loss) else None})
        self.undrawn = self.run.primary

    def _compare(self, step: int, val_loss: float) -> None:
        """Say that the loss has left the band of the preset, or that it is there at the end."""
        where = bands.place(self.band, step, val_loss) if self.band else ""
        left = where in ("above", "below") and where != self.where
        if self.band and (left or (where == "in" and step == self.config.max_iters)):
            self.note(bands.remark(self.band, step, val_loss, where))
        self.where = where or self.where

    def _draw(self) -> None:
        try:
            metrics.draw_losses(
                metrics.read_metrics(self.metrics_file),
                self.run.run_dir / "loss.png",
                self.config.loss_axis,
                self.config.model.vocab_size,
            )
        except Exception as error:  # no picture is worth ending a run
            self.note(f"warning: loss.png was not drawn: {error}")

    def sample(self, step: int, text: str | None) -> None:
        """Record and show a text that the model wrote after `step` steps, unless it is None."""
        if text is None:
            return
        text = f"---- sample after {step} {plural(step, 'step')} ----\n{text}\n----"
        self.note(text)
        with self._unless_disk_fails():
            append_line(self.run.run_dir / "samples.txt", text)


def report_end(run: TrainingRun, state: TrainState, step: int, val_loss: float | None) -> int:
    """Print how the run ended, after `step` steps that are saved; return the exit code."""
    config, note = run.config, run.console.note
    complete = step == config.max_iters and val_loss is not None
    if complete:
        note(
            f"val loss {val_loss:.4f} after {step} {plural(step, 'step')} in "
            f"{time.monotonic() - run.began:.1f} s\n"
            f"state sha256={digest(state)} ({config.model.dtype})\n"
            f"{run.run_dir}: checkpoints, metrics.jsonl, loss.png, samples.txt\n"
            f"next: {programs.command('sample.py', f'--out_dir={run.run_dir}')}"
        )
        return 0
    if step < config.max_iters and step == plan.last_step(config):
        note(f"saved step {step}, as --stop_step={step} asks; --init_from=resume continues")
        return 0
    number = run.stop_signals[0] if run.stop_signals else signal.SIGTERM
    note(f"saved step {step} after {signal.Signals(number).name}")
    return 128 + number
