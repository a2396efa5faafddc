"""ResNet v1 from a description of its layers: what CGD's converted networks run on (MXNet's gluon model zoo).

Such networks differ in where they halve the image, in which convolutions have biases, and in their batch
normalisations; so the description says it, layer by layer. It is plain JSON:

    {"stem": UNIT, "pool": [kernel, stride, pad] or None, "stages": [[BLOCK, ...], ...]}
    BLOCK = {"units": [UNIT, ...], "shortcut": UNIT or None}
    UNIT = [channels, kernel, stride, has_bias, epsilon, momentum]

A unit is a convolution and its batch normalisation; the image is surrounded by kernel // 2 zeros. ReLUs follow the
stem, all units of a block but the last, and the sum of a block's units and its shortcut.
"""

import math

import keras
from keras import ops

from gpq_tf.backbones.batch_norm import BatchNormalization
from gpq_tf.backbones.convolution import Conv2D

# Mean and standard deviation of ImageNet's channels, of values in 0 ... 1.
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_DEVIATION = (0.229, 0.224, 0.225)
_LARGEST = {"channels": 65_536, "kernel": 31, "stride": 8}
_MOST_UNITS = 2_000


def bottlenecks(width=64, blocks=(3, 4, 6, 3), strides=(1, 2, 2, 1)):
    """The description of a ResNet v1 of bottleneck blocks.

    Args:
        width: int, channels of the stem; a stage has 1, 2, 4 and 8 times as many, and 4 times those come out.
        blocks: ints, blocks of each stage.
        strides: ints, of each stage, in its first 1x1 convolution, where Keras's and gluon's networks have them. CGD
            (arXiv 1903.10663, section 3.1) takes that of the last stage away: a map of 14x14 places for images of
            224x224 pixels.

    Returns:
        dict.

    Example:
        >>> len(bottlenecks()["stages"]), feature_size(bottlenecks())
        (4, 2048)
    """

    def unit(channels, kernel, stride=1):
        return [channels, kernel, stride, False, 1.001e-5, 0.9]  # the epsilon of Keras's weights

    stages, before = [], width
    for stage, (n_block, stride) in enumerate(zip(blocks, strides, strict=True)):
        inside, outside, stage_blocks = width * 2**stage, 4 * width * 2**stage, []
        for number in range(n_block):
            step = stride if number == 0 else 1
            shortcut = unit(outside, 1, step) if before != outside or step > 1 else None
            units = [unit(inside, 1, step), unit(inside, 3), unit(outside, 1)]
            stage_blocks.append({"units": units, "shortcut": shortcut})
            before = outside
        stages.append(stage_blocks)
    return {"stem": unit(width, 7, 2), "pool": [3, 2, 1], "stages": stages}


def preprocess(images):
    """Normalise the channels as CGD does: (x / 255 - mean) / deviation, in this order, in float32.

    Args:
        images: uint8 or float (B, H, W, 3), in uint8 units.

    Returns:
        float32 (B, H, W, 3).

    Example:
        >>> preprocess(ops.zeros((2, 8, 8, 3))).shape == (2, 8, 8, 3)
        True
    """
    images = ops.cast(images, "float32") / 255.0
    return (images - ops.convert_to_tensor(CHANNEL_MEAN)) / ops.convert_to_tensor(CHANNEL_DEVIATION)


def is_layout(layout):
    """Whether something is a description as above, whose layers fit onto each other.

    Args:
        layout: anything.

    Returns:
        bool.

    Example:
        >>> unit = [4, 3, 1, False, 1e-5, 0.9]
        >>> is_layout({"stem": unit, "pool": None, "stages": [[{"units": [unit, unit], "shortcut": None}]]})
        True
    """
    if not isinstance(layout, dict) or set(layout) != {"stem", "pool", "stages"} or not _is_unit(layout["stem"]):
        return False
    pool, stages = layout["pool"], layout["stages"]
    is_pool = isinstance(pool, list | tuple) and len(pool) == 3 and all(_is_count(value, 31, low=0) for value in pool)
    if pool is not None and not (is_pool and min(pool[:2]) > 0 and pool[2] <= pool[0] // 2):
        return False
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, list | tuple) and stage for stage in stages):
        return False
    blocks = [block for stage in stages for block in stage]
    before = layout["stem"][0]
    for block in blocks:
        if not isinstance(block, dict) or set(block) != {"units", "shortcut"}:
            return False
        units, shortcut = block["units"], block["shortcut"]
        if not isinstance(units, list | tuple) or not units or not all(map(_is_unit, units)):
            return False
        if shortcut is not None and not _is_unit(shortcut):
            return False
        stride = math.prod(unit[2] for unit in units)
        if (units[-1][0], stride) != ((before, 1) if shortcut is None else (shortcut[0], shortcut[2])):
            return False
        before = units[-1][0]
    return sum(len(block["units"]) + 1 for block in blocks) <= _MOST_UNITS


