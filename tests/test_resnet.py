"""SPQ's feature extractor against a plain float64 forward: any size, gradients, statistics, precisions."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from gpq_tf.backbones import resnet
from gpq_tf.ops import compiled_call
from gpq_tf.train_step import make_step

from golden import worst

NARROW = 1 / 32
EPSILON = 1e-5


def images(n, height, width, seed=0):
    return np.random.default_rng(seed).random((n, height, width, 3), "float32")


def built(width_multiplier=NARROW, seed=0, **options):
    network = resnet.ResNet(width_multiplier, seed, **options)
    network.build((None, None, None, 3))
    return network


def disturbed(network, seed=1):
    """The same network with normalisations that change something, and kernels under which ReLUs let half through."""
    rng = np.random.default_rng(seed)
    for weight in network.weights:
        shape = tuple(weight.shape)
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, shape))
        elif weight.name in ("beta", "moving_mean", "bias"):
            weight.assign(0.3 * rng.normal(size=shape))
    return network


def values_of(network):
    return {weight.path: ops.convert_to_numpy(weight).astype("float64") for weight in network.weights}


@pytest.fixture(scope="module")
def network():
    return disturbed(built())


@pytest.fixture(scope="module")
def features(network):
    """The compiled network."""
    return compiled_call(network, network)


# --- the definition, as loops over the kernel's places


def plain_convolution(x, kernel, stride):
    """Zeros on all sides by half the kernel's size, whatever the image's: PyTorch's padding=1 (0 for 1x1)."""
    side = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    height, width = ((size + 2 * (side // 2) - side) // stride + 1 for size in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for down, right in itertools.product(range(side), repeat=2):
        rows, columns = (slice(start, start + stride * n, stride) for start, n in ((down, height), (right, width)))
        out += padded[:, rows, columns] @ kernel[down, right]
    return out


def plain_features(values, x, statistics=None):
    """Features (B, F) by the values of all weights; `statistics`, a dict, gets the batch's and makes it training."""

    def normalized(x, convolution, normalization, stride=1):
        x = plain_convolution(x, values[f"{convolution}/kernel"], stride)
        if statistics is None:
            mean, variance = (values[f"{normalization}/moving_{name}"] for name in ("mean", "variance"))
        else:
            pixels = x.reshape(-1, x.shape[-1])
            mean, variance, n = pixels.mean(axis=0), pixels.var(axis=0), len(pixels)
            statistics[normalization] = mean, variance * n / (n - 1)
        gamma, beta = values[f"{normalization}/gamma"], values[f"{normalization}/beta"]
        return gamma * (x - mean) / np.sqrt(variance + EPSILON) + beta

    top = next(iter(values)).split("/")[0]
    x = np.maximum(normalized(x.astype("float64"), f"{top}/conv1", f"{top}/norm1"), 0)
    for layer, position in itertools.product((1, 2, 3, 4), (0, 1)):
        block, halved = f"{top}/layer{layer}_{position}", layer > 1 and position == 0
        y = np.maximum(normalized(x, f"{block}/conv1", f"{block}/norm1", 2 if halved else 1), 0)
        y = normalized(y, f"{block}/conv2", f"{block}/norm2")
        x = np.maximum(y + (normalized(x, f"{block}/shortcut_conv", f"{block}/shortcut_norm", 2) if halved else x), 0)
    return np.maximum(x.mean(axis=(1, 2)) @ values[f"{top}/fc_out/kernel"] + values[f"{top}/fc_out/bias"], 0)


@pytest.mark.parametrize("size", [(32, 32), (17, 17), (33, 46), (8, 27), (2, 3), (1, 1)])
def test_inference_is_the_definition_at_any_size(network, features, size):
    x = images(2, *size)
    expected = plain_features(values_of(network), x)
    assert (expected > 0).mean() > 0.2
    assert worst(features(x), expected) < 2e-6


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_training_is_the_definition_and_keeps_every_batchs_statistics_in_turn(size):
    network = disturbed(built())
    values = values_of(network)
    for seed in (1, 2):
        x, statistics = images(4, *size, seed), {}
        expected = plain_features(values, x, statistics)
        assert worst(network(x, training=True), expected) < 2e-5
        found = values_of(network)
        for path, batch in statistics.items():
            for kind, value in zip(("mean", "variance"), batch, strict=True):
                name = f"{path}/moving_{kind}"
                values[name] = 0.9 * values[name] + 0.1 * value
                assert worst(found[name], values[name]) < 3e-6, name
    assert len(statistics) == 20


def gradients_of(network, x, cotangent):
    """The gradients of sum(features * cotangent) in training, by path: what one plain step of descent takes off."""
    before, rate = values_of(network), 2.0**10

    def losses_of(batch):
        return {"loss": ops.sum(network(batch["x"], training=True) * batch["cotangent"])}

    make_step(network, losses_of, keras.optimizers.SGD(rate))({"x": x, "cotangent": cotangent})
    after = values_of(network)
    return {weight.path: (before[weight.path] - after[weight.path]) / rate for weight in network.trainable_variables}


def test_gradients_are_the_definitions():
    """Of every trained array, along a random direction, against a central difference in float64."""
    network, x = disturbed(built()), images(4, 10, 9)
    rng = np.random.default_rng(3)
    cotangent = rng.normal(size=(4, resnet.feature_size(NARROW))).astype("float32")
    values = values_of(network)
    found, step = gradients_of(network, x, cotangent), 1e-6
    assert len(found) == 20 + 2 * 20 + 2
    for path, gradient in found.items():
        direction = rng.normal(size=gradient.shape)
        ends = [
            np.sum(plain_features({**values, path: values[path] + sign * step * direction}, x, {}) * cotangent)
            for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * step)
        assert np.sum(gradient * direction) == pytest.approx(expected, abs=1e-4 * np.linalg.norm(gradient)), path
        assert np.abs(gradient).max() > 0, path


# --- sizes


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        (1, (64, 128, 256, 512)),
        (0.25, (16, 32, 64, 128)),
        (2, (128, 256, 512, 1024)),
        (1e-9, (1, 1, 1, 1)),
    ],
)
def test_widths_scale_and_never_vanish(multiplier, expected):
    assert resnet.widths(multiplier) == expected
    assert resnet.feature_size(multiplier) == expected[3]


@pytest.mark.parametrize("multiplier", [1e-9, 1 / 64, 1 / 16, 0.3])
def test_the_number_of_values_is_known_without_building(multiplier):
    network, widths = built(multiplier), resnet.widths(multiplier)
    kernels = sum(int(np.prod(weight.shape)) for weight in network.weights if weight.name == "kernel")
    assert kernels == resnet.kernel_size(multiplier)
    # 5, 5, 5 and 5 normalisations, each with gamma, beta and two statistics, and the bias of the dense layer
    assert network.count_params() == kernels + 4 * 5 * sum(widths) + widths[3]


# --- initial values, precisions, configuration


def test_initial_values_are_a_function_of_the_seed_and_differ_from_layer_to_layer():
    first, again, other = (built(seed=seed).get_weights() for seed in (5, 5, 6))
    for values, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(values, same)
    drawn = [[values.ravel()[:8].tobytes() for values in arrays if values.std() > 0] for arrays in (first, other)]
    # 20 kernels, the dense layer's kernel and its bias
    assert len(drawn[0]) == len(set(drawn[0])) == 22
    assert all(ours != theirs for ours, theirs in zip(*drawn, strict=True))


def test_initial_values_are_uniform_as_pytorch_draws_them():
    network = built(1 / 4)
    drawn = {
        weight.path: ops.convert_to_numpy(weight) for weight in network.weights if weight.name in ("kernel", "bias")
    }
    for path, values in drawn.items():
        limit = (128 if path.endswith("bias") else np.prod(values.shape[:-1])) ** -0.5
        assert 0.9 * limit < np.abs(values).max() <= np.float32(limit), path
        assert values.std() == pytest.approx(limit / 3**0.5, rel=5 / values.size**0.5), path


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_16_bits_with_weights_in_32(network, precision):
    mixed, x = disturbed(built(dtype=f"mixed_{precision}")), images(2, 8, 8)
    for training in (False, True):
        found = mixed(x, training=training)
        assert keras.backend.standardize_dtype(found.dtype) == precision
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in mixed.weights} == {"float32"}
    mixed.set_weights(network.get_weights())
    expected = plain_features(values_of(network), x)
    found = ops.convert_to_numpy(ops.cast(mixed(x), "float32"))
    assert 0 < worst(found, expected) < 0.05


