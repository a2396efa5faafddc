"""Convolution against its definition: plain loops in float64, values and gradients, and joined with a normalisation."""

import itertools

import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from hypothesis import given
from keras import ops

from gpq_tf.backbones.batch_norm import BatchNormalization, DebiasedBatchNormalization
from gpq_tf.backbones.convolution import Conv2D, convolve

from golden import worst
from gradients import random_cases, value_and_gradients


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def meetings(size, kernel, stride):
    """(row, column, down, right, y, z): where an output pixel meets an image's through which place of the kernel.

    PyTorch's rule: half the kernel's size of zeros on every side, and every stride-th window from the first on.
    """
    side = kernel.shape[0]
    rows, columns = ((length + 2 * (side // 2) - side) // stride + 1 for length in size)
    for row, column, down, right in itertools.product(range(rows), range(columns), range(side), range(side)):
        y, z = stride * row + down - side // 2, stride * column + right - side // 2
        if 0 <= y < size[0] and 0 <= z < size[1]:
            yield row, column, down, right, y, z


def loops(x, kernel, stride=1):
    """out[b, row, column] = sum over down, right of x[b, y, z] @ kernel[down, right]"""
    x, kernel = x.astype("float64"), kernel.astype("float64")
    size, height, width, _ = x.shape
    out = np.zeros((size, -(-height // stride), -(-width // stride), kernel.shape[-1]))
    for row, column, down, right, y, z in meetings((height, width), kernel, stride):
        out[:, row, column] += x[:, y, z] @ kernel[down, right]
    return out


def loops_of_gradients(x, kernel, cotangent, stride=1):
    x, kernel, cotangent = (values.astype("float64") for values in (x, kernel, cotangent))
    of_x, of_kernel = np.zeros_like(x), np.zeros_like(kernel)
    for row, column, down, right, y, z in meetings(x.shape[1:3], kernel, stride):
        of_x[:, y, z] += cotangent[:, row, column] @ kernel[down, right].T
        of_kernel[down, right] += x[:, y, z].T @ cotangent[:, row, column]
    return of_x, of_kernel


def check(size, height, width, channels, filters, stride=1, side=3):
    x, kernel = normals(1, size, height, width, channels), normals(2, side, side, channels, filters)
    expected = loops(x, kernel, stride)
    cotangent = normals(3, *expected.shape)
    value, found = value_and_gradients(lambda x, kernel: convolve(x, kernel, stride), [x, kernel], cotangent)
    assert worst(value, expected) < 1e-6
    for gradient, expected in zip(found, loops_of_gradients(x, kernel, cotangent, stride), strict=True):
        assert worst(gradient, expected) < 2e-6


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 16), (2, 2), (3, 3), (4, 4), (8, 2), (5, 3), (1, 17), (4, 5), (5, 5), (8, 8)],
)
def test_values_and_gradients_are_those_of_the_loops(height, width):
    check(3, height, width, 5, 4)


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 2), (2, 2), (3, 3), (4, 4), (3, 8), (7, 4), (8, 8), (9, 9)],
)
@pytest.mark.parametrize(("stride", "side"), [(2, 3), (2, 1), (1, 1)])
def test_strides_and_kernels_of_one_pixel(height, width, stride, side):
    check(3, height, width, 5, 4, stride, side)


@random_cases
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
)
def test_any_shape(size, height, width, channels, filters, stride, side):
    check(size, height, width, channels, filters, stride, side)


@pytest.mark.parametrize("channels", [2, 15, 16])
def test_a_strided_gradient_stays_in_its_memory(channels):
    """Images large enough for oneDNN's issue 6035 to overwrite others' memory, where it then crashes or miscounts."""
    for _ in range(4):
        check(2, 64, 64, channels, 4, stride=2, side=1)


