"""Convolution against its definition: plain loops in float64, values and gradients, and joined with a normalisation."""

import itertools

import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from hypothesis import given
from keras import ops

from gpq_tf.backbones.batch_norm import DebiasedBatchNormalization
from gpq_tf.backbones.convolution import Conv2D, convolve

from golden import worst
from gradients import random_cases, value_and_gradients


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def loops(x, kernel):
    """out[b, row, column] = sum over down, right of x[b, row + down - 1, column + right - 1] @ kernel[down, right]"""
    x, kernel = x.astype("float64"), kernel.astype("float64")
    size, height, width, _ = x.shape
    out = np.zeros((size, height, width, kernel.shape[-1]))
    for row, column, down, right in itertools.product(range(height), range(width), range(3), range(3)):
        y, z = row + down - 1, column + right - 1
        if 0 <= y < height and 0 <= z < width:
            out[:, row, column] += x[:, y, z] @ kernel[down, right]
    return out


def loops_of_gradients(x, kernel, cotangent):
    x, kernel, cotangent = (values.astype("float64") for values in (x, kernel, cotangent))
    of_x, of_kernel = np.zeros_like(x), np.zeros_like(kernel)
    _, height, width, _ = x.shape
    for row, column, down, right in itertools.product(range(height), range(width), range(3), range(3)):
        y, z = row + down - 1, column + right - 1
        if 0 <= y < height and 0 <= z < width:
            of_x[:, y, z] += cotangent[:, row, column] @ kernel[down, right].T
            of_kernel[down, right] += x[:, y, z].T @ cotangent[:, row, column]
    return of_x, of_kernel


def check(size, height, width, channels, filters):
    x, kernel = normals(1, size, height, width, channels), normals(2, 3, 3, channels, filters)
    cotangent = normals(3, size, height, width, filters)
    value, found = value_and_gradients(convolve, [x, kernel], cotangent)
    assert worst(value, loops(x, kernel)) < 1e-6
    for gradient, expected in zip(found, loops_of_gradients(x, kernel, cotangent), strict=True):
        assert worst(gradient, expected) < 2e-6


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 16), (2, 2), (3, 3), (4, 4), (8, 2), (5, 3), (1, 17), (4, 5), (5, 5), (8, 8)],
)
def test_values_and_gradients_are_those_of_the_loops(height, width):
    check(3, height, width, 5, 4)


@random_cases
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_any_shape(size, height, width, channels, filters):
    check(size, height, width, channels, filters)


@pytest.mark.parametrize("side", [4, 5])
def test_bfloat16_rounds_once(side):
    x, kernel = normals(1, 2, side, side, 64), normals(2, 3, 3, 64, 8)
    x, kernel = (ops.cast(values, "bfloat16") for values in (x, kernel))
    value = convolve(x, kernel)
    exact = loops(*(ops.convert_to_numpy(ops.cast(values, "float32")) for values in (x, kernel)))
    assert keras.backend.standardize_dtype(value.dtype) == "bfloat16"
    # a result in 16 bits is off by half a unit in the last of its 8 places; sums are in 32 bits
    assert worst(ops.convert_to_numpy(ops.cast(value, "float32")), exact) < 2**-8


@pytest.mark.parametrize("side", [3, 8])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-6), ("mixed_bfloat16", 0.02)])
def test_a_layer_joined_with_its_normalisation(side, precision, tolerance):
    x = normals(0, 4, side, side, 6)
    layer, normalization = Conv2D(5, dtype=precision), DebiasedBatchNormalization(dtype=precision)
    layer.build(x.shape)
    normalization.build((None, None, None, 5))
    layer.bias.assign(normals(1, 5))
    normalization.gamma.assign(1 + 0.3 * normals(2, 5))
    normalization.beta.assign(normals(3, 5))
    normalization.moving_mean.assign(normals(4, 5))
    normalization.moving_variance.assign(0.5 + normals(5, 5) ** 2)
    kernel, bias, gamma, beta, mean, variance = (
        ops.convert_to_numpy(weight).astype("float64")
        for weight in (
            layer.kernel,
            layer.bias,
            normalization.gamma,
            normalization.beta,
            normalization.moving_mean,
            normalization.moving_variance,
        )
    )
    expected = gamma * (loops(x, kernel) + bias - mean) / np.sqrt(variance + normalization.epsilon) + beta
    joined = layer.call_normalized(x, normalization)
    apart = normalization(layer(x), training=False)
    assert joined.dtype == apart.dtype
    assert worst(ops.convert_to_numpy(ops.cast(joined, "float32")), expected) < tolerance
    assert worst(ops.convert_to_numpy(ops.cast(apart, "float32")), expected) < tolerance


def test_a_layer_survives_its_configuration():
    layer = Conv2D(5, use_bias=True, name="conv")
    other = Conv2D.from_config(layer.get_config())
    assert (other.filters, other.kernel_size, other.padding, other.name) == (5, (3, 3), "same", "conv")
