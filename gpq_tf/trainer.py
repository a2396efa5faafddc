"""The training loop: draw a batch, take a step, log it; measure and save every save_term epochs."""

import functools
import signal
from pathlib import Path

import keras
import numpy as np

from gpq_tf import curves, heads, measures, running, starting, stopping, strategies
from gpq_tf.data import check_image_size, lazy
from gpq_tf.train_step import make_step


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
        running.Diverged: at a loss that is not finite, or where no step in 16 bits is taken any more; what was saved
            before stays.
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
    steps_per_epoch, fingerprint = recipe.steps_per_epoch(data, settings), data.fingerprint()
    model, optimizer, origin, done = _begin(recipe, settings, strategy, steps_per_epoch, fingerprint)
    strategies.check_equal(strategy, done, settings, fingerprint)
    about = {"origin": origin + why_scratch, "source": data.source, "data_sha256": fingerprint}
    about |= {"class_names": list(data.class_names), "settings": settings.as_dict()}
    report(about["origin"])
    if strategy:
        report(strategies.describe(strategy))
    stem = Path(settings.model_save_path) / recipe.file_stem(settings)
    measure = measures.MEASURES[recipe.PROTOCOL]
    with (
        running.opened(
            stem if is_chief else None,
            model,
            optimizer,
            settings,
            data,
            steps_per_epoch,
            done,
            about,
            measure,
            report,
            progress if is_chief else None,
        ) as run,
        stopping.on_request() as request,
    ):
        _take_steps(run, recipe, strategy, stem, request, done)
    return model, run.saves.last_good if is_chief else None


def _begin(recipe, settings, strategy, steps_per_epoch, fingerprint):
    """(model, optimizer, str that tells where training begins, int number of steps that lie behind)."""
    with strategies.naming_lost_workers(strategy, None), strategies.scope(strategy):
        optimizer = make_optimizer(recipe, settings, steps_per_epoch)
        if settings.resume:
            total = settings.total_epochs * steps_per_epoch
            model, origin, done = starting.resumed_model(settings, optimizer, total, fingerprint)
        else:
            (model, origin), done = starting.initial_model(settings), 0
        if strategy:
            synchronize(model, settings.sync_batch_norm)
        if not optimizer.built:  # LossScaleOptimizer would make its variables a second time
            optimizer.build(model.trainable_variables)
    return model, optimizer, origin, done


def _take_steps(run, recipe, strategy, stem, request, done):
    """All steps of a run that are left, its evaluations and saves in between.

    Raises:
        stopping.Stopped: where `request` has got a signal, once the run is saved.
    """
    settings, several = run.settings, strategies.is_several_workers(strategy)

    @functools.cache
    def compiled_step(frozen):
        return make_step(
            run.model,
            lambda described: recipe.compare(run.model, described, settings),
            run.optimizer,
            use_jit(settings),
            describe=lambda batch: recipe.describe(run.model, batch, settings, frozen),
            strategy=strategy,
            batch_size=settings.batch_size,
            clip_norm=settings.clip_norm,
            accumulate=settings.accumulate,
        )

    batches = lazy.ahead(functools.partial(_draw_batch, recipe, run.data, settings), range(done, run.total))
    rate = recipe.learning_rate(settings, run.steps_per_epoch)
    pending = running.Pending(run, rate, deferred=_is_asynchronous() and not several)
    for step, epoch, batch in _numbered(batches, run, pending, done):
        take_step = compiled_step(recipe.is_frozen(settings, epoch))
        if several:
            batch["stop"] = np.float32(request.signal is not None)
        with strategies.naming_lost_workers(strategy, stem):
            losses = take_step(batch)
            stop = bool(float(losses.pop("stop"))) if several else request.signal is not None
        pending.add(step, epoch, losses, len(batch["images"]))
        at_end = step % run.steps_per_epoch == 0
        evaluates = at_end and settings.eval_epoch and epoch % settings.eval_epoch == 0
        ends_term = at_end and (epoch % settings.save_term == 0 or epoch == settings.total_epochs)
        if evaluates or ends_term or stop:
            loss = pending.finish()
        # Whoever asks a run to stop may not wait for an evaluation.
        if run.saves and evaluates and not (stop and step < run.total):
            run.evaluate(step, epoch, loss)
            stop = stop or (not several and request.signal is not None)
        if run.saves and ends_term:
            run.save(step, epoch, loss)
        elif run.saves and stop:
            run.save_stopped(step, epoch)
        if stop and step < run.total:
            path = run.saves and run.saves.last_good
            raise stopping.Stopped(_stopped(request.signal, step, run.total, path), request.signal or signal.SIGTERM)


def _numbered(batches, run, pending, done):
    """(step, epoch, batch) of each. Where one cannot be read, what was learned is saved before the error goes on."""
    step = done
    try:
        for step, batch in enumerate(batches, done + 1):
            epoch = (step - 1) // run.steps_per_epoch + 1
            yield step, epoch, batch
    except (ValueError, OSError):  # of the next batch: what goes wrong with a step is not seen here
        if run.saves and step > done:
            pending.finish()
            run.save_stopped(step, epoch)
        raise


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


def _stopped(number, step, total, path):
    name = stopping.NAMES.get(number, "stopped with another worker")
    saved = f"saved {path}" if path else "saved by the first worker"
    return f"{name} after step {step} of {total}; {saved}, --resume={starting.LAST} goes on from there"
