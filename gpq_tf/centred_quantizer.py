"""A product quantizer that goes along with its descriptors: codewords in units of their spread about their mean."""

import keras
from keras import ops

from gpq_tf import replicas
from gpq_tf.quantizer import ProductQuantizer

# Weight of the past in the mean and the spread of the descriptors: those of the last three batches or so. In training
# all descriptors move together, by more than they differ where a network has learned little.
_MOMENTUM = 0.7
_SMALLEST_SPREAD = 1e-6  # of descriptors that are all alike
_LARGEST_UNIFORM = 3.0**0.5  # of uniform values with a mean square of 1


@keras.saving.register_keras_serializable("gpq_tf")
class CentredQuantizer(ProductQuantizer):
    """A product quantizer of x' = (x - centre) / spread, "l2", for descriptors that are trained along with it.

    The codewords that images are assigned to are centre + spread * codebook. In training centre and spread are those of
    the batch, m = mean_i x_i and s = sqrt(mean_i ||x_i - m||^2 / D), and no gradient flows by them; `watch` keeps their
    moving averages for what comes after. An optimiser that moves every value by its rate, as Adam does, thus moves
    codewords by the same share of what they stand for, however close together the descriptors of a network lie, and
    they need not run after a mean that moves.

    Args:
        n_book, n_word, len_code: int M, K, d.
        seed: int, of the initial values, uniform with a mean square of 1; centre begins at 0 and spread at (M d)^-1/2,
            as of unit vectors in all directions.

    Example:
        >>> quantizer = CentredQuantizer(n_book=3, n_word=4, len_code=2)
        >>> quantizer.words().shape
        (3, 4, 2)
    """

    def __init__(self, n_book, n_word, len_code, seed=0, **kwargs):
        super().__init__(n_book, n_word, len_code, seed, metric="l2", limit=_LARGEST_UNIFORM, **kwargs)
        size = n_book * len_code
        self.centre = self._state("centre", (size,), 0.0)
        self.spread = self._state("spread", (), size**-0.5)

    def _state(self, name, shape, value):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=keras.initializers.Constant(value),
            trainable=False,
            dtype="float32",
            autocast=False,
            aggregation="only_first_replica",  # all replicas assign the same
        )

    def words(self):
        """The codewords as descriptors are compared with them, numpy float32 (M, K, d)."""
        return ops.convert_to_numpy(self._centres() + self.spread * self.codebook.value)

    def place(self, words, centre, spread):
        """Take codewords that were fitted to descriptors.

        Args:
            words: float (M, K, d), as `words` returns them.
            centre: float (D,), the descriptors' mean.
            spread: float, the square root of their mean squared distance from it by component.
        """
        self.centre.assign(centre)
        self.spread.assign(max(spread, _SMALLEST_SPREAD))
        self.codebook.assign((words - self._centres()) / self.spread)

    def watch(self, x):
        """Move centre and spread towards those of a training step's descriptors, float (B, D), of all replicas."""
        x = ops.stop_gradient(x)
        (mean,) = replicas.mean(ops.mean(x, axis=0))
        (square,) = replicas.mean(ops.mean(ops.square(x - mean)))
        for state, value in ((self.centre, mean), (self.spread, _root(square))):
            state.assign(state - (1.0 - _MOMENTUM) * (state - value))

    def encode(self, x):
        """float (B, D) -> int32 codes (B, M); see `hard_assign`."""
        return super().encode((x - self.centre) / self.spread)

    def decode(self, codes):
        """integer codes (B, M) -> float (B, D)."""
        return self.centre + self.spread * super().decode(codes)

    def call(self, x, alpha=20.0):
        """Descriptors, softly quantized as training does it.

        z_j = sum_k softmax_k(-alpha / d ||x'_j - c_jk||^2) c_jk for each book j, and back from x' to x: by alpha / d,
        alpha means the same whatever the length of a sub-vector.

        Args:
            x: float (B, D).
            alpha: float > 0, inverse temperature; larger is closer to codes.

        Returns:
            float (B, D).
        """
        mean, spread = self.batch_statistics(x)
        return mean + spread * super().call((x - mean) / spread, alpha=alpha / self.len_code)

    def batch_statistics(self, x):
        """(m, s) of descriptors: float (D,) and (), without gradient."""
        x = ops.stop_gradient(x)
        mean = ops.mean(x, axis=0)
        return mean, _root(ops.mean(ops.square(x - mean)))

    def _centres(self):
        """The centre's sub-vectors, float (M, 1, d)."""
        return ops.reshape(self.centre.value, (self.n_book, 1, self.len_code))

    def get_config(self):
        config = super().get_config()
        return {name: value for name, value in config.items() if name not in ("metric", "limit")}


def _root(square):
    return ops.sqrt(ops.maximum(square, _SMALLEST_SPREAD**2))
