"""The batch normalisation of TensorFlow 1's contrib library, as GPQ trained with it."""

import keras
from keras import ops

from gpq_tf.ops import batch_normalize


@keras.saving.register_keras_serializable("gpq_tf")
class DebiasedBatchNormalization(keras.layers.Layer):
    """Batch normalisation of every channel, with a zero-debiased moving mean.

    One call in training mode, with batch mean m and population variance v over n values a channel:

        output          = gamma * (x - m) / sqrt(v + epsilon) + beta
        biased          <- biased - (1 - momentum) * (biased - m)
        local_step      <- local_step + 1
        moving_mean     <- biased / (1 - momentum^local_step)
        moving_variance <- moving_variance - (1 - momentum) * (moving_variance - v * n / (n - 1))

    The moving mean is thus right from the first step on, while the moving variance starts at 1 and is not debiased.
    Inference uses moving_mean and moving_variance alone. Statistics are float32 whatever the precision.

    Args:
        momentum: float in (0, 1), weight of the past.
        epsilon: float > 0, added to the variance.

    Shapes:
        input and output: float (B, H, W, channels).
    """

    def __init__(self, momentum=0.9, epsilon=1e-3, **kwargs):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape):
        def add(name, shape, initializer, trainable):
            # autocast=False: in mixed precision these must not be read in 16 bits
            return self.add_weight(
                name=name,
                shape=shape,
                initializer=initializer,
                trainable=trainable,
                dtype="float32",
                autocast=False,
            )

        channels = (input_shape[-1],)
        self.gamma = add("gamma", channels, "ones", True)
        self.beta = add("beta", channels, "zeros", True)
        self.moving_mean = add("moving_mean", channels, "zeros", False)
        self.moving_variance = add("moving_variance", channels, "ones", False)
        self.biased = add("biased", channels, "zeros", False)
        self.local_step = add("local_step", (), "zeros", False)

    def call(self, x, training=False):
        if training:
            y, mean, variance = batch_normalize(x, self.gamma, self.beta, self.epsilon)
            self._update(ops.stop_gradient(mean), ops.stop_gradient(variance))
            return y
        scale, shift = self.inference_scale_and_shift()
        return x * ops.cast(scale, x.dtype) + ops.cast(shift, x.dtype)

    def inference_scale_and_shift(self):
        """What inference does to every value of a channel: x * scale + shift; two float32 (channels,)."""
        scale = self.gamma * ops.rsqrt(self.moving_variance + self.epsilon)
        return scale, self.beta - self.moving_mean * scale

    def _update(self, mean, variance):
        keep = 1.0 - self.momentum
        self.biased.assign(self.biased - keep * (self.biased - mean))
        self.local_step.assign(self.local_step + 1.0)
        self.moving_mean.assign(self.biased / (1.0 - ops.power(self.momentum, self.local_step)))
        self.moving_variance.assign(self.moving_variance - keep * (self.moving_variance - variance))

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}
