"""The published losses, one plain function each, and what they are made of. Heads weigh one against another."""

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
    # `slope` is the derivative of p log(p + 1e-5) less a 1 that no gradient sees, because p sums to 1: where one class
    # has it all, rounding of that 1 would be multiplied by a descriptor that may be ten thousand long.
    remainder = 1e-5 / (p + 1e-5)
    slope = ops.log(p + 1e-5) - remainder
    return ops.mean(ops.sum(p * ops.stop_gradient(slope) + ops.stop_gradient(p * remainder), axis=-1))


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


def classification_smoothed(labels, logits, temperature=0.5, smoothing=0.1):
    """Softmax cross-entropy of logits / temperature with smoothed labels: CGD's auxiliary loss.

    CGD (arXiv 1903.10663), section 3.3, equation 4. The target is 1 - smoothing + smoothing / C for the image's class
    and smoothing / C for each other one, the usual definition (Szegedy et al., CVPR 2016); the paper does not say which
    it means. MXNet's SoftmaxOutput has 1 - smoothing and smoothing / (C - 1): the same as this function with
    smoothing * C / (C - 1).

    Args:
        labels: int (B,), 0 to C - 1, which is not checked: another label has no class, and no error.
        logits: float (B, C).
        temperature: float > 0, divides the logits.
        smoothing: float, 0 for labels as they are.

    Returns:
        float scalar.

    Raises:
        ValueError: if the numbers of labels and of logits differ.

    Example:
        >>> logits = ops.convert_to_tensor([[1.0, 0.0]])
        >>> round(float(classification_smoothed([0], logits, temperature=0.5, smoothing=0.1)), 4)
        0.2269
    """
    logits = ops.convert_to_tensor(logits)
    n_classes = logits.shape[-1]
    targets = (1.0 - smoothing) * ops.one_hot(labels, n_classes, dtype=logits.dtype) + smoothing / n_classes
    return _cross_entropy(targets, logits / temperature)


def batch_hard_triplet(embeddings, labels, margin=0.1, squared=False):
    """Batch-hard triplet loss: the mean over the batch of `batch_hard_hinges`.

    Args:
        embeddings, labels, margin, squared: see `batch_hard_hinges`.

    Returns:
        float scalar.

    Example:
        >>> x = ops.convert_to_tensor([[0.0], [0.2], [0.3]])
        >>> round(float(batch_hard_triplet(x, [0, 0, 1])), 4)  # of 0, .2 and 0
        0.0667
    """
    return ops.mean(batch_hard_hinges(embeddings, labels, margin, squared))


def batch_hard_hinges(embeddings, labels, margin=0.1, squared=False, others=None):
    """max(0, hardest positive - hardest negative + margin) of each image of a batch (see `hardest_pairs`).

    Hermans, Beyer and Leibe (arXiv 1703.07737), equation 5; CGD (arXiv 1903.10663), section 3.2, ranks by its mean. The
    share of those above 0 tells how much is left to learn from.

    Args:
        embeddings: float (B, D).
        labels: int (B,).
        margin: float.
        squared: bool, squared distances instead of distances.
        others: float (B, D) or None, see `hardest_pairs`.

    Returns:
        float (B,). 0 for an image without a negative.

    Raises:
        ValueError: if the numbers of embeddings and labels differ.

    Example:
        >>> x = ops.convert_to_tensor([[0.0], [0.2], [0.3]])
        >>> [round(float(v), 3) for v in batch_hard_hinges(x, [0, 0, 1])]
        [0.0, 0.2, 0.0]
    """
    positive, negative, _, _ = hardest_pairs(embeddings, labels, squared, others)
    return ops.relu(positive - negative + margin)


def hardest_pairs(embeddings, labels, squared=False, others=None):
    """The farthest other image of the same class and the nearest image of another, for each image of a batch.

    Which pairs those are is found by inner products, the fast way; their distances are then taken from the
    differences, so that neither cancellation nor a processor's short products (TF32) reach the values.

    Args:
        embeddings: float (B, D).
        labels: int (B,).
        squared: bool, squared distances instead of distances.
        others: float (B, D), what each image is to the other ones as a positive or a negative, such as its quantized
            descriptor; None for its embedding.

    Returns:
        positive: float (B,), distance of the hardest positive, 0 for an image alone in its class (the distance to its
            own row of `others`, if given). The gradient of a distance of 0 is 0.
        negative: float (B,), distance of the hardest negative, infinite where all images are of one class.
        positive_index, negative_index: int32 (B,), their places in the batch; an image alone in its class is its own
            positive, and negative_index means nothing where there is no negative.

    Raises:
        ValueError: if the numbers of embeddings and labels differ, or the shapes of embeddings and others.

    Example:
        >>> positive, _, _, negative_index = hardest_pairs(ops.convert_to_tensor([[0.0], [0.2], [0.3]]), [0, 0, 1])
        >>> [round(float(v), 3) for v in positive], [int(v) for v in negative_index]
        ([0.2, 0.2, 0.0], [2, 2, 1])
    """
    embeddings, labels = ops.convert_to_tensor(embeddings), ops.convert_to_tensor(labels)
    others = embeddings if others is None else ops.convert_to_tensor(others)
    _same_shape("labels", labels, "the embeddings' first axis", embeddings[:, 0])
    _same_shape("others", others, "the embeddings", embeddings)
    # About their mean, or the distances of descriptors that are nearly alike would drown in the rounding of products.
    mean = ops.stop_gradient(ops.mean(embeddings, axis=0))
    rows, columns = ops.stop_gradient(embeddings) - mean, ops.stop_gradient(others) - mean
    # ||x_i - y_j||^2 without ||x_i||^2, which is the same for every j, made positive
    distances = ops.sum(ops.square(columns), axis=-1) - 2 * ops.matmul(rows, ops.transpose(columns))
    distances = distances - ops.min(distances)
    same = labels[:, None] == labels
    self_last = ops.where(ops.eye(ops.shape(rows)[0], dtype="bool"), -1.0, distances)
    positive_index = ops.argmax(ops.where(same, self_last, -2.0), axis=1)
    negative_index = ops.argmin(ops.where(same, np.inf, distances), axis=1)
    positive = _distances(embeddings, ops.take(others, positive_index, axis=0), squared)
    negative = _distances(embeddings, ops.take(others, negative_index, axis=0), squared)
    negative = ops.where(ops.all(same, axis=1), np.inf, negative)
    return positive, negative, positive_index, negative_index


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


def _distances(x, y, squared):
    """Between the rows of x and y. The root's slope at 0, which is infinite, is taken as 0."""
    squares = ops.sum(ops.square(x - y), axis=-1)
    if squared:
        return squares
    alike = squares <= 0  # what is not a number stays so
    return ops.where(alike, 0.0, ops.sqrt(ops.where(alike, 1.0, squares)))


def _mean_squared_length(x):
    return ops.mean(ops.sum(ops.square(x), axis=-1))


def _same_shape(name, value, other_name, other):
    if tuple(value.shape) != tuple(other.shape):
        raise ValueError(
            f"Invalid {name}. Expected the shape of {other_name}, {tuple(other.shape)}. "
            f"Received: shape {tuple(value.shape)}"
        )
