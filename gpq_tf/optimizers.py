"""PyTorch's Adam, as SPQ trains with it."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable("gpq_tf")
class TorchAdam(keras.optimizers.Adam):
    """Adam whose weight decay is part of the gradient and whose epsilon is added after the correction of the bias.

    With g = gradient + l2 * variable, in step t:

        m <- beta_1 m + (1 - beta_1) g
        v <- beta_2 v + (1 - beta_2) g^2
        variable <- variable - rate * m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)

    Keras's Adam adds its epsilon to sqrt(v), which in the first steps makes it 30 times as large, and its weight decay
    leaves m and v alone.

    Args:
        learning_rate: float or keras.optimizers.schedules.LearningRateSchedule.
        l2: float >= 0.
        **kwargs: those of keras.optimizers.Adam, without amsgrad.

    Raises:
        ValueError: if amsgrad is asked for.
    """

    def __init__(self, learning_rate=1e-3, l2=0.0, epsilon=1e-8, **kwargs):
        super().__init__(learning_rate, epsilon=epsilon, **kwargs)
        if self.amsgrad:
            raise ValueError("Invalid amsgrad. Expected False. Received: amsgrad=True")
        self.l2 = l2

    def update_step(self, gradient, variable, learning_rate):
        dtype, index = variable.dtype, self._get_variable_index(variable)
        rate, step = ops.cast(learning_rate, dtype), ops.cast(self.iterations + 1, dtype)
        mean, mean_square = self._momentums[index], self._velocities[index]
        gradient = ops.cast(gradient, dtype) + self.l2 * variable
        self.assign(mean, mean + (gradient - mean) * (1 - self.beta_1))
        self.assign(mean_square, mean_square + (ops.square(gradient) - mean_square) * (1 - self.beta_2))
        length = ops.sqrt(mean_square / _one_minus_power(self.beta_2, step)) + self.epsilon
        self.assign_sub(variable, rate * mean / _one_minus_power(self.beta_1, step) / length)

    def get_config(self):
        return {**super().get_config(), "l2": self.l2}


def _one_minus_power(beta, step):
    """1 - beta^step. Of a beta near 1 the difference itself would keep five digits in float32."""
    return -ops.expm1(step * (math.log(beta) if beta else -math.inf))


@keras.saving.register_keras_serializable("gpq_tf")
class ConstantThenCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A constant learning rate, and then a cosine: it changes from epoch to epoch, not within.

    rate / 2 * (1 + cos(pi * max(epoch - constant_epochs, 0) / half_period)), which falls to 0 after half_period epochs
    and then rises again.

    Args:
        rate: float > 0.
        steps_per_epoch: int.
        constant_epochs: int.
        half_period: int > 0, epochs.

    Example:
        >>> schedule = ConstantThenCosine(3e-4, steps_per_epoch=195, constant_epochs=10, half_period=20)
        >>> [round(float(schedule(epoch * 195)), 6) for epoch in (0, 10, 20, 30)]
        [0.0003, 0.0003, 0.00015, 0.0]
    """

    def __init__(self, rate, steps_per_epoch, constant_epochs, half_period):
        self.rate, self.steps_per_epoch = rate, steps_per_epoch
        self.constant_epochs, self.half_period = constant_epochs, half_period

    def __call__(self, step):
        # whole numbers first: in floats the last step of an epoch could round into the next
        epoch = ops.floor_divide(ops.cast(step, "int32"), self.steps_per_epoch)
        # modulo the period, so that the cosine of a large angle loses no digits
        behind = ops.mod(ops.maximum(epoch - self.constant_epochs, 0), 2 * self.half_period)
        return self.rate / 2 * (1 + ops.cos(math.pi * ops.cast(behind, "float32") / self.half_period))

    def get_config(self):
        names = ("rate", "steps_per_epoch", "constant_epochs", "half_period")
        return {name: getattr(self, name) for name in names}
