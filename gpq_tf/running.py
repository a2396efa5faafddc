"""What a run of training keeps and tells while it goes on: its losses, models, scores, and what it will cost."""

import contextlib
import dataclasses
import json
import math
import os
import time

import keras
import numpy as np

from gpq_tf import curves, measures, training_state
from gpq_tf import settings as settings_module
from gpq_tf.network import RetrievalModel
from gpq_tf.saves import Saves

# The first step compiles; the estimate of a run's cost rests on the steps after it.
ESTIMATE_STEPS = 4
# In 16 bits a step whose gradients overflow is left out, and the loss scaled down for the next: so many in a row have
# halved the scale from 2^15 to 2^-35, and nothing will be learned any more.
MOST_SKIPPED = 50


class Diverged(ArithmeticError):
    """Training met a loss or a weight that is not finite."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of training, and where it writes; workers other than the first write nothing (saves, board, bar: None)."""

    model: RetrievalModel
    optimizer: keras.optimizers.Optimizer
    settings: settings_module.Settings
    data: object
    steps_per_epoch: int
    measure: measures.Measure
    saves: Saves | None
    log: object
    board: curves.Curves | None
    report: object
    about: dict
    clock: object
    bar: object

    @property
    def total(self):
        """int, steps of the whole run."""
        return self.settings.total_epochs * self.steps_per_epoch

    def tell_step(self, step, epoch, losses, n_images):
        """Log a step, show it."""
        entry = {**losses, "images_per_second": round(n_images / self.clock.tick(), 1)}
        self.log.write(event="step", step=step, epoch=epoch, **entry)
        if self.board is not None:
            self.board.scalars(step, entry)
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in entry.items()}, refresh=False)
            self.bar.update(1)

    def evaluate(self, step, epoch, loss):
        """Measure the model on all queries, and keep it where it is the best so far."""
        self._check_finite(step, epoch)
        scores = self.measure.evaluate(self.model, self.data, self.settings)
        self._describe_model(step, epoch, scores)
        with self._naming_last_good():
            path = self.saves.save_if_best(self.model)
        score, best = scores[self.measure.score], self.saves.best[self.measure.score]
        self.log.write(event="evaluation", step=step, epoch=epoch, **scores, best=best, path=path and str(path))
        if self.board is not None:
            self.board.scalars(step, scores)
        self.report(
            f"epoch {epoch}: loss {loss:.4f}, {self.measure.name(self.settings)} {score:.4f}, best {best:.4f} "
            f"(epoch {self.saves.best['epoch']})"
        )
        self.clock.restart()

    def save(self, step, epoch, loss):
        """Save the model with what training needs to go on, after a look at it on a subset of the data."""
        self._check_finite(step, epoch)
        found = self.measure.watch(self.model, self.data, self.settings)
        watched = {f"{self.measure.score}_of_subset": found.score}
        self._describe_model(step, epoch, watched, training_state.from_optimizer(self.optimizer, step))
        with self._naming_last_good():
            path = self.saves.save(self.model, epoch)
        self.log.write(event="save", step=step, epoch=epoch, path=str(path), **watched, **_rounded(found.usage))
        if self.board is not None:
            self.board.scalars(step, watched)
            if found.usage:
                self.board.usage(step, found.usage)
            self.board.ranked_list(step, **found.answers())
        score = f"{self.measure.score} of the subset {found.score:.4f}"
        self.report(f"epoch {epoch}: loss {loss:.4f}, {score}, saved {path}")
        self.clock.restart()

    def save_stopped(self, step, epoch):
        """Save the model with what training needs to go on, at once: whoever sends a signal may not wait."""
        self._check_finite(step, epoch)
        self._describe_model(step, epoch, {}, training_state.from_optimizer(self.optimizer, step))
        with self._naming_last_good():
            path = self.saves.save_stopped(self.model)
        self.log.write(event="stopped", step=step, epoch=epoch, path=str(path))

    def diverged(self, what, epoch):
        """Diverged, to raise: what is wrong, from which model the run can go on, and what to try."""
        weights = "smaller alpha or beta, smaller lam_1 and lam_2, " if self.settings.head == "gpq" else ""
        advice = f"Try --precision=float32, a smaller --learning_rate, {weights}or another --init"
        return Diverged(f"{what} (epoch {epoch}); {self._last_good()}. {advice}")

    def _describe_model(self, step, epoch, scores, state=None):
        self.model.record = {"epoch": epoch, "step": step, **scores, **self.about}
        self.model.training_state = state

    def _check_finite(self, step, epoch):
        for weight in self.model.weights:
            if not np.isfinite(keras.ops.convert_to_numpy(weight)).all():
                raise self.diverged(f"{weight.path} is not finite after step {step}", epoch)

    @contextlib.contextmanager
    def _naming_last_good(self):
        """Within it an error of the system, such as a full disk, tells from which model the run can go on."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; {self._last_good()}", error.filename) from error

    def _last_good(self):
        path = self.saves and self.saves.newest
        return f"the last good model is {path}" if path else "no model was saved yet"


@contextlib.contextmanager
def opened(stem, model, optimizer, settings, data, steps_per_epoch, done, about, measure, report, progress):
    """A run whose log, progress bar and curves are open within the context.

    Args:
        stem: Path, folder and beginning of the names of what is written; None writes nothing.
        done: int, steps that lie behind.
        about: dict, what every saved model tells of the run: "origin", "source", "settings" and more.
        progress: callable(total=int, unit=str) -> a progress bar as tqdm's, or None.
        model, optimizer, settings, data, steps_per_epoch, measure, report: see Run.

    Yields:
        Run.
    """
    left = settings.total_epochs * steps_per_epoch - done
    saves, log_path = None, os.devnull
    if stem:
        stem.parent.mkdir(parents=True, exist_ok=True)
        saves, log_path = Saves(stem, settings, measure.score, done // steps_per_epoch, report), f"{stem}.log.jsonl"
    with _Log(log_path) as log, _closing(progress, left) as bar, _board(settings, stem) as board:
        log.write(event="start", step=done, **{name: about[name] for name in ("origin", "source", "settings")})
        clock = _Clock(left, report)
        yield Run(
            model, optimizer, settings, data, steps_per_epoch, measure, saves, log, board, report, about, clock, bar
        )


class Pending:
    """Steps that were taken, but whose losses are not known here yet.

    A GPU computes a step while the next is prepared. So `deferred` asks for a step's losses once the next is under way.

    Args:
        run: Run.
        rate: callable(int, updates before) -> learning rate.
        deferred: bool; False asks at once.
    """

    def __init__(self, run, rate, deferred):
        self._run, self._rate, self._deferred, self._step, self._loss = run, rate, deferred, None, None
        # The optimiser counts its updates: in 16 bits there are fewer than steps.
        self._updates, self._skipped = int(keras.ops.convert_to_numpy(run.optimizer.iterations)), 0

    def add(self, *step):
        """Take note of a step (number, epoch, losses, images), and finish the one before it, or this one."""
        before, self._step = self._step, step
        if before:
            self._finish(*before)
        if not self._deferred:
            self.finish()

    def finish(self):
        """Finish what is under way; returns the loss of the last step."""
        step, self._step = self._step, None
        if step:
            self._finish(*step)
        return self._loss

    def _finish(self, step, epoch, losses, n_images):
        losses = {name: float(value) for name, value in losses.items()}
        if not math.isfinite(losses["loss"]):
            raise self._run.diverged(f"Loss is {losses['loss']} at step {step}", epoch)
        rate = float(keras.ops.convert_to_numpy(self._rate(self._updates)))
        self._run.tell_step(step, epoch, {**losses, "lr": rate}, n_images)
        self._loss = losses["loss"]
        was_skipped = bool(losses.get("skipped"))
        self._updates, self._skipped = self._updates + (not was_skipped), self._skipped + 1 if was_skipped else 0
        if self._skipped == MOST_SKIPPED:
            what = f"Gradients overflowed in the last {MOST_SKIPPED} steps, up to step {step}, and none was taken"
            raise self._run.diverged(what, epoch)


def _board(settings, stem):
    """The run's curves where they are wanted, as a context."""
    if not (stem and settings.tensorboard):
        return contextlib.nullcontext()
    return curves.Curves(stem.parent / "tensorboard" / stem.name)


