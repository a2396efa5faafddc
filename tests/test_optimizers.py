"""PyTorch's Adam and SPQ's learning rate against their formulas in float64."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from gpq_tf import training_state
from gpq_tf.optimizers import ConstantThenCosine, TorchAdam
from gpq_tf.train_step import make_step

from golden import worst
from gradients import random_cases

RATE = 3e-4


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def variable_of(values):
    return keras.Variable(np.asarray(values, "float32"), name="x")


def plain_adam(value, gradients, rate, l2=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
    """The value after each step, PyTorch's documentation line by line, in float64."""
    value = np.asarray(value, "float64")
    mean, mean_square, values = np.zeros_like(value), np.zeros_like(value), []
    for step, gradient in enumerate(gradients, 1):
        gradient = gradient.astype("float64") + l2 * value
        mean = beta_1 * mean + (1 - beta_1) * gradient
        mean_square = beta_2 * mean_square + (1 - beta_2) * gradient**2
        corrected_mean = mean / (1 - beta_1**step)
        corrected_square = mean_square / (1 - beta_2**step)
        value = value - rate * corrected_mean / (np.sqrt(corrected_square) + epsilon)
        values.append(value)
    return values


# --- Adam


@pytest.mark.parametrize("scale", [1e-10, 1e-8, 1e-4, 1.0, 1e4])
def test_steps_are_the_formulas(scale):
    """From zero, so that a step is not rounded to the last place of what it is added to."""
    gradients = [np.float32(scale) * normals(seed, 50) for seed in range(8)]
    variable, optimizer = variable_of(np.zeros(50)), TorchAdam(RATE)
    for gradient, expected in zip(gradients, plain_adam(np.zeros(50), gradients, RATE), strict=True):
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
        assert worst(variable, expected) < 1e-6


@pytest.mark.parametrize("l2", [0.0, 1e-5, 0.3])
def test_the_decay_is_a_part_of_the_gradient(l2):
    start, gradients = normals(8, 50), [normals(seed, 50) for seed in range(8)]
    variable, optimizer = variable_of(start), TorchAdam(0.01, l2=l2)
    for gradient, expected in zip(gradients, plain_adam(start, gradients, 0.01, l2), strict=True):
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
        assert worst(variable, expected) < 5e-7


@pytest.mark.parametrize("gradient", [1e-10, 1e-8, 1e-6])
def test_epsilon_is_not_divided_by_the_correction(gradient):
    """The first step is rate * g / (|g| + epsilon); an epsilon inside the correction would be 32 times as large."""
    variable = variable_of([0.0])
    TorchAdam(RATE, epsilon=1e-8).apply([ops.convert_to_tensor([gradient])], [variable])
    assert float(variable[0]) == pytest.approx(-RATE * gradient / (gradient + 1e-8), rel=1e-6)


@pytest.mark.parametrize(("beta_1", "beta_2"), [(0.0, 0.99), (0.5, 0.9), (0.9, 0.9999)])
def test_other_betas(beta_1, beta_2):
    gradients = [normals(seed, 20) for seed in range(5)]
    variable, optimizer = variable_of(np.zeros(20)), TorchAdam(RATE, beta_1=beta_1, beta_2=beta_2)
    expected = plain_adam(np.zeros(20), gradients, RATE, beta_1=beta_1, beta_2=beta_2)[-1]
    for gradient in gradients:
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    assert worst(variable, expected) < 2e-6


def test_the_correction_ends_after_many_steps():
    """Step a million of a run: a constant gradient moves by the rate."""
    variable, optimizer = variable_of([0.0]), TorchAdam(RATE)
    optimizer.build([variable])
    optimizer.iterations.assign(10**6 - 1)
    mean, mean_square = training_state.slot_variables(optimizer, variable)
    mean.assign([0.25])
    mean_square.assign([0.0625])
    optimizer.apply([ops.convert_to_tensor([0.25])], [variable])
    assert float(variable[0]) == pytest.approx(-RATE, rel=1e-6)


def test_the_rate_is_the_schedules():
    """Of the step before it is counted, as training logs it."""
    schedule = ConstantThenCosine(RATE, steps_per_epoch=2, constant_epochs=1, half_period=2)
    variable, optimizer = variable_of([0.0]), TorchAdam(schedule, epsilon=0.0)
    places = [0.0]
    for _ in range(6):
        optimizer.apply([ops.convert_to_tensor([1.0])], [variable])
        places.append(float(variable[0]))
    expected = [RATE * factor for factor in (1, 1, 1, 1, 0.5, 0.5)]
    np.testing.assert_allclose(-np.diff(places), expected, rtol=1e-5)


def test_amsgrad_is_refused():
    with pytest.raises(ValueError) as caught:
        TorchAdam(amsgrad=True)
    assert str(caught.value) == "Invalid amsgrad. Expected False. Received: amsgrad=True"


