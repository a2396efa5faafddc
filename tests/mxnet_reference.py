"""What MXNet computes, operator by operator in float64, for small networks that `gpq_tf.convert.mxnet_symbol` read."""

import numpy as np


def values(layers, arrays, image):
    """The value of every layer.

    Args:
        layers: dict of key -> mxnet_symbol.Layer, inputs first.
        arrays: dict of variable -> numpy array.
        image: (B, C, H, W), the value of the variable that is in no file.

    Returns:
        dict of layer name -> float64 array; variables are not in it.
    """
    found, named = {}, {}
    for key, layer in layers.items():
        if layer.op == "null":
            found[key] = np.asarray(arrays.get(layer.name, image), np.float64)
            continue
        inputs = [found[source] for source in layer.inputs]
        stored = {role: np.asarray(arrays[name], np.float64) for role, name in layer.variables.items()}
        found[key] = named[layer.name] = OPERATORS[layer.op](*inputs, **stored, **layer.attributes)
    return named


def output(layers, arrays, image):
    """The value of the last layer."""
    return list(values(layers, arrays, image).values())[-1]


def windows(x, kernel, stride, pad, rim):
    """(B, C, rows, columns, kernel height, kernel width): what each place of a convolution sees."""
    x = np.pad(x, ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2), constant_values=rim)
    seen = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(2, 3))
    return seen[:, :, :: stride[0], :: stride[1]]


def convolution(x, weight, bias=0.0, *, kernel, stride, pad, dilate, num_group, num_filter, **_):
    assert set(dilate) == {1} and num_group == 1 and weight.shape == (num_filter, x.shape[1], *kernel)
    y = np.tensordot(windows(x, kernel, stride, pad, 0.0), weight, axes=((1, 4, 5), (1, 2, 3)))
    return (y + bias).transpose(0, 3, 1, 2)


def fully_connected(x, weight, bias=0.0, *, num_hidden, flatten, **_):
    assert len(weight) == num_hidden
    return (x.reshape(len(x), -1) if flatten else x) @ weight.T + bias


def batch_norm(x, gamma, beta, moving_mean, moving_var, *, eps, fix_gamma, axis, **_):
    shape = [-1 if place == axis % x.ndim else 1 for place in range(x.ndim)]
    gamma = np.ones_like(gamma) if fix_gamma else gamma
    scale = gamma / np.sqrt(moving_var + eps)
    return (x - moving_mean.reshape(shape)) * scale.reshape(shape) + beta.reshape(shape)


def pooling(x, *, kernel, stride, pad, pool_type, global_pool, pooling_convention, p_value, **_):
    if global_pool:
        kernel, stride, pad = x.shape[2:], (1, 1), (0, 0)
    else:
        assert pooling_convention == "valid" and pool_type == "max"
    seen = windows(x, kernel, stride, pad, -np.inf)
    if pool_type == "lp":
        return (seen**p_value).sum((4, 5)) ** (1 / p_value)
    return {"max": seen.max, "avg": seen.mean}[pool_type](axis=(4, 5))


def l2_normalization(x, *, eps, mode):
    assert mode == "instance"
    axes = tuple(range(1, x.ndim))
    return x / np.sqrt((x**2).sum(axes, keepdims=True) + eps)


def reduce(function):
    def reduced(x, *, axis, keepdims, exclude):
        assert not exclude
        return function(x, axis=axis or None, keepdims=keepdims)

    return reduced


def activation(x, *, act_type):
    assert act_type == "relu"
    return np.maximum(x, 0)


OPERATORS = {
    "Convolution": convolution,
    "FullyConnected": fully_connected,
    "BatchNorm": batch_norm,
    "Pooling": pooling,
    "Activation": activation,
    "relu": lambda x: np.maximum(x, 0),
    "L2Normalization": l2_normalization,
    "Concat": lambda *parts, dim: np.concatenate(parts, axis=dim),
    "elemwise_add": lambda x, y: x + y,
    "broadcast_add": lambda x, y: x + y,
    "add_n": lambda *parts: sum(parts),
    "mean": reduce(np.mean),
    "max": reduce(np.max),
    "_maximum_scalar": lambda x, scalar: np.maximum(x, scalar),
    "_power_scalar": lambda x, scalar: x**scalar,
    "_rdiv_scalar": lambda x, scalar: scalar / x,
    "broadcast_power": lambda x, y: x**y,
    "Flatten": lambda x: x.reshape(len(x), -1),
    "_copy": lambda x: x,
    "Dropout": lambda x: x,
    "BlockGrad": lambda x: x,
}


def embed(contents, images):
    """The embeddings by a description of CGD and arrays in our layout, as `mxnet_checkpoint.read` gives them.

    Args:
        contents: mxnet_checkpoint.Contents.
        images: (B, H, W, 3), as the network takes them.

    Returns:
        float64 (B, D).
    """
    network = contents.network
    stored = {target: contents.arrays[name].astype(np.float64) for name, target in contents.targets.items()}

    def unit(x, described, convolution, normalization):
        kernel, pad = stored[f"backbone/{convolution}/kernel"], described.kernel // 2
        assert kernel.shape == (described.kernel, described.kernel, x.shape[-1], described.channels)
        assert (f"backbone/{convolution}/bias" in stored) == described.has_bias
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        seen = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
        seen = seen[:, :: described.stride, :: described.stride]
        x = np.einsum("bhwcij,ijco->bhwo", seen, kernel, optimize=True)
        x += stored.get(f"backbone/{convolution}/bias", 0.0)
        gamma, beta, mean, variance = (
            stored.get(f"backbone/{normalization}/{name}", 1.0)
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return gamma * (x - mean) / np.sqrt(variance + described.epsilon) + beta

    def unit_length(x):
        return x / np.sqrt((x**2).sum(1, keepdims=True) + network.l2_epsilon)

    x = np.maximum(unit(images.astype(np.float64), network.stem, "conv0", "norm0"), 0)
    if network.pool:
        kernel, stride, pad = network.pool
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))[:, ::stride, ::stride].max(
            (4, 5)
        )
    for stage, blocks in enumerate(network.stages, 1):
        for number, block in enumerate(blocks, 1):
            scope, y = f"stage{stage}_{number}_", x
            for place, described in enumerate(block.units, 1):
                y = unit(y, described, f"{scope}conv{place}", f"{scope}norm{place}")
                y = np.maximum(y, 0) if place < len(block.units) else y
            if block.shortcut:
                x = unit(x, block.shortcut, f"{scope}shortcut_conv", f"{scope}shortcut_norm")
            x = np.maximum(x + y, 0)
    descriptors = []
    for branch in network.branches:
        if branch.letter == "G":
            p = stored["head/gem_p"] if branch.gem.variable else branch.gem.p
            y = (np.maximum(x, branch.gem.floor) ** p).mean((1, 2)) ** (1 / p)
        else:
            y = {"S": x.mean, "M": x.max}[branch.letter]((1, 2))
        if branch.dense:
            y = y @ stored[f"head/fc_{branch.letter}/kernel"] + stored.get(f"head/fc_{branch.letter}/bias", 0.0)
        descriptors.append(unit_length(y) if branch.is_normalized else y)
    combined = np.concatenate(descriptors, 1) if network.combination == "concat" else sum(descriptors)
    return unit_length(combined) if network.is_normalized else combined
