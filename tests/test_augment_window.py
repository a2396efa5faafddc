"""Windows of images, mirrored or not, against slices; and the distribution of what is drawn."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gpq_tf.augment import generator
from gpq_tf.augment.window import crop_and_flip, draw_crop_and_flip
from gpq_tf.ops import compiled

from gradients import random_cases


def sliced(images, flips, offsets, height, width):
    """Image by image: slice, then mirror."""
    windows = [
        image[row : row + height, column : column + width] for image, (row, column) in zip(images, offsets, strict=True)
    ]
    return np.stack([window[:, ::-1] if flip else window for window, flip in zip(windows, flips, strict=True)])


@random_cases
@given(
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 2**32 - 1),
)
def test_a_window_is_a_slice(n, height, width, more_rows, more_columns, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, height + more_rows, width + more_columns, 3), np.uint8)
    flips, offsets = draw_crop_and_flip(rng, n, (more_rows, more_columns))
    found = np.asarray(crop_and_flip(images, flips, offsets, height, width))
    np.testing.assert_array_equal(found, sliced(images, flips, offsets, height, width))


def test_every_flip_and_every_offset_of_the_papers_size():
    """28 x 28 offsets are too many: all rows against all columns of every fourth, both borders among them."""
    images = np.random.default_rng(0).integers(0, 256, (16, 252, 252, 3), np.uint8)
    window = compiled(lambda *arguments: crop_and_flip(*arguments, 224, 224))
    places = np.array([(row, column) for row in range(0, 29, 4) for column in range(0, 29, 4)], "int32")
    assert places.max() == 28
    for start in range(0, len(places), 16):
        offsets = places[start : start + 16]
        flips = np.arange(16) % 2 == start // 16 % 2
        found = np.asarray(window(images, flips, offsets))
        np.testing.assert_array_equal(found, sliced(images, flips, offsets, 224, 224))


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16"])
def test_the_dtype_is_kept(dtype):
    images = keras.ops.ones((1, 4, 4, 3), dtype)
    window = crop_and_flip(images, np.array([True]), np.array([[1, 0]], "int32"), 2, 3)
    assert keras.backend.standardize_dtype(window.dtype) == dtype and window.shape == (1, 2, 3, 3)


def test_draws_are_fair_uniform_and_independent():
    """3 x 2 offsets and 2 flips: 12 equally likely outcomes, seen in steps of 1,000 as in training."""
    draws = [draw_crop_and_flip(generator(1, step, 1), 1000, (2, 1)) for step in range(24)]
    flips, offsets = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    assert (flips.dtype, offsets.dtype) == (np.bool_, np.int32)
    assert offsets.min(axis=0).tolist() == [0, 0] and offsets.max(axis=0).tolist() == [2, 1]
    outcomes = flips * 6 + offsets[:, 0] * 2 + offsets[:, 1]
    assert stats.chisquare(np.bincount(outcomes, minlength=12)).pvalue > 1e-3


def test_one_margin_serves_both_axes():
    flips, offsets = draw_crop_and_flip(np.random.default_rng(0), 50_000, 28)
    for axis in range(2):
        counts = np.bincount(offsets[:, axis], minlength=29)
        assert len(counts) == 29 and stats.chisquare(counts).pvalue > 1e-3
    assert stats.chisquare(np.bincount(flips)).pvalue > 1e-3
    assert draw_crop_and_flip(np.random.default_rng(0), 9, 0)[1].max() == 0


def test_draws_are_a_function_of_seed_and_step():
    def draw(*place):
        flips, offsets = draw_crop_and_flip(generator(*place), 20, 28)
        return flips.tobytes() + offsets.tobytes()

    places = [(seed, step, 1) for seed in (0, 2**32 - 1) for step in (0, 1, 10**6)]
    drawn = {place: draw(*place) for place in places}
    assert len(set(drawn.values())) == len(places)
    for place in reversed(places):
        assert draw(*place) == drawn[place]


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 7)])
def test_refuses_a_window_larger_than_the_images(height, width):
    message = rf"^Invalid size\. Expected a window inside the images of 4x6\. Received: {height}x{width}$"
    with pytest.raises(ValueError, match=message):
        crop_and_flip(np.zeros((1, 4, 6, 3), "uint8"), np.array([False]), np.array([[0, 0]]), height, width)