def test_the_optimiser_survives_its_config():
    optimizer = TorchAdam(ConstantThenCosine(RATE, 195, 10, 4990), l2=1e-5, beta_1=0.8, epsilon=1e-7)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(again, TorchAdam)
    assert (again.l2, again.beta_1, again.epsilon) == (1e-5, 0.8, 1e-7)
    assert again._learning_rate.get_config() == optimizer._learning_rate.get_config()
    assert again.get_config() == optimizer.get_config()
    start, gradient = normals(9, 5), ops.convert_to_tensor(normals(10, 5))
    first, second = variable_of(start), variable_of(start)
    optimizer.apply([gradient], [first])
    again.apply([gradient], [second])
    np.testing.assert_array_equal(ops.convert_to_numpy(first), ops.convert_to_numpy(second))


class Values(keras.layers.Layer):
    """One trained array."""

    def __init__(self, start):
        super().__init__(name="values")
        self.x = self.add_weight(shape=start.shape, name="x")
        self.x.assign(start)
        self.built = True


def step_of(layer, optimizer):
    """A compiled training step that takes the gradient of `layer.x` itself."""
    step = make_step(layer, lambda batch: {"loss": ops.sum(layer.x * batch["gradient"])}, optimizer)
    return lambda gradient: step({"gradient": gradient})


def test_it_works_under_a_loss_scale():
    """The decay is added to the gradient after the scale is taken off; a step that overflows is left out."""
    start, gradients = normals(11, 20), [normals(seed, 20) for seed in range(3)]
    layer = Values(start)
    optimizer = keras.optimizers.LossScaleOptimizer(TorchAdam(0.01, l2=0.3), initial_scale=2.0**10)
    step = step_of(layer, optimizer)
    step(np.full(20, np.inf, "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.x), start)
    assert float(optimizer.scale_loss(1.0)) == 2.0**9
    for gradient, expected in zip(gradients, plain_adam(start, gradients, 0.01, 0.3), strict=True):
        step(gradient)
        assert worst(layer.x, expected) < 5e-7


@pytest.mark.parametrize("scaled", [False, True])
def test_a_saved_state_goes_on_in_the_same_bits(scaled):
    def made():
        optimizer = TorchAdam(ConstantThenCosine(0.01, 2, 1, 3), l2=1e-3)
        return keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer

    gradients, first, optimizer = [normals(seed, 20) for seed in range(6)], Values(normals(12, 20)), made()
    step = step_of(first, optimizer)
    for gradient in gradients[:3]:
        step(gradient)
    resumed, other = Values(ops.convert_to_numpy(first.x)), made()
    step_resumed = step_of(resumed, other)
    assert training_state.into_optimizer(training_state.from_optimizer(optimizer, 3), other) == 3
    for gradient in gradients[3:]:
        step(gradient)
        step_resumed(gradient)
    np.testing.assert_array_equal(ops.convert_to_numpy(resumed.x), ops.convert_to_numpy(first.x))


# --- the learning rate


def plain_rate(step, rate, steps_per_epoch, constant_epochs, half_period):
    behind = max(step // steps_per_epoch - constant_epochs, 0)
    return rate / 2 * (1 + math.cos(math.pi * behind / half_period))


@random_cases
@given(st.integers(0, 2**31 - 1), st.integers(1, 2000), st.integers(0, 20), st.integers(1, 5000))
def test_the_rate_is_the_formula(step, steps_per_epoch, constant_epochs, half_period):
    sizes = RATE, steps_per_epoch, constant_epochs, half_period
    assert float(ConstantThenCosine(*sizes)(step)) == pytest.approx(plain_rate(step, *sizes), abs=3e-7 * RATE)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 195, 1009])
def test_the_rate_changes_between_epochs_alone(steps_per_epoch):
    schedule = ConstantThenCosine(RATE, steps_per_epoch, 10, 40)
    for epoch in (11, 30, 49, 5001, 10**6 // steps_per_epoch):
        first, last = (float(schedule(epoch * steps_per_epoch + more)) for more in (0, steps_per_epoch - 1))
        assert first == last
        assert first != float(schedule(epoch * steps_per_epoch - 1))


def test_the_rate_is_whole_for_the_constant_epochs_and_none_at_the_end():
    schedule = ConstantThenCosine(RATE, 195, 10, 4990)
    assert float(schedule(0)) == float(schedule(10 * 195)) == float(schedule(11 * 195 - 1)) == np.float32(RATE)
    assert float(schedule(11 * 195)) < np.float32(RATE)
    assert float(schedule(5000 * 195)) == 0.0
    assert 0 < float(schedule(5000 * 195 - 1)) < 1e-6 * RATE
    assert float(schedule((5000 + 4990) * 195)) == np.float32(RATE)


def test_every_period_has_the_same_bits():
    """Also where a float32 angle would have lost its digits."""
    schedule = ConstantThenCosine(RATE, 7, 10, 195)
    for epoch in (10, 11, 100, 205, 300):
        rates = {float(schedule(7 * (epoch + 390 * period))) for period in (0, 1, 10, 360)}
        assert len(rates) == 1


def test_the_schedule_survives_its_config_and_compiles():
    from gpq_tf.ops import compiled

    schedule = ConstantThenCosine(RATE, 195, 10, 20)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert again.get_config() == schedule.get_config()
    function = compiled(again)
    for step in (0, 2000, 4000, 10**6):
        assert float(function(np.int32(step))) == pytest.approx(float(schedule(step)), abs=1e-7 * RATE)
