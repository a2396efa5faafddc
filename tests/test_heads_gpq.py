"""What a training step of GPQ draws, and what its head gives to the search."""

import types

import keras
import numpy as np
import pytest

from gpq_tf import settings as settings_module
from gpq_tf.heads import gpq, recipe


def settings(**changes):
    return settings_module.resolve([f"--{k}={v}" for k, v in changes.items()], "no_such_config.py")


def data(n_labelled=40, n_unlabelled=70):
    """Images that carry their own number in every pixel, labels that follow from it."""
    numbers = np.arange(n_labelled + n_unlabelled, dtype="uint8")
    images = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 8, 8, 3))
    return types.SimpleNamespace(
        labelled_images=images[:n_labelled],
        labelled_labels=(numbers[:n_labelled] % 10).astype("int64"),
        unlabelled_images=images[n_labelled:],
    )


def test_an_epoch_is_one_pass_over_the_labelled_images():
    images = types.SimpleNamespace(labelled_labels=np.zeros(5000), unlabelled_images=np.zeros((54000, 1)))
    assert gpq.steps_per_epoch(images, settings()) == 10
    assert gpq.steps_per_epoch(images, settings(batch_size=300)) == 16
    with pytest.raises(ValueError, match=r"Expected at most 5000.*Received: batch_size=5001"):
        gpq.steps_per_epoch(images, settings(batch_size=5001))


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first = gpq.draw_batch(data(), settings(batch_size=16, seed=3), step=7)
    again = gpq.draw_batch(data(), settings(batch_size=16, seed=3), step=7)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    for other in ({"seed": 4, "step": 7}, {"seed": 3, "step": 8}):
        batch = gpq.draw_batch(data(), settings(batch_size=16, seed=other["seed"]), other["step"])
        assert (batch["images"] != first["images"]).any()
        assert (batch["offsets"] != first["offsets"]).any()


def test_a_batch_is_drawn_without_replacement_from_the_right_halves():
    batch = gpq.draw_batch(data(), settings(batch_size=40), step=0)
    numbers = batch["images"][:, 0, 0, 0]
    assert sorted(numbers[:40]) == list(range(40))
    assert len(set(numbers[40:])) == 40
    assert numbers[40:].min() >= 40
    np.testing.assert_array_equal(batch["labels"], numbers[:40] % 10)
    assert (batch["images"].shape, batch["images"].dtype) == ((80, 8, 8, 3), np.uint8)
    assert (batch["flips"].shape, batch["offsets"].shape) == ((80,), (80, 2))


def test_every_image_is_drawn_equally_often():
    counts = np.zeros(110)
    for step in range(400):
        np.add.at(counts, gpq.draw_batch(data(), settings(batch_size=10), step)["images"][:, 0, 0, 0], 1)
    # 400 * 10 / 40 = 100 expected (deviation 8.7), and 400 * 10 / 70 = 57 (deviation 7): five deviations
    assert np.abs(counts[:40] - 100).max() < 44
    assert np.abs(counts[40:] - 4000 / 70).max() < 36


def test_the_optimiser_is_the_originals():
    optimizer = gpq.optimizer()
    optimizer.build([keras.Variable(np.zeros(2, "float32"))])
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon) == (0.5, 0.999, 1e-8)
    assert optimizer._learning_rate.get_config() == gpq.learning_rate().get_config()
    rates = [float(gpq.learning_rate()(step)) for step in (0, 99, 100, 250, 2999)]
    np.testing.assert_allclose(rates, [2e-4, 2e-4, 1.9e-4, 2e-4 * 0.95**2, 2e-4 * 0.95**29], rtol=1e-6)


def test_a_given_rate_is_the_first():
    schedule = gpq.optimizer(settings(learning_rate=1e-3), 10)._learning_rate
    np.testing.assert_allclose([float(schedule(step)) for step in (0, 100)], [1e-3, 9.5e-4], rtol=1e-6)


