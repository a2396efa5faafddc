"""One compiled optimisation step, on TensorFlow or on JAX, from the same losses."""

import keras

from gpq_tf.ops import compiled


def make_step(model, losses_of, optimizer, jit=False):
    """Compile "losses, gradients, update" for the backend in use.

    Args:
        model: keras.Model or Layer, built; all its trainable variables are trained.
        losses_of: callable(batch) -> dict of scalar tensors with the key "loss", which is minimised. It calls the
            model in training mode, so that batch normalisation moves.
        optimizer: keras.optimizers.Optimizer, of this step alone.
        jit: bool, whether TensorFlow is to use XLA for the whole step.

    Returns:
        callable(batch, a dict of numpy arrays) -> dict of scalar tensors, the losses before the update.

    Raises:
        ValueError: if the backend is neither TensorFlow nor JAX.
    """
    if not optimizer.built:  # LossScaleOptimizer would make its variables a second time
        optimizer.build(model.trainable_variables)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return compiled(_tensorflow_step(model, losses_of, optimizer), jit)
    if backend == "jax":
        return _jax_step(model, losses_of, optimizer)
    raise ValueError(f"Invalid backend. Expected tensorflow or jax to train. Received: {backend}")


def _tensorflow_step(model, losses_of, optimizer):
    import tensorflow as tf

    def step(batch):
        with tf.GradientTape() as tape:
            losses = losses_of(batch)
            scaled = optimizer.scale_loss(losses["loss"])
        variables = [variable.value for variable in model.trainable_variables]
        optimizer.apply(tape.gradient(scaled, variables), model.trainable_variables)
        return losses

    return step


def _jax_step(model, losses_of, optimizer):
    import jax

    # JAX knows no variables: their values go in and come out.
    def scaled_loss(trainable, state, slots, batch):
        values = [
            *zip(model.trainable_variables, trainable, strict=True),
            *zip(model.non_trainable_variables, state, strict=True),
            *zip(optimizer.variables, slots, strict=True),
        ]
        with keras.StatelessScope(state_mapping=values) as scope:
            losses = losses_of(batch)
            scaled = optimizer.scale_loss(losses["loss"])
        changed = [scope.get_current_value(variable) for variable in model.non_trainable_variables]
        return scaled, (losses, changed)

    def update(trainable, state, slots, batch):
        gradient = jax.value_and_grad(scaled_loss, has_aux=True)
        (_, (losses, state)), gradients = gradient(trainable, state, slots, batch)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return losses, trainable, state, slots

    compiled_update = jax.jit(update)

    def step(batch):
        groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
        losses, *values = compiled_update(*([variable.value for variable in group] for group in groups), batch)
        for group, new_values in zip(groups, values, strict=True):
            for variable, value in zip(group, new_values, strict=True):
                variable.assign(value)
        return losses

    return step
