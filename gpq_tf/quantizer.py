"""Product quantization with a learned codebook: soft assignment (for training), hard assignment (codes), decoding."""

import keras
from keras import ops

from gpq_tf.ops import compiled, join_books, l2_normalize, split_books

# Scores that differ by less than this, relative to the lengths of the two vectors, are equal up to float32 rounding.
_ROUNDING = 1e-6


def soft_assign(x, codebook, alpha):
    """Replace each sub-vector by a softmax-weighted mean of its book's codewords.

    GPQ, section 3.1, equation 1: z_j = sum_k softmax_k(alpha <x_j, c_jk>) c_jk, then each z_j is scaled to unit length.
    Neither the input nor the codebook is normalised here.

    Args:
        x: float (B, M * d), descriptors, as a rule with sub-vectors of unit length.
        codebook: float (M, K, d).
        alpha: float > 0, inverse temperature; larger is closer to `hard_assign`.

    Returns:
        float (B, M * d), in the dtype that `x` and `codebook` promote to.

    Raises:
        ValueError: if M * d differs between `x` and `codebook`.

    Example:
        >>> import numpy as np
        >>> codebook = np.array([[[1.0, 0.0], [0.0, 1.0]]], "float32")
        >>> [round(float(v), 3) for v in soft_assign(np.array([[0.6, 0.8]], "float32"), codebook, alpha=20.0)[0]]
        [0.018, 1.0]
    """
    # for b, j: w = softmax([alpha * dot(x[b, j], codebook[j, k]) for k]); z[b, j] = unit(sum(w[k] * codebook[j, k]))
    sub_vectors = _sub_vectors(x, codebook)
    weights = ops.softmax(alpha * ops.einsum("bmd,mkd->bmk", sub_vectors, codebook), axis=-1)
    return join_books(l2_normalize(ops.einsum("bmk,mkd->bmd", weights, codebook)))


def soft_assign_l2(x, codebook, alpha):
    """Replace each sub-vector by a mean of its book's codewords, weighted by how near they are.

    SPQ (ICCV 2021), section 3.1, equation 2: z_j = sum_k softmax_k(-alpha ||x_j - c_jk||^2) c_jk. The paper's
    temperature 0.2 divides, so alpha is its inverse, 5. Neither input nor result is normalised.

    Args:
        x: float (B, M * d), descriptors.
        codebook: float (M, K, d).
        alpha: float > 0, inverse temperature; larger is closer to `hard_assign` by "l2".

    Returns:
        float (B, M * d), in the dtype that `x` and `codebook` promote to.

    Raises:
        ValueError: if M * d differs between `x` and `codebook`.

    Example:
        >>> import numpy as np
        >>> codebook = np.array([[[1.0, 0.0], [0.0, 1.0]]], "float32")
        >>> [round(float(v), 3) for v in soft_assign_l2(np.array([[0.6, 0.8]], "float32"), codebook, alpha=5.0)[0]]
        [0.119, 0.881]
    """
    # for b, j: w = softmax([-alpha * norm(x[b, j] - codebook[j, k])**2 for k]); z[b, j] = sum(w[k] * codebook[j, k])
    sub_vectors = _sub_vectors(x, codebook)
    products = ops.einsum("bmd,mkd->bmk", sub_vectors, codebook)
    # ||x||^2 is the same for every codeword: the softmax does not see it
    weights = ops.softmax(alpha * (2 * products - ops.sum(ops.square(codebook), axis=-1)), axis=-1)
    return join_books(ops.einsum("bmk,mkd->bmd", weights, codebook))


def hard_assign(x, codebook, metric="cosine"):
    """The nearest codeword of every book (GPQ, section 3.4; the lowest index wins ties, up to float32 rounding).

    Args:
        x: float (B, M * d).
        codebook: float (M, K, d).
        metric: "cosine", the largest inner product with the codeword scaled to unit length (the length of the
            sub-vector plays no part), or "l2", the smallest Euclidean distance.

    Returns:
        int32 (B, M), codes between 0 and K - 1.

    Raises:
        ValueError: if M * d differs between `x` and `codebook`, or the metric is another.

    Example:
        >>> import numpy as np
        >>> codebook = np.array([[[9.0, 0.0], [0.0, 1.0]]], "float32")
        >>> int(hard_assign(np.array([[0.6, 0.8]], "float32"), codebook)[0, 0])
        1
    """
    sub_vectors = _sub_vectors(x, codebook)
    lengths = _lengths(sub_vectors)[..., None]
    if metric == "cosine":
        scores = ops.einsum("bmd,mkd->bmk", sub_vectors, l2_normalize(codebook))
        rounding = _ROUNDING * lengths
    elif metric == "l2":
        # -||x - c||^2 / 2 without ||x||^2 / 2, which is the same for every codeword
        word_lengths = _lengths(codebook)
        scores = ops.einsum("bmd,mkd->bmk", sub_vectors, codebook) - ops.square(word_lengths) / 2
        rounding = _ROUNDING * word_lengths * (lengths + word_lengths)
    else:
        raise ValueError(f'Invalid metric. Expected "cosine" or "l2". Received: metric={metric!r}')
    # argmax over k, but a matrix product may treat its last columns differently: the scores of two equal codewords can
    # differ in the last place, and then the first of them is still to win.
    worse = scores + rounding < ops.max(scores, axis=-1, keepdims=True)
    n_word = codebook.shape[1]
    return ops.min(ops.where(worse, n_word - 1, ops.arange(n_word, dtype="int32")), axis=-1)