def _rounded(usage):
    """The same as lists: how many codewords of each book occur, and the entropy in bits to three digits."""
    return {f"codewords_{name}": np.round(by_book, 3).tolist() for name, by_book in usage.items()}


@contextlib.contextmanager
def _closing(progress, total):
    bar = progress(total=total, unit="step") if progress else None
    try:
        yield bar
    finally:
        if bar is not None:
            bar.close()


class _Log:
    """JSON lines, one an event, handed to the system as soon as it is written."""

    def __init__(self, path):
        self._path = path

    def __enter__(self):
        self._file = open(self._path, "a+b", buffering=0)
        # A run that was killed may have left half a line.
        if self._file.tell() and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n":
            self._file.write(b"\n")
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, **entry):
        self._file.write(json.dumps(entry).encode() + b"\n")


class _Clock:
    """Seconds of each step, and once, after the first steps, a line about what the run will cost."""

    def __init__(self, total, report):
        self._total, self._report, self._seconds, self._count = total, report, [], 0
        self.restart()

    def restart(self):
        self._last = time.perf_counter()

    def tick(self):
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._count += 1
        if self._count <= ESTIMATE_STEPS:
            self._seconds.append(seconds)
        if self._count == ESTIMATE_STEPS:
            a_step = float(np.median(self._seconds[1:]))
            whole = duration(a_step * self._total)
            self._report(f"{a_step:.2g} s a step on this machine: {self._total} steps take about {whole}")
        return seconds


def duration(seconds):
    """Seconds as a user says them.

    Example:
        >>> duration(5), duration(200), duration(8000)
        ('5 s', '3 min', '2 h 13 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
