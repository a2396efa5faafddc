"""keras-cv's ResNetBackbone as CGD's backbone, built from its arguments.

Its description is {"keras_cv": {"stackwise_filters": [...], "stackwise_blocks": [...], "stackwise_strides": [...]}}.
Unlike `resnet_v1`'s, its stem always has 64 channels, and its first convolution and pooling surround an image as
Keras's "same" does: more at the right and below. So weights of the one network do not suit the other.
"""

import keras

NAMES = ("stackwise_filters", "stackwise_blocks", "stackwise_strides")
_LARGEST = {"stackwise_filters": 16_384, "stackwise_blocks": 100, "stackwise_strides": 8}
_STEM, _EXPANSION = 64, 4


def bottlenecks(width=64, blocks=(3, 4, 6, 3), strides=(1, 2, 2, 1)):
    """The description of a network whose stages are as those of `resnet_v1.bottlenecks`.

    Example:
        >>> feature_size(bottlenecks())
        2048
    """
    filters = [width * 2**stage for stage in range(len(blocks))]
    return {"keras_cv": dict(zip(NAMES, (filters, list(blocks), list(strides)), strict=True))}


def is_layout(layout):
    """Whether something is such a description.

    Example:
        >>> is_layout(bottlenecks(16)), is_layout({"keras_cv": {}})
        (True, False)
    """
    arguments = layout.get("keras_cv") if isinstance(layout, dict) and len(layout) == 1 else None
    if not isinstance(arguments, dict) or set(arguments) != set(NAMES):
        return False
    values = [arguments[name] for name in NAMES]
    if not all(isinstance(value, list | tuple) and 1 <= len(value) <= 8 for value in values):
        return False
    return len({len(value) for value in values}) == 1 and all(
        isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= _LARGEST[name]
        for name in NAMES
        for number in arguments[name]
    )


def feature_size(layout):
    """Channels of the feature map."""
    return _EXPANSION * layout["keras_cv"]["stackwise_filters"][-1]


def kernel_size(layout):
    """Number of values in all kernels; it tells how large a weights file must at least be."""
    filters, blocks, _ = (layout["keras_cv"][name] for name in NAMES)
    size, before = 7 * 7 * 3 * _STEM, _STEM
    for inside, n_block in zip(filters, blocks, strict=True):
        outside = _EXPANSION * inside
        size += before * outside  # the shortcut of the first block
        for width in (before, *[outside] * (n_block - 1)):
            size += width * inside + 9 * inside**2 + inside * outside
        before = outside
    return size


@keras.saving.register_keras_serializable("gpq_tf")
class KerasCVResNet(keras.layers.Layer):
    """The network of a description.

    Args:
        layout: dict, as above.
        seed: int, of the initial kernels (He normal), which keras-cv draws unseeded.

    Shapes:
        input: float (B, H, W, 3), normalised (see `resnet_v1.preprocess`).
        output: float (B, H', W', F), the feature map, F = `feature_size(layout)`.

    Raises:
        ValueError: if the layout is not such a description.
    """

    def __init__(self, layout, seed=0, **kwargs):
        super().__init__(**kwargs)
        if not is_layout(layout):
            raise ValueError("Invalid layout. Expected arguments of ResNetBackbone. Received: another value")
        import keras_cv

        self.layout, self.seed = layout, seed
        # Its layers have no argument for their precision: they take the one that is set.
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.dtype_policy)
        try:
            self.network = keras_cv.models.ResNetBackbone(**layout["keras_cv"], include_rescaling=False)
        finally:
            keras.config.set_dtype_policy(before)

    def build(self, input_shape):
        convolutions = [layer for layer in self.network.layers if isinstance(layer, keras.layers.Conv2D)]
        for number, convolution in enumerate(convolutions):
            kernel = convolution.kernel
            kernel.assign(keras.initializers.HeNormal(self.seed + number)(kernel.shape))

    def call(self, x, training=False):
        return self.network(x, training=training)

    def get_config(self):
        return {**super().get_config(), "layout": self.layout, "seed": self.seed}