def test_legacy_searches_with_raw_descriptors_and_codewords():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(5, 12)).astype("float32")
    for legacy in (False, True):
        head = gpq.GPQHead(n_book=3, n_word=4, len_code=4, n_classes=2, legacy=legacy)
        head.build((None, 7))
        lengths = np.linalg.norm(np.asarray(head.embed(raw)).reshape(5, 3, 4), axis=-1)
        words = np.linalg.norm(head.search_codebook(), axis=-1)
        if legacy:
            np.testing.assert_array_equal(np.asarray(head.embed(raw)), raw)
            assert np.abs(words - 1).max() > 0.1
        else:
            np.testing.assert_allclose(lengths, 1, atol=1e-6)
            np.testing.assert_allclose(words, 1, atol=1e-6)


def test_the_entropy_reaches_the_features_reversed():
    """The prototypes lower the loss `ent`, the features of unlabelled images raise it."""
    from gradients import value_and_gradients

    head = gpq.GPQHead(n_book=2, n_word=4, len_code=3, n_classes=5)
    head.build((None, 7))
    rng = np.random.default_rng(1)
    labelled, unlabelled = rng.normal(size=(2, 4, 6)).astype("float32")
    labels = np.array([0, 1, 0, 3], "int32")

    def entropy(features):
        return head.losses_of(labelled, labels, features, alpha=20.0, beta=4.0, lam_1=0.1, lam_2=0.1)["ent"]

    value, (gradient,) = value_and_gradients(entropy, [unlabelled], np.ones(()))
    stepped, _ = value_and_gradients(entropy, [unlabelled - 0.05 * gradient], np.ones(()))
    assert stepped > value


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"Invalid head. Expected one of gpq, spq, cgd. Received: head='vgg'"):
        recipe("vgg")


def test_crops_take_the_place_of_shifts_and_change_nothing_else():
    plain = gpq.draw_batch(data(), settings(batch_size=16), step=7)
    cropped = gpq.draw_batch(data(), settings(batch_size=16, crop_area=0.5), step=7)
    assert set(cropped) == {*plain, "boxes"} - {"offsets"}
    for name in ("images", "labels", "flips"):
        np.testing.assert_array_equal(plain[name], cropped[name])
    assert (cropped["boxes"].shape, cropped["boxes"].dtype) == ((32, 4), np.int32)
    larger = gpq.draw_batch(data(), settings(batch_size=40, crop_area=0.9), step=0)["boxes"][:, 2:].prod(axis=1)
    # rounded to whole pixels, 7 by 8 and 8 by 7 are what is below the whole
    assert larger.min() >= 49 and (larger < 64).any()


def test_crops_reach_the_network(monkeypatch):
    """Against resizing by hand: a box of 5x5 of an 8x8 image, corners onto corners, then mirrored."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), dtype="uint8")
    seen = []
    model = types.SimpleNamespace(describe=lambda x, training: seen.append(keras.ops.convert_to_numpy(x)) or x)
    boxes = np.array([[1, 2, 5, 5], [0, 0, 8, 8]], "int32")
    batch = {"images": images, "labels": np.zeros(1, "int32"), "flips": np.array([True, False]), "boxes": boxes}
    gpq.describe(model, batch, settings())
    places = np.linspace(0, 4, 8)
    low = np.minimum(places.astype(int), 3)
    weights = np.zeros((8, 5))
    weights[np.arange(8), low], weights[np.arange(8), low + 1] = 1 - (places - low), places - low
    part = keras.ops.convert_to_numpy(gpq.preprocess(images))[0, 1:6, 2:7]
    expected = np.einsum("yi,xj,ijc->yxc", weights, weights, part)[:, ::-1]
    np.testing.assert_allclose(seen[0][0], expected, atol=1e-5)
    np.testing.assert_allclose(seen[1][0], keras.ops.convert_to_numpy(gpq.preprocess(images))[1], atol=1e-5)


@pytest.mark.parametrize("wrong", [0, -0.1, 1.5, "half"])
def test_a_share_is_more_than_nothing_and_no_more_than_all(wrong):
    with pytest.raises(ValueError, match=r"Invalid crop_area .*above 0 and at most 1, or None\. Received: crop_area="):
        settings(crop_area=wrong)
