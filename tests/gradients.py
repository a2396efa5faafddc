"""Values and gradients of the same function on whichever backend the tests run on."""

import hypothesis
import keras
import numpy as np
from keras import ops

# JAX compiles every operation anew for every shape.
_CASES_A_TEST = 40 if keras.backend.backend() == "tensorflow" else 3

random_cases = hypothesis.settings(
    max_examples=_CASES_A_TEST, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


def losses_of_batch(recipe, model, batch, settings, frozen=False):
    """What a training step minimises, and its parts: the head's `describe` and `compare`."""
    return recipe.compare(model, recipe.describe(model, batch, settings, frozen), settings)


def value_and_gradients(function, inputs, cotangent):
    """function(*inputs) and the gradients of sum(function(*inputs) * cotangent), as numpy arrays."""
    inputs = [np.asarray(values, "float32") for values in inputs]
    if keras.backend.backend() == "jax":
        import jax

        # One compilation of the whole; op by op, JAX compiles each one for each shape, which takes ten times as long.
        @jax.jit
        def value_and_pulled_back(cotangent, *inputs):
            value, pull_back = jax.vjp(function, *inputs)
            return value, pull_back(ops.reshape(cotangent, value.shape))

        value, gradients = value_and_pulled_back(np.asarray(cotangent, "float32"), *inputs)
    else:
        import tensorflow as tf

        tensors = [tf.constant(values) for values in inputs]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
            total = tf.reduce_sum(value * tf.constant(np.asarray(cotangent, "float32").reshape(value.shape)))
        gradients = tape.gradient(total, tensors, unconnected_gradients="zero")
    return np.asarray(value), [np.asarray(gradient) for gradient in gradients]


def numerical_gradients(function, inputs, cotangent, step=1e-6):
    """The gradients of sum(function(*inputs) * cotangent) by central differences; `function` is float64 NumPy."""
    inputs = [np.asarray(values, "float32").astype("float64") for values in inputs]
    gradients = []
    for values in inputs:
        gradient = np.empty_like(values)
        for place in np.ndindex(values.shape):
            kept = values[place]
            values[place] = kept + step
            above = np.sum(function(*inputs) * cotangent)
            values[place] = kept - step
            below = np.sum(function(*inputs) * cotangent)
            values[place] = kept
            gradient[place] = (above - below) / (2 * step)
        gradients.append(gradient)
    return gradients
