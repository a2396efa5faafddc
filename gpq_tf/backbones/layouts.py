"""CGD's backbones by their descriptions: our own ResNet v1, or keras-cv's."""

from gpq_tf.backbones import keras_cv_resnet, resnet_v1


def is_layout(layout):
    """Whether something describes one of the backbones."""
    return resnet_v1.is_layout(layout) or keras_cv_resnet.is_layout(layout)


def build(layout, seed, dtype):
    """The backbone of a description, a layer that has its variables.

    Args:
        layout: dict, see `resnet_v1` and `keras_cv_resnet`.
        seed: int, of the initial kernels.
        dtype: dtype policy.

    Returns:
        ResNetV1 or KerasCVResNet.
    """
    layer = keras_cv_resnet.KerasCVResNet if _module(layout) is keras_cv_resnet else resnet_v1.ResNetV1
    backbone = layer(layout, seed, dtype=dtype, name="backbone")
    # A model that loads weights must have its variables, whatever image sizes it will see.
    backbone.build((None, None, None, 3))
    return backbone


def feature_size(layout):
    """Channels of the feature map."""
    return _module(layout).feature_size(layout)


def kernel_size(layout):
    """Number of values in all kernels."""
    return _module(layout).kernel_size(layout)


def of_settings(settings):
    """The description of the backbone that settings ask for: ResNet-50, its channels times width_multiplier."""
    made = keras_cv_resnet if settings.backbone == "keras_cv" else resnet_v1
    return made.bottlenecks(max(1, round(64 * settings.width_multiplier)))


def settings_of(layout):
    """The settings that `of_settings` makes this description of, a dict; empty where there are none."""
    if _module(layout) is keras_cv_resnet:
        backbone, width = "keras_cv", layout["keras_cv"]["stackwise_filters"][0]
    else:
        backbone, width = "resnet_v1", layout["stem"][0]
    return (
        {"backbone": backbone, "width_multiplier": width / 64} if _module(layout).bottlenecks(width) == layout else {}
    )


def _module(layout):
    return keras_cv_resnet if "keras_cv" in layout else resnet_v1
