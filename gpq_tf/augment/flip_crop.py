"""GPQ's augmentation: a mirror image and a shift."""

from keras import ops


def draw_flip_and_crop(rng, size, padding=4):
    """Draw what `flip_and_crop` does to each image.

    Args:
        rng: numpy.random.Generator.
        size: int B.
        padding: int, rows and columns of zeros around the image.

    Returns:
        flips: bool (B,), each true with probability 1/2.
        offsets: int32 (B, 2), row and column of the crop's corner in the padded image, each uniform on
            0 ... 2 * padding, both ends included.

    Example:
        >>> import numpy as np
        >>> flips, offsets = draw_flip_and_crop(np.random.default_rng(0), 3)
        >>> flips.shape, offsets.shape
        ((3,), (3, 2))
    """
    flips = rng.integers(0, 2, size, dtype="int32").astype(bool)
    return flips, rng.integers(0, 2 * padding + 1, (size, 2), dtype="int32")


def flip_and_crop(images, flips, offsets, padding=4):
    """Mirror some images left to right, surround all with zeros, cut the former size out again.

    The padding is zero after normalisation, that is, the mean colour.

    Args:
        images: float (B, H, W, 3), normalised.
        flips: bool (B,).
        offsets: int32 (B, 2), row and column of the corner in the padded image (`padding`, `padding`: the middle).
        padding: int.

    Returns:
        float (B, H, W, 3), in the dtype of `images`.

    Example:
        >>> import numpy as np
        >>> image = np.arange(4, dtype="float32").reshape(1, 2, 2, 1)
        >>> moved = flip_and_crop(image, np.array([True]), np.array([[1, 0]]), padding=1)
        >>> np.asarray(moved)[0, :, :, 0].tolist()
        [[0.0, 1.0], [0.0, 3.0]]
    """
    _, height, width, channels = images.shape
    # out[b, y, x] = padded[b, y + row[b], x + column[b]]: find the pixel in the unpadded, unflipped image
    rows = ops.arange(height, dtype="int32") + offsets[:, :1] - padding
    columns = ops.arange(width, dtype="int32") + offsets[:, 1:] - padding
    inside = _inside(rows, height)[:, :, None] & _inside(columns, width)[:, None, :]
    columns = ops.where(flips[:, None], width - 1 - columns, columns)
    pixels = ops.clip(rows, 0, height - 1)[:, :, None] * width + ops.clip(columns, 0, width - 1)[:, None, :]
    # one look-up of whole pixels in all images laid end to end
    images_before = ops.arange(ops.shape(images)[0], dtype="int32") * (height * width)
    flat = ops.reshape(images, (-1, channels))
    moved = ops.take(flat, pixels + images_before[:, None, None], axis=0)
    return ops.where(inside[..., None], moved, ops.zeros_like(moved))


def _inside(positions, size):
    return ops.logical_and(positions >= 0, positions < size)
