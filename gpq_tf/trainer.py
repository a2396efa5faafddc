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

from gpq_tf import convert, curves, heads, measures, model_file, stopping, strategies, training_state
from gpq_tf import settings as settings_module
from gpq_tf.convert import keras_resnet, mat
from gpq_tf.data import check_image_size, lazy
from gpq_tf.network import RetrievalModel, find_model, load_model
from gpq_tf.saves import Saves, find_last
from gpq_tf.train_step import make_step

# The first step compiles; the estimate of a run's cost rests on the steps after it.
ESTIMATE_STEPS = 4
# settings.resume: the newest save of the run.
LAST = "last"


class Diverged(ArithmeticError):
    """Training met a loss or a weight that is not finite."""


class Finished(ValueError):
    """The run that is to go on has all its steps behind it."""


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
        Finished: if `settings.resume` has no steps left.
        Diverged: at a loss that is not finite; what was saved before stays.
        OSError: if a file cannot be written.
        stopping.LostWorker: if another worker is gone.
        stopping.Stopped: by SIGTERM or Ctrl-C, once the run is saved.
    """
    if settings.resume:
        settings = settings_of_resumed(settings)
    strategy = strategy or strategies.from_settings(settings)
    is_chief = strategies.is_chief(strategy)
    report = (report if is_chief else None) or (lambda line: None)
    settings, why_scratch = settings_of_start(settings_of_data(settings, data))
    _check(settings, data)
    strategies.check_batch_size(settings, strategy)
    if strategy and settings.jit_compile is True:
        raise ValueError(
            "Invalid jit_compile. Expected auto or False on several devices, whose communication XLA does not compile. "
            "Received: jit_compile=True"
        )
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
            model, origin, done = _resumed(settings, optimizer, total, fingerprint)
        else:
            model, origin = initial_model(settings)
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
        with _Pending(run, deferred=_is_asynchronous() and not several) as pending:
            for step, batch in enumerate(batches, done + 1):
                epoch = (step - 1) // steps_per_epoch + 1
                take_step = compiled_step(recipe.is_frozen(settings, epoch))
                if several:
                    batch["stop"] = np.float32(request.signal is not None)
                with strategies.naming_lost_workers(strategy, saves.last_good):
                    losses = take_step(batch)
                    stop = bool(float(losses.pop("stop"))) if several else request.signal is not None
                pending.add(step, epoch, losses, rate(step - 1), len(batch["images"]))
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
                    raise stopping.Stopped(
                        _stopped(request.signal, step, total, path), request.signal or signal.SIGTERM
                    )
    return model, saves.last_good if is_chief else None


class _Run(typing.NamedTuple):
    """What stays the same throughout a run."""

    model: RetrievalModel
    optimizer: keras.optimizers.Optimizer
    settings: settings_module.Settings
    data: object
    measure: measures.Measure
    saves: Saves
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
        deferred: bool; False asks at once.
    """

    def __init__(self, run, deferred):
        self._run, self._deferred, self._step, self._loss = run, deferred, None, None

    def add(self, *step):
        """Take note of a step, the arguments of `_finish_step`, and finish the one before it, or this one."""
        before, self._step = self._step, step
        if before:
            self._loss = _finish_step(self._run, *before)
        if not self._deferred:
            self.finish()

    def finish(self):
        """Finish what is under way; returns the loss of the last step."""
        step, self._step = self._step, None
        if step:
            self._loss = _finish_step(self._run, *step)
        return self._loss

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.finish()  # a step that was taken counts, whatever ended the next


def _finish_step(run, step, epoch, losses, rate, n_images):
    """Wait for a step, check its loss and tell of it; returns the loss."""
    losses = {name: float(value) for name, value in losses.items()}
    if not math.isfinite(losses["loss"]):
        raise Diverged(_diverged(f"Loss is {losses['loss']} at step {step}", epoch, run))
    rate = float(keras.ops.convert_to_numpy(rate))
    entry = {**losses, "lr": rate, "images_per_second": round(n_images / run.clock.tick(), 1)}
    run.log.write(event="step", step=step, epoch=epoch, **entry)
    if run.board is not None:
        run.board.scalars(step, entry)
    if run.bar is not None:
        run.bar.set_postfix({name: f"{value:.4g}" for name, value in entry.items()}, refresh=False)
        run.bar.update(1)
    return losses["loss"]


