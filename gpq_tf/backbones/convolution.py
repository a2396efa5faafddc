"""Convolutions as the originals pad them, fast also where the image is small, and joined with their normalisation."""

import keras
from keras import ops

# Pixels up to which a convolution goes pixel by pixel; at 8x8 the convolution of the backend is faster.
SMALL_IMAGE = 16
# Input channels below which TensorFlow's gradient of a strided 1x1 kernel writes beyond its memory on a CPU (oneDNN
# issue 6035, open as of version 3.12), which ends in a crash or in wrong values somewhere else.
FEW_CHANNELS = 16


@keras.saving.register_keras_serializable("gpq_tf")
class Conv2D(keras.layers.Conv2D):
    """keras.layers.Conv2D by `convolve`: an odd kernel, as many zeros on every side as keep the size.

    With a stride above 1 Keras's own padding "same" is another, which begins with the image where it can.

    The name is Keras's, because a layer's place in a weights file comes from it.

    Args:
        filters: int.
        kernel_size: int, odd.
        **kwargs: those of keras.layers.Conv2D, but for the padding.
    """

    def __init__(self, filters, kernel_size=3, **kwargs):
        super().__init__(filters, kernel_size, **{**kwargs, "padding": "same"})

    def convolution_op(self, inputs, kernel):
        return convolve(inputs, kernel.value, self.strides[0])  # a function with its own gradient: no Keras variables

    def call_normalized(self, x, normalization):
        """This convolution and its batch normalisation in inference, as one convolution.

        gamma * (kernel * x + bias - mean) / sqrt(variance + epsilon) + beta is linear in x, so the channel's factor
        goes into the kernel: the normalisation by itself would be one more pass over memory.

        Args:
            x: float (B, H, W, channels).
            normalization: BatchNormalization, built.

        Returns:
            float (B, H, W, filters), in the compute dtype.
        """
        scale, shift = normalization.inference_scale_and_shift()
        dtype = self.compute_dtype
        # In mixed precision a layer's weights are read in 16 bits.
        kernel = ops.cast(self.kernel, dtype) * ops.cast(scale, dtype)
        if self.use_bias:
            shift = ops.cast(self.bias, "float32") * scale + shift
        return ops.add(convolve(ops.cast(x, dtype), kernel, self.strides[0]), ops.cast(shift, dtype))


