"""The published losses, one plain function each. All are means over the batch, without weights or temperatures."""

import numpy as np
from keras import ops

from gpq_tf.ops import l2_normalize, split_books


def n_pair_product_quantization(label_similarity, x, q, n_book, l2_weight=0.002):
    """N-pair product quantization loss: descriptors and quantized descriptors of one class attract each other.

    GPQ, section 3.2, equation 5: cross-entropy between the rows of `label_similarity` and softmax(M * cos(x_i, q_j)),
    plus l2_weight / 4 times the mean squared length of `x` and of `q`. No gradient flows to the labels.

    Args:
        label_similarity: float (B, B), 1 where two images share a class, each row divided by its sum.
        x: float (B, D), descriptors.
        q: float (B, D), the same, softly quantized.
        n_book: int M, the scale of the similarities.
        l2_weight: float, weight of the squared lengths; the original's factor 1/4 comes on top.

    Returns:
        float scalar.

    Raises:
        ValueError: if the shapes do not fit each other.

    Example:
        >>> x = ops.eye(2)
        >>> round(float(n_pair_product_quantization(ops.eye(2), x, x, n_book=2)), 4)
        0.1279
    """
    x, q = ops.convert_to_tensor(x), ops.convert_to_tensor(q)
    _same_shape("q", q, "x", x)
    squared_lengths = _mean_squared_length(x) + _mean_squared_length(q)
    similarities = n_book * ops.matmul(l2_normalize(x), ops.transpose(l2_normalize(q)))
    return _cross_entropy(label_similarity, similarities) + 0.25 * l2_weight * squared_lengths


def classification(labels_onehot, logits):
    """Softmax cross-entropy (GPQ, section 3.2, equation 6). No gradient flows to the labels.

    Args:
        labels_onehot: float (B, C), rows that sum to 1.
        logits: float (B, C).

    Returns:
        float scalar.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(float(classification(ops.eye(2), ops.zeros((2, 2)))), 4)
        0.6931
    """
    return _cross_entropy(labels_onehot, ops.convert_to_tensor(logits))


def subspace_entropy(x, prototypes, n_book):
    """Negative entropy of the mean of the sub-spaces' similarities to the class prototypes.

    GPQ, section 3.3, equation 8: sum_c p_c log(p_c + 1e-5) with p = softmax(mean_j <x_j, prototype_cj>), averaged over
    the batch. Minimised, it makes the assignment uncertain; with `ops.reverse_gradient` before `x` the features are
    trained for the opposite.

    Args:
        x: float (B, D).
        prototypes: float (C, D).
        n_book: int M, divides D.

    Returns:
        float scalar, between -log C and 0 (up to the 1e-5).

    Raises:
        ValueError: if D differs or n_book does not divide it.

    Example:
        >>> round(float(subspace_entropy(ops.zeros((1, 4)), ops.ones((2, 4)), n_book=2)), 4)
        -0.6931
    """
    p = ops.softmax(mean_book_similarity(x, prototypes, n_book), axis=-1)
    return ops.mean(ops.sum(p * ops.log(p + 1e-5), axis=-1))


def cross_quantized_contrastive(x_a, x_b, z_a, z_b, temperature=0.5):
    """Cross quantized contrastive loss: a view's descriptor is to find the other view's quantized descriptor.

    SPQ (ICCV 2021), section 3.2, equations 4 and 5: with the 2B rows u = (x_a, z_b) and s_ij = cos(u_i, u_j) /
    temperature, the mean over the rows of log sum_{j != i} exp(s_ij) - s_ip, where p is the row's own image in the
    other half; and the same for (x_b, z_a). The other rows, descriptors and quantized ones alike, are the negatives.

    Args:
        x_a, x_b: float (B, D), descriptors of two views of the same B images.
        z_a, z_b: float (B, D), the same, softly quantized.
        temperature: float > 0.

    Returns:
        float scalar: 2 log(2B - 1) where all cosines are equal.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> x = ops.ones((2, 4))
        >>> round(float(cross_quantized_contrastive(x, x, x, x)), 4)  # 2 log 3
        2.1972
    """
    x_a, x_b, z_a, z_b = (ops.convert_to_tensor(x) for x in (x_a, x_b, z_a, z_b))
    for name, x in {"x_b": x_b, "z_a": z_a, "z_b": z_b}.items():
        _same_shape(name, x, "x_a", x_a)
    return _contrast(x_a, z_b, temperature) + _contrast(x_b, z_a, temperature)


def mean_book_similarity(x, prototypes, n_book):
    """Mean over the books of the inner products with the class prototypes: the logits of GPQ's classifier.

    Args:
        x: float (B, D).
        prototypes: float (C, D).
        n_book: int M, divides D.

    Returns:
        float (B, C).

    Raises:
        ValueError: if D differs or n_book does not divide it.

    Example:
        >>> float(mean_book_similarity(ops.ones((1, 4)), ops.ones((1, 4)), n_book=2)[0, 0])
        2.0
    """
    x, prototypes = ops.convert_to_tensor(x), ops.convert_to_tensor(prototypes)
    split_books(prototypes, n_book)  # checks n_book
    if x.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            f"Invalid prototypes. Expected (C, {x.shape[-1]}), as long as the descriptors. "
            f"Received: shape {tuple(prototypes.shape)}"
        )
    # mean over j of dot(x[b, j], prototypes[c, j]): the sum over the books is the whole inner product
    return ops.matmul(x, ops.transpose(prototypes)) / n_book


def _cross_entropy(targets, logits):
    targets = ops.cast(targets, logits.dtype)
    _same_shape("labels", targets, "logits", logits)
    return -ops.mean(ops.sum(ops.stop_gradient(targets) * ops.log_softmax(logits, axis=-1), axis=-1))


def _contrast(first, second, temperature):
    """Mean over the 2B rows of (first, second): how surely a row picks its partner among all other rows."""
    # Lengths are bounded by 1e-8 as PyTorch's cosine similarity bounds them.
    rows = l2_normalize(ops.concatenate([first, second]), smallest=1e-16)
    n = ops.shape(rows)[0]
    similarities = ops.matmul(rows, ops.transpose(rows)) / temperature
    partners = ops.roll(ops.arange(n), n // 2)
    positives = ops.sum(rows * ops.take(rows, partners, axis=0), axis=-1) / temperature
    # A row is not among those it chooses from.
    others = ops.where(ops.eye(n, dtype="bool"), -np.inf, similarities)
    return ops.mean(ops.logsumexp(others, axis=-1) - positives)


def _mean_squared_length(x):
    return ops.mean(ops.sum(ops.square(x), axis=-1))


def _same_shape(name, value, other_name, other):
    if tuple(value.shape) != tuple(other.shape):
        raise ValueError(
            f"Invalid {name}. Expected the shape of {other_name}, {tuple(other.shape)}. "
            f"Received: shape {tuple(value.shape)}"
        )