def _evaluate(run, step, epoch, loss):
    """Measure the model on all queries, and keep it where it is the best so far."""
    _check_finite(run, step, epoch)
    scores = run.measure.evaluate(run.model, run.data, run.settings)
    run.model.record, run.model.training_state = {"epoch": epoch, "step": step, **scores, **run.about}, None
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
    path = run.saves.save_stopped(run.model)
    run.log.write(event="stopped", step=step, epoch=epoch, path=str(path))


def settings_of_start(settings):
    """The settings with what init = "imagenet" means here, and why it is nothing, where it is.

    It means a file of Keras's ResNet50: the one that ImageNet_pretrained_path names if it was given, else what Keras
    has downloaded before or, with `download`, can download now, else ImageNet_pretrained_path with ".h5". Without all
    of them, and for another width than 1, training starts from scratch.

    Args:
        settings: gpq_tf.settings.Settings.

    Returns:
        (settings, str): gpq_tf.settings.Settings whose init is a path or None; "" or what to add to the line that tells
        where training starts.

    Raises:
        ValueError: if ImageNet_pretrained_path was given and there is no such file.
    """
    if settings.init != "imagenet" or settings.head != "cgd" or settings.resume:
        return settings, ""
    file, why = _imagenet_file(settings)
    return settings.completed({"init": file and str(file)}), why


def _imagenet_file(settings):
    """(Path or None, str): see `settings_of_start`."""
    local = keras_resnet.find(settings.ImageNet_pretrained_path)
    if "ImageNet_pretrained_path" in settings.given:
        if local is None:
            raise ValueError(
                "Invalid ImageNet_pretrained_path. Expected a .h5 file with head=cgd. "
                f"Received: {settings.ImageNet_pretrained_path}, no such file"
            )
        return local, ""
    if settings.width_multiplier != 1 or settings.backbone != "resnet_v1":
        return None, ": ImageNet weights are for width_multiplier=1 and backbone=resnet_v1"
    kept, why = keras_resnet.kept_by_keras(), "--download=True fetches them"
    if kept.is_file():
        return kept, ""
    if settings.download:
        try:
            return keras_resnet.download(), ""
        except OSError as error:
            why = str(error)
    if local:
        return local, ""
    return None, f": no ImageNet weights in {kept} nor {settings.ImageNet_pretrained_path}.h5; {why}"


def initial_model(settings):
    """The model that training starts from, and a line that says which.

    --init if given, else (for gpq) ImageNet_pretrained.mat if present, else drawn from the seed.

    Args:
        settings: gpq_tf.settings.Settings.

    Returns:
        (RetrievalModel, str).

    Raises:
        ValueError: if the file is damaged, or its backbone has another width, or a file that was asked for is absent.
    """
    architecture = heads.architecture_of(settings)
    if settings.init is not None and not (settings.head == "cgd" and keras_resnet.find(settings.init)):
        n_book = settings.n_book if "n_book" in settings.given else None
        other, _ = convert.load(settings.init, n_book)
        model = RetrievalModel(**_as_converted(architecture, other), dtype=settings.precision)
        return model, _copy_from(settings.init, other, model)
    model = RetrievalModel(**architecture, dtype=settings.precision)
    if settings.init is not None:
        keras_resnet.load_backbone(model.backbone, settings.init)
        return model, f"starting from {settings.init} (backbone; head from seed {settings.seed})"
    mat_file = mat.find(settings.ImageNet_pretrained_path)
    if mat_file is not None and settings.head == "gpq":
        mat.load_backbone(model.backbone, mat_file)
        return model, f"starting from {mat_file} (backbone; head from seed {settings.seed})"
    if settings.given & {"ImagNet_pretrained_path", "ImageNet_pretrained_path"}:
        expected = "a .mat file" if settings.head == "gpq" else f"none with head={settings.head}: --init takes models"
        raise ValueError(
            f"Invalid ImageNet_pretrained_path. Expected {expected}. Received: {settings.ImageNet_pretrained_path}"
            f"{'' if mat_file else ', no such file'}"
        )
    return model, f"starting from scratch (seed {settings.seed})"


