"""OpenCV's bilinear resize against the original's record and against its arithmetic written out as loops."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpq_tf.data.resize import resize
from tests import golden

many = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(1, 12)


def random_image(seed, height, width, channels=3):
    """Half of the images are black and white only: the extremes of the arithmetic."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, channels), np.uint8)
    return image if seed % 2 else (image >> 7) * np.uint8(255)


def position(i, size_in, size_out):
    """(pixel before, share of the next one as float32) of output pixel i."""
    place = np.float32((i + 0.5) * (size_in / size_out) - 0.5)
    return math.floor(place), place - np.float32(math.floor(place))


def fixed(share):
    return int(np.rint(np.float32(share) * np.float32(2048)))


def loop_resize(image, height, width):
    """The rule of OpenCV's fixed point, number by number in Python's integers."""
    n_rows, n_columns, channels = image.shape
    out = np.zeros((height, width, channels), np.uint8)
    for i, j, c in np.ndindex(out.shape):
        column, across = position(j, n_columns, width)
        if column < 0 or column >= n_columns - 1:
            column, across = min(max(column, 0), n_columns - 1), np.float32(0)
        row, down = position(i, n_rows, height)
        total = 2
        for n, weight in ((row, fixed(1 - down)), (row + 1, fixed(down))):
            pixels = image[min(max(n, 0), n_rows - 1), :, c]
            mixed = fixed(1 - across) * int(pixels[column])
            mixed += fixed(across) * int(pixels[min(column + 1, n_columns - 1)])
            total += weight * (mixed >> 4) >> 16
        out[i, j, c] = total >> 2
    return out


def exact_resize(image, height, width):
    """Bilinear interpolation in float64: outside the border everything equals the border."""

    def weights(size_in, size_out):
        matrix = np.zeros((size_out, size_in))
        for i in range(size_out):
            place = (i + 0.5) * (size_in / size_out) - 0.5
            before = math.floor(place)
            matrix[i, min(max(before, 0), size_in - 1)] += 1 - (place - before)
            matrix[i, min(max(before + 1, 0), size_in - 1)] += place - before
        return matrix

    down, across = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("iy,yxc,jx->ijc", down, image.astype(np.float64), across)


def recorded():
    """(key, input, output) of every resize in the golden file."""
    stored = golden.load("dataset.npz", golden.CGD)
    for key, expected in stored.items():
        found = re.fullmatch(r"(resized/(\d+)|(resize_\w+))/w(\d+)_h(\d+)", key)
        if found:
            image = stored[f"crop/{found[2]}" if found[2] else f"{found[3].removesuffix('_float32')}/in"]
            assert expected.shape[:2] == (int(found[5]), int(found[4])), key
            yield key, image.astype(expected.dtype), expected


@golden.needs_golden
def test_every_recorded_resize_to_the_bit():
    keys = []
    for key, image, expected in recorded():
        found = resize(image, *expected.shape[:2])
        assert found.dtype == expected.dtype, key
        np.testing.assert_array_equal(found, expected, err_msg=key)
        keys.append(key.partition("/")[0])
    assert set(keys) == {"resized", "resize_probe", "resize_half", "resize_probe_float32"}


@many
@given(sizes, sizes, sizes, sizes, st.sampled_from([1, 3, 4]), st.integers(0, 2**32 - 1))
def test_uint8_is_the_loop(n_rows, n_columns, height, width, channels, seed):
    image = random_image(seed, n_rows, n_columns, channels)
    found = resize(image, height, width)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, loop_resize(image, height, width))


@pytest.mark.parametrize(
    ("n_rows", "n_columns", "height", "width"),
    [
        (1, 1, 5, 7),
        (1, 9, 3, 2),
        (9, 1, 2, 3),
        (2, 2, 31, 1),
        (40, 30, 20, 15),
        (45, 40, 15, 10),
        (7, 300, 9, 2),
        (375, 40, 5, 4),
    ],
)
def test_extreme_shapes_are_the_loop(n_rows, n_columns, height, width):
    image = random_image(n_rows, n_rows, n_columns)
    np.testing.assert_array_equal(resize(image, height, width), loop_resize(image, height, width))


@many
@given(sizes, sizes, sizes, sizes, st.integers(0, 2**32 - 1))
def test_both_dtypes_interpolate(n_rows, n_columns, height, width, seed):
    """uint8 stays within one of the exact value, float32 within its own rounding."""
    image = random_image(seed, n_rows, n_columns)
    exact = exact_resize(image, height, width)
    assert np.abs(resize(image, height, width) - exact).max() < 1
    found = resize(image.astype(np.float32), height, width)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=255 * 4e-6)


@many
@given(sizes, sizes, st.sampled_from(["uint8", "float32"]), st.integers(0, 2**32 - 1))
def test_the_same_size_changes_nothing(height, width, dtype, seed):
    image = random_image(seed, height, width).astype(dtype)
    np.testing.assert_array_equal(resize(image, height, width), image)


@pytest.mark.parametrize("size", [1, 3, 10, 224])
def test_one_colour_stays_that_colour(size):
    colours = np.arange(256, dtype=np.uint8)
    found = resize(np.broadcast_to(colours, (7, 10, 256)), size, 2 * size)
    assert (found == colours).all()


def test_a_view_gives_what_its_copy_gives():
    image = random_image(1, 30, 40)
    view = image[5:25:2, ::-1]
    np.testing.assert_array_equal(resize(view, 8, 9), resize(view.copy(), 8, 9))


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4), np.uint8), r"uint8 \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float64), r"float64 \(4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \(0, 4, 3\)"),
    ],
)
def test_refuses_other_arrays(image, found):
    message = rf"Invalid image\. Expected uint8 or float32 \(H, W, channels\)\. Received: {found}"
    with pytest.raises(ValueError, match=message):
        resize(image, 2, 2)


def test_refuses_a_size_of_nothing():
    with pytest.raises(ValueError, match=r"Invalid size\. Expected positive height and width\. Received: 0x5"):
        resize(np.zeros((2, 2, 3), np.uint8), 0, 5)
