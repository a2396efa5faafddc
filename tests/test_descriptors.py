"""The global descriptors against float64 loops, their limits, and their gradients where those are delicate."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from gpq_tf.descriptors import gem, mac, spoc

from golden import worst
from gradients import numerical_gradients, random_cases, value_and_gradients

SIZES = st.integers(1, 4)
POWERS = st.sampled_from([0.5, 1.0, 1.5, 3.0, 10.0, 40.0])


def maps(seed, *shape):
    """ReLU-like: about half of the values are 0."""
    return np.maximum(np.random.default_rng(seed).normal(size=shape), 0).astype("float32")


def plain(features, pool):
    """`pool` of the list of a channel's values, channel by channel, in float64."""
    n, _, _, channels = features.shape
    values = features.astype("float64")
    return np.array([[pool([*values[b, :, :, c].ravel()]) for c in range(channels)] for b in range(n)])


def plain_gem(features, p, floor):
    return plain(features, lambda values: (sum(max(v, floor) ** p for v in values) / len(values)) ** (1 / p))


@random_cases
@given(SIZES, SIZES, SIZES, SIZES, POWERS, st.sampled_from([1e-6, 1e-3]))
def test_descriptors_are_the_loops(n, height, width, channels, p, floor):
    features = maps(n + 10 * height, n, height, width, channels)
    assert worst(spoc(features), plain(features, lambda values: sum(values) / len(values))) < 1e-6
    assert worst(mac(features), plain(features, max)) == 0
    # The root magnifies the rounding of the mean where p is small.
    assert worst(gem(features, p, floor), plain_gem(features, p, floor)) < 2e-6


@random_cases
@given(SIZES, SIZES, SIZES, POWERS)
def test_gradients_of_gem_are_the_slopes(n, height, channels, p):
    features, cotangent = maps(n + 10 * height, n, height, 3, channels), maps(2, n, channels) + 0.1
    features[0] += 0.05  # away from the floor, below which there is no slope
    _, (to_map, to_p) = value_and_gradients(lambda x, p: gem(x, p, floor=1e-2), [features, [p]], cotangent)
    slopes = numerical_gradients(lambda x, p: plain_gem(x, float(p[0]), 1e-2), [features, [p]], cotangent)
    assert worst(to_map, slopes[0]) < 2e-5
    assert abs(to_p - slopes[1])[0] < 2e-5 * max(1.0, abs(slopes[1][0]))


def test_gem_lies_between_the_mean_and_the_maximum():
    features = maps(0, 3, 5, 5, 6) + 1e-3
    between = [np.asarray(gem(features, p)) for p in (1, 2, 3, 10, 100, 1000)]
    assert worst(between[0], spoc(features)) < 1e-6
    for smaller, larger in itertools.pairwise(between):
        assert (smaller < larger).all()
    assert worst(between[-1], mac(features)) < 4e-3  # 25 ** (1 / 1000)
    assert (between[-1] <= np.asarray(mac(features))).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_no_power_overflows_or_vanishes(scale):
    features = (maps(1, 2, 4, 4, 3) + 0.1) * np.float32(scale)
    value, (to_map, to_p) = value_and_gradients(lambda x, p: gem(x, p, floor=0.0), [features, [10.0]], np.ones((2, 3)))
    assert worst(value, plain_gem(features, 10.0, 0.0)) < 2e-6
    # GeM is homogeneous: the slopes with respect to x do not know the scale.
    _, (to_unscaled, _) = value_and_gradients(
        lambda x, p: gem(x, p, floor=0.0), [features / np.float32(scale), [10.0]], np.ones((2, 3))
    )
    assert worst(to_map, to_unscaled) < 1e-5
    assert np.isfinite(to_p).all()


@pytest.mark.parametrize("floor", [0.0, 1e-6])
@pytest.mark.parametrize("p", [1.0, 1.5, 3.0, 10.0])
def test_a_channel_of_zeros_has_a_value_and_no_slope(floor, p):
    features = maps(3, 2, 3, 3, 4)
    features[:, :, :, 1] = 0
    value, (to_map, to_p) = value_and_gradients(lambda x, p: gem(x, p, floor), [features, [p]], np.ones((2, 4)))
    np.testing.assert_allclose(value[:, 1], floor, rtol=1e-6)
    assert np.isfinite(to_map).all()
    assert np.isfinite(to_p).all()
    if floor:
        assert (to_map[:, :, :, 1] == 0).all()


def test_the_first_of_equal_maxima_takes_the_whole_gradient():
    features = np.zeros((2, 2, 3, 2), "float32")
    features[0, 0, 2, 0] = features[0, 1, 0, 0] = features[0, 1, 2, 0] = 5
    features[0, 1, 1, 1] = 7
    _, (to_map,) = value_and_gradients(mac, [features], [[2.0, 3.0], [4.0, 5.0]])
    expected = np.zeros_like(features)
    expected[0, 0, 2, 0], expected[0, 1, 1, 1] = 2, 3
    expected[1, 0, 0] = 4, 5  # all are 0
    np.testing.assert_array_equal(to_map, expected)


def test_negative_values_are_features_too():
    features = -1 - maps(4, 2, 3, 3, 2)
    assert worst(mac(features), plain(features, max)) == 0
    assert worst(spoc(features), features.mean(axis=(1, 2), dtype="float64")) < 1e-6
    np.testing.assert_allclose(gem(features, 3.0, floor=0.5), 0.5, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_pooled_in_float32(dtype):
    features = ops.cast(maps(5, 2, 20, 20, 3) * 500, dtype)
    exact = ops.convert_to_numpy(ops.cast(features, "float32"))
    for pool in (spoc, mac, lambda x: gem(x, 3.0)):
        pooled = pool(features)
        assert ops.dtype(pooled) == "float32"
        np.testing.assert_allclose(pooled, pool(exact), rtol=1e-6)


@pytest.mark.parametrize("pool", [spoc, mac, lambda x: gem(x, 3.0)])
def test_what_is_no_number_stays_none(pool):
    features = maps(6, 1, 3, 3, 2)
    features[0, 1, 1, 0] = np.nan
    pooled = np.asarray(pool(features))
    assert np.isnan(pooled[0, 0])
    assert np.isfinite(pooled[0, 1])


def test_what_is_refused():
    for pool in (spoc, mac, lambda x: gem(x, 3.0)):
        with pytest.raises(ValueError, match=r"Invalid features\. Expected \(B, H, W, C\)\. Received: shape \(2, 3\)"):
            pool(np.ones((2, 3), "float32"))
    features = maps(7, 1, 2, 2, 1)
    for p in (0, -3.0, float("nan")):
        with pytest.raises(ValueError, match=r"Invalid p\. Expected a number above 0\. Received: p="):
            gem(features, p)
    with pytest.raises(ValueError, match=r"Invalid floor\. Expected a number of 0 or more\. Received: floor=-0\.1"):
        gem(features, 3.0, floor=-0.1)
