"""Gaussian blur, with a width for each image and each direction."""

from keras import ops


def radius_for(image_size):
    """How many pixels the blur reaches to each side: half a tenth of the shorter side, rounded down.

    The original asks for int(.1 * size) taps, which its library refuses where that number is even (6 at 64 pixels, 22
    at 224) or 0. SimCLR's own program rounds even numbers up, which is what 2 * radius + 1 does: 3 taps at 32 pixels,
    7 at 64, 9 at 96, 23 at 224; below 20 pixels there is 1, and nothing is blurred.

    Args:
        image_size: (H, W), int.

    Returns:
        int.

    Example:
        >>> [2 * radius_for((size, size)) + 1 for size in (16, 32, 64, 224)]
        [1, 3, 7, 23]
    """
    return min(image_size) // 20


def blur(images, sigmas, radius):
    """Convolve each image with a Gaussian, cut off after `radius` pixels and scaled to sum 1; the border is mirrored.

    Args:
        images: float32 (B, H, W, C), H and W larger than `radius`.
        sigmas: float32 (B, 2), standard deviations downwards and across, in pixels, positive.
        radius: int >= 0.

    Returns:
        float32 (B, H, W, C).

    Example:
        >>> import numpy as np
        >>> dot = np.zeros((1, 5, 5, 1), "float32")
        >>> dot[0, 2, 2, 0] = 1
        >>> [round(float(value), 4) for value in blur(dot, np.array([[0.1, 2.0]], "float32"), 1)[0, 2, :, 0]]
        [0.0, 0.3192, 0.3617, 0.3192, 0.0]
    """
    offsets = ops.arange(-radius, radius + 1, dtype="float32")
    weights = ops.exp(-ops.square(offsets) / (2 * ops.square(sigmas[..., None])))
    weights = weights / ops.sum(weights, axis=-1, keepdims=True)
    height, width = images.shape[1:3]
    # out[b, y, x] = sum_k weights[b, k] * padded[b, y + k, x], then the same across
    taps = range(2 * radius + 1)
    padded = ops.pad(images, ((0, 0), (radius, radius), (0, 0), (0, 0)), mode="reflect")
    images = sum(weights[:, 0, k, None, None, None] * padded[:, k : k + height] for k in taps)
    padded = ops.pad(images, ((0, 0), (0, 0), (radius, radius), (0, 0)), mode="reflect")
    return sum(weights[:, 1, k, None, None, None] * padded[:, :, k : k + width] for k in taps)