def test_a_block_without_a_shortcut_adds_its_input():
    block = resnet.ResidualBlock(5, stride=1, shortcut=False)
    block.build((None, None, None, 5))
    block.norm2.gamma.assign(np.zeros(5))
    x = images(2, 4, 4) @ np.ones((3, 5), "float32") - 1
    np.testing.assert_array_equal(np.asarray(block(x)), np.maximum(x, 0))


def test_the_layers_survive_their_config():
    again = resnet.ResNet.from_config(built(seed=3).get_config())
    assert (again.width_multiplier, again.seed) == (NARROW, 3)
    block = resnet.ResidualBlock(6, stride=2, shortcut=True, seed=4)
    other = resnet.ResidualBlock.from_config(block.get_config())
    assert (other.width, other.stride, other.shortcut, other.seed) == (6, 2, True, 4)
    for made in (block, other):
        made.build((None, None, None, 3))
    for ours, theirs in zip(other.get_weights(), block.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_preprocessing_scales_images_of_any_size_and_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    for given in (pixels, pixels.astype("float32")):
        found = np.asarray(resnet.preprocess(given))
        assert (found.shape, found.dtype) == ((2, 5, 7, 3), np.float32)
        # XLA multiplies by the rounded 1 / 255
        np.testing.assert_allclose(found, pixels / 255, rtol=0, atol=1.2e-7)
