"""Batch normalisation against its definition in float64: output, statistics step by step, gradients, precisions."""

import keras
import numpy as np
import pytest
from keras import ops

from gpq_tf.backbones.batch_norm import BatchNormalization, DebiasedBatchNormalization
from gpq_tf.ops import batch_normalize, compiled

import golden
from golden import worst
from gradients import numerical_gradients, value_and_gradients

EPSILON = 1e-3


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def statistics(x):
    """Mean and population variance of every channel, float64, and the number of values."""
    values = np.asarray(x, "float64").reshape(-1, x.shape[-1])
    mean = values.mean(axis=0)
    return mean, np.mean((values - mean) ** 2, axis=0), len(values)


class Recurrence:
    """The state after each update, as the docstring of the layer has it, in float64."""

    def __init__(self, channels):
        self.biased, self.moving_mean, self.local_step = np.zeros(channels), np.zeros(channels), 0
        self.moving_variance = np.ones(channels)

    def update(self, mean, variance, n, momentum=0.9):
        self.biased = momentum * self.biased + (1 - momentum) * mean
        self.local_step += 1
        self.moving_mean = self.biased / (1 - momentum**self.local_step)
        self.moving_variance = momentum * self.moving_variance + (1 - momentum) * variance * n / (n - 1)


NAMES = ("moving_mean", "moving_variance", "biased", "local_step")


def state_of(layer):
    return {name: ops.convert_to_numpy(getattr(layer, name)) for name in NAMES}


def layer_for(channels, **options):
    layer = DebiasedBatchNormalization(**options)
    layer.build((None, None, None, channels))
    layer.gamma.assign(1 + 0.1 * normals(0, channels))
    layer.beta.assign(normals(1, channels))
    return layer


@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (1, 2, 2, 1), (2, 1, 1, 7)])
def test_training_normalises_by_the_batch(shape):
    x = 3 * normals(2, *shape) + 5
    layer = layer_for(shape[-1])
    mean, variance, _ = statistics(x)
    gamma, beta = (ops.convert_to_numpy(v).astype("float64") for v in (layer.gamma, layer.beta))
    expected = gamma * (x - mean) / np.sqrt(variance + EPSILON) + beta
    assert worst(layer(x, training=True), expected) < 1e-5


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_statistics_follow_the_recurrence(momentum):
    layer, expected = layer_for(6, momentum=momentum), Recurrence(6)
    for step in range(12):
        x = (1 + step) * normals(step, 3, 4, 2, 6) + step
        layer(x, training=True)
        expected.update(*statistics(x), momentum)
        for name, values in state_of(layer).items():
            assert worst(values, getattr(expected, name)) < 3e-6, (step, name)


def test_the_mean_is_right_from_the_first_step_on():
    layer = layer_for(2)
    x = normals(3, 8, 2, 2, 2) + np.array([100, -7], "float32")
    for _ in range(3):
        layer(x, training=True)
        assert worst(layer.moving_mean, statistics(x)[0]) < 1e-6


def test_inference_uses_the_moving_statistics_and_changes_nothing():
    layer = layer_for(3)
    layer(2 * normals(4, 4, 3, 3, 3) - 1, training=True)
    before = state_of(layer)
    x = normals(5, 2, 3, 3, 3)
    gamma, beta = (ops.convert_to_numpy(v).astype("float64") for v in (layer.gamma, layer.beta))
    deviation = np.sqrt(before["moving_variance"].astype("float64") + EPSILON)
    expected = gamma * (x - before["moving_mean"]) / deviation + beta
    assert worst(layer(x), expected) < 1e-6
    assert worst(layer(x[:1]), expected[:1]) < 1e-6  # whatever else is in the batch
    for name, values in state_of(layer).items():
        np.testing.assert_array_equal(values, before[name])


