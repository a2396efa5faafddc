"""The .h5 file of Keras's ResNet50, learned from ImageNet: the backbone that CGD's training starts from.

Keras's network is ResNet v1 with the stride of a block in its first 1x1 convolution, as `resnet_v1.bottlenecks`. What
differs is folded into the weights: biases in front of normalisations go into the moving means, and the order (blue,
green, red) and scale of Keras's input into the first kernel. Keras's channel means are up to half a grey level off ours
(103.939 for .406 * 255), which is left as it is.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from gpq_tf.backbones import resnet_v1
from gpq_tf.files import find_file
from gpq_tf.model_file import check_hdf5

NAME = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
_VECTORS = ("gamma", "beta", "moving_mean", "moving_variance")


def find(path):
    """The .h5 file that `path` means, with or without its ".h5", or None.

    Example:
        >>> find("no_such_file") is None
        True
    """
    return find_file(path, ".h5")


def kept_by_keras():
    """Where Keras keeps what it has downloaded, pathlib.Path: in $KERAS_HOME or ~/.keras."""
    return Path(os.environ.get("KERAS_HOME", Path("~").expanduser() / ".keras"), "models", NAME)


def download():
    """Have Keras fetch the file (94 MB), compared with a checksum that Keras knows.

    Returns:
        pathlib.Path.

    Raises:
        OSError: if it cannot be had.
    """
    import keras

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            keras.applications.ResNet50(include_top=False, weights="imagenet")
        except Exception as error:  # Keras raises a plain Exception where there is no network
            raise OSError(f"Keras could not fetch {NAME}: {error}") from error
    return kept_by_keras()


def load_backbone(backbone, path):
    """Copy the file's arrays into a backbone of the same sizes.

    Args:
        backbone: resnet_v1.ResNetV1 of the layout `resnet_v1.bottlenecks()`; where its strides are does not matter.
        path: str or Path.

    Raises:
        ValueError: if the file cannot be read, is no plain HDF5 file, or an array is missing or has another shape.
    """
    import h5py

    try:
        check_hdf5(path)
        with h5py.File(path, "r") as file:
            layers = file.get("model_weights", file)
            for name, convolution in backbone.convolutions.items():
                _load_unit(layers, _name_in_keras(name), convolution, backbone.normalizations[name])
    except (ValueError, KeyError, RuntimeError, OSError) as error:  # h5py raises all of them on a damaged file
        raise ValueError(f"Invalid {path}. Expected the weights of Keras's ResNet50. Found: {error}") from error


def _load_unit(layers, name, convolution, normalization):
    kernel = _array(layers, f"{name}_conv", "kernel", convolution.kernel.shape)
    if kernel.shape[2] == 3:
        kernel = kernel[:, :, ::-1] * 255 * np.array(resnet_v1.CHANNEL_DEVIATION, "float32")[:, None]
    bias = _array(layers, f"{name}_conv", "bias", kernel.shape[-1:])
    vectors = {which: _array(layers, f"{name}_bn", which, bias.shape) for which in _VECTORS}
    # gamma * (x + bias - mean) / deviation + beta
    vectors["moving_mean"] = vectors["moving_mean"] - bias
    convolution.kernel.assign(kernel)
    for which, values in vectors.items():
        getattr(normalization, which).assign(values)


def _name_in_keras(name):
    """ "0" -> "conv1", "stage1_2_3" -> "conv2_block2_3", "stage1_1_shortcut" -> "conv2_block1_0"."""
    if name == "0":
        return "conv1"
    stage, block, place = name.removeprefix("stage").split("_")
    return f"conv{int(stage) + 1}_block{block}_{0 if place == 'shortcut' else place}"


def _array(layers, layer, which, shape):
    """float32 array of a layer, whose members Keras calls LAYER/LAYER/kernel:0, once its shape has been compared."""
    found = {}

    def note(path, item):  # what it returned would end the visit
        if hasattr(item, "shape"):
            found[path.split("/")[-1].partition(":")[0]] = item

    if layer in layers:
        layers[layer].visititems(note)
    if which not in found or tuple(found[which].shape) != tuple(shape):
        what = f"it with shape {found[which].shape}; is width_multiplier another than 1?" if which in found else "none"
        raise ValueError(f"expected {layer}/{which} of shape {tuple(shape)}, found {what}")
    return found[which][()].astype("float32")
