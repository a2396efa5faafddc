"""What a training step of SPQ draws and computes, and what its head gives to the search."""

import types

import keras
import numpy as np
import pytest
from keras import ops

from gpq_tf import augment, heads, losses
from gpq_tf import settings as settings_module
from gpq_tf.heads import spq
from gpq_tf.network import RetrievalModel
from gpq_tf.quantizer import soft_assign_l2
from gpq_tf.train_step import make_step

from golden import worst
from gradients import losses_of_batch

NARROW = 1 / 64


def settings(**changes):
    given = {"head": "spq", **changes}
    return settings_module.resolve([f"--{k}={v}" for k, v in given.items()], "no_such_config.py")


def data(n=70):
    """Images that carry their own number in every pixel."""
    numbers = np.arange(n, dtype="uint8")
    return types.SimpleNamespace(unlabelled_images=np.broadcast_to(numbers[:, None, None, None], (n, 8, 9, 3)))


def numbers_of(batch):
    return batch["images"][:, 0, 0, 0].tolist()


# --- what is drawn


def test_an_epoch_is_one_pass_over_the_images():
    images = types.SimpleNamespace(unlabelled_images=np.zeros((50_000, 1)))
    assert spq.steps_per_epoch(images, settings()) == 195
    assert spq.steps_per_epoch(images, settings(batch_size=50_000)) == 1
    with pytest.raises(ValueError) as caught:
        spq.steps_per_epoch(images, settings(batch_size=50_001))
    assert str(caught.value) == (
        "Invalid batch_size. Expected at most 50000, the number of images. Received: batch_size=50001"
    )


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first = spq.draw_batch(data(), settings(batch_size=16, seed=3), step=7)
    again = spq.draw_batch(data(), settings(batch_size=16, seed=3), step=7)
    assert set(first) == {"images", "first", "second"}
    np.testing.assert_array_equal(first["images"], again["images"])
    for view in ("first", "second"):
        for name in first[view]:
            np.testing.assert_array_equal(first[view][name], again[view][name])
    for seed, step in ((4, 7), (3, 8)):
        other = spq.draw_batch(data(), settings(batch_size=16, seed=seed), step)
        assert numbers_of(other) != numbers_of(first)
        for view in ("first", "second"):
            assert (other[view]["boxes"] != first[view]["boxes"]).any()


def test_the_two_views_are_drawn_apart_and_for_the_images():
    batch = spq.draw_batch(data(), settings(batch_size=16), step=0)
    assert (batch["images"].shape, batch["images"].dtype) == ((16, 8, 9, 3), np.uint8)
    for name in ("boxes", "jitter_factors", "blur_sigmas"):
        assert (batch["first"][name] != batch["second"][name]).any()
    bottom, right = (batch["first"]["boxes"][:, [i, i + 2]].sum(axis=1).max() for i in (0, 1))
    assert bottom <= 8
    assert right <= 9


@pytest.mark.parametrize("recipe", augment.RECIPES)
def test_the_recipe_is_the_settings(recipe):
    chosen = settings(batch_size=16, augment=recipe, seed=5)
    expected = augment.draw_views(augment.generator(5, 3, 4), 16, (8, 9), recipe)
    found = spq.draw_batch(data(), chosen, step=3)["first"]
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_every_image_comes_at_most_once_an_epoch_in_an_order_of_the_epochs_own():
    chosen, orders = settings(batch_size=16), []
    for epoch in range(3):
        steps = range(4 * epoch, 4 * epoch + 4)  # 70 images in batches of 16: 4 steps, 6 left out
        orders.append([number for step in steps for number in numbers_of(spq.draw_batch(data(), chosen, step))])
        assert len(orders[-1]) == len(set(orders[-1])) == 64
    assert orders[0] != orders[1] != orders[2]
    left_out = [set(range(70)) - set(order) for order in orders]
    assert left_out[0] != left_out[1] != left_out[2]


def test_without_a_rest_every_image_comes_once():
    drawn = [
        number for step in range(7) for number in numbers_of(spq.draw_batch(data(), settings(batch_size=10), step))
    ]
    assert sorted(drawn) == list(range(70))
    assert drawn != sorted(drawn)


# --- when the statistics stand still, and how fast it learns


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({}, set()),
        ({"legacy": True}, {101, 102, 5000}),
        ({"legacy": True, "eval_epoch": 1}, {2, 99, 100, 101, 102, 5000}),
        ({"legacy": True, "eval_epoch": None}, set()),
        ({"eval_epoch": 1}, set()),
    ],
)
def test_legacy_freezes_after_the_first_evaluation(changes, frozen):
    chosen = settings(**changes)
    assert {epoch for epoch in (1, 2, 99, 100, 101, 102, 5000) if spq.is_frozen(chosen, epoch)} == frozen


def test_the_rate_ends_with_the_last_epoch():
    schedule = spq.learning_rate(settings(total_epochs=60), 195)
    rates = [float(schedule(195 * epoch)) for epoch in (0, 10, 35, 60)]
    np.testing.assert_allclose(rates, [3e-4, 3e-4, 1.5e-4, 0], rtol=1e-6, atol=1e-12)
    assert float(schedule(195 * 60 - 1)) > 0
    short = spq.learning_rate(settings(total_epochs=7), 195)
    assert float(short(195 * 7 - 1)) == np.float32(3e-4)


