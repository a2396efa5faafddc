"""The training loop: draw a batch, take a step, log it; measure and save every save_term epochs."""

import contextlib
import functools
import json
import math
import os
import signal
import time
import typing
from pathlib import Path

import keras
import numpy as np

from gpq_tf import curves, heads, measures, starting, stopping, strategies, training_state
from gpq_tf import settings as settings_module
from gpq_tf.data import check_image_size, lazy
from gpq_tf.network import RetrievalModel
from gpq_tf.saves import Saves
from gpq_tf.train_step import make_step

# The first step compiles; the estimate of a run's cost rests on the steps after it.
ESTIMATE_STEPS = 4
# In 16 bits a step whose gradients overflow is left out, and the loss scaled down for the next: so many in a row have
# halved the scale from 2^15 to 2^-35, and nothing will be learned any more.
MOST_SKIPPED = 50


class Diverged(ArithmeticError):
    """Training met a loss or a weight that is not finite."""


def train(settings, data, report=None, progress=None, strategy=None):
    """Train a model and save it every save_term epochs.

    Into `settings.model_save_path` go <head>_<bits>bits_<epoch>.keras (cgd_<D>d_<epoch>.keras), a .json of the same
    name with the settings in force, and <head>_<bits>bits.log.jsonl, one line a step and one a save. The last epoch is
    always saved. With `settings.tensorboard` the folder tensorboard/<head>_<bits>bits gets curves, a ranked list and
    the codebook's usage.

    The same settings and data give the same bits, resumed or not; on a GPU TensorFlow's deterministic operations are
    switched on for that.

    With several devices (`settings.strategy`) each takes part of every batch, and losses and batch statistics are those
    of the whole: the same numbers as on one, up to rounding. With several workers the first of them saves and measures;
    all read `settings.resume`, so it lies where all find it.

    SIGTERM and Ctrl-C end the run after the step in progress, with a save, <stem>_stopped.keras.

    Args:
        settings: gpq_tf.settings.Settings.
        data: gpq_tf.data.RetrievalData; of cgd gpq_tf.data.metric_learning.UnseenClasses.
        report: callable(str), told what a user should know, or None.
        progress: callable(total=int, unit=str) -> a progress bar as tqdm's (update, set_postfix, close), or None.
        strategy: tf.distribute.Strategy if it has been made from the settings (`strategies.from_settings`), else None.

    Returns:
        (model, path): the trained RetrievalModel, pathlib.Path of its file (None in workers that do not save).

    Raises:
        ValueError: if settings and data do not fit.
        starting.Finished: if `settings.resume` has no steps left.
        Diverged: at a loss that is not finite, or where no step in 16 bits is taken any more; what was saved before
            stays.
        OSError: if a file cannot be written.
        stopping.LostWorker: if another worker is gone.
        stopping.Stopped: by SIGTERM or Ctrl-C, once the run is saved.
    """
    if settings.resume:
        settings = starting.settings_of_resumed(settings, report)
    strategy = strategy or strategies.from_settings(settings)
    is_chief = strategies.is_chief(strategy)
    report = (report if is_chief else None) or (lambda line: None)
    settings, why_scratch = starting.settings_of_start(settings_of_data(settings, data))
    _check(settings, data)
    strategies.check_batch_size(settings, strategy)
    _check_jit(settings, strategy)
    if settings.tensorboard:
        curves.check_installed()
    _make_deterministic()
    recipe = heads.recipe(settings.head)
    measure = measures.MEASURES[recipe.PROTOCOL]
    steps_per_epoch = recipe.steps_per_epoch(data, settings)
    total = settings.total_epochs * steps_per_epoch
    fingerprint = data.fingerprint()
    with strategies.naming_lost_workers(strategy, None), strategies.scope(strategy):
        optimizer = make_optimizer(recipe, settings, steps_per_epoch)
        if settings.resume:
            model, origin, done = starting.resumed_model(settings, optimizer, total, fingerprint)
        else:
            model, origin = starting.initial_model(settings)
            origin += why_scratch
            done = 0
        if strategy:
            synchronize(model, settings.sync_batch_norm)
        if not optimizer.built:  # LossScaleOptimizer would make its variables a second time
            optimizer.build(model.trainable_variables)
    strategies.check_equal(strategy, done, settings, fingerprint)
    report(origin)
    if strategy:
        report(strategies.describe(strategy))
    rate = recipe.learning_rate(settings, steps_per_epoch)

    @functools.cache
    def compiled_step(frozen):
        return make_step(
            model,
            lambda described: recipe.compare(model, described, settings),
            optimizer,
            use_jit(settings),
            describe=lambda batch: recipe.describe(model, batch, settings, frozen),
            strategy=strategy,
            batch_size=settings.batch_size,
            clip_norm=settings.clip_norm,
            accumulate=settings.accumulate,
        )

    stem = Path(settings.model_save_path) / recipe.file_stem(settings)
    saves = None
    if is_chief:
        stem.parent.mkdir(parents=True, exist_ok=True)
        saves = Saves(stem, settings, measure.score, done // steps_per_epoch, report)
    about = {"origin": origin, "source": data.source, "data_sha256": fingerprint}
    about |= {"class_names": list(data.class_names), "settings": settings.as_dict()}
    log_path = f"{stem}.log.jsonl" if is_chief else os.devnull
    with (
        _Log(log_path) as log,
        _closing(progress if is_chief else None, total - done) as bar,
        _board(settings, stem) if is_chief else contextlib.nullcontext() as board,
        stopping.on_request() as request,
    ):
        log.write(event="start", step=done, origin=origin, source=data.source, settings=settings.as_dict())
        clock = _Clock(total - done, report)
        run = _Run(model, optimizer, settings, data, measure, saves, log, board, report, about, clock, bar)
        several = strategies.is_several_workers(strategy)
        batches = lazy.ahead(functools.partial(_draw_batch, recipe, data, settings), range(done, total))
        pending = _Pending(run, rate, deferred=_is_asynchronous() and not several)
        for step, epoch, batch in _numbered(batches, run, pending, done, steps_per_epoch):
            take_step = compiled_step(recipe.is_frozen(settings, epoch))
            if several:
                batch["stop"] = np.float32(request.signal is not None)
            with strategies.naming_lost_workers(strategy, stem):
                losses = take_step(batch)
                stop = bool(float(losses.pop("stop"))) if several else request.signal is not None
            pending.add(step, epoch, losses, len(batch["images"]))
            at_end = step % steps_per_epoch == 0
            evaluates = at_end and settings.eval_epoch and epoch % settings.eval_epoch == 0
            ends_term = at_end and (epoch % settings.save_term == 0 or epoch == settings.total_epochs)
            if evaluates or ends_term or stop:
                loss = pending.finish()
            # Whoever asks a run to stop may not wait for an evaluation.
            if is_chief and evaluates and not (stop and step < total):
                _evaluate(run, step, epoch, loss)
                clock.restart()
                stop = stop or (not several and request.signal is not None)
            if is_chief and ends_term:
                _save(run, step, epoch, loss)
                clock.restart()
            elif is_chief and stop:
                _save_stopped(run, step, epoch)
            if stop and step < total:
                path = saves.last_good if is_chief else None
                raise stopping.Stopped(_stopped(request.signal, step, total, path), request.signal or signal.SIGTERM)
    return model, saves.last_good if is_chief else None


def _numbered(batches, run, pending, done, steps_per_epoch):
    """(step, epoch, batch) of each. Where one cannot be read, what was learned is saved before the error goes on."""
    step = done
    try:
        for step, batch in enumerate(batches, done + 1):
            epoch = (step - 1) // steps_per_epoch + 1
            yield step, epoch, batch
    except (ValueError, OSError):  # of the next batch: what goes wrong with a step is not seen here
        if run.saves and step > done:
            pending.finish()
            _save_stopped(run, step, epoch)
        raise


class _Run(typing.NamedTuple):
    """What stays the same throughout a run."""

    model: RetrievalModel
    optimizer: keras.optimizers.Optimizer
    settings: settings_module.Settings
    data: object
    measure: measures.Measure
    saves: Saves | None
    log: object
    board: curves.Curves | None
    report: object
    about: dict
    clock: object
    bar: object


def _draw_batch(recipe, data, settings, step):
    """What the recipe draws, on the way to the device already where a GPU may be waiting for it."""
    batch = recipe.draw_batch(data, settings, step)
    if keras.backend.backend() == "jax" and settings.accumulate == 1:
        import jax

        return jax.device_put(batch)
    return batch


def _is_asynchronous():
    """Whether a step that was taken is still under way: on a GPU, and with JAX."""
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


class _Pending:
    """Steps that were taken, but whose losses are not known here yet.

    A GPU computes a step while the next is prepared. So `deferred` asks for a step's losses once the next is under way.

    Args:
        run: _Run.
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
            raise Diverged(_diverged(f"Loss is {losses['loss']} at step {step}", epoch, self._run))
        rate = float(keras.ops.convert_to_numpy(self._rate(self._updates)))
        _tell_step(self._run, step, epoch, {**losses, "lr": rate}, n_images)
        self._loss = losses["loss"]
        was_skipped = bool(losses.get("skipped"))
        self._updates, self._skipped = self._updates + (not was_skipped), self._skipped + 1 if was_skipped else 0
        if self._skipped == MOST_SKIPPED:
            what = f"Gradients overflowed in the last {MOST_SKIPPED} steps, up to step {step}, and none was taken"
            raise Diverged(_diverged(what, epoch, self._run))


def _tell_step(run, step, epoch, losses, n_images):
    """Log a step, show it."""
    entry = {**losses, "images_per_second": round(n_images / run.clock.tick(), 1)}
    run.log.write(event="step", step=step, epoch=epoch, **entry)
    if run.board is not None:
        run.board.scalars(step, entry)
    if run.bar is not None:
        run.bar.set_postfix({name: f"{value:.4g}" for name, value in entry.items()}, refresh=False)
        run.bar.update(1)


def _evaluate(run, step, epoch, loss):
    """Measure the model on all queries, and keep it where it is the best so far."""
    _check_finite(run, step, epoch)
    scores = run.measure.evaluate(run.model, run.data, run.settings)
    run.model.record, run.model.training_state = {"epoch": epoch, "step": step, **scores, **run.about}, None
    with _saving(run):
        path = run.saves.save_if_best(run.model)
    score, best = scores[run.measure.score], run.saves.best[run.measure.score]
    run.log.write(event="evaluation", step=step, epoch=epoch, **scores, best=best, path=path and str(path))
    if run.board is not None:
        run.board.scalars(step, scores)
    run.report(
        f"epoch {epoch}: loss {loss:.4f}, {run.measure.name(run.settings)} {score:.4f}, best {best:.4f} "
        f"(epoch {run.saves.best['epoch']})"
    )


def _save(run, step, epoch, loss):
    """Save the model with what training needs to go on, after a look at it on a subset of the data."""
    _check_finite(run, step, epoch)
    found = run.measure.watch(run.model, run.data, run.settings)
    watched = {f"{run.measure.score}_of_subset": found.score}
    run.model.record = {"epoch": epoch, "step": step, **watched, **run.about}
    run.model.training_state = training_state.from_optimizer(run.optimizer, step)
    with _saving(run):
        path = run.saves.save(run.model, epoch)
    run.log.write(event="save", step=step, epoch=epoch, path=str(path), **watched, **_rounded(found.usage))
    if run.board is not None:
        run.board.scalars(step, watched)
        if found.usage:
            run.board.usage(step, found.usage)
        run.board.ranked_list(step, **found.answers())
    run.report(f"epoch {epoch}: loss {loss:.4f}, {run.measure.score} of the subset {found.score:.4f}, saved {path}")


def _save_stopped(run, step, epoch):
    """Save the model with what training needs to go on, at once: whoever sends a signal may not wait."""
    _check_finite(run, step, epoch)
    run.model.record = {"epoch": epoch, "step": step, **run.about}
    run.model.training_state = training_state.from_optimizer(run.optimizer, step)
    with _saving(run):
        path = run.saves.save_stopped(run.model)
    run.log.write(event="stopped", step=step, epoch=epoch, path=str(path))


def settings_of_data(settings, data):
    """The settings with what the data tell: n_CLASSES, where it was not given.

    Args:
        settings: gpq_tf.settings.Settings.
        data: gpq_tf.data.RetrievalData or gpq_tf.data.metric_learning.UnseenClasses.

    Returns:
        gpq_tf.settings.Settings.
    """
    if "n_CLASSES" in settings.given:
        return settings
    return settings.completed({"n_CLASSES": len(data.class_names)})


def _check(settings, data):
    check_image_size(settings, data)
    if len(data.class_names) != settings.n_CLASSES:
        raise ValueError(
            f"Invalid n_CLASSES. Expected the data's, {len(data.class_names)}. Received: n_CLASSES={settings.n_CLASSES}"
        )


def make_optimizer(recipe, settings, steps_per_epoch):
    optimizer = recipe.optimizer(settings, steps_per_epoch)
    if settings.precision == "mixed_float16":
        # 16-bit floats of this kind lose small gradients unless the loss is scaled up.
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def synchronize(model, synchronized):
    """Have all batch normalisations take their statistics over the replicas, or not."""
    for layer in model._flatten_layers():
        if hasattr(layer, "synchronized"):
            layer.synchronized = synchronized


def use_jit(settings):
    """Whether XLA is to compile whole steps: settings.jit_compile, where that is "auto" on one GPU alone."""
    if settings.jit_compile != "auto":
        return settings.jit_compile
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    # On a CPU XLA makes this step slower; across several GPUs the collectives do not compile; and of a batch in parts
    # it keeps all that both passes compute, which the parts are there to avoid.
    return len(tf.config.list_physical_devices("GPU")) == 1 and settings.accumulate == 1


def _check_jit(settings, strategy):
    """Refuse to compile whole steps where XLA cannot, or not as asked."""
    if settings.jit_compile is not True:
        return
    reason = None
    if strategy:
        reason = "on several devices, whose communication XLA does not compile"
    elif settings.accumulate > 1 and keras.backend.backend() == "tensorflow":
        reason = "with accumulate, since XLA would keep all parts of a batch in memory"
    if reason:
        raise ValueError(f"Invalid jit_compile. Expected auto or False {reason}. Received: jit_compile=True")


def _make_deterministic():
    """Have TensorFlow choose, for the rest of the process, the same algorithms in every run on a GPU.

    On a CPU its operations are deterministic as they are. What each step draws is made on the host.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            tf.config.experimental.enable_op_determinism()


def _check_finite(run, step, epoch):
    for weight in run.model.weights:
        if not np.isfinite(keras.ops.convert_to_numpy(weight)).all():
            raise Diverged(_diverged(f"{weight.path} is not finite after step {step}", epoch, run))


def _diverged(what, epoch, run):
    last = _last_good(run)
    weights = "smaller alpha or beta, smaller lam_1 and lam_2, " if run.settings.head == "gpq" else ""
    advice = f"Try --precision=float32, a smaller --learning_rate, {weights}or another --init"
    return f"{what} (epoch {epoch}); {last}. {advice}"


def _last_good(run):
    path = run.saves and run.saves.newest
    return f"the last good model is {path}" if path else "no model was saved yet"


@contextlib.contextmanager
def _saving(run):
    """Within it an error of the system, such as a full disk, tells from which model the run can go on."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {_last_good(run)}", error.filename) from error


def _stopped(number, step, total, path):
    name = stopping.NAMES.get(number, "stopped with another worker")
    saved = f"saved {path}" if path else "saved by the first worker"
    return f"{name} after step {step} of {total}; {saved}, --resume={starting.LAST} goes on from there"


def _board(settings, stem):
    """The run's curves where they are wanted, as a context."""
    if not settings.tensorboard:
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
