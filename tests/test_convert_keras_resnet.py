"""Keras's ImageNet weights in CGD's backbone: what Keras's own network computes from them, and where they come from."""

import h5py
import keras
import numpy as np
import pytest

from gpq_tf import settings as settings_module
from gpq_tf import starting
from gpq_tf.backbones import resnet_v1
from gpq_tf.convert import keras_resnet

NO_FILE = "no_such_config.py"


@pytest.fixture(scope="module")
def network():
    """Keras's ResNet50 with random weights, biases and statistics, so that nothing can be left out unseen."""
    made, rng = keras.applications.ResNet50(include_top=False, weights=None), np.random.default_rng(0)
    for layer in made.layers:
        values = []
        for weight in layer.weights:
            kind, shape = weight.name, weight.shape
            if kind == "kernel":
                values.append(rng.normal(0, (2 / np.prod(shape[:3])) ** 0.5, shape))
            elif kind in ("gamma", "moving_variance"):
                values.append(rng.uniform(0.5, 1.5, shape))
            else:
                values.append(rng.normal(0, 0.3, shape))
        layer.set_weights(values)
    return made


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """The weights as Keras publishes them: a group a layer, the layer's name in it again."""
    path = tmp_path_factory.mktemp("keras") / keras_resnet.NAME
    with h5py.File(path, "w") as made:
        for layer in network.layers:
            group = made.create_group(layer.name)
            for weight in layer.weights:
                group[f"{layer.name}/{weight.name}:0"] = keras.ops.convert_to_numpy(weight)
    return path


def test_the_backbone_computes_what_keras_does(network, file):
    """Down to the last stage, whose stride CGD takes away: with it here."""
    backbone = resnet_v1.ResNetV1(resnet_v1.bottlenecks(strides=(1, 2, 2, 2)))
    backbone.build((None, None, None, 3))
    keras_resnet.load_backbone(backbone, file)
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 96, 3), dtype="uint8")
    ours = keras.ops.convert_to_numpy(backbone(resnet_v1.preprocess(images)))
    theirs = keras.applications.resnet50.preprocess_input(images.astype("float32"))
    # means of .406, .456, .485 times 255, and not Keras's: half a grey level at most
    shift = np.array([103.939, 116.779, 123.68]) - 255 * np.array(resnet_v1.CHANNEL_MEAN)[::-1]
    assert np.abs(shift).max() < 0.5
    expected = network(theirs + shift.astype("float32")).numpy()
    assert ours.shape == expected.shape == (2, 2, 3, 2048)
    assert 0.1 < expected.std() < 1e6
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_paper_s_backbone_takes_them_too(network, file):
    backbone = resnet_v1.ResNetV1(resnet_v1.RESNET50)
    backbone.build((None, None, None, 3))
    keras_resnet.load_backbone(backbone, file)
    name = "conv5_block1_0"
    np.testing.assert_array_equal(
        backbone.convolutions["stage4_1_shortcut"].kernel, network.get_layer(f"{name}_conv").kernel
    )
    expected = network.get_layer(f"{name}_bn").moving_mean - network.get_layer(f"{name}_conv").bias
    np.testing.assert_array_equal(backbone.normalizations["stage4_1_shortcut"].moving_mean, expected)


def small(path, changes):
    """A file of a layer or two."""
    with h5py.File(path, "w") as made:
        for name, values in changes.items():
            made[name] = values
    return path


def test_a_wrong_file_is_named(tmp_path):
    backbone = resnet_v1.ResNetV1(resnet_v1.bottlenecks(16, blocks=(1, 1, 1, 1)))
    backbone.build((None, None, None, 3))
    kernel = np.zeros((7, 7, 3, 64), "float32")
    cases = {
        small(tmp_path / "empty.h5", {}): r"expected conv1_conv/kernel of shape \(7, 7, 3, 16\), found none",
        small(
            tmp_path / "wide.h5", {"conv1_conv/conv1_conv/kernel:0": kernel}
        ): r"found it with shape \(7, 7, 3, 64\); "
        "is width_multiplier another than 1",
        small(tmp_path / "whole.h5", {"conv1_conv/kernel:0": np.zeros((7, 7, 3, 16), int)}): "no plain array of floats",
    }
    (tmp_path / "text.h5").write_text("no HDF5")
    cases[tmp_path / "text.h5"] = "file signature not found"
    for path, message in cases.items():
        with pytest.raises(
            ValueError, match=rf"^Invalid {path}\. Expected the weights of Keras's ResNet50\. .*{message}"
        ):
            keras_resnet.load_backbone(backbone, path)


# --- which weights training starts from


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A user without files and without a network."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "ResNet50", refuse)
    return tmp_path


def start(*changes):
    chosen, why = starting.settings_of_start(settings_module.resolve(["--head=cgd", *changes], NO_FILE))
    return chosen.init, why


def test_keras_s_file_comes_first_then_a_local_one_then_scratch(nothing):
    kept, local = nothing / "keras" / "models" / keras_resnet.NAME, nothing / "models" / "ImageNet_pretrained.h5"
    absent = f": no ImageNet weights in {kept} nor ./models/ImageNet_pretrained.h5; "
    assert start() == (None, f"{absent}--download=True fetches them")
    assert start("--download") == (None, f"{absent}Keras could not fetch {keras_resnet.NAME}: URL fetch failure")
    local.parent.mkdir()
    local.touch()
    assert start() == start("--download") == ("models/ImageNet_pretrained.h5", "")
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert start() == (str(kept), "")
    assert start("--ImageNet_pretrained_path=models/ImageNet_pretrained.h5") == ("models/ImageNet_pretrained.h5", "")
    assert start("--init=None") == (None, "")
    why = ": ImageNet weights are for width_multiplier=1 and backbone=resnet_v1"
    assert start("--width_multiplier=0.25") == start("--backbone=keras_cv") == (None, why)


def test_without_being_asked_nothing_is_fetched(nothing, monkeypatch):
    monkeypatch.setattr(keras_resnet, "download", lambda: pytest.fail("it fetched"))
    assert start()[0] is None


def test_a_file_that_was_asked_for_must_exist(nothing):
    with pytest.raises(ValueError, match=r"^Invalid ImageNet_pretrained_path\. Expected a \.h5 file with head=cgd\."):
        start("--ImageNet_pretrained_path=other.h5")


@pytest.mark.slow  # the whole ResNet-50
def test_training_starts_from_the_file_and_says_so(file):
    chosen = settings_module.resolve(["--head=cgd", f"--init={file}"], NO_FILE)
    model, line = starting.initial_model(chosen)
    assert line == f"starting from {file} (backbone; head from seed 0)"
    with h5py.File(file) as made:
        kernel = made["conv2_block1_1_conv/conv2_block1_1_conv/kernel:0"][()]
    np.testing.assert_array_equal(model.backbone.convolutions["stage1_1_1"].kernel, kernel)