def test_a_stride_begins_with_the_first_pixel():
    """Keras's own padding "same" would centre its windows on the second, the fourth, ... of an even number."""
    x = np.arange(16, dtype="float32").reshape(1, 4, 4, 1)
    kernel = np.zeros((3, 3, 1, 1), "float32")
    kernel[1, 1] = 1  # each output pixel is the image's at its window's centre
    assert np.asarray(convolve(x, kernel, 2)).ravel().tolist() == [0, 2, 8, 10]
    assert np.asarray(convolve(x, kernel[1:2, 1:2], 2)).ravel().tolist() == [0, 2, 8, 10]


@pytest.mark.parametrize("side", [4, 5])
def test_bfloat16_rounds_once(side):
    x, kernel = normals(1, 2, side, side, 64), normals(2, 3, 3, 64, 8)
    x, kernel = (ops.cast(values, "bfloat16") for values in (x, kernel))
    value = convolve(x, kernel)
    exact = loops(*(ops.convert_to_numpy(ops.cast(values, "float32")) for values in (x, kernel)))
    assert keras.backend.standardize_dtype(value.dtype) == "bfloat16"
    # a result in 16 bits is off by half a unit in the last of its 8 places; sums are in 32 bits
    assert worst(ops.convert_to_numpy(ops.cast(value, "float32")), exact) < 2**-8


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 6), (8, 8), (2, 32), (7, 8), (10, 8)])
def test_a_stride_of_two_in_16_bits_is_exact_where_the_numbers_are(height, width):
    """Small whole numbers and their sums, below 256, are bfloat16 values."""
    rng = np.random.default_rng(4)
    shapes = (3, height, width, 5), (3, 3, 5, 4), (3, -(-height // 2), -(-width // 2), 4)
    x, kernel, cotangent = (rng.integers(-1, 2, shape).astype("float32") for shape in shapes)

    def halved(x, kernel):
        return ops.cast(convolve(ops.cast(x, "bfloat16"), ops.cast(kernel, "bfloat16"), 2), "float32")

    value, found = value_and_gradients(halved, [x, kernel], cotangent)
    np.testing.assert_array_equal(value, loops(x, kernel, 2))
    for gradient, expected in zip(found, loops_of_gradients(x, kernel, cotangent, 2), strict=True):
        np.testing.assert_array_equal(gradient, expected)


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


@pytest.mark.parametrize(("stride", "side"), [(2, 3), (2, 1)])
def test_a_layer_with_a_stride_joined_with_its_normalisation(stride, side):
    """As in a residual block: no bias; `compute_output_shape` tells what comes."""
    layer, normalization = Conv2D(5, side, strides=stride, use_bias=False), BatchNormalization()
    for size in ((8, 8), (7, 6)):
        x = normals(0, 4, *size, 6)
        layer.build(x.shape)
        normalization.build((None, None, None, 5))
        normalization.moving_mean.assign(normals(1, 5))
        normalization.moving_variance.assign(0.5 + normals(2, 5) ** 2)
        apart = normalization(layer(x))
        mean, variance = (
            ops.convert_to_numpy(statistic).astype("float64")
            for statistic in (normalization.moving_mean, normalization.moving_variance)
        )
        expected = (loops(x, ops.convert_to_numpy(layer.kernel), stride) - mean) / np.sqrt(variance + 1e-5)
        assert worst(layer.call_normalized(x, normalization), expected) < 2e-6
        assert worst(apart, expected) < 2e-6
        assert layer.compute_output_shape(x.shape) == tuple(apart.shape)
        layer, normalization = Conv2D.from_config(layer.get_config()), BatchNormalization()


def test_a_layer_survives_its_configuration():
    layer = Conv2D(5, 1, strides=2, use_bias=True, name="conv")
    other = Conv2D.from_config(layer.get_config())
    assert (other.filters, other.kernel_size, other.strides, other.name) == (5, (1, 1), (2, 2), "conv")
    assert (Conv2D(5).kernel_size, Conv2D(5).padding) == ((3, 3), "same")