def convolve(x, kernel, stride=1):
    """Convolve with a square kernel of odd size, and (size - 1) / 2 zeros on every side of the image.

    In images of at most 4x4 pixels a third of a 3x3 kernel's products are with those zeros, and the backend's kernels
    are at their worst. There each output pixel is one matrix product of the window around it with the part of the
    kernel that falls inside, and each part of the kernel's gradient one product over all the pixels that it meets.

    Args:
        x: float (B, H, W, channels).
        kernel: float (size, size, channels, filters), in the dtype of `x`.
        stride: int, pixels from one output to the next, in both directions.

    Returns:
        float (B, ceil(H / stride), ceil(W / stride), filters).

    Example:
        >>> [float(value) for value in convolve(ops.ones((1, 1, 3, 1)), ops.ones((3, 3, 1, 1)))[0, 0, :, 0]]
        [2.0, 3.0, 2.0]
    """
    _, height, width, _ = x.shape
    if kernel.shape[0] == 1:
        if stride > 1 and kernel.shape[2] < FEW_CHANNELS:
            return ops.conv(x[:, ::stride, ::stride], kernel)
        # Elsewhere TensorFlow takes longer to pick the pixels, and to put back their gradient.
        return ops.conv(x, kernel, stride)
    if stride == 2 and kernel.shape[0] == 3 and _is_slow_to_halve(x):
        return _convolve_halving(x, kernel)
    if stride > 1 or kernel.shape[0] > 3:
        rim = (kernel.shape[0] // 2, kernel.shape[0] // 2)
        return ops.conv(ops.pad(x, ((0, 0), rim, rim, (0, 0))), kernel, stride)
    if height and width and height * width <= SMALL_IMAGE:
        return _convolve_small(x, kernel)
    return ops.conv(x, kernel, padding="same")


@ops.custom_gradient
def _convolve_small(x, kernel):
    def gradient(*arguments, upstream=None):
        if upstream is None:
            (upstream,) = arguments
        turned = ops.transpose(ops.flip(kernel, axis=(0, 1)), (0, 1, 3, 2))
        return _pixel_by_pixel(upstream, turned), _kernel_gradient(x, upstream)

    return _pixel_by_pixel(x, kernel), gradient


def _pixel_by_pixel(x, kernel):
    _, height, width, channels = x.shape
    filters = kernel.shape[-1]
    # out[:, row, column] = sum over the window around it of x[:, y, x] @ kernel[y - row + 1, x - column + 1]
    pixels = []
    for row in range(height):
        top, bottom = max(row - 1, 0), min(row + 2, height)
        for column in range(width):
            left, right = max(column - 1, 0), min(column + 2, width)
            length = (bottom - top) * (right - left) * channels
            window = ops.reshape(x[:, top:bottom, left:right], (-1, length))
            part = kernel[top - row + 1 : bottom - row + 1, left - column + 1 : right - column + 1]
            pixels.append(ops.matmul(window, ops.reshape(part, (length, filters))))
    return ops.reshape(ops.stack(pixels, axis=1), (-1, height, width, filters))


def _kernel_gradient(x, upstream):
    _, height, width, channels = x.shape
    filters = upstream.shape[-1]
    # gradient[1 + down, 1 + right] = sum over row, column of
    #     outer(x[:, row + down, column + right], upstream[:, row, column])
    parts = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            seen = x[:, _inside(down, height), _inside(right, width)]
            met = upstream[:, _inside(-down, height), _inside(-right, width)]
            parts.append(ops.matmul(ops.transpose(ops.reshape(seen, (-1, channels))), ops.reshape(met, (-1, filters))))
    return ops.reshape(ops.stack(parts), (3, 3, channels, filters))


def _is_slow_to_halve(x):
    """Whether the backend's gradient of the kernel takes several times as long as nine products.

    It does so in 16 bits and small images; in float32, and in images larger than 8x8, it is as fast.
    """
    _, height, width, _ = x.shape
    even = height and width and height % 2 == width % 2 == 0
    return even and height * width <= 4 * SMALL_IMAGE and keras.backend.standardize_dtype(x.dtype) != "float32"


@ops.custom_gradient
def _convolve_halving(x, kernel):
    def gradient(*arguments, upstream=None):
        if upstream is None:
            (upstream,) = arguments
        to_x = ops.conv_transpose(upstream, kernel, 2)[:, 1:, 1:]
        return to_x, _kernel_gradient_halving(x, upstream)

    return ops.conv(_pad_first(x, 1), kernel, 2), gradient


def _kernel_gradient_halving(x, upstream):
    channels = x.shape[-1]
    rows, columns, filters = upstream.shape[1:]
    # gradient[1 + down, 1 + right] = sum over row, column of
    #     outer(x[:, 2 * row + down, 2 * column + right], upstream[:, row, column])
    # Two rows of zeros and every two rows together, and likewise columns: a step of 2 costs more than the products.
    pairs = ops.reshape(_pad_first(x, 2), (-1, rows + 1, 2, columns + 1, 2 * channels))
    met = ops.reshape(upstream, (-1, filters))
    parts = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            top, lower = divmod(2 + down, 2)
            left, second = divmod(2 + right, 2)
            one = slice(second * channels, (second + 1) * channels)
            seen = pairs[:, top : top + rows, lower, left : left + columns, one]
            parts.append(ops.matmul(ops.transpose(ops.reshape(seen, (-1, channels))), met))
    return ops.reshape(ops.stack(parts), (3, 3, channels, filters))


def _pad_first(x, n):
    """n zeros before the first row and before the first column."""
    return ops.pad(x, ((0, 0), (n, 0), (n, 0), (0, 0)))


def _inside(shift, size):
    """The positions p + shift that lie inside for p = 0 ... size - 1."""
    return slice(max(shift, 0), size + min(shift, 0))
