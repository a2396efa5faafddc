"""A batch in parts has the losses and the gradients of the whole."""

import keras
import numpy as np
import pytest

from gpq_tf import heads, trainer
from gpq_tf import settings as settings_module
from gpq_tf.network import RetrievalModel
from gpq_tf.train_step import make_step

from small_data import HEADS, SMALL, coloured_data, small_set


def chosen_for(head, *more):
    return settings_module.resolve([f"--head={head}", *SMALL[head], *more], "no config.py")


def twice(batch, size):
    """Every image twice, so that either half has the batch statistics of the whole."""
    doubled = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            doubled[name] = twice(value, size)
        elif name == "jitter_order":
            doubled[name] = value
        else:
            sets = value.reshape(-1, 1, size, *value.shape[1:]).repeat(2, axis=1)
            doubled[name] = sets.reshape(-1, *value.shape[1:])
    return doubled


def one_step(head, batch, size, accumulate):
    """Losses, gradients by name (the optimiser's), and how often the first batch normalisation moved, of one step."""
    chosen, recipe = chosen_for(head), heads.recipe(head)
    model = RetrievalModel(**heads.architecture_of(chosen))
    optimizer = keras.optimizers.SGD(1.0, momentum=0.5)  # whose momentum after a step is minus the gradient
    step = make_step(
        model,
        lambda described: recipe.compare(model, described, chosen),
        optimizer,
        describe=lambda images: recipe.describe(model, images, chosen),
        batch_size=size,
        accumulate=accumulate,
    )
    losses = {name: float(value) for name, value in step(batch).items()}
    return losses, {slot.path: keras.ops.convert_to_numpy(slot) for slot in optimizer.variables[2:]}


@pytest.mark.parametrize("head", HEADS)
def test_the_losses_and_gradients_are_those_of_the_whole_batch(head):
    chosen = chosen_for(head)
    size = chosen.batch_size
    batch = twice(heads.recipe(head).draw_batch(small_set(head), chosen, 0), size)
    losses, gradients = one_step(head, batch, 2 * size, 1)
    found, in_parts = one_step(head, batch, 2 * size, 2)
    assert found == pytest.approx(losses, rel=1e-5, abs=1e-7)
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for expected, actual in zip(gradients.values(), in_parts.values(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4 * np.abs(expected).max() + 5e-6 * largest)


@pytest.mark.slow
def test_statistics_move_once_a_part(tmp_path):
    """What the first of the two passes assigns is dropped."""
    chosen = chosen_for("gpq", f"--model_save_path={tmp_path}", "--total_epochs=1", "--accumulate=2")
    data = coloured_data(600)
    model, _ = trainer.train(chosen, data)
    n_step = len(data.labelled_labels) // 20
    assert int(model.backbone.normalizations[0].local_step) == 2 * 2 * n_step  # both halves, in two parts


def test_a_batch_that_has_no_such_parts_is_refused(tmp_path):
    chosen = chosen_for("gpq", f"--model_save_path={tmp_path}", "--accumulate=3")
    with pytest.raises(ValueError) as caught:
        trainer.train(chosen, coloured_data(600))
    assert "Expected a multiple of 3: 1 replicas, accumulate=3. Received: batch_size=20" in str(caught.value)
