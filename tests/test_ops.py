"""The small tensor operations against plain float64 loops."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from gpq_tf.ops import (
    compiled,
    compiled_call,
    join_books,
    l2_normalize,
    normalize_books,
    reverse_gradient,
    split_books,
)

from golden import worst
from gradients import numerical_gradients, random_cases, value_and_gradients

SIZES = st.integers(1, 5)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def plain_l2_normalize(x):
    """Row by row, in float64."""
    x = np.asarray(x, "float64")
    rows = x.reshape(-1, x.shape[-1])
    return np.array([row / np.sqrt(max(np.sum(row * row), 1e-12)) for row in rows]).reshape(x.shape)


@random_cases
@given(SIZES, SIZES, SIZES)
def test_books_are_consecutive_parts_of_a_descriptor(n, n_book, length):
    x = normals(0, n, n_book * length)
    books = np.asarray(split_books(x, n_book))
    for i in range(n):
        for j in range(n_book):
            np.testing.assert_array_equal(books[i, j], x[i, j * length : (j + 1) * length])
    np.testing.assert_array_equal(np.asarray(join_books(ops.convert_to_tensor(books))), x)


@pytest.mark.parametrize("n_book", [7, 0, -12, 145])
@pytest.mark.parametrize("function", [split_books, normalize_books])
def test_a_number_of_books_that_does_not_divide_is_refused(function, n_book):
    with pytest.raises(ValueError) as caught:
        function(np.zeros((2, 144), "float32"), n_book)
    expected = f"Invalid n_book. Expected a positive integer dividing D=144. Received: n_book={n_book}"
    assert str(caught.value) == expected


@random_cases
@given(SIZES, SIZES, st.floats(-5, 5))
def test_l2_normalize_is_the_loop(n, length, exponent):
    x = normals(1, n, length) * np.float32(10.0**exponent)
    assert worst(l2_normalize(x), plain_l2_normalize(x)) < 1e-6


def test_l2_normalize_along_another_axis():
    x = normals(2, 3, 4, 5)
    expected = np.moveaxis(plain_l2_normalize(np.moveaxis(x, 1, -1)), -1, 1)
    assert worst(l2_normalize(x, axis=1), expected) < 1e-6


def test_short_vectors_are_scaled_by_a_million_and_nothing_is_added_to_long_ones():
    direction = np.array([[0.6, 0.8]], "float32")
    for length, expected in ((1.0, 1.0), (2e-6, 1.0), (1.001e-6, 1.0), (1e-7, 0.1), (1e-12, 1e-6), (0.0, 0.0)):
        found = np.asarray(l2_normalize(np.float32(length) * direction))
        np.testing.assert_allclose(found, expected * direction, rtol=1e-5)


def test_the_gradient_of_l2_normalize():
    """(g - y <g, y>) / ||x||; 1e6 g for the zero vector."""
    x, g = normals(3, 6, 5), normals(4, 6, 5)
    x[2] = 0
    _, (found,) = value_and_gradients(l2_normalize, [x], g)
    for i in range(6):
        length = np.sqrt(np.sum(x[i].astype("float64") ** 2))
        y = x[i] / length if length else 0 * x[i]
        expected = (g[i] - y * np.dot(g[i], y)) / length if length else 1e6 * g[i]
        assert worst(found[i], expected) < 2e-6


@random_cases
@given(SIZES, SIZES, SIZES)
def test_normalize_books_is_the_loop(n, n_book, length):
    x = normals(5, n, n_book * length)
    expected = plain_l2_normalize(x.reshape(n, n_book, length)).reshape(n, -1)
    assert worst(normalize_books(x, n_book), expected) < 1e-6


def test_normalize_books_again_changes_nothing_and_lengths_of_books_play_no_part():
    x = normals(6, 4, 12)
    once = np.asarray(normalize_books(x, 3))
    assert worst(normalize_books(once, 3), once) < 1e-6
    scaled = (x.reshape(4, 3, 4) * np.array([0.1, 7.0, 300.0], "float32")[:, None]).reshape(4, 12)
    assert worst(normalize_books(scaled, 3), once) < 1e-6


def test_the_gradient_of_normalize_books():
    x, g = normals(7, 2, 6), normals(8, 2, 6)
    _, (found,) = value_and_gradients(lambda x: normalize_books(x, 3), [x], g)
    (expected,) = numerical_gradients(lambda x: plain_l2_normalize(x.reshape(2, 3, 2)).reshape(2, 6), [x], g)
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0, 5.0])
def test_reversal_changes_the_gradient_alone(scale):
    x, g = normals(9, 4, 3), normals(10, 4, 3)
    value, (gradient,) = value_and_gradients(lambda x: reverse_gradient(x, scale), [x], g)
    assert worst(value, x) < 2e-6
    assert worst(gradient, -scale * g) < 1e-6


def test_reversed_twice_is_as_it_was():
    x, g = normals(11, 4, 3), normals(12, 4, 3)
    _, (gradient,) = value_and_gradients(lambda x: reverse_gradient(reverse_gradient(x)), [x], g)
    np.testing.assert_array_equal(gradient, g)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_kept(dtype):
    x = ops.cast(normals(13, 2, 6), dtype)
    for y in (l2_normalize(x), normalize_books(x, 3), reverse_gradient(x), split_books(x, 3)):
        assert keras.backend.standardize_dtype(y.dtype) == dtype


@pytest.mark.parametrize("jit", [True, False])
def test_compiling_changes_no_result(jit):
    x = normals(14, 5, 12)
    found = compiled(lambda x: normalize_books(x, 3), jit)(x)
    assert worst(found, np.asarray(normalize_books(x, 3))) < 1e-6


def test_compiled_functions_are_traced_once_for_a_shape():
    shapes = []
    function = compiled(lambda x: shapes.append(tuple(x.shape)) or x + 1.0)
    for size in (2, 3, 2, 3):
        function(np.zeros(size, "float32"))
    assert shapes == [(2,), (3,)]


class Scale(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.factor = self.add_weight(name="factor", shape=(), initializer="ones")
        self.traces = 0
        self.built = True

    def call(self, x):
        self.traces += 1
        return x * self.factor


@pytest.mark.parametrize("jit", [True, False])
def test_a_compiled_call_sees_the_variables_as_they_are(jit):
    layer = Scale()
    function = compiled_call(layer, layer.call, jit)
    for factor in (1.0, 3.0, -2.0):
        layer.factor.assign(factor)
        assert float(function(np.float32(5))) == 5 * factor
    assert layer.traces == 1