def feature_size(layout):
    """Channels of the feature map."""
    blocks = [block for stage in layout["stages"] for block in stage]
    return blocks[-1]["units"][-1][0] if blocks else layout["stem"][0]


def kernel_size(layout):
    """Number of values in all kernels; it tells how large a weights file must at least be."""
    return sum(kernel**2 * before * channels for _, before, (channels, kernel, *_) in _units(layout))


def _units(layout):
    """Yield (name, channels before, unit) of every unit, in order: "0" for the stem, then "stage1_1_1", ..."""
    yield "0", 3, layout["stem"]
    before = layout["stem"][0]
    for stage, blocks in enumerate(layout["stages"], 1):
        for number, block in enumerate(blocks, 1):
            width = before
            for place, unit in enumerate(block["units"], 1):
                yield f"stage{stage}_{number}_{place}", width, unit
                width = unit[0]
            if block["shortcut"] is not None:
                yield f"stage{stage}_{number}_shortcut", before, block["shortcut"]
            before = width


def _is_unit(unit):
    if not isinstance(unit, list | tuple) or len(unit) != 6:
        return False
    *counts, has_bias, epsilon, momentum = unit
    fits = all(_is_count(value, largest) for value, largest in zip(counts, _LARGEST.values(), strict=True))
    numbers = all(isinstance(value, float) and math.isfinite(value) for value in (epsilon, momentum))
    return fits and counts[1] % 2 == 1 and isinstance(has_bias, bool) and numbers and epsilon > 0 <= momentum <= 1


def _is_count(value, high, low=1):
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


# The backbone of CGD's paper.
RESNET50 = bottlenecks()


@keras.saving.register_keras_serializable("gpq_tf")
class ResNetV1(keras.layers.Layer):
    """The network of a description.

    Args:
        layout: dict, as above.
        seed: int, of the initial kernels (He normal).

    Shapes:
        input: float (B, H, W, 3), normalised (see `preprocess`).
        output: float (B, H', W', F), the feature map, F = `feature_size(layout)`.

    Raises:
        ValueError: if the layout is not such a description.
    """

    def __init__(self, layout, seed=0, **kwargs):
        super().__init__(**kwargs)
        if not is_layout(layout):
            raise ValueError("Invalid layout. Expected a description of ResNet v1. Received: another value")
        self.layout, self.seed = layout, seed
        self.convolutions, self.normalizations = {}, {}
        for number, (name, _, unit) in enumerate(_units(layout)):
            channels, kernel, stride, has_bias, epsilon, momentum = unit
            self.convolutions[name] = Conv2D(
                channels,
                kernel,
                strides=stride,
                use_bias=has_bias,
                kernel_initializer=keras.initializers.HeNormal(seed + number),
                dtype=self.dtype_policy,
                name=_layer_name("conv", name),
            )
            self.normalizations[name] = BatchNormalization(
                momentum, epsilon, dtype=self.dtype_policy, name=_layer_name("norm", name)
            )

    def build(self, input_shape):
        for name, before, unit in _units(self.layout):
            self.convolutions[name].build((None, None, None, before))
            self.normalizations[name].build((None, None, None, unit[0]))

    def call(self, x, training=False):
        x = ops.relu(self._unit("0", x, training))
        if self.layout["pool"] is not None:
            kernel, stride, pad = self.layout["pool"]
            # Behind a ReLU zeros are as good as minus infinity.
            x = ops.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            x = ops.max_pool(x, kernel, stride)
        for stage, blocks in enumerate(self.layout["stages"], 1):
            for number, block in enumerate(blocks, 1):
                name, y = f"stage{stage}_{number}", x
                for place in range(1, len(block["units"]) + 1):
                    y = self._unit(f"{name}_{place}", y if place == 1 else ops.relu(y), training)
                if block["shortcut"] is not None:
                    x = self._unit(f"{name}_shortcut", x, training)
                x = ops.relu(y + x)
        return x

    def _unit(self, name, x, training):
        convolution, normalization = self.convolutions[name], self.normalizations[name]
        if training:
            return normalization(convolution(x), training=True)
        return convolution.call_normalized(x, normalization)

    def get_config(self):
        return {**super().get_config(), "layout": self.layout, "seed": self.seed}


def _layer_name(kind, name):
    """ "conv0", "stage1_1_conv1", "stage1_1_shortcut_conv"."""
    if name == "0":
        return f"{kind}0"
    scope, _, place = name.rpartition("_")
    return f"{scope}_shortcut_{kind}" if place == "shortcut" else f"{scope}_{kind}{place}"
