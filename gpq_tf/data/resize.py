"""Bilinear resizing to the bit as OpenCV does it, which is how published CGD checkpoints saw their images."""

import numpy as np

_ONE = 2048  # a weight of 1 in OpenCV's fixed point


def resize(image, height, width):
    """Resize an image as OpenCV's `resize` with INTER_LINEAR does, aspect ratio not kept.

    Output pixel i lies at (i + 1/2) * size_in / size_out - 1/2 of the input and mixes its two neighbours by distance,
    along both axes. Nothing is smoothed before an image shrinks. A uint8 image is mixed in integers, with weights in
    1/2048: each row in full precision, then four bits are dropped, both rows are weighted and cut to quarters, and
    only their sum is rounded. So the result differs from exact bilinear interpolation by less than one.

    Args:
        image: uint8 or float32 (H, W, channels), none of them 0.
        height: int > 0, pixels.
        width: int > 0, pixels.

    Returns:
        (height, width, channels), in the dtype of `image`.

    Raises:
        ValueError: if `image` is no such array, or a size is not positive.

    Example:
        >>> resize(np.array([[[0], [100]]], np.uint8), 1, 4)[0, :, 0].tolist()
        [0, 25, 75, 100]
    """
    image = np.asarray(image)
    if image.dtype not in (np.uint8, np.float32) or image.ndim != 3 or not image.size:
        raise ValueError(
            f"Invalid image. Expected uint8 or float32 (H, W, channels). Received: {image.dtype} {image.shape}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"Invalid size. Expected positive height and width. Received: {height}x{width}")
    n_rows, n_columns, channels = image.shape
    left, right, across = _neighbours(n_columns, width)
    above, below, down = _neighbours(n_rows, height)
    # Beyond the outer columns only the border pixel counts; beyond the outer rows both weights stay, though both
    # fall on the border row, and what they drop in rounding stays dropped.
    across = np.where(left == right, np.float32(0), across)

    # rows[y, x] = (1 - across[x]) * image[y, left[x]] + across[x] * image[y, right[x]]
    # out[y, x] = (1 - down[y]) * rows[above[y], x] + down[y] * rows[below[y], x]
    # The channels lie flat beside each other, each with its pixel's weight: NumPy is fastest on long rows.
    flat = image.reshape(n_rows, n_columns * channels)
    left, right = ((pixels[:, None] * channels + np.arange(channels)).ravel() for pixels in (left, right))
    across, down = np.repeat(across, channels), down[:, None]
    weight = _fixed if image.dtype == np.uint8 else np.asarray
    rows = flat.take(left, axis=1) * weight(1 - across)
    rows += flat.take(right, axis=1) * weight(across)
    if image.dtype == np.uint8:
        rows >>= 4
        out = (rows.take(above, axis=0) * _fixed(1 - down)) >> 16
        out += (rows.take(below, axis=0) * _fixed(down)) >> 16
        out = ((out + 2) >> 2).astype(np.uint8)
    else:
        out = rows.take(above, axis=0) * (1 - down) + rows.take(below, axis=0) * down
    return out.reshape(height, width, channels)


def _neighbours(size_in, size_out):
    """For each output pixel of an axis: the two input pixels it lies between (int64) and the second's share (float32).

    An input pixel that would lie outside is the border pixel; then both are the same.
    """
    position = ((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5).astype(np.float32)
    before = np.floor(position)
    first = before.astype(np.int64)
    return first.clip(0, size_in - 1), (first + 1).clip(0, size_in - 1), position - before


def _fixed(share):
    """Weights in 1/2048, int32, halves to even."""
    return np.rint(share * np.float32(_ONE)).astype(np.int32)