def decode(codes, codebook):
    """Put each code's codewords side by side.

    Args:
        codes: integer (B, M), values between 0 and K - 1.
        codebook: float (M, K, d).

    Returns:
        float (B, M * d), in the dtype of `codebook`.

    Raises:
        ValueError: if the number of books differs.

    Example:
        >>> import numpy as np
        >>> codebook = np.array([[[9.0, 0.0], [0.0, 1.0]]], "float32")
        >>> [float(v) for v in decode(np.array([[1]]), codebook)[0]]
        [0.0, 1.0]
    """
    n_book, n_word, length = codebook.shape
    if codes.shape[-1] != n_book:
        raise ValueError(
            f"Invalid codes. Expected (B, {n_book}), one column per book. Received: shape {tuple(codes.shape)}"
        )
    # out[b, j] = codebook[j, codes[b, j]]: one look-up in the books laid end to end
    rows = ops.cast(codes, "int32") + n_word * ops.arange(n_book, dtype="int32")
    return join_books(ops.take(ops.reshape(codebook, (n_book * n_word, length)), rows, axis=0))


def _lengths(vectors):
    return ops.sqrt(ops.sum(ops.square(vectors), axis=-1))


def _sub_vectors(x, codebook):
    n_book, _, length = codebook.shape
    if x.shape[-1] != n_book * length:
        raise ValueError(
            f"Invalid x. Expected (B, {n_book * length}) for a codebook of {n_book} books with codewords of length "
            f"{length}. Received: shape {tuple(x.shape)}"
        )
    return split_books(x, n_book)


_SOFT_ASSIGN = {"cosine": soft_assign, "l2": soft_assign_l2}


@keras.saving.register_keras_serializable("gpq_tf")
class ProductQuantizer(keras.layers.Layer):
    """The codebook as a layer: a trainable variable (M, K, d) and the functions above, compiled by XLA.

    Args:
        n_book: int M.
        n_word: int K, codewords a book.
        len_code: int d, length of a codeword.
        seed: int, of the initial values, which are uniform.
        limit: float, the largest of them; None for Glorot's of a (K, M * d) matrix, as the originals of GPQ and SPQ
            draw them.
        metric: "cosine" for GPQ (`soft_assign`, `hard_assign`), "l2" for SPQ (`soft_assign_l2`, `hard_assign` by "l2").

    Raises:
        ValueError: if a size is not a positive integer, or the metric is another.

    Example:
        >>> quantizer = ProductQuantizer(n_book=3, n_word=4, len_code=2)
        >>> quantizer.encode(ops.ones((5, 6))).shape == (5, 3)
        True
    """

    def __init__(self, n_book, n_word, len_code, seed=0, metric="cosine", limit=None, **kwargs):
        super().__init__(**kwargs)
        if metric not in _SOFT_ASSIGN:
            raise ValueError(f'Invalid metric. Expected "cosine" or "l2". Received: metric={metric!r}')
        for name, size in {"n_book": n_book, "n_word": n_word, "len_code": len_code}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"Invalid {name}. Expected a positive integer. Received: {name}={size!r}")
        self.n_book, self.n_word, self.len_code, self.seed, self.metric = n_book, n_word, len_code, seed, metric
        self.limit = limit
        limit = (6.0 / (n_word + n_book * len_code)) ** 0.5 if limit is None else limit
        self.codebook = self.add_weight(
            name="codebook",
            shape=(n_book, n_word, len_code),
            initializer=keras.initializers.RandomUniform(-limit, limit, seed=seed),
            dtype="float32",
            autocast=False,  # distances between near codewords do not survive 16 bits
        )
        self.built = True
        # Compiled once: the codebook is an argument, so that its present value is used.
        self._hard_assign = compiled(lambda x, codebook: hard_assign(x, codebook, metric))
        self._soft_assign = compiled(_SOFT_ASSIGN[metric])
        self._decode = compiled(decode)

    def encode(self, x):
        """float (B, M * d) -> int32 codes (B, M); see `hard_assign`."""
        return self._hard_assign(x, self.codebook.value)

    def decode(self, codes):
        """integer codes (B, M) -> float (B, M * d); see `decode`."""
        return self._decode(codes, self.codebook.value)

    def call(self, x, alpha=20.0):
        """float (B, M * d) -> float (B, M * d), softly quantized; see `soft_assign`, `soft_assign_l2`."""
        return self._soft_assign(x, self.codebook.value, alpha)

    def get_config(self):
        sizes = {"n_book": self.n_book, "n_word": self.n_word, "len_code": self.len_code}
        return {**super().get_config(), **sizes, "seed": self.seed, "metric": self.metric, "limit": self.limit}
