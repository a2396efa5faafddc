"""Heads: what turns pooled features into descriptors, and which losses train it.

A head is one module. It defines a layer (`GPQHead`) and the training recipe, plain functions with fixed names:
file_stem(settings), steps_per_epoch(data, settings), draw_batch(data, settings, step),
training_losses(model, batch, settings), learning_rate() and optimizer().
"""

import importlib

NAMES = ("gpq",)


def recipe(name):
    """The module of a head.

    Args:
        name: str, one of `NAMES`.

    Raises:
        ValueError: if there is no such head.

    Example:
        >>> recipe("gpq").GPQHead.head_name
        'gpq'
    """
    if name not in NAMES:
        raise ValueError(f"Invalid head. Expected one of {', '.join(NAMES)}. Received: head={name!r}")
    return importlib.import_module(f"gpq_tf.heads.{name}")