def test_variance_is_bessel_corrected_for_the_statistics_only():
    x = np.array([1.0, 3.0], "float32").reshape(2, 1, 1, 1)
    y, mean, variance = batch_normalize(x, ops.ones(1), ops.zeros(1), EPSILON)
    assert (float(mean[0]), float(variance[0])) == (2.0, 2.0)
    np.testing.assert_allclose(np.asarray(y).ravel(), np.array([-1, 1]) / np.sqrt(1 + EPSILON), rtol=1e-6)


def test_a_single_value_has_variance_zero():
    y, mean, variance = batch_normalize(5 * ops.ones((1, 1, 1, 2)), ops.ones(2), ops.zeros(2), EPSILON)
    assert np.asarray(y).ravel().tolist() == [0, 0]
    assert np.asarray(mean).tolist() == [5, 5]
    assert np.asarray(variance).tolist() == [0, 0]


def test_a_large_mean_does_not_swallow_the_variance():
    x = normals(6, 16, 4, 4, 2) + 1000
    _, mean, variance = batch_normalize(x, ops.ones(2), ops.zeros(2), EPSILON)
    expected_mean, expected_variance, n = statistics(x)
    assert worst(mean, expected_mean) < 1e-6
    assert worst(variance, expected_variance * n / (n - 1)) < 1e-3


def test_gradients_in_training():
    """With h = (x - m) / s: dx = gamma / s (g - mean(g) - h mean(g h)), dgamma = sum(g h), dbeta = sum(g)."""
    x, g = normals(7, 4, 3, 2, 5) * 2 + 1, normals(8, 4, 3, 2, 5)
    gamma, beta = 1 + 0.1 * normals(9, 5), normals(10, 5)
    _, found = value_and_gradients(
        lambda x, gamma, beta: batch_normalize(x, gamma, beta, EPSILON)[0], [x, gamma, beta], g
    )
    mean, variance, _ = statistics(x)
    s = np.sqrt(variance + EPSILON)
    xhat = (x - mean) / s
    axes = (0, 1, 2)
    expected = [
        gamma / s * (g - g.mean(axis=axes) - xhat * np.mean(g * xhat, axis=axes)),
        np.sum(g * xhat, axis=axes),
        np.sum(g, axis=axes, dtype="float64"),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert worst(ours, theirs) < 1e-5


@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (2, 1, 1, 3), (1, 1, 1, 2)])
def test_the_fused_kernel_and_separate_operations_agree(monkeypatch, shape):
    inputs = 2 * normals(16, *shape) + 1, 1 + 0.1 * normals(17, shape[-1]), normals(18, shape[-1])

    def all_of_it():
        y, mean, variance = batch_normalize(*inputs, EPSILON)
        _, gradients = value_and_gradients(
            lambda *inputs: batch_normalize(*inputs, EPSILON)[0], list(inputs), 1 + normals(19, *shape)
        )
        return [y, mean, variance, *gradients]

    fused = all_of_it()
    monkeypatch.setattr("gpq_tf.ops._has_fused_kernel", lambda: False)
    for ours, other in zip(fused, all_of_it(), strict=True):
        # Gradients are sums over a batch of what may nearly cancel: rounding goes with the largest, not with each.
        atol = 1e-6 * max(3, np.abs(np.asarray(other)).max())
        np.testing.assert_allclose(np.asarray(ours), np.asarray(other), rtol=0, atol=atol)


def test_gradients_are_numerical_ones_too():
    def plain(x, gamma, beta):
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        return gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta

    inputs, cotangent = [normals(20, 2, 2, 3, 2) + 1, normals(21, 2), normals(22, 2)], normals(23, 2, 2, 3, 2)
    _, found = value_and_gradients(lambda *inputs: batch_normalize(*inputs, 1e-5)[0], inputs, cotangent)
    for ours, theirs in zip(found, numerical_gradients(plain, inputs, cotangent), strict=True):
        assert worst(ours, theirs) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_gradient_flows_through_the_statistics(precision):
    def statistics_alone(x):
        _, mean, variance = batch_normalize(ops.cast(x, precision), ops.ones(2), ops.zeros(2), 1e-5)
        return mean + variance

    _, (found,) = value_and_gradients(statistics_alone, [normals(24, 2, 2, 3, 2)], np.ones(2))
    assert not found.any()


