"""Random resized crops: a part of the image, stretched to the size of the whole, perhaps mirrored."""

import numpy as np
from keras import ops

# Of the whole image's area; of width to height, uniform in its logarithm; how often a box that fits is tried for.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10


def draw_boxes(rng, size, image_size, smaller=False, least_area=AREA[0]):
    """Draw which part of each image is kept.

    Area and aspect ratio are drawn, then rounded to whole pixels, up to ten times until the box fits into the image;
    its place is uniform. Where no box fitted: the largest one whose aspect ratio is as near the image's as `ASPECT`
    allows.

    Args:
        rng: numpy.random.Generator.
        size: int B.
        image_size: (H, W), int.
        smaller: bool, whether a box fits only if it is smaller than the image both ways, as in kornia 0.5.10. The
            box for the case that none fitted is then that version's too, with an aspect ratio of 3/4 upright.
        least_area: float in 0..1, of the whole image's area.

    Returns:
        int32 (B, 4): top, left, height and width, in pixels.

    Example:
        >>> top, left, height, width = draw_boxes(np.random.default_rng(0), 1, (32, 32))[0]
        >>> bool(top + height <= 32 and left + width <= 32)
        True
    """
    height, width = image_size
    areas = rng.uniform(least_area, AREA[1], (size, TRIES)) * (height * width)
    aspects = np.exp(rng.uniform(*np.log(ASPECT), (size, TRIES)))
    tried = np.rint(np.stack([np.sqrt(areas / aspects), np.sqrt(areas * aspects)], axis=-1))  # (B, TRIES, 2)
    fits = ((tried >= 1) & (tried <= np.array(image_size) - smaller)).all(axis=-1)
    first = fits.argmax(axis=1)
    fallback = _upright_box(height, width) if smaller else _largest_box(height, width)
    sides = np.where(fits.any(axis=1)[:, None], tried[np.arange(size), first], fallback).astype("int32")
    corners = rng.integers(0, np.array(image_size) - sides + 1, dtype="int32")
    return np.concatenate([corners, sides], axis=1)


def _largest_box(height, width):
    narrowest, widest = ASPECT
    if width / height < narrowest:
        return min(round(width / narrowest), height), width
    if width / height > widest:
        return height, min(round(height * widest), width)
    return height, width


def _upright_box(height, width):
    """kornia 0.5.10 compares height / width, and only with 3/4: a square image gives a box three quarters as high."""
    narrowest = ASPECT[0]
    if height / width < narrowest:
        return height, round(height / narrowest)
    return round(width * narrowest), width


def crop_and_flip(images, boxes, flips):
    """Cut a box out of every image, stretch it to the size of the image, and mirror some left to right.

    Bilinear; the pixels at the corners of the box become those at the corners of the result (align_corners).

    Args:
        images: float32 (B, H, W, C).
        boxes: int32 (B, 4): top, left, height and width, inside the image.
        flips: bool (B,).

    Returns:
        float32 (B, H, W, C).

    Example:
        >>> image = np.arange(9, dtype="float32").reshape(1, 3, 3, 1)
        >>> cropped = crop_and_flip(image, np.array([[1, 0, 2, 2]], "int32"), np.array([False]))
        >>> np.asarray(cropped)[0, :, :, 0].tolist()
        [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]
    """
    height, width, channels = images.shape[1:]
    upper, lower, down = _neighbours(boxes[:, 0], boxes[:, 2], height)
    left, right, across = _neighbours(boxes[:, 1], boxes[:, 3], width)
    left, right, across = (ops.where(flips[:, None], places[:, ::-1], places) for places in (left, right, across))

    # Four look-ups of whole pixels in all images laid end to end. Two products with interpolation matrices take half
    # as long again on a CPU, and a GPU would round their factors to 10 bits.
    flat = ops.reshape(images, (-1, channels))
    images_before = ops.arange(ops.shape(images)[0], dtype="int32")[:, None, None] * (height * width)

    def pixels(rows, columns):
        return ops.take(flat, images_before + rows[:, :, None] * width + columns[:, None, :], axis=0)

    down, across = down[:, :, None, None], across[:, None, :, None]
    above = (1 - across) * pixels(upper, left) + across * pixels(upper, right)
    below = (1 - across) * pixels(lower, left) + across * pixels(lower, right)
    return (1 - down) * above + down * below


def _neighbours(start, length, size):
    """The two pixels between which each of `size` places along a side of the box lies, and how far from the first.

    Place i is at start + i * (length - 1) / (size - 1), as an integer and a remainder: exact, whatever the size.
    """
    steps = ops.arange(size, dtype="int32") * (length[:, None] - 1)
    intervals = max(size - 1, 1)
    first = start[:, None] + steps // intervals
    second = ops.minimum(first + 1, (start + length)[:, None] - 1)
    return first, second, ops.cast(steps % intervals, "float32") / intervals
