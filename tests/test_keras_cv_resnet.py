"""keras-cv's ResNet as a backbone of CGD: its descriptions; a network of it draws, computes, saves and loads."""

import keras
import numpy as np
import pytest

from gpq_tf import load_model
from gpq_tf.backbones import keras_cv_resnet, layouts, resnet_v1
from gpq_tf.network import RetrievalModel

SMALL = keras_cv_resnet.bottlenecks(4, blocks=(1, 2), strides=(1, 1))


@pytest.mark.parametrize(
    "layout",
    [
        None,
        {},
        {"keras_cv": None},
        {"keras_cv": SMALL["keras_cv"], "more": 1},
        {"keras_cv": {**SMALL["keras_cv"], "stackwise_blocks": [1]}},
        {"keras_cv": {**SMALL["keras_cv"], "stackwise_strides": [1, 0]}},
        {"keras_cv": {**SMALL["keras_cv"], "stackwise_strides": [1, True]}},
        {"keras_cv": {**SMALL["keras_cv"], "stackwise_filters": [4, 10**9]}},
        {"keras_cv": {**SMALL["keras_cv"], "stackwise_filters": []}},
        {"keras_cv": {**SMALL["keras_cv"], "include_rescaling": [True, True]}},
    ],
)
def test_what_is_no_description_is_refused(layout):
    assert layouts.is_layout(SMALL)
    assert not layouts.is_layout(layout)
    with pytest.raises(ValueError, match=r"^Invalid layout\. Expected a description of a backbone\."):
        RetrievalModel("cgd", layout=layout)


def test_settings_and_descriptions_belong_together():
    class Settings:
        width_multiplier = 0.25

    for Settings.backbone, made in (("resnet_v1", resnet_v1), ("keras_cv", keras_cv_resnet)):
        layout = layouts.of_settings(Settings)
        assert layout == made.bottlenecks(16)
        assert layouts.settings_of(layout) == {"backbone": Settings.backbone, "width_multiplier": 0.25}
        assert layouts.feature_size(layout) == 512
    assert layouts.settings_of(SMALL) == {}


@pytest.mark.slow  # importing keras-cv takes most of ten seconds
def test_it_is_keras_cv_s_network(tmp_path):
    import keras_cv

    model = RetrievalModel("cgd", layout=SMALL, n_dim=6, seed=3)
    plain = keras_cv.models.ResNetBackbone(**SMALL["keras_cv"], include_rescaling=False)
    for ours, theirs in zip(model.backbone.weights, plain.weights, strict=True):
        theirs.assign(ours)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype="uint8")
    expected = plain(resnet_v1.preprocess(images))
    np.testing.assert_allclose(model.backbone(resnet_v1.preprocess(images)), expected, rtol=0, atol=1e-6)
    assert expected.shape == (2, 8, 10, 32)  # both stages without stride: a quarter of the image's sides
    kernels = sum(np.prod(w.shape) for w in model.backbone.weights if w.name == "kernel")
    assert keras_cv_resnet.kernel_size(SMALL) == kernels
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(load_model(tmp_path / "m.keras").embed(images), model.embed(images))
    for seed, same in ((3, True), (4, False)):
        other = RetrievalModel("cgd", layout=SMALL, n_dim=6, seed=seed)
        equal = [np.array_equal(a, b) for a, b in zip(model.weights, other.weights, strict=True)]
        assert all(equal) == same


@pytest.mark.slow
def test_it_computes_in_the_precision_asked_for_and_leaves_the_setting_alone():
    before = keras.config.dtype_policy()
    model = RetrievalModel("cgd", layout=SMALL, n_dim=6, dtype="mixed_bfloat16")
    assert keras.config.dtype_policy() == before
    features = model.backbone(np.zeros((1, 32, 32, 3), "float32"), training=True)
    assert keras.backend.standardize_dtype(features.dtype) == "bfloat16"
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in model.backbone.weights} == {"float32"}
