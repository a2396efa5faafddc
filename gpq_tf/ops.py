"""Small tensor operations shared by the whole library, in keras.ops.

Axis letters, used in every docstring of this library: B batch, N gallery, Q queries, M books, K codewords of a book,
d length of a sub-vector, D = M * d length of a descriptor, C classes, H W height and width of an image.
"""

import keras
from keras import ops

from gpq_tf import replicas

# The smallest squared length that `l2_normalize` divides by as a rule; below it a vector is scaled by 1e6 instead.
TINY_SQUARED_LENGTH = 1e-12


def split_books(x, n_book):
    """Cut descriptors into their sub-vectors.

    Args:
        x: (B, D).
        n_book: int M, divides D.

    Returns:
        (B, M, d), a view of the same numbers.

    Raises:
        ValueError: if n_book does not divide D.

    Example:
        >>> split_books(ops.ones((2, 6)), 3).shape == (2, 3, 2)
        True
    """
    width = x.shape[-1]
    if n_book < 1 or width % n_book:
        raise ValueError(f"Invalid n_book. Expected a positive integer dividing D={width}. Received: n_book={n_book}")
    return ops.reshape(x, (-1, n_book, width // n_book))


def join_books(x):
    """Undo `split_books`: (B, M, d) -> (B, M * d)."""
    return ops.reshape(x, (-1, x.shape[-2] * x.shape[-1]))


def l2_normalize(x, axis=-1, smallest=TINY_SQUARED_LENGTH):
    """Scale vectors to unit Euclidean length: x / sqrt(max(sum(x^2), smallest)).

    The bound is under the square root and not added to it, so vectors longer than 1e-6 come out exactly unit and the
    zero vector stays zero, with 1e6 times the incoming gradient, as in the original (TensorFlow 1.14's l2_normalize).

    Args:
        x: float, any shape.
        axis: the axis along which the length is taken.
        smallest: float > 0, the squared length below which a vector is scaled by 1 / sqrt(smallest) instead.

    Returns:
        float, shape and dtype of `x`.

    Example:
        >>> [round(float(v), 3) for v in l2_normalize(ops.convert_to_tensor([[3.0, 4.0]]))[0]]
        [0.6, 0.8]
    """
    squared_length = ops.sum(ops.square(x), axis=axis, keepdims=True)
    return x * ops.rsqrt(ops.maximum(squared_length, smallest))


def l2_normalize_added(x, epsilon=1e-10):
    """Scale vectors to unit Euclidean length as MXNet's L2Normalization does: x / sqrt(sum(x^2) + epsilon).

    Short vectors come out shorter than 1; the zero vector stays zero, with 1e5 times the incoming gradient.

    Args:
        x: float (..., D).
        epsilon: float >= 0, added to the squared length.

    Returns:
        float, shape and dtype of `x`.

    Example:
        >>> [round(float(v), 3) for v in l2_normalize_added(ops.convert_to_tensor([[3e-6, 4e-6]]))[0]]
        [0.268, 0.358]
    """
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + epsilon)


def normalize_books(x, n_book):
    """Scale every sub-vector of a descriptor to unit length (GPQ, section 3.1: intra-normalisation).

    Args:
        x: float (B, D).
        n_book: int M, divides D.

    Returns:
        float (B, D), in the dtype of `x`.

    Raises:
        ValueError: if n_book does not divide D.

    Example:
        >>> [round(float(v), 3) for v in normalize_books(ops.convert_to_tensor([[3.0, 4.0, 0.0, 5.0]]), 2)[0]]
        [0.6, 0.8, 0.0, 1.0]
    """
    return join_books(l2_normalize(split_books(x, n_book)))


def batch_normalize(x, gamma, beta, epsilon, synchronized=True):
    """Normalise every channel by the batch's own mean and variance.

    In a distributed step the batch is that of all replicas.

    In 16 bits TensorFlow's fused kernel, the fastest there is. It adds up the values of a channel one after the other:
    256 images of 32x32 pixels lose five digits of seven on the way (y is wrong by 8e-5), and ReLUs switch. So in
    float32 sums go over each image and then over the images, which keeps six digits; the kernel gets the statistics and
    does the rest. With sums and rest in separate operations this took twice the time, a quarter of SPQ's step.

    Args:
        x: float (B, H, W, channels).
        gamma, beta: float32 (channels,), scale and shift.
        epsilon: float > 0, added to the variance.
        synchronized: bool, whether a distributed step takes the statistics over all replicas.

    Returns:
        y: float (B, H, W, channels), gamma * (x - mean) / sqrt(variance + epsilon) + beta with the population
            variance, in the dtype of `x`.
        mean: float32 (channels,). No gradient flows through it,
        variance: float32 (channels,), nor through this, with Bessel's correction: n / (n - 1) times the population
            variance.

    Example:
        >>> y, mean, variance = batch_normalize(ops.ones((2, 2, 2, 3)), ops.ones(3), ops.zeros(3), 1e-3)
        >>> float(mean[0]), float(variance[0])
        (1.0, 0.0)
    """
    gamma, beta = ops.convert_to_tensor(gamma), ops.convert_to_tensor(beta)
    n_replicas = replicas.count() if synchronized else 1
    is_float32 = keras.backend.standardize_dtype(x.dtype) == "float32"
    if n_replicas == 1 and not is_float32 and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Called directly: tf.nn's wrapper replaces an epsilon of 1e-5 by a larger one.
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=gamma, offset=beta, mean=[], variance=[], epsilon=epsilon, is_training=True
        )
        return y, ops.stop_gradient(mean), ops.stop_gradient(variance)
    if n_replicas > 1:
        normalize = _batch_normalize(epsilon, replicas.mean)
    else:
        normalize = (_with_fused_kernel if _has_fused_kernel() else _batch_normalize)(epsilon)
    # A function with its own gradient takes tensors, not variables.
    y, mean, variance = normalize(ops.cast(x, "float32"), gamma + 0.0, beta + 0.0)
    n = ops.cast(n_replicas * (ops.size(x) // x.shape[-1]), "float32")
    bessel = n / ops.maximum(n - 1.0, 1.0)
    return ops.cast(y, x.dtype), ops.stop_gradient(mean), ops.stop_gradient(variance) * bessel


def _batch_normalize(epsilon, over_replicas=lambda *means: means):
    """(x, gamma, beta) -> (y, mean, population variance), with the gradient written out: half as many passes.

    `over_replicas` makes means over a replica's part of a batch to those over the batch.
    """

    @ops.custom_gradient
    def normalize(x, gamma, beta):
        (mean,) = over_replicas(_channel_means(x))
        centred = x - mean
        (variance,) = over_replicas(_channel_means(ops.square(centred)))
        inverse = ops.rsqrt(variance + epsilon)

        def gradient(*upstream):
            (upstream, *_) = upstream[0] if isinstance(upstream[0], tuple | list) else upstream
            n = ops.cast(ops.size(x) // x.shape[-1], "float32")
            shift, slope = over_replicas(_channel_means(upstream), _channel_means(upstream * centred))
            to_x = gamma * inverse * (upstream - shift - centred * (slope * ops.square(inverse)))
            return to_x, n * slope * inverse, n * shift

        return (centred * (gamma * inverse) + beta, mean, variance), gradient

    return normalize


def _has_fused_kernel():
    """Whether TensorFlow runs on the CPU: on a GPU its kernel takes another figure in the place of the variance."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.config.list_logical_devices("GPU")


def _with_fused_kernel(epsilon):
    """As `_batch_normalize`, on a CPU: all but the statistics, and the whole gradient, in one operation each."""
    import tensorflow as tf

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        mean = _channel_means(x)
        variance = _channel_means(tf.math.squared_difference(x, mean))
        y, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=epsilon, is_training=False
        )

        def gradient(upstream, *_):
            # What it adds up has been centred or changes sign: the sums lose no digits.
            gradients = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream,
                x=x,
                scale=gamma,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=[0.0],
                epsilon=epsilon,
                is_training=True,
            )
            return gradients[:3]

        return (y, mean, variance), gradient

    return normalize


def _channel_means(x):
    return ops.mean(ops.mean(x, axis=(1, 2)), axis=0)


def reverse_gradient(x, scale=1.0):
    """Return `x` unchanged; the gradient that flows back is multiplied by -scale.

    It makes one optimiser play both sides of GPQ's mini-max game: what the losses minimise with respect to the
    prototypes they maximise with respect to the features (GPQ, section 3.3; Ganin and Lempitsky, ICML 2015).

    Args:
        x: float, any shape.
        scale: float, strength of the reversal.

    Returns:
        float, shape and dtype of `x`; equal to `x` up to rounding.

    Example:
        >>> [round(float(v), 3) for v in reverse_gradient(ops.convert_to_tensor([1.0, 2.0]))]
        [1.0, 2.0]
    """
    return ops.stop_gradient(x * (1.0 + scale)) - x * scale


def compiled(function, jit=True):
    """Compile a function of tensors for the backend in use.

    TensorFlow: tf.function, with XLA where `jit`. JAX: jax.jit, which is always XLA. Other backends: as it is.
    The function must read variables only if the backend is TensorFlow; `compiled_call` serves both.

    Args:
        function: callable on tensors, without side effects.
        jit: bool, whether TensorFlow is to use XLA.

    Returns:
        callable with the same arguments and results.

    Example:
        >>> float(compiled(lambda x: x + 1.0)(ops.convert_to_tensor(1.0)))
        2.0
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        # No branch or loop here depends on a tensor's value: AutoGraph would take a third of the tracing for nothing.
        return tf.function(function, jit_compile=jit, autograph=False)
    if backend == "jax":
        import jax

        return jax.jit(function)
    return function


def compiled_call(layer, function, jit=False):
    """Compile `function`, which reads (and does not change) the variables of `layer`.

    Under JAX a compiled function would freeze the values that variables have when it is first called; here they are
    passed in at every call, so weights loaded or trained later are seen.

    Args:
        layer: keras.Layer that owns every variable `function` reads.
        function: callable on tensors.
        jit: bool, whether TensorFlow is to use XLA. Convolutions on a CPU are faster without.

    Returns:
        callable with the arguments and results of `function`.
    """
    if keras.backend.backend() != "jax":
        return compiled(function, jit)

    def with_values(values, *arguments):
        with keras.StatelessScope(state_mapping=list(zip(layer.variables, values, strict=True))):
            return function(*arguments)

    stateless = compiled(with_values)
    return lambda *arguments: stateless([variable.value for variable in layer.variables], *arguments)


def frozen_call(layer, function):
    """Compile `function` with the present values of the variables of `layer` as constants.

    What depends on weights alone, such as kernels times the factors of batch normalisation, is then computed once and
    not in every call, and oneDNN keeps kernels in its own order. That is two fifths of a single image's way through
    ResNet-50. Batches of 32 in bfloat16 take three times as long: TensorFlow then joins operations that it had better
    not.

    Args:
        layer: keras.Layer that owns every variable `function` reads.
        function: callable on tensors.

    Returns:
        callable with the arguments and results of `function`, which later changes of the variables do not reach.

    Example:
        >>> dense = keras.layers.Dense(1, kernel_initializer="ones")
        >>> dense.build((None, 2))
        >>> frozen = frozen_call(dense, dense.call)
        >>> _ = dense.kernel.assign([[0.0], [0.0]])
        >>> float(frozen(ops.ones((1, 2)))[0, 0])
        2.0
    """
    values = [ops.convert_to_numpy(variable) for variable in layer.variables]

    def with_constants(*arguments):
        # Made into tensors in here, or they would be arguments of the compiled function.
        constants = [ops.convert_to_tensor(value) for value in values]
        with keras.StatelessScope(state_mapping=list(zip(layer.variables, constants, strict=True))):
            return function(*arguments)

    return compiled(with_constants, jit=False)
