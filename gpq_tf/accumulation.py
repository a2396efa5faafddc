"""Gradients of a batch that memory does not hold at once: its parts go through the network one after the other.

The losses compare images with one another, so the mean of the parts' losses is another loss. Instead every part is
described first, and nothing but the descriptors kept; the losses of all of them give the gradient of each descriptor;
and then every part is described again, and its descriptors' gradients go back through the network (Gao et al., "Scaling
Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021). Losses and gradients are those of the whole
batch, for two passes forwards in place of one, except that batch normalisation sees one part at a time.
"""

import keras
from keras import ops


def losses_and_gradients(describe, losses_of, parts, variables):
    """Losses of all parts together, and their gradients.

    Args:
        describe: callable(part) -> dict of tensors whose rows belong to images. It is called twice for each part; what
            it assigns to variables the first time is dropped.
        losses_of: callable(dict of the parts' tensors, joined) -> (dict of scalars, the scalar to minimise).
        parts: list of dicts of tensors.
        variables: list of tf.Variable.

    Returns:
        (dict of scalars, list of tensors like `variables`).
    """
    import tensorflow as tf

    described = []
    for part in parts:
        # One after the other, or TensorFlow would compute them side by side, in as much memory as the whole.
        with _after(tf.nest.flatten(described[-1:])), keras.StatelessScope():
            described.append(describe(part))
    joined = {name: tf.concat([each[name] for each in described], axis=0) for name in described[0]}
    trained = [name for name, value in joined.items() if value.dtype.is_floating]
    with tf.GradientTape() as tape:
        tape.watch([joined[name] for name in trained])
        losses, minimised = losses_of(joined)
    wanted = ({name: joined[name] for name in trained}, variables)
    to_described, gradients = tape.gradient(minimised, wanted, unconnected_gradients="zero")
    upstream = {name: tf.split(value, len(parts)) for name, value in to_described.items()}
    for i, part in enumerate(parts):
        with _after(gradients), tf.GradientTape() as tape:
            again = describe(part)
        outputs, weights = [again[name] for name in trained], [upstream[name][i] for name in trained]
        own = tape.gradient(outputs, variables, output_gradients=weights, unconnected_gradients="zero")
        gradients = [total + each for total, each in zip(gradients, own, strict=True)]
    return losses, gradients


def _after(tensors):
    """Context whose operations wait for all tensors: each for one operation that does, not for every tensor itself."""
    import tensorflow as tf

    with tf.control_dependencies(tensors):
        return tf.control_dependencies([tf.no_op()])


def accumulated(described, minimised, values, state, parts):
    """The same on JAX, where variables are arguments and results.

    Args:
        described: callable(values, state, part) -> (dict of arrays whose rows belong to images, the new state).
        minimised: callable(values, dict of the parts' arrays, joined) -> (the scalar to minimise, what else is wanted).
        values: list of arrays, of the trained variables.
        state: list of arrays, of the other variables. The first pass drops what it makes of them.
        parts: list of dicts of arrays.

    Returns:
        (what else is wanted, list of gradients like `values`, the new state).
    """
    import jax

    def after(part, done):
        """A part that can be used when `done` is computed: one after the other, as above."""
        return jax.lax.optimization_barrier((part, done))[0]

    first = []
    for part in parts:
        first.append(described(values, state, after(part, first[-1:]))[0])
    joined = {name: ops.concatenate([each[name] for each in first]) for name in first[0]}
    fixed = {name: value for name, value in joined.items() if not keras.backend.is_float_dtype(value.dtype)}
    trained = {name: value for name, value in joined.items() if name not in fixed}
    slope = jax.value_and_grad(lambda values, trained: minimised(values, fixed | trained), (0, 1), has_aux=True)
    (_, wanted), (gradients, upstream) = slope(values, trained)
    upstream = {name: ops.split(value, len(parts)) for name, value in upstream.items()}
    for i, part in enumerate(parts):
        part = after(part, gradients)

        def again(values, part=part, state=state):
            outputs, new_state = described(values, state, part)
            return {name: outputs[name] for name in trained}, new_state

        _, take_back, state = jax.vjp(again, values, has_aux=True)
        (own,) = take_back({name: pieces[i] for name, pieces in upstream.items()})
        gradients = [total + each for total, each in zip(gradients, own, strict=True)]
    return wanted, gradients, state
