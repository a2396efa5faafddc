"""One compiled optimisation step, on TensorFlow or on JAX, on one device or several, from the same losses."""

import keras
from keras import ops

from gpq_tf import replicas
from gpq_tf.accumulation import accumulated, losses_and_gradients
from gpq_tf.ops import compiled
from gpq_tf.strategies import share


def make_step(
    model,
    losses_of,
    optimizer,
    jit=False,
    *,
    describe=None,
    strategy=None,
    batch_size=None,
    clip_norm=None,
    accumulate=1,
):
    """Compile "losses, gradients, update" for the backend in use.

    With a strategy every replica describes its part of the batch, and computes the losses from the descriptors of all
    (`replicas.gather`), so that they are those of the whole batch, on each replica the same. The optimiser adds up the
    replicas' gradients; each loss is therefore divided by their number.

    Args:
        model: keras.Model or Layer, built; all its trainable variables are trained.
        losses_of: callable(described) -> dict of scalar tensors with the key "loss", which is minimised.
        optimizer: keras.optimizers.Optimizer, of this step alone.
        jit: bool, whether TensorFlow is to use XLA for the whole step; not with a strategy, whose communication XLA
            does not compile.
        describe: callable(batch) -> dict of tensors whose rows belong to images. It calls the model in training mode,
            so that batch normalisation moves. None: `losses_of` takes the batch itself, and does so.
        strategy: tf.distribute.Strategy in whose scope model and optimizer were made, or None.
        batch_size: int, images that each array of a batch is a multiple of; needed to divide a batch.
        clip_norm: float, largest length of the gradient of all variables together, beyond which it is scaled down; or
            None.
        accumulate: int, parts of a batch that go through the network one after the other (`gpq_tf.accumulation`); not
            with jit on TensorFlow, since XLA would join the two passes and keep all parts.

    Returns:
        callable(batch, a dict of numpy arrays) -> dict of scalar tensors, the losses before the update; of a
        LossScaleOptimizer also loss_scale, the factor of this step, and skipped, 1 where gradients overflowed, else 0.

    Raises:
        ValueError: if the backend is neither TensorFlow nor JAX.
    """
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    n = strategy.num_replicas_in_sync if strategy else 1

    def parts_of(batch, replica=0):
        """A replica's part of each part: what goes through the network at a time is the same on any number of them."""
        parts = [share(batch, i, accumulate, batch_size) for i in range(accumulate)] if accumulate > 1 else [batch]
        return [share(part, replica, n, batch_size // accumulate) for part in parts] if n > 1 else parts

    backend = keras.backend.backend()
    if backend == "tensorflow":
        if strategy:  # what is left of a step without communication, on several devices
            losses_of = compiled(losses_of)
        step = _tensorflow_step(model, describe, losses_of, optimizer, clip_norm, accumulate)
        if strategy:
            return _on_all_replicas(step, strategy, parts_of)
        run = compiled(step, jit)
    elif backend == "jax":
        run = _jax_step(model, describe, losses_of, optimizer, clip_norm)
    else:
        raise ValueError(f"Invalid backend. Expected tensorflow or jax to train. Received: {backend}")
    return lambda batch: run(parts_of(batch))


def _on_all_replicas(step, strategy, parts_of):
    import tensorflow as tf

    def of_replica(batch, context):
        return tf.nest.map_structure(tf.convert_to_tensor, parts_of(batch, context.replica_id_in_sync_group))

    run = compiled(lambda parts: strategy.run(step, (parts,)), jit=False)

    def take_step(batch):
        parts = strategy.experimental_distribute_values_from_function(lambda context: of_replica(batch, context))
        return {name: strategy.experimental_local_results(value)[0] for name, value in run(parts).items()}

    return take_step


def _tensorflow_step(model, describe, losses_of, optimizer, clip_norm, accumulate):
    import tensorflow as tf

    def gathered_losses(described):
        """The losses, and what is minimised: of every replica an equal part of it."""
        losses = losses_of({name: replicas.gather(value) for name, value in described.items()})
        scaled, n = optimizer.scale_loss(losses["loss"]), replicas.count()
        return losses, scaled / n if n > 1 else scaled

    def step(parts):
        variables = [variable.value for variable in model.trainable_variables]
        if accumulate > 1:
            losses, gradients = losses_and_gradients(describe, gathered_losses, parts, variables)
        else:
            with tf.GradientTape() as tape:
                losses, scaled = gathered_losses(describe(parts[0]) if describe else parts[0])
            gradients = tape.gradient(scaled, variables)
        n, scale = replicas.count(), optimizer.scale_loss(1.0)
        if clip_norm is not None:
            # Of the sum over the replicas, which the optimiser makes once more: it gets an equal part of each.
            gradients = [part / n for part in clipped(replicas.total(*gradients), clip_norm, scale)]
        elif n > 1 and isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            gradients[0] += replicas.not_a_number_unless(all_finite(gradients))
        losses = losses | _of_scaling(optimizer, scale, gradients)
        optimizer.apply(gradients, model.trainable_variables)
        stop = parts[0].get("stop")
        return losses if stop is None else losses | {"stop": replicas.total(stop)[0]}

    return step


def clipped(gradients, clip_norm, scale=1.0):
    """Gradients scaled down where they are, all together, longer than clip_norm.

    Args:
        gradients: list of float tensors.
        clip_norm: float > 0.
        scale: float, factor by which the gradients are too large (`LossScaleOptimizer.scale_loss`).

    Returns:
        list like `gradients`; not finite where one of them is not.

    Example:
        >>> [float(g) for g in clipped([ops.convert_to_tensor(3.0), ops.convert_to_tensor(4.0)], 1.0)]
        [0.6000000238418579, 0.800000011920929]
    """
    norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients))
    factor = ops.minimum(1.0, clip_norm * scale / norm)
    return [gradient * factor for gradient in gradients]


