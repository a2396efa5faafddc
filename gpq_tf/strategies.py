"""Which devices train together: a tf.distribute strategy from the settings, and what it means for a step's batch."""

import contextlib
import json
import os
import re
import zlib

import keras
import numpy as np

from gpq_tf import replicas
from gpq_tf.ops import compiled
from gpq_tf.saves import newest
from gpq_tf.stopping import LostWorker, ending_at_once

# Settings that say where a worker finds or puts something, in which workers may differ.
_OF_A_WORKER = {
    "data_dir",
    "meta_dir",
    "download",
    "ImagNet_pretrained_path",
    "ImageNet_pretrained_path",
    "cifar10_label_sim_path",
    "model_save_path",
    "model_load_path",
    "init",
    "resume",
    "keep",
    "tensorboard",
    "query_image",
}
# What a step draws once for all images, by the keys of its batch.
_OF_THE_BATCH = ("jitter_order", "stop")


def from_settings(settings):
    """The strategy that `settings.strategy` names.

    "auto" is multiworker where TF_CONFIG names several workers, mirrored where this machine has several GPUs, with as
    many of them as can share a batch evenly, else one.

    TensorFlow joins the workers when it starts: with several this comes before everything else that uses it.

    Args:
        settings: gpq_tf.settings.Settings.

    Returns:
        tf.distribute.Strategy, or None for one device.

    Raises:
        ValueError: if there is only one device to mirror on, TF_CONFIG names no workers, or the backend is not
            TensorFlow.
    """
    name = settings.strategy
    if keras.backend.backend() != "tensorflow":
        if name not in ("auto", "one"):
            raise ValueError(f"Invalid strategy. Expected auto or one, without TensorFlow. Received: strategy={name}")
        if name == "auto" and len(_workers()) > 1:
            raise ValueError(
                "Invalid TF_CONFIG. Expected one worker, without TensorFlow: each would train by itself. "
                f"Received: {os.environ['TF_CONFIG']}; --strategy=one trains here all the same"
            )
        return None
    n_workers = len(_workers()) if name in ("auto", "multiworker") else 0
    if name == "multiworker" and not n_workers:
        raise ValueError(
            "Invalid TF_CONFIG. Expected a cluster with workers and a task, with strategy=multiworker. "
            f"Received: {os.environ.get('TF_CONFIG') or 'none'}"
        )
    import tensorflow as tf

    if name == "multiworker" or (name == "auto" and n_workers > 1):
        strategy = _join_workers()
    else:
        devices = _devices_to_mirror_on(name, settings)
        strategy = tf.distribute.MirroredStrategy(devices) if devices else None
    return strategy


def waits_for(settings):
    """A line for the user where `from_settings` waits for other workers, else None.

    Raises:
        ValueError: as `from_settings`.
    """
    may_wait = settings.strategy in ("auto", "multiworker") and keras.backend.backend() == "tensorflow"
    workers = _workers() if may_wait else []
    return f"waiting for {len(workers)} workers: {', '.join(workers)}" if len(workers) > 1 else None


def _join_workers():
    import tensorflow as tf

    try:
        with ending_at_once():
            return tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.OpError as error:
        raise ValueError(
            f"Invalid TF_CONFIG. Expected a free address of this machine as that of its worker. "
            f"Received: {os.environ['TF_CONFIG']}: {error.message}"
        ) from error


def scope(strategy):
    """The context in which model and optimizer of a strategy are made; of None, nothing."""
    return strategy.scope() if strategy else contextlib.nullcontext()


