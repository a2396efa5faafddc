"""GPQ's feature extractor: ten 3x3 convolutions in four blocks (CVPR 2020, section 4.1; TensorFlow 1 program)."""

import itertools

import keras
from keras import ops

from gpq_tf.backbones.batch_norm import DebiasedBatchNormalization
from gpq_tf.backbones.convolution import Conv2D

# Channels of the convolutions of each block; a 2x2 maximum follows each block but the last.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512))
# Mean and standard deviation of CIFAR-10's channels, in uint8 units, as the original has them.
CHANNEL_MEAN = (125.642, 123.738, 114.46)
CHANNEL_DEVIATION = (63.01, 62.157, 66.94)


def widths(width_multiplier):
    """Channels of every convolution, block by block.

    Args:
        width_multiplier: float > 0, 1 for the published network.

    Returns:
        tuple of tuples of int, each at least 1.

    Example:
        >>> widths(1 / 16)
        ((4, 4), (8, 8), (16, 16, 16), (32, 32, 32))
    """
    return tuple(tuple(max(1, round(width * width_multiplier)) for width in block) for block in BLOCKS)


def feature_size(width_multiplier):
    """Length of the pooled features: the last block's channels and the third block's.

    Example:
        >>> feature_size(1.0)
        768
    """
    channels = widths(width_multiplier)
    return channels[3][-1] + channels[2][-1]


def kernel_size(width_multiplier):
    """Number of values in all convolution kernels; it tells how large a weights file must at least be.

    Example:
        >>> kernel_size(1.0)
        7632576
    """
    flat = [3, *(width for block in widths(width_multiplier) for width in block)]
    return sum(9 * before * after for before, after in itertools.pairwise(flat))


def preprocess(images):
    """Normalise the channels: (x - mean) / deviation, in this order, in float32.

    Args:
        images: uint8 or float (B, H, W, 3), in uint8 units.

    Returns:
        float32 (B, H, W, 3).

    Example:
        >>> import numpy as np
        >>> preprocess(np.zeros((2, 8, 8, 3), "uint8")).shape == (2, 8, 8, 3)
        True
    """
    images = ops.cast(images, "float32")
    return (images - ops.convert_to_tensor(CHANNEL_MEAN)) / ops.convert_to_tensor(CHANNEL_DEVIATION)


@keras.saving.register_keras_serializable("gpq_tf")
class VGG(keras.layers.Layer):
    """Ten convolutions with batch normalisation and ReLU; the pooled outputs of the third and the fourth block.

    Args:
        width_multiplier: float > 0, scales every channel count.
        seed: int, of the initial kernels (Glorot uniform, as the original).

    Shapes:
        input: float (B, H, W, 3), normalised (see `preprocess`), H and W at least 8.
        output: float (B, F), F = `feature_size(width_multiplier)`; first the average of the fourth block (512 at
        full width), then of the third block after its maximum (256).
    """

    def __init__(self, width_multiplier=1.0, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.width_multiplier, self.seed = width_multiplier, seed
        self.convolutions, self.normalizations = [], []
        for block, channels in enumerate(widths(width_multiplier)):
            for position, width in enumerate(channels):
                name = f"{block}_{position}"
                self.convolutions.append(
                    Conv2D(
                        width,
                        kernel_initializer=keras.initializers.GlorotUniform(seed + len(self.convolutions)),
                        dtype=self.dtype_policy,
                        name=f"conv_{name}",
                    )
                )
                self.normalizations.append(DebiasedBatchNormalization(dtype=self.dtype_policy, name=f"norm_{name}"))
        self.pool = keras.layers.MaxPooling2D(2, dtype=self.dtype_policy, name="pool")

    def build(self, input_shape):
        before = input_shape[-1]
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            convolution.build((None, None, None, before))
            before = convolution.filters
            normalization.build((None, None, None, before))

    def call(self, x, training=False):
        layers = iter(zip(self.convolutions, self.normalizations, strict=True))
        for block, channels in enumerate(BLOCKS):
            for _ in channels:
                convolution, normalization = next(layers)
                if training:
                    x = normalization(convolution(x), training=True)
                else:
                    x = convolution.call_normalized(x, normalization)
                x = ops.relu(x)
            if block < 3:
                x = self.pool(x)
            if block == 2:
                branch = ops.mean(x, axis=(1, 2))
        return ops.concatenate([ops.mean(x, axis=(1, 2)), branch], axis=-1)

    def get_config(self):
        return {**super().get_config(), "width_multiplier": self.width_multiplier, "seed": self.seed}
