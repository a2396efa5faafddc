"""The feature extractor: shapes, widths, the order of its features, initial values, precisions."""

import keras
import numpy as np
import pytest
from keras import ops

from gpq_tf.backbones import vgg
from gpq_tf.ops import compiled_call

NARROW = 1 / 32


def images(n, height, width, seed=0):
    return np.random.default_rng(seed).normal(size=(n, height, width, 3)).astype("float32")


def built(width_multiplier=NARROW, seed=0, **options):
    network = vgg.VGG(width_multiplier, seed, **options)
    network.build((None, None, None, 3))
    return network


@pytest.fixture(scope="module")
def network():
    return built()


@pytest.fixture(scope="module")
def features(network):
    """The compiled network."""
    return compiled_call(network, network)


@pytest.mark.parametrize("size", [(8, 8), (33, 47), (9, 64)])
def test_any_height_and_width_gives_the_same_number_of_features(features, size):
    assert features(images(2, *size)).shape == (2, vgg.feature_size(NARROW)) == (2, 24)


def plain_features(network, x):
    """Every layer as loops over the kernel's nine places, in float64; statistics as they are before training."""
    state = {weight.path: ops.convert_to_numpy(weight).astype("float64") for weight in network.weights}
    x = x.astype("float64")
    layers = iter(zip(network.convolutions, network.normalizations, strict=True))
    pooled = []
    for block, channels in enumerate(vgg.BLOCKS):
        for _ in channels:
            convolution, normalization = next(layers)
            kernel, bias = (state[weight.path] for weight in (convolution.kernel, convolution.bias))
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            height, width = x.shape[1:3]
            x = bias + sum(
                padded[:, row : row + height, column : column + width] @ kernel[row, column]
                for row in range(3)
                for column in range(3)
            )
            gamma, beta = (state[weight.path] for weight in (normalization.gamma, normalization.beta))
            x = np.maximum(gamma * x / np.sqrt(1 + 1e-3) + beta, 0)
        if block < 3:
            height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
            corners = [x[:, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]
            x = np.max(corners, axis=0)
        if block >= 2:
            pooled.insert(0, x.mean(axis=(1, 2)))
    return np.concatenate(pooled, axis=1)


def test_the_network_is_what_its_description_says():
    network = built(seed=1)
    rng = np.random.default_rng(2)
    for layer in [*network.convolutions, *network.normalizations]:
        for weight in layer.trainable_variables:
            if weight.name != "kernel":
                weight.assign(ops.convert_to_numpy(weight) + 0.1 * rng.normal(size=weight.shape))
    x = images(2, 11, 13)
    expected = plain_features(network, x)
    assert (expected > 0).mean() > 0.3
    np.testing.assert_allclose(np.asarray(network(x)), expected, rtol=0, atol=1e-5 * expected.max())


def test_features_of_the_fourth_block_come_first():
    network, x = built(), images(2, 8, 8)
    n_fourth = vgg.widths(NARROW)[3][-1]
    before = np.asarray(network(x))
    assert before[:, :n_fourth].any()
    last = network.normalizations[-1]
    last.gamma.assign(np.zeros(n_fourth))  # and so ReLU gives 0 everywhere
    found = np.asarray(network(x))
    assert not found[:, :n_fourth].any()
    assert found[:, n_fourth:].any()
    np.testing.assert_array_equal(found[:, n_fourth:], before[:, n_fourth:])


def test_each_image_is_its_own():
    network, x = built(), images(4, 8, 8)
    together = np.asarray(network(x))
    np.testing.assert_allclose(np.asarray(network(x[::-1]))[::-1], together, atol=1e-6)


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        (1, ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512))),
        (0.25, ((16, 16), (32, 32), (64, 64, 64), (128, 128, 128))),
        (2, ((128, 128), (256, 256), (512, 512, 512), (1024, 1024, 1024))),
        (1e-9, ((1, 1), (1, 1), (1, 1, 1), (1, 1, 1))),
    ],
)
def test_widths_scale_and_never_vanish(multiplier, expected):
    assert vgg.widths(multiplier) == expected
    assert vgg.feature_size(multiplier) == expected[3][2] + expected[2][2]


@pytest.mark.parametrize("multiplier", [1 / 64, 1 / 16, 0.3])
def test_the_number_of_values_is_known_without_building(multiplier):
    network = built(multiplier)
    n_channels = sum(sum(block) for block in vgg.widths(multiplier))
    # bias, gamma, beta, two moving statistics, biased; and a counter for each normalisation
    assert network.count_params() == vgg.kernel_size(multiplier) + 6 * n_channels + 10
    n_trainable = sum(int(np.prod(weight.shape)) for weight in network.trainable_variables)
    assert n_trainable == vgg.kernel_size(multiplier) + 3 * n_channels


def test_initial_values_are_a_function_of_the_seed():
    first, again, other = (
        [ops.convert_to_numpy(c.kernel) for c in built(seed=seed).convolutions] for seed in (5, 5, 6)
    )
    for kernel, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(kernel, same)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))
    same_shape = [kernel for kernel in first if kernel.shape == first[5].shape]
    assert len(same_shape) == 2
    assert (same_shape[0] != same_shape[1]).any()


def test_initial_kernels_are_glorot_uniform():
    kernel = ops.convert_to_numpy(built(1 / 4).convolutions[-1].kernel)
    limit = (6 / (9 * (128 + 128))) ** 0.5
    assert 0.99 * limit < np.abs(kernel).max() <= limit
    assert np.mean(kernel**2) == pytest.approx(limit**2 / 3, rel=0.02)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_16_bits_with_weights_in_32(network, precision):
    mixed, x = built(dtype=f"mixed_{precision}"), images(2, 8, 8)
    found = mixed(x)
    assert keras.backend.standardize_dtype(found.dtype) == precision
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in mixed.weights} == {"float32"}
    expected = np.asarray(network(x))
    found = ops.convert_to_numpy(ops.cast(found, "float32"))
    assert 0 < np.abs(found - expected).max() < 0.05 * expected.max()


def test_training_moves_every_statistic():
    network = built()
    network(images(4, 8, 8), training=True)
    for layer in network.normalizations:
        assert float(layer.local_step) == 1
        assert (ops.convert_to_numpy(layer.moving_variance) != 1).all()


def test_the_layer_survives_its_config(network):
    again = vgg.VGG.from_config(built(seed=3).get_config())
    assert (again.width_multiplier, again.seed) == (NARROW, 3)


def test_preprocessing_takes_images_of_any_size_and_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    expected = (pixels - np.array(vgg.CHANNEL_MEAN)) / np.array(vgg.CHANNEL_DEVIATION)
    for given in (pixels, pixels.astype("float32")):
        found = np.asarray(vgg.preprocess(given))
        assert (found.shape, found.dtype) == ((2, 5, 7, 3), np.float32)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7)