def test_a_given_rate_is_the_first():
    schedule = spq.optimizer(settings(total_epochs=60, learning_rate=1e-3), 195)._learning_rate
    np.testing.assert_allclose([float(schedule(195 * epoch)) for epoch in (0, 35)], [1e-3, 5e-4], rtol=1e-6)


def test_legacy_takes_steps_for_epochs():
    schedule = spq.learning_rate(settings(total_epochs=5000, legacy=True), 195)
    rates = [float(schedule(195 * epoch)) for epoch in (10, 205, 400, 595)]
    np.testing.assert_allclose(rates, [3e-4, 0, 3e-4, 0], rtol=1e-6, atol=1e-12)


def test_the_optimiser_is_the_originals():
    optimizer = spq.optimizer(settings(), 195)
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon, optimizer.l2) == (0.9, 0.999, 1e-8, 1e-5)
    assert optimizer._learning_rate.get_config() == spq.learning_rate(settings(), 195).get_config()


def test_file_names_count_the_bits():
    assert spq.file_stem(settings()) == "spq_32bits"
    assert spq.file_stem(settings(n_book=16, bn_word=8)) == "spq_128bits"


# --- the head


def made_head(**options):
    head = spq.SPQHead(n_book=3, n_word=4, len_code=4, **options)
    head.build((None, 7))
    return head


def test_the_search_uses_descriptors_and_codewords_as_they_are():
    head = made_head()
    raw = np.random.default_rng(0).normal(size=(5, 12)).astype("float32")
    np.testing.assert_array_equal(np.asarray(head.embed(raw)), raw)
    np.testing.assert_array_equal(head.search_codebook(), ops.convert_to_numpy(head.quantizer.codebook))
    assert (head.search_metric, head.quantizer.metric) == ("l2", "l2")


def test_the_loss_is_that_of_the_softly_quantized_views():
    head = made_head()
    first, second = np.random.default_rng(1).normal(size=(2, 6, 12)).astype("float32")
    codebook = ops.convert_to_numpy(head.quantizer.codebook)
    for alpha, temperature in ((5.0, 0.5), (1.0, 0.1)):
        quantized = [soft_assign_l2(view, codebook, alpha) for view in (first, second)]
        expected = losses.cross_quantized_contrastive(first, second, *quantized, temperature)
        found = head.losses_of(first, second, alpha, temperature)
        assert set(found) == {"loss"}
        assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_the_head_survives_its_config():
    head = made_head(seed=9)
    again = spq.SPQHead.from_config(head.get_config())
    again.build((None, 7))
    assert again.get_config() == head.get_config()
    for ours, theirs in zip(again.get_weights(), head.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_descriptors_are_float32_in_every_precision(precision):
    head, x = made_head(dtype=precision), np.ones((2, 7), "float32")
    assert keras.backend.standardize_dtype(head(x).dtype) == "float32"
    assert head.projection.compute_dtype == precision.removeprefix("mixed_")
    assert {keras.backend.standardize_dtype(weight.dtype) for weight in head.weights} == {"float32"}


# --- a training step


def model_and_batch(**changes):
    chosen = settings(batch_size=6, width_multiplier=NARROW, n_book=2, len_code=4, **changes)
    rng = np.random.default_rng(2)
    images = types.SimpleNamespace(unlabelled_images=rng.integers(0, 256, (20, 8, 8, 3), np.uint8))
    model = RetrievalModel(**heads.architecture_of(chosen))
    return chosen, model, lambda step: spq.draw_batch(images, chosen, step)


def moving_statistics(model):
    return [ops.convert_to_numpy(weight) for weight in model.non_trainable_variables]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_losses_are_the_steps_in_turn(frozen):
    chosen, model, draw = model_and_batch()
    other = RetrievalModel(**model.architecture)
    batch = draw(0)
    images = batch["images"].astype("float32") / 255
    views = [np.asarray(augment.apply_views(images, batch[view], "simclr")) for view in ("first", "second")]
    descriptors = [other.describe(view, training=not frozen) for view in views]
    expected = other.head.losses_of(*descriptors, chosen.alpha, chosen.temperature)["loss"]
    before = moving_statistics(model)
    found = losses_of_batch(spq, model, batch, chosen, frozen)["loss"]
    # a view compiled differs in the last place from one that is not
    assert float(found) == pytest.approx(float(expected), abs=1e-4)
    after = moving_statistics(model)
    for ours, theirs, old in zip(after, moving_statistics(other), before, strict=True):
        assert worst(ours, theirs) < 1e-4
        assert (ours == old).all() == frozen


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_is_traced_once_and_trains_everything(jit):
    """Also where XLA compiles the whole of it, as on a GPU."""
    chosen, model, draw = model_and_batch()
    traces = []

    def losses_of(batch):
        traces.append(set(batch))
        return losses_of_batch(spq, model, batch, chosen)

    before = [ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    step = make_step(model, losses_of, spq.optimizer(chosen, 3), jit)
    found = [float(step(draw(0))["loss"])]
    # Adam's first step is as long as the rate, whatever the gradient's length
    for variable, old in zip(model.trainable_variables, before, strict=True):
        apart = np.abs(ops.convert_to_numpy(variable) - old).max()
        assert 1e-4 < apart < 3.01e-4, variable.path
    found += [float(step(draw(i))["loss"]) for i in (1, 2, 3)]
    assert len(traces) == 1
    assert np.isfinite(found).all()
    assert len(set(found)) == 4