def _devices_to_mirror_on(name, settings):
    import tensorflow as tf

    devices = [device.name for device in tf.config.list_logical_devices("GPU")]
    if name == "auto":
        n = most_that_share(len(devices), settings.batch_size // settings.accumulate)
        return devices[:n] if n > 1 else []
    if name == "one":
        return []
    devices = devices or [device.name for device in tf.config.list_logical_devices("CPU")]
    if len(devices) < 2:
        raise ValueError(f"Invalid strategy. Expected one with a single device, {devices[0]}. Received: mirrored")
    return devices


def most_that_share(n_device, batch_size):
    """The largest number of devices, up to n_device, that divides batch_size; 0 of 0.

    Example:
        >>> most_that_share(8, 500), most_that_share(4, 500)
        (5, 4)
    """
    return max((n for n in range(1, n_device + 1) if batch_size % n == 0), default=0)


def describe(strategy):
    """One line for the user: what takes part."""
    return f"{strategy.num_replicas_in_sync} devices: {', '.join(strategy.extended.worker_devices)}" + (
        " and those of the other workers" if is_several_workers(strategy) else ""
    )


def _workers():
    """The addresses of the workers that TF_CONFIG names, a list."""
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        config = json.loads(text)
        cluster = config.get("cluster", {})
        by_type = {name: cluster.get(name, []) for name in ("chief", "worker")}
        if not all(isinstance(addresses, list) for addresses in by_type.values()):
            raise TypeError("lists")
        workers = [*by_type["chief"], *by_type["worker"]]
        index, kind = (config["task"]["index"], config["task"]["type"]) if workers else (0, None)
        takes_part = kind not in ("evaluator", "ps")
        if workers and takes_part and (isinstance(index, bool) or not 0 <= index < len(by_type[kind])):
            raise IndexError(index)
        if not all(re.fullmatch(r".+:\d+", address) for address in workers):
            raise ValueError("addresses")
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(
            "Invalid TF_CONFIG. Expected JSON with a cluster, lists of addresses host:port by the names chief and "
            f"worker, and a task, the type and index of one of them. Received: {text}"
        ) from error
    if not takes_part:
        raise ValueError(
            f"Invalid TF_CONFIG. Expected the task of a chief or worker. Received: {kind}, which takes no part in "
            "synchronous training and need not be started"
        )
    return workers


def check_batch_size(settings, strategy):
    """Refuse a batch that cannot be divided evenly.

    Raises:
        ValueError: if batch_size is not a multiple of the replicas' number times `settings.accumulate`.
    """
    n_replicas, n_parts = strategy.num_replicas_in_sync if strategy else 1, settings.accumulate
    if settings.batch_size % (n_replicas * n_parts):
        raise ValueError(
            f"Invalid batch_size. Expected a multiple of {n_replicas * n_parts}: {n_replicas} replicas, "
            f"accumulate={n_parts}. Received: batch_size={settings.batch_size}"
        )


def is_several_workers(strategy):
    """Whether other processes take part."""
    resolver = getattr(strategy, "cluster_resolver", None)
    return resolver is not None and bool(resolver.task_type)


def is_chief(strategy):
    """Whether this process measures, reports and saves: with several workers one of them does."""
    if not is_several_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return resolver.task_type == "chief" if has_chief else resolver.task_id == 0


def check_equal(strategy, step, settings, fingerprint):
    """Refuse workers that do not train the same: from another step, with other settings or other data.

    Args:
        strategy: tf.distribute.Strategy or None.
        step: int, steps done: another where a worker has not found the save of the others.
        settings: gpq_tf.settings.Settings.
        fingerprint: str, of the data.

    Raises:
        ValueError: if they differ.
    """
    if not is_several_workers(strategy):
        return
    import tensorflow as tf

    trained = {name: value for name, value in settings.as_dict().items() if name not in _OF_A_WORKER}
    # 31 bits each: an int32 holds them.
    hashes = (zlib.crc32(text.encode()) >> 1 for text in (json.dumps(trained, sort_keys=True), fingerprint))
    own = np.array([[step, *hashes]], "int32")
    run = compiled(lambda: strategy.run(lambda: replicas.gather(tf.constant(own))), jit=False)
    with naming_lost_workers(strategy, None):
        found = strategy.experimental_local_results(run())[0].numpy()
    steps = sorted(set(found[:, 0].tolist()))
    if len(steps) > 1:
        raise ValueError(
            f"Invalid resume. Expected all workers to go on from the same step. Received: {step} here, "
            f"{', '.join(str(other) for other in steps if other != step)} elsewhere; does every worker see "
            "model_save_path?"
        )
    for what, column in (("settings", 1), ("data", 2)):
        if len(set(found[:, column].tolist())) > 1:
            raise ValueError(
                f"Invalid {what}. Expected the same on all workers. Received: others on at least one of them"
            )


@contextlib.contextmanager
def naming_lost_workers(strategy, stem):
    """Within it TensorFlow's errors about a worker that is gone become one line.

    Args:
        strategy: tf.distribute.Strategy or None.
        stem: Path, folder and beginning of the names of the run's saves, or None where there can be none yet.
    """
    if not is_several_workers(strategy):
        yield
        return
    import tensorflow as tf

    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        # Only one worker saves, but all see the folder.
        saved = newest(stem)[:1] if stem else []
        again = f"the last save is {saved[0]}; start all workers again, with --resume=last, to go on"
        raise LostWorker(f"Lost another worker; {again if saved else 'start all workers again'}") from error


def share(batch, index, n_replicas, batch_size):
    """One replica's part of a batch.

    A batch may stack several sets of batch_size images, such as labelled and unlabelled ones; of each the replica gets
    its part, so that the parts of all replicas, gathered, are in the order of the batch.

    Args:
        batch: dict of numpy arrays, or of such dicts, whose rows belong to images unless drawn for the whole batch.
        index: int, of the replica.
        n_replicas: int, divides batch_size.
        batch_size: int.

    Returns:
        dict like `batch`.

    Example:
        >>> share({"images": np.arange(8)}, 1, 2, batch_size=4)["images"]
        array([2, 3, 6, 7])
    """
    parts = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            parts[name] = share(value, index, n_replicas, batch_size)
        elif name in _OF_THE_BATCH:
            parts[name] = value
        else:
            shape = (-1, n_replicas, batch_size // n_replicas, *value.shape[1:])
            parts[name] = np.reshape(value.reshape(shape)[:, index], (-1, *value.shape[1:]))
    return parts