def test_sums_over_many_pixels_keep_six_digits():
    """As many as in the first layers of SPQ's network at a batch of 256.

    A sum of 262,144 values one after the other in float32, as TensorFlow's fused kernel adds them up, makes y wrong by
    8e-5 here; sums over each image and then over the images by less than 5e-6, which ReLUs and gradients do not notice.
    """
    x = np.random.default_rng(25).standard_normal((256, 32, 32, 64), "float32")
    x += np.linspace(-1, 1, 64, dtype="float32")
    y, mean, variance = (np.asarray(part) for part in batch_normalize(x, ops.ones(64), ops.zeros(64), 1e-5))
    n = x.size // 64
    exact_mean = x.mean(axis=(0, 1, 2), dtype="float64")
    exact_square = np.einsum("bhwc,bhwc->c", x, x, dtype="float64") / n
    exact_variance = exact_square - exact_mean**2
    some = slice(None, None, 32)
    expected = (x[some] - exact_mean) / np.sqrt(exact_variance + 1e-5)
    assert np.abs(y[some] - expected).max() < 5e-6
    assert np.abs(mean - exact_mean).max() < 1e-6
    assert worst(variance, exact_variance * n / (n - 1)) < 1e-6


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(8, 4, 4, 3), (2, 1, 1, 3), (1, 1, 1, 3)])
def test_16_bits_round_the_output_alone(shape, precision, jit):
    """Also by XLA, whose own kernel it is: the same epsilon, statistics in float32 with Bessel's correction."""
    x = ops.cast(0.01 * normals(26, *shape) + 0.05, precision)
    gamma, beta = 1 + 0.1 * normals(27, 3), normals(28, 3)
    normalize = compiled(lambda *inputs: batch_normalize(*inputs, 1e-5), jit)
    y, mean, variance = normalize(x, gamma, beta)
    assert keras.backend.standardize_dtype(y.dtype) == precision
    assert keras.backend.standardize_dtype(mean.dtype) == keras.backend.standardize_dtype(variance.dtype) == "float32"
    values = ops.convert_to_numpy(ops.cast(x, "float32"))
    exact_mean, exact_variance, n = statistics(values)
    assert worst(mean, exact_mean) < 1e-5
    assert worst(variance, exact_variance * n / max(n - 1, 1)) < 1e-3
    expected = gamma * (values - exact_mean) / np.sqrt(exact_variance + 1e-5) + beta
    places = 8 if precision == "bfloat16" else 11
    assert worst(ops.convert_to_numpy(ops.cast(y, "float32")), expected) < 2.0**-places + 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gradients_in_16_bits(precision):
    inputs, g = [normals(29, 4, 3, 2, 5), 1 + 0.1 * normals(30, 5), normals(31, 5)], normals(32, 4, 3, 2, 5)

    def normalize(x, gamma, beta, precision):
        return ops.cast(batch_normalize(ops.cast(x, precision), gamma, beta, 1e-5)[0], "float32")

    _, expected = value_and_gradients(lambda *inputs: normalize(*inputs, "float32"), inputs, g)
    _, found = value_and_gradients(lambda *inputs: normalize(*inputs, precision), inputs, g)
    for ours, theirs in zip(found, expected, strict=True):
        assert worst(ours, theirs) < 0.02


# --- as PyTorch keeps its statistics


