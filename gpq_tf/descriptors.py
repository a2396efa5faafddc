"""Global descriptors: one value for each channel of a feature map (CGD, arXiv 1903.10663, section 3.2).

All three are GeM's mean of powers: SPoC is p = 1, MAC the limit of large p. They are taken in float32 in every
precision.
"""

from keras import ops

# Keeps quotients and powers of nothing but zeros finite; far below every value that a floor lets through.
_TINY = 1e-30


def spoc(features):
    """Sum-pooled convolutional features: the mean over the places of the map.

    Args:
        features: float (B, H, W, C).

    Returns:
        float32 (B, C).

    Raises:
        ValueError: if `features` is no map.

    Example:
        >>> float(spoc(ops.convert_to_tensor([[[[1.0], [2.0]], [[3.0], [6.0]]]]))[0, 0])
        3.0
    """
    return ops.mean(_places(features), axis=1)


def mac(features):
    """Maximum activations of convolutions: the largest value over the places of the map.

    Where several places share the largest value, the whole gradient goes to the first of them, row by row: as through
    MXNet's global max pooling (its nd.max gives each of them the whole gradient), and whereas both backends' own
    maximum divides it among them. It matters little: behind a ReLU only zeros tie, which pass nothing on.

    Args:
        features: float (B, H, W, C).

    Returns:
        float32 (B, C).

    Raises:
        ValueError: if `features` is no map.

    Example:
        >>> float(mac(ops.convert_to_tensor([[[[1.0], [2.0]], [[3.0], [6.0]]]]))[0, 0])
        6.0
    """
    return _largest(_places(features))


def gem(features, p, floor=1e-6):
    """Generalised mean: (mean over the places of max(x, floor)^p)^(1/p).

    Each channel is divided by its largest value before the power and multiplied by it behind the root, so no power
    overflows or vanishes, and the gradients with respect to the features and to `p` stay finite.

    Args:
        features: float (B, H, W, C).
        p: float > 0, a number or a scalar tensor or variable. One that is learnt is not checked.
        floor: float >= 0, the least value of a place. Below it no gradient flows. It is to be above 0 where p may fall
            below 1: roots have no slope at 0.

    Returns:
        float32 (B, C).

    Raises:
        ValueError: if `features` is no map, p a number that is not above 0, or floor negative.

    Example:
        >>> round(float(gem(ops.convert_to_tensor([[[[1.0], [2.0]], [[3.0], [6.0]]]]), p=3)[0, 0]), 4)
        3.9791
    """
    if isinstance(p, int | float) and not p > 0:
        raise ValueError(f"Invalid p. Expected a number above 0. Received: p={p!r}")
    if not floor >= 0:
        raise ValueError(f"Invalid floor. Expected a number of 0 or more. Received: floor={floor!r}")
    x = _places(features)
    x = ops.where(x < floor, floor, x)
    p = ops.reshape(ops.convert_to_tensor(p, "float32"), ())
    # The result does not depend on what it is scaled by, so neither does the gradient.
    scale = ops.stop_gradient(ops.max(x, axis=1, keepdims=True))
    mean = ops.mean(ops.power(x / ops.maximum(scale, _TINY), p), axis=1)
    return scale[:, 0] * ops.power(ops.maximum(mean, _TINY), 1.0 / p)


def _places(features):
    """(B, H, W, C) -> float32 (B, H * W, C)."""
    features = ops.convert_to_tensor(features)
    if len(features.shape) != 4:
        raise ValueError(f"Invalid features. Expected (B, H, W, C). Received: shape {tuple(features.shape)}")
    return ops.reshape(ops.cast(features, "float32"), (ops.shape(features)[0], -1, features.shape[-1]))


@ops.custom_gradient
def _largest(x):
    """Maximum over axis 1, whose gradient goes to its first place. (Not argmax, which ONNX files cannot hold.)"""
    largest = ops.max(x, axis=1)

    def gradient(upstream):
        n = ops.shape(x)[1]
        places = ops.arange(n, dtype="int32")[:, None]
        first = ops.min(ops.where(x == largest[:, None], places, n), axis=1)
        return ops.where(places == first[:, None], upstream[:, None], 0.0)

    return largest, gradient