def settings_of_resumed(settings):
    """The settings with which a run goes on: those it was saved with, then what is given now.

    A converted checkpoint knows its architecture only; the rest are the present settings. resume = "last" means the
    newest save of such a run in model_save_path; without one, a new run.

    Args:
        settings: gpq_tf.settings.Settings whose `resume` names a model with a training state.

    Returns:
        gpq_tf.settings.Settings.

    Raises:
        ValueError: if there is no such model, or what is given contradicts its architecture.
    """
    if settings.resume == LAST:
        last = find_last(Path(settings.model_save_path) / heads.recipe(settings.head).file_stem(settings))
        settings = settings.completed({"resume": last and str(last)})
        if last is None:
            return settings
    _, architecture, record, *_ = model_file.read(find_model(settings.resume))
    fixed = heads.fixed_by(architecture)
    settings_module.check_fixed(settings, fixed, settings.resume)
    before = settings_module.from_dict(record["settings"], settings.resume) if "settings" in record else settings
    # On which devices is no part of a run: it may go on on others.
    given = {name: getattr(settings, name) for name in {*settings.given, "strategy"}}
    return before.completed({"legacy": architecture["legacy"], **given, **fixed}, settings.given | set(fixed))


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


def _resumed(settings, optimizer, total, fingerprint):
    """(model, line, steps done) of the run that settings.resume continues; the optimiser is filled."""
    model = load_model(settings.resume, settings.legacy, settings.precision)
    state = model_file.training_state(model_file.read(find_model(settings.resume)))
    if state is None:
        raise ValueError(
            f"Invalid resume {settings.resume!r}. Expected a model that train.py saved, or a converted checkpoint of "
            "training. Received: a model without the optimiser's state; --init starts a new run from it"
        )
    if model.record.get("data_sha256", fingerprint) != fingerprint:
        raise ValueError(
            f"Invalid data. Expected the images that {settings.resume} was trained on: {model.record.get('source')}. "
            "Received: others; --init starts a new run from it"
        )
    optimizer.build(model.trainable_variables)
    done = training_state.into_optimizer(state, optimizer)
    if done >= total:
        raise Finished(
            f"Invalid total_epochs. Expected more than the {done} steps that {settings.resume} has behind it. "
            f"Received: total_epochs={settings.total_epochs}, {total} steps"
        )
    return model, f"resuming {settings.resume} after step {done}", done


def _as_converted(architecture, other):
    """The architecture, laid out as a converted checkpoint's where no settings describe that (`heads.cgd`)."""
    if "layout" not in architecture or other.head_name != "cgd" or "backbone" in heads.fixed_by(other.architecture):
        return architecture
    own = ("layout", "use_bias", "gem_floor", "l2_epsilon", "normalize_branches", "normalize_combined")
    return architecture | {name: other.architecture[name] for name in (*own, "classifier_place")}


def _copy_from(source, other, model):
    """Copy backbone and, where its sizes agree, head of another model; returns a line that says what was copied."""
    _assign_all(other.backbone, model.backbone, source)
    shapes = [[tuple(weight.shape) for weight in part.head.weights] for part in (other, model)]
    if shapes[0] == shapes[1]:
        _assign_all(other.head, model.head, source)
        return f"starting from {source} (backbone and head)"
    return f"starting from {source} (backbone; the head has other sizes and comes from the seed)"


def _assign_all(source_layer, target_layer, source):
    if len(source_layer.weights) != len(target_layer.weights):
        raise ValueError(
            f"Invalid init {source!r}. Expected {len(target_layer.weights)} variables of {target_layer.name}. "
            f"Received: {len(source_layer.weights)}; is it of another head or backbone?"
        )
    for old, new in zip(source_layer.weights, target_layer.weights, strict=True):
        if tuple(old.shape) != tuple(new.shape):
            raise ValueError(
                f"Invalid init {source!r}. Expected {new.path} {tuple(new.shape)}. Received: {tuple(old.shape)}; "
                "is its width_multiplier another?"
            )
        new.assign(old)


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

    # On a CPU XLA makes this step slower; across several GPUs the collectives do not compile.
    return len(tf.config.list_physical_devices("GPU")) == 1


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
    newest = run.saves.newest
    last = f"the last good model is {newest}" if newest else "no model was saved yet"
    weights = "smaller alpha or beta, smaller lam_1 and lam_2, " if run.settings.head == "gpq" else ""
    advice = f"Try --precision=float32, a smaller --learning_rate, {weights}or another --init"
    return f"{what} (epoch {epoch}); {last}. {advice}"


def _stopped(number, step, total, path):
    name = stopping.NAMES.get(number, "stopped with another worker")
    saved = f"saved {path}" if path else "saved by the first worker"
    return f"{name} after step {step} of {total}; {saved}, --resume={LAST} goes on from there"


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
