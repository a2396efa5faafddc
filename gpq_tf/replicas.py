"""What the replicas of a distributed step tell one another; without other replicas nothing changes and nothing is sent.

The losses compare the images of a batch, so they must see the batch of all replicas; batch normalisation likewise needs
its statistics. Everything here is called inside `tf.distribute.Strategy.run`.
"""

import keras
from keras import ops


def count():
    """int, replicas that compute this step together; 1 outside of a distributed step."""
    context = _context()
    return context.num_replicas_in_sync if context else 1


def gather(x):
    """The rows of all replicas, those of the first replica first.

    Every replica computes the same from them, and the step adds up the gradients of all R replicas' losses, each
    divided by R. What flows back into the rows of this replica is therefore R times its share, and nothing need be
    sent.

    Args:
        x: (b, ...), of any type.

    Returns:
        (R * b, ...), on every replica the same; differentiable where x is floating point.

    Example:
        >>> gather(ops.ones((2, 3))).shape == (2, 3)
        True
    """
    context = _context()
    if context is None:
        return x
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    n, size, own = context.num_replicas_in_sync, x.shape[0], context.replica_id_in_sync_group

    def of_all(x):
        gathered = context.all_gather(_placed(context, x), axis=0)
        gathered.set_shape([n * size, *x.shape[1:]])
        return gathered

    if not x.dtype.is_floating:
        return of_all(x)

    @tf.custom_gradient
    def with_gradient(x):
        return of_all(x), lambda upstream: n * upstream[own * size : (own + 1) * size]

    return with_gradient(x)


def mean(*values):
    """The mean over the replicas of each value, a list. For use in written out gradients: it has none of its own.

    Args:
        *values: float tensors, on every replica of the same shapes.
    """
    return _reduced("MEAN", values)


def total(*values):
    """The sum over the replicas of each value, a list.

    Args:
        *values: float tensors, on every replica of the same shapes.
    """
    return _reduced("SUM", values)


def not_a_number_unless(condition):
    """float32 (), 0, or NaN where a replica's bool tensor is false: what is found on one spoils the step on all."""
    return total(ops.where(condition, 0.0, float("nan")))[0]


def _reduced(operation, values):
    context = _context()
    if context is None:
        return list(values)
    import tensorflow as tf

    values = [_placed(context, value) for value in values]
    return context.all_reduce(getattr(tf.distribute.ReduceOp, operation), values)


def _placed(context, x):
    """`x` on a device that it names: a worker's only replica is asked for it, and an input of a step names none."""
    import tensorflow as tf

    devices = context.strategy.extended.worker_devices
    if len(devices) > 1:
        return x
    with tf.device(devices[0]):
        return tf.identity(x)


def _context():
    """tf.distribute's replica context where there are other replicas, else None."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context if context is not None and context.num_replicas_in_sync > 1 else None