def all_finite(tensors):
    """Whether all values of a list of float tensors are finite, a bool tensor."""
    return ops.all(ops.stack([ops.all(ops.isfinite(tensor)) for tensor in tensors]))


def _of_scaling(optimizer, scale, gradients):
    """What scaling the loss for 16-bit floats does to a step: the factor, and 1 where the step is skipped, else 0."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return {}
    return {"loss_scale": scale, "skipped": 1.0 - ops.cast(all_finite(gradients), "float32")}


def _jax_step(model, describe, losses_of, optimizer, clip_norm):
    import jax

    # JAX knows no variables: their values go in and come out. Keras walks through all layers to list them, so once.
    groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)

    def with_values(function, *values):
        """What `function()` returns where the variables have these values, group by group, and the state it leaves."""
        pairs = [pair for group, own in zip(groups, values, strict=True) for pair in zip(group, own, strict=True)]
        with keras.StatelessScope(state_mapping=pairs) as scope:
            result = function()
        return result, [scope.get_current_value(variable) for variable in groups[1]]

    def scaled_losses(described):
        losses = losses_of(described)
        return losses, optimizer.scale_loss(losses["loss"]), optimizer.scale_loss(1.0)

    def of_whole(trainable, state, slots, batch):
        def minimised(trainable):
            computed = with_values(
                lambda: scaled_losses(describe(batch) if describe else batch), trainable, state, slots
            )
            return computed[0][1], computed

        (_, ((losses, _, scale), state)), gradients = jax.value_and_grad(minimised, has_aux=True)(trainable)
        return losses, scale, gradients, state

    def of_parts(trainable, state, slots, parts):
        def described(trainable, state, part):
            return with_values(lambda: describe(part), trainable, state, slots)

        def minimised(trainable, joined):
            (losses, scaled, scale), _ = with_values(lambda: scaled_losses(joined), trainable, state, slots)
            return scaled, (losses, scale)

        (losses, scale), gradients, state = accumulated(described, minimised, trainable, state, parts)
        return losses, scale, gradients, state

    def update(trainable, state, slots, parts):
        if len(parts) == 1:
            losses, scale, gradients, state = of_whole(trainable, state, slots, parts[0])
        else:
            losses, scale, gradients, state = of_parts(trainable, state, slots, parts)
        if clip_norm is not None:
            gradients = clipped(gradients, clip_norm, scale)
        losses = losses | _of_scaling(optimizer, scale, gradients)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return losses, trainable, state, slots

    compiled_update = jax.jit(update)

    def step(parts):
        losses, *values = compiled_update(*([variable.value for variable in group] for group in groups), parts)
        for group, new_values in zip(groups, values, strict=True):
            for variable, value in zip(group, new_values, strict=True):
                variable.assign(value)
        return losses

    return step
