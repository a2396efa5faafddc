"""SPQ's feature extractor: ResNet-18 for small images, with one more dense layer (ICCV 2021; the PyTorch program)."""

import keras
from keras import ops

from gpq_tf.backbones.batch_norm import BatchNormalization
from gpq_tf.backbones.convolution import Conv2D

# Channels of the four layers of two blocks each, at full width; the first block of all layers but one halves the image.
CHANNELS = (64, 128, 256, 512)
BLOCKS_PER_LAYER = 2


def widths(width_multiplier):
    """Channels of the four layers.

    Args:
        width_multiplier: float > 0, 1 for the published network.

    Returns:
        tuple of int, each at least 1.

    Example:
        >>> widths(1 / 8)
        (8, 16, 32, 64)
    """
    return tuple(max(1, round(channels * width_multiplier)) for channels in CHANNELS)


def feature_size(width_multiplier):
    """Length of the features.

    Example:
        >>> feature_size(1.0)
        512
    """
    return widths(width_multiplier)[-1]


def kernel_size(width_multiplier):
    """Number of values in all kernels; it tells how large a weights file must at least be.

    Example:
        >>> kernel_size(1.0)
        11421376
    """
    channels = widths(width_multiplier)
    n = 9 * 3 * channels[0] + channels[-1] ** 2
    before = channels[0]
    for layer, width in enumerate(channels):
        n += 9 * before * width + 9 * width * width * (2 * BLOCKS_PER_LAYER - 1)
        n += before * width if _has_shortcut(layer, before, width) else 0
        before = width
    return n


def preprocess(images):
    """Scale to 0 ... 1 in float32; SPQ subtracts no mean.

    Args:
        images: uint8 or float (B, H, W, 3), in uint8 units.

    Returns:
        float32 (B, H, W, 3).

    Example:
        >>> float(preprocess(ops.full((1, 1, 1, 3), 255))[0, 0, 0, 0])
        1.0
    """
    return ops.cast(images, "float32") / 255.0


@keras.saving.register_keras_serializable("gpq_tf")
class ResNet(keras.layers.Layer):
    """A 3x3 convolution, four layers of two residual blocks, the average over the image, a dense layer and ReLU.

    Args:
        width_multiplier: float > 0, scales every channel count.
        seed: int, of the initial values: uniform, up to 1 / sqrt(inputs of a unit), PyTorch's default.

    Shapes:
        input: float (B, H, W, 3), in 0 ... 1 (see `preprocess`), any H and W.
        output: float (B, F), F = `feature_size(width_multiplier)`.
    """

    def __init__(self, width_multiplier=1.0, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.width_multiplier, self.seed = width_multiplier, seed
        policy, channels = self.dtype_policy, widths(width_multiplier)
        self.conv1 = _convolution(channels[0], seed, policy, "conv1")
        self.norm1 = BatchNormalization(dtype=policy, name="norm1")
        self.blocks, before = [], channels[0]
        for layer, width in enumerate(channels):
            for position in range(BLOCKS_PER_LAYER):
                first = position == 0
                self.blocks.append(
                    ResidualBlock(
                        width,
                        stride=2 if first and layer else 1,
                        shortcut=first and _has_shortcut(layer, before, width),
                        seed=seed + 1 + 3 * len(self.blocks),
                        dtype=policy,
                        name=f"layer{layer + 1}_{position}",
                    )
                )
            before = width
        initializer = _uniform(seed + 1 + 3 * len(self.blocks))
        limit = channels[-1] ** -0.5
        self.fc_out = keras.layers.Dense(
            channels[-1],
            activation="relu",
            kernel_initializer=initializer,
            bias_initializer=keras.initializers.RandomUniform(-limit, limit, seed=seed + 2 + 3 * len(self.blocks)),
            dtype=policy,
            name="fc_out",
        )

    def build(self, input_shape):
        self.conv1.build((None, None, None, input_shape[-1]))
        before = self.conv1.filters
        self.norm1.build((None, None, None, before))
        for block in self.blocks:
            block.build((None, None, None, before))
            before = block.width
        self.fc_out.build((None, before))

    def call(self, x, training=False):
        x = ops.relu(_normalized(self.conv1, self.norm1, x, training))
        for block in self.blocks:
            x = block(x, training=training)
        # Averaged in float32: in 16 bits a sum of many pixels would lose digits.
        pooled = ops.mean(ops.cast(x, "float32"), axis=(1, 2))
        return self.fc_out(ops.cast(pooled, x.dtype))

    def get_config(self):
        return {**super().get_config(), "width_multiplier": self.width_multiplier, "seed": self.seed}


@keras.saving.register_keras_serializable("gpq_tf")
class ResidualBlock(keras.layers.Layer):
    """Two 3x3 convolutions, and the input added before the last ReLU.

    Args:
        width: int, channels of the output.
        stride: int, of the first convolution.
        shortcut: bool, whether the input is projected by a normalised 1x1 convolution before it is added.
        seed: int, of the initial values.
    """

    def __init__(self, width, stride, shortcut, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.width, self.stride, self.shortcut, self.seed = width, stride, shortcut, seed
        policy = self.dtype_policy
        self.conv1 = _convolution(width, seed, policy, "conv1", stride)
        self.norm1 = BatchNormalization(dtype=policy, name="norm1")
        self.conv2 = _convolution(width, seed + 1, policy, "conv2")
        self.norm2 = BatchNormalization(dtype=policy, name="norm2")
        if shortcut:
            self.shortcut_conv = _convolution(width, seed + 2, policy, "shortcut_conv", stride, kernel_size=1)
            self.shortcut_norm = BatchNormalization(dtype=policy, name="shortcut_norm")

    def build(self, input_shape):
        inside = (None, None, None, self.width)
        self.conv1.build(input_shape)
        self.norm1.build(inside)
        self.conv2.build(inside)
        self.norm2.build(inside)
        if self.shortcut:
            self.shortcut_conv.build(input_shape)
            self.shortcut_norm.build(inside)

    def call(self, x, training=False):
        y = ops.relu(_normalized(self.conv1, self.norm1, x, training))
        y = _normalized(self.conv2, self.norm2, y, training)
        if self.shortcut:
            x = _normalized(self.shortcut_conv, self.shortcut_norm, x, training)
        return ops.relu(y + x)

    def get_config(self):
        own = {name: getattr(self, name) for name in ("width", "stride", "shortcut", "seed")}
        return {**super().get_config(), **own}


def _convolution(width, seed, policy, name, stride=1, kernel_size=3):
    return Conv2D(
        width,
        kernel_size,
        strides=stride,
        use_bias=False,
        kernel_initializer=_uniform(seed),
        dtype=policy,
        name=name,
    )


def _uniform(seed):
    """Uniform up to 1 / sqrt(inputs of a unit)."""
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed=seed)


def _normalized(convolution, normalization, x, training):
    if training:
        return normalization(convolution(x), training=True)
    return convolution.call_normalized(x, normalization)


def _has_shortcut(layer, before, width):
    return layer > 0 or before != width
