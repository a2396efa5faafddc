"""Gradients of a batch that memory does not hold at once: its parts go through the network one after the other.

The losses compare images with one another, so the mean of the parts' losses is another loss. Instead every part is
described first, and nothing but the descriptors kept; the losses of all of them give the gradient of each descriptor;
and then every part is described again, and its descriptors' gradients go back through the network (Gao et al., "Scaling
Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021). Losses and gradients are those of the whole
batch, for two passes forwards in place of one, except that batch normalisation sees one part at a time.
"""

import keras


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
        with tf.control_dependencies(tf.nest.flatten(described[-1:])), keras.StatelessScope():
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
        with tf.control_dependencies(gradients), tf.GradientTape() as tape:
            again = describe(part)
        outputs, weights = [again[name] for name in trained], [upstream[name][i] for name in trained]
        own = tape.gradient(outputs, variables, output_gradients=weights, unconnected_gradients="zero")
        gradients = [total + each for total, each in zip(gradients, own, strict=True)]
    return losses, gradients