@pytest.mark.parametrize(("momentum", "epsilon"), [(0.9, 1e-5), (0.5, 0.1)])
def test_torchs_statistics_are_averages_of_the_batches(momentum, epsilon):
    layer = BatchNormalization(momentum, epsilon)
    layer.build((None, None, None, 6))
    moving_mean, moving_variance = np.zeros(6), np.ones(6)
    for step in range(12):
        x = (1 + step) * normals(step, 3, 4, 2, 6) + step
        y = layer(x, training=True)
        mean, variance, n = statistics(x)
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_variance = momentum * moving_variance + (1 - momentum) * variance * n / (n - 1)
        assert worst(y, (x - mean) / np.sqrt(variance + epsilon)) < 2e-6
        assert worst(layer.moving_mean, moving_mean) < 3e-6
        assert worst(layer.moving_variance, moving_variance) < 3e-6
    x = normals(33, 2, 3, 3, 6)
    assert worst(layer(x), (x - moving_mean) / np.sqrt(moving_variance + epsilon)) < 5e-6


def test_torchs_defaults():
    layer = BatchNormalization()
    assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)
    again = BatchNormalization.from_config(BatchNormalization(0.8, 0.01).get_config())
    assert (again.momentum, again.epsilon) == (0.8, 0.01)
    layer.build((None, None, None, 3))
    names = [weight.name for weight in layer.weights]
    assert sorted(names) == ["beta", "gamma", "moving_mean", "moving_variance"]
    assert [weight.name for weight in layer.trainable_variables] == ["gamma", "beta"]
    # small activations: the epsilon is a part of the result
    x = 1e-3 * normals(34, 4, 3, 3, 3)
    mean, variance, _ = statistics(x)
    assert worst(layer(x, training=True), (x - mean) / np.sqrt(variance + 1e-5)) < 2e-6


def test_gradients_in_inference():
    layer = layer_for(3)
    layer(2 * normals(11, 4, 3, 3, 3), training=True)
    x, g = normals(12, 2, 3, 3, 3), normals(13, 2, 3, 3, 3)
    _, (found,) = value_and_gradients(layer, [x], g)
    gamma, variance = ops.convert_to_numpy(layer.gamma), ops.convert_to_numpy(layer.moving_variance)
    assert worst(found, g * gamma / np.sqrt(variance + EPSILON)) < 1e-6


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_statistics_stay_float32_in_mixed_precision(precision):
    x = 2 * normals(14, 8, 4, 4, 3) + 1
    layer = layer_for(3, dtype=f"mixed_{precision}")
    for training in (True, False):
        assert keras.backend.standardize_dtype(layer(x, training=training).dtype) == precision
    assert {keras.backend.standardize_dtype(weight.value.dtype) for weight in layer.weights} == {"float32"}
    expected = Recurrence(3)
    expected.update(*statistics(ops.convert_to_numpy(ops.cast(ops.cast(x, precision), "float32"))))
    for name, values in state_of(layer).items():
        assert worst(values, getattr(expected, name)) < 3e-6, name


def test_what_is_trained_and_what_is_state():
    layer = layer_for(3)
    assert [weight.name for weight in layer.trainable_variables] == ["gamma", "beta"]
    assert [weight.name for weight in layer.non_trainable_variables] == list(NAMES)
    again = DebiasedBatchNormalization.from_config(DebiasedBatchNormalization(0.8, 0.01).get_config())
    assert (again.momentum, again.epsilon) == (0.8, 0.01)


@golden.needs_golden
@pytest.mark.parametrize("name", ["batch0", "batch3-2"])
@pytest.mark.parametrize("order", ["LU", "UL"])
def test_the_originals_statistics_over_three_steps(name, order):
    """Fed with the batch statistics of the original's two passes a step, the layer ends in the original's state."""
    recorded = golden.load("step.npz")
    layer = DebiasedBatchNormalization()
    layer.build((None, None, None, len(recorded[f"step1_{name}_batch_mean_L"])))
    for step in (1, 2, 3):
        for half in order:
            mean, variance = (recorded[f"step{step}_{name}_batch_{which}_{half}"] for which in ("mean", "var"))
            n = int(recorded[f"{name}_count_{half}"])
            layer._update(mean.astype("float32"), (variance * n / (n - 1)).astype("float32"))
        if step in (1, 3):
            for which, values in state_of(layer).items():
                assert worst(values, recorded[f"{order}_step{step}_after_{name}_{which}"]) < 6e-6, which
