"""CGD's augmentation: a random window of each image, half of them mirrored."""

from keras import ops


def draw_crop_and_flip(rng, size, margin):
    """Draw what `crop_and_flip` does to each image.

    Args:
        rng: numpy.random.Generator.
        size: int B.
        margin: int or pair of int (rows, columns), by which the images are larger than the window: 28 for CGD's windows
            of 224x224 in images of 252x252.

    Returns:
        flips: bool (B,), each true with probability 1/2.
        offsets: int32 (B, 2), row and column of the window's upper left corner, each uniform on 0 ... margin, both ends
            included.

    Example:
        >>> import numpy as np
        >>> flips, offsets = draw_crop_and_flip(np.random.default_rng(0), 3, 28)
        >>> flips.shape, offsets.shape
        ((3,), (3, 2))
    """
    flips = rng.integers(0, 2, size, dtype="int32").astype(bool)
    return flips, rng.integers(0, margin, (size, 2), dtype="int32", endpoint=True)


def crop_and_flip(images, flips, offsets, height, width):
    """Cut a window out of each image, and mirror some of the windows left to right.

    CGD's recipe: images of 252x252, windows of 224x224.

    Args:
        images: (B, H, W, channels), of any dtype; uint8 is the cheapest.
        flips: bool (B,).
        offsets: int32 (B, 2), row and column of the window's upper left corner; the window lies inside the image.
        height: int <= H, of the window.
        width: int <= W.

    Returns:
        (B, height, width, channels), in the dtype of `images`.

    Raises:
        ValueError: if the window is larger than the images.

    Example:
        >>> import numpy as np
        >>> image = np.arange(6, dtype="uint8").reshape(1, 2, 3, 1)
        >>> np.asarray(crop_and_flip(image, np.array([True]), np.array([[1, 1]]), 1, 2))[0, :, :, 0].tolist()
        [[5, 4]]
    """
    _, n_rows, n_columns, channels = images.shape
    if height > n_rows or width > n_columns:
        raise ValueError(
            f"Invalid size. Expected a window inside the images of {n_rows}x{n_columns}. Received: {height}x{width}"
        )
    # out[b, y, x] = images[b, y + row[b], x + column[b]], in mirrored windows at width - 1 - x
    rows = ops.arange(height, dtype="int32") + offsets[:, :1]
    columns = ops.arange(width, dtype="int32")
    columns = ops.where(flips[:, None], width - 1 - columns, columns) + offsets[:, 1:]
    pixels = rows[:, :, None] * n_columns + columns[:, None, :]
    # one look-up of whole pixels in all images laid end to end
    images_before = ops.arange(ops.shape(images)[0], dtype="int32") * (n_rows * n_columns)
    return ops.take(ops.reshape(images, (-1, channels)), pixels + images_before[:, None, None], axis=0)
