"""Colours: brightness, contrast, saturation and hue in a drawn order, and grey. Images are in 0..1."""

import functools

from keras import ops

LUMA = (0.299, 0.587, 0.114)


def gray(images):
    """The brightness of each pixel, .299 red + .587 green + .114 blue.

    Args:
        images: float (B, H, W, 3).

    Returns:
        float (B, H, W, 1), in the dtype of `images`.

    Example:
        >>> round(float(gray(ops.ones((1, 1, 1, 3)))[0, 0, 0, 0]), 6)
        1.0
    """
    red, green, blue = ops.split(images, 3, axis=-1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def jitter(images, factors, order, steps):
    """Apply four steps to all images, in a drawn order.

    Args:
        images: float (B, H, W, 3), in 0..1.
        factors: float32 (B, 4), of brightness, contrast, saturation and hue; 1, 1, 1, 0 change nothing.
        order: int32 (4,), a permutation of 0..3: the step that comes first, and so on.
        steps: the four functions of (images, factors (B, 1, 1, 1)), such as `STEPS["simclr"]`.

    Returns:
        float (B, H, W, 3), in 0..1 up to rounding.

    Example:
        >>> image, factors = ops.ones((1, 1, 1, 3)), ops.convert_to_tensor([[0.5, 1.0, 1.0, 0.0]])
        >>> jittered = jitter(image, factors, ops.arange(4, dtype="int32"), STEPS["simclr"])
        >>> [round(float(value), 4) for value in jittered[0, 0, 0]]
        [0.5, 0.5, 0.5]
    """
    # The order is data, so that nothing is compiled anew, and sixteen times "if it is this step's turn" computes only
    # what is due. Computing all steps and selecting takes 4 to 7 times as long; ops.switch runs as fast as this, but
    # TensorFlow takes up to a minute to compile it.
    for place in range(4):
        for number, step in enumerate(steps):
            images = _apply_if(order[place] == number, step, images, factors[:, number, None, None, None])
    return images


def to_hsv(images, epsilon):
    """Split colours into hue, saturation and value.

    Args:
        images: float (B, H, W, 3), in 0..1.
        epsilon: float, in saturation = (largest - smallest) / (largest + epsilon) of the three channels.

    Returns:
        hue in turns, saturation and value (the largest channel), each float (B, H, W, 1), in 0..1.

    Example:
        >>> [round(float(x[0, 0, 0, 0]), 4) for x in to_hsv(ops.convert_to_tensor([[[[0.0, 0.5, 0.0]]]]), 1e-6)]
        [0.3333, 1.0, 0.5]
    """
    hue, saturation, value = ops.split(ops.image.rgb_to_hsv(images, data_format="channels_last"), 3, axis=-1)
    return hue, saturation * (value / (value + epsilon)), value


def to_rgb(hue, saturation, value):
    """Undo `to_hsv`: three of float (B, H, W, 1) in 0..1 -> float (B, H, W, 3)."""
    return ops.image.hsv_to_rgb(ops.concatenate([hue, saturation, value], axis=-1), data_format="channels_last")


def _apply_if(due, step, images, factors):
    return ops.cond(due, lambda: step(images, factors), lambda: images)


def _blend(images, other, factors):
    """As Pillow's ImageEnhance: `other` where the factor is 0, the image where it is 1, past it where it is larger."""
    return ops.clip(factors * images + (1 - factors) * other, 0, 1)


def _blend_with_mean_gray(images, factors):
    return _blend(images, ops.mean(gray(images), axis=(1, 2, 3), keepdims=True), factors)


def _blend_with_gray(images, factors):
    return _blend(images, gray(images), factors)


def _multiply(images, factors):
    return ops.clip(factors * images, 0, 1)


def _add(images, factors):
    return ops.clip(images + (factors - 1), 0, 1)


def _scale_saturation(images, factors, epsilon):
    hue, saturation, value = to_hsv(images, epsilon)
    return to_rgb(hue, ops.clip(factors * saturation, 0, 1), value)


def _shift_hue(images, turns, epsilon):
    hue, saturation, value = to_hsv(images, epsilon)
    shifted = hue + turns
    return to_rgb(shifted - ops.floor(shifted), saturation, value)


# Brightness, contrast, saturation, hue. The epsilons are kornia's: of a colour without any blue, say, they make one
# with about this much, which no longer counts among the pixels that are exactly 0.
STEPS = {
    "simclr": (
        _multiply,
        _blend_with_mean_gray,
        _blend_with_gray,
        functools.partial(_shift_hue, epsilon=1e-8),
    ),
    "spq2021": (
        _add,
        _multiply,
        functools.partial(_scale_saturation, epsilon=1e-6),
        functools.partial(_shift_hue, epsilon=1e-6),
    ),
}
