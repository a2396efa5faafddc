"""The batch normalisations that the originals trained with: TensorFlow 1's contrib library's and PyTorch's."""

import keras
from keras import ops

from gpq_tf import replicas
from gpq_tf.ops import batch_normalize


@keras.saving.register_keras_serializable("gpq_tf")
class BatchNormalization(keras.layers.Layer):
    """Batch normalisation of every channel, as PyTorch keeps its statistics.

    One call in training mode, with batch mean m and population variance v over n values a channel:

        output          = gamma * (x - m) / sqrt(v + epsilon) + beta
        moving_mean     <- moving_mean - (1 - momentum) * (moving_mean - m)
        moving_variance <- moving_variance - (1 - momentum) * (moving_variance - v * n / (n - 1))

    Keras's own layer keeps v instead of v * n / (n - 1). Inference uses moving_mean and moving_variance alone.
    Statistics are float32 whatever the precision. In a distributed step they are those of all replicas' images, unless
    `synchronized` is set to False: then each replica normalises by its own, and the moving ones take their mean.

    Args:
        momentum: float in (0, 1), weight of the past (PyTorch's "momentum" is the weight of the present).
        epsilon: float > 0, added to the variance.

    Shapes:
        input and output: float (B, H, W, channels).
    """

    def __init__(self, momentum=0.9, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon
        self.synchronized = True

    def build(self, input_shape):
        channels = (input_shape[-1],)
        self.gamma = self._add("gamma", channels, "ones", True)
        self.beta = self._add("beta", channels, "zeros", True)
        self.moving_mean = self._add("moving_mean", channels, "zeros", False)
        self.moving_variance = self._add("moving_variance", channels, "ones", False)

    def _add(self, name, shape, initializer, trainable):
        # autocast=False: in mixed precision these must not be read in 16 bits
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            trainable=trainable,
            dtype="float32",
            autocast=False,
            aggregation="none" if trainable else "only_first_replica",  # all replicas assign the same
        )

    def call(self, x, training=False):
        if training:
            y, mean, variance = batch_normalize(x, self.gamma, self.beta, self.epsilon, self.synchronized)
            if not self.synchronized:
                mean, variance = replicas.mean(mean, variance)
            self._update(ops.stop_gradient(mean), ops.stop_gradient(variance))
            return y
        scale, shift = self.inference_scale_and_shift()
        return x * ops.cast(scale, x.dtype) + ops.cast(shift, x.dtype)

    def inference_scale_and_shift(self):
        """What inference does to every value of a channel: x * scale + shift; two float32 (channels,)."""
        scale = self.gamma * ops.rsqrt(self.moving_variance + self.epsilon)
        return scale, self.beta - self.moving_mean * scale

    def _update(self, mean, variance):
        self._update_mean(mean)
        keep = 1.0 - self.momentum
        self.moving_variance.assign(self.moving_variance - keep * (self.moving_variance - variance))

    def _update_mean(self, mean):
        self.moving_mean.assign(self.moving_mean - (1.0 - self.momentum) * (self.moving_mean - mean))

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("gpq_tf")
class DebiasedBatchNormalization(BatchNormalization):
    """The batch normalisation of TensorFlow 1's contrib library: the same with a zero-debiased moving mean.

        biased          <- biased - (1 - momentum) * (biased - m)
        local_step      <- local_step + 1
        moving_mean     <- biased / (1 - momentum^local_step)

    The moving mean is thus right from the first step on, while the moving variance starts at 1 and is not debiased.

    Args:
        momentum: float in (0, 1), weight of the past.
        epsilon: float > 0, added to the variance.

    Shapes:
        input and output: float (B, H, W, channels).
    """

    def __init__(self, momentum=0.9, epsilon=1e-3, **kwargs):
        super().__init__(momentum, epsilon, **kwargs)

    def build(self, input_shape):
        super().build(input_shape)
        self.biased = self._add("biased", (input_shape[-1],), "zeros", False)
        self.local_step = self._add("local_step", (), "zeros", False)

    def _update_mean(self, mean):
        self.biased.assign(self.biased - (1.0 - self.momentum) * (self.biased - mean))
        self.local_step.assign(self.local_step + 1.0)
        self.moving_mean.assign(self.biased / (1.0 - ops.power(self.momentum, self.local_step)))
