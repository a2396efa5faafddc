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
    """Legacy name -> (Keras variable, where) for the dense layer, the prototypes and the codebook."""
    return {
        f"{SCOPE}/dense/kernel": (head.projection.kernel, "head/projection/kernel"),
        f"{SCOPE}/dense/bias": (head.projection.bias, "head/projection/bias"),
        "C": (head.prototypes, "head/prototypes"),
        "Z": (head.quantizer.codebook, "head/quantizer/codebook"),
    }


def books_of(matrix, n_book):
    """The original's codebook (K, M * d) -> (M, K, d).

    Example:
        >>> books_of(np.arange(8).reshape(2, 4), n_book=2).tolist()
        [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    """
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
    widest = shapes.get(f"{SCOPE}/conv2d_9/kernel", ())
    if len(widest) != 4:
        some = ", ".join(sorted(shapes)[:3]) + (", ..." if len(shapes) > 3 else "")
        raise ValueError(
            f"Invalid file {source!r}. Expected GPQ's variables, {SCOPE}/conv2d_9/kernel (3, 3, 512, 512) among them. "
            f"Received: {len(shapes)} variables{f', {some}' if some else ''}"
        )
    multiplier = widest[3] / vgg.BLOCKS[3][2]  # of the last layer, where rounding changes it least
    before = 3
    for index, width in enumerate(width for block in vgg.widths(multiplier) for width in block):
        name = f"{SCOPE}/conv2d" + (f"_{index}" if index else "") + "/kernel"
        expected = (3, 3, before, width)
        if tuple(shapes.get(name, ())) != expected:
            raise ValueError(
                f"Invalid file {source!r}. Expected {name} {expected}, GPQ's network at {multiplier:g} of its width. "
                f"Received: {tuple(shapes[name]) if name in shapes else 'no such array'}"
            )
        before = width
    return multiplier


def load(source, arrays, targets):
    """Copy arrays into a model's variables, all or none.

    Args:
        source: str, names the file in errors.
        arrays: dict of legacy name -> numpy array; may hold more than `targets`.
        targets: dict of legacy name -> (Keras variable, where).

    Returns:
        list of str, a line for each target.

    Raises:
        ValueError: if an array is missing, has another shape, or cannot be weights: not floats, not finite, or
            holding a value of 1e6 or more. Formats without a checksum show a flipped bit only here.
    """
    moves, lines = [], []
    for name, (variable, where) in targets.items():
        if name not in arrays:
            raise ValueError(f"Invalid file {source!r}. Expected the variable {name}. Received: no such array")
        values, shape = arrays[name], tuple(variable.shape)
        line = f"used     {name} {values.shape} -> {where}"
        if name.split("/")[0] == "Z":  # it and its slots are the only ones that are stored in another order
            n_book, n_word, length = shape
            if values.shape == (n_word, n_book * length):
                values = books_of(values, n_book)
            line += f" {shape}"
        if values.shape != shape:
            raise ValueError(f"Invalid file {source!r}. Expected {name} {shape}. Received: {values.shape}")
        if values.dtype.kind != "f":
            raise ValueError(f"Invalid file {source!r}. Expected floats in {name}. Received: {values.dtype}")
        largest = np.abs(values).max(initial=0)
        if not largest < 1e6:
            raise ValueError(
                f"Invalid file {source!r}. Expected finite weights below 1e6 in {name}. Received: {largest}; "
                "the file is damaged or its training had diverged"
            )
        moves.append((variable, values.astype("float32")))
        lines.append(line)
    for variable, values in moves:
        variable.assign(values)
    return lines


def sizes(model, why):
    """The line about a converted model's sizes.

    Args:
        model: RetrievalModel.
        why: str, where the number of books comes from.

    Returns:
        str.
    """
    own = model.architecture
    return (
        f"n_book = {own['n_book']} ({why}), n_word = {2 ** own['bn_word']}, len_code = {own['len_code']}, "
        f"width_multiplier = {own['width_multiplier']:g}"
    )
