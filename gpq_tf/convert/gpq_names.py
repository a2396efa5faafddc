"""How GPQ's TensorFlow 1 program names its variables, and where each goes in a RetrievalModel."""

import numpy as np

from gpq_tf.backbones import vgg

# Names of the batch normalisations in the order of the convolutions conv2d, conv2d_1, ... conv2d_9.
_NORM_SCOPES = tuple(
    f"batch{block}" + (f"-{position}" if position else "")
    for block, channels in enumerate(vgg.BLOCKS)
    for position in range(len(channels))
)
SCOPE = "Fixed_VGG"


def backbone_targets(backbone):
    """Legacy name -> (Keras variable, words that say where it is) for the trained part of the backbone.

    These 40 are what ImageNet_pretrained.mat holds (there with ":0" behind the name).
    """
    targets = {}
    for index, (convolution, normalization) in enumerate(
        zip(backbone.convolutions, backbone.normalizations, strict=True)
    ):
        conv_scope = f"{SCOPE}/conv2d" + (f"_{index}" if index else "")
        norm_scope = f"{SCOPE}/{_NORM_SCOPES[index]}"
        for scope, layer, names in (
            (conv_scope, convolution, ("kernel", "bias")),
            (norm_scope, normalization, ("beta", "gamma")),
        ):
            for name in names:
                targets[f"{scope}/{name}"] = (getattr(layer, name), f"backbone/{layer.name}/{name}")
    return targets


def statistics_targets(backbone):
    """Legacy name -> (Keras variable, where) for the state of the batch normalisations.

    TensorFlow 1 puts the two variables of the debiasing under the scope written twice.
    """
    targets = {}
    for scope, layer in zip(_NORM_SCOPES, backbone.normalizations, strict=True):
        scope = f"{SCOPE}/{scope}"
        names = {
            f"{scope}/moving_mean": "moving_mean",
            f"{scope}/moving_variance": "moving_variance",
            f"{scope}/{scope}/moving_mean/biased": "biased",
            f"{scope}/{scope}/moving_mean/local_step": "local_step",
        }
        for legacy_name, name in names.items():
            targets[legacy_name] = (getattr(layer, name), f"backbone/{layer.name}/{name}")
    return targets


def head_targets(head):
    """Legacy name -> (Keras variable, where) for the dense layer and the prototypes; Z is `books_of`'s."""
    return {
        f"{SCOPE}/dense/kernel": (head.projection.kernel, "head/projection/kernel"),
        f"{SCOPE}/dense/bias": (head.projection.bias, "head/projection/bias"),
        "C": (head.prototypes, "head/prototypes"),
    }


def books_of(matrix, n_book):
    """The original's codebook (K, M * d) -> (M, K, d)."""
    return np.ascontiguousarray(matrix.reshape(len(matrix), n_book, -1).transpose(1, 0, 2))


def width_multiplier_of(source, shapes):
    """Read the width of a legacy backbone off the shapes of its kernels.

    Args:
        source: str, names the file in errors.
        shapes: dict of legacy name -> shape.

    Returns:
        float, 1.0 for the published network.

    Raises:
        ValueError: if a kernel is missing or the widths are not those of one multiplier.
    """
    first = shapes.get(f"{SCOPE}/conv2d/kernel")
    if first is None or len(first) != 4:
        raise ValueError(
            f"Invalid file {source!r}. Expected GPQ's variables, {SCOPE}/conv2d/kernel (3, 3, 3, 64) among them. "
            f"Received: {len(shapes)} variables, {_some(shapes)}"
        )
    multiplier = first[3] / vgg.BLOCKS[0][0]
    before = 3
    for index, width in enumerate(width for block in vgg.widths(multiplier) for width in block):
        name = f"{SCOPE}/conv2d" + (f"_{index}" if index else "") + "/kernel"
        expected = (3, 3, before, width)
        if tuple(shapes.get(name, ())) != expected:
            raise ValueError(
                f"Invalid file {source!r}. Expected {name} {expected}, GPQ's network at {multiplier:g} of its width. "
                f"Received: {tuple(shapes[name]) if name in shapes else 'no such variable'}"
            )
        before = width
    return multiplier


def check_values(source, arrays):
    """Refuse arrays that cannot be weights: formats without a checksum show a flipped exponent bit only here.

    Raises:
        ValueError: naming the first array that is not float32 or float64, not finite, or holds a value above 1e6.
    """
    for name, values in arrays.items():
        if values.dtype.kind != "f":
            raise ValueError(f"Invalid file {source!r}. Expected floats in {name}. Received: {values.dtype}")
        largest = np.abs(values).max(initial=0)
        if not largest < 1e6:
            raise ValueError(
                f"Invalid file {source!r}. Expected finite weights below 1e6 in {name}. Received: {largest}; "
                "the file is damaged or its training had diverged"
            )


def _some(shapes):
    names = sorted(shapes)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
