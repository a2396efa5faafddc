"""Recall@k among embeddings, as metric learning publishes it."""

import numpy as np

from gpq_tf.metrics.checks import checked_ranks
from gpq_tf.metrics.relevance import relevance

_BLOCK_ENTRIES = 2**24  # float32 distances held at a time, 64 MiB
_EXACT_ENTRIES = 2**20  # float64 components recomputed at a time, 8 MiB


def recall_at_k(embeddings, labels, ks=(1, 2, 4, 8), *, similarity=None):
    """Share of the embeddings that have one of their own class among their k nearest others.

    The protocol of CGD (Jun et al., "Combination of Multiple Global Descriptors for Image Retrieval", 2019) and of
    metric learning at large: every embedding queries all the others by Euclidean distance. One whose class has no
    other member is a miss, and stays in the mean. Equally far embeddings rank in their given order, where the original
    leaves it to chance.

    No list is sorted: query q hits at k exactly if its nearest relevant embedding, at distance d, has fewer than k
    others before it. Those are counted from float32 matrix products of what the embeddings differ from their mean by,
    which keeps the digits of embeddings that are nearly alike; the few that lie within rounding of d are measured
    again, one by one in float64, so that equal embeddings are equally far.

    Args:
        embeddings: float (N, D), finite; compared as float32.
        labels: (N,) classes; or (N, C) of 0 and 1, where embeddings that share a label belong together.
        ks: ints >= 1; more than N - 1 means all others.
        similarity: (N, N) of 0 and 1, dense or scipy.sparse: who belongs together, row by row. With it labels is None.

    Returns:
        dict of k -> float, in [0, 1].

    Raises:
        ValueError: if embeddings is not (N, D) with N at least 1, or holds NaN, infinity or values whose squared
            distances overflow float32 (the row is named), `ks` is empty or holds anything but positive integers, or
            labels or similarity do not fit.

    Example:
        >>> recall_at_k([[0.0], [1.0], [3.0], [7.0]], ["cat", "dog", "cat", "dog"], ks=(1, 2))
        {1: 0.0, 2: 0.75}
    """
    embeddings = _checked(embeddings)
    ks = checked_ranks("ks", ks)
    relevant_to = relevance(labels, labels, similarity, (len(embeddings), len(embeddings)))
    ranks = np.concatenate(list(_first_hits(embeddings, relevant_to)))
    return {k: float(np.mean(ranks <= k)) for k in ks.tolist()}


def _first_hits(embeddings, relevant_to):
    """For block after block of embeddings, the rank of each one's nearest relevant other; inf where there is none."""
    n, dimension = embeddings.shape
    size = max(1, min(n, _BLOCK_ENTRIES // n))
    # Distances stay what they are when all embeddings move by the same: from their mean, the shortest on the whole.
    centred = embeddings - embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    squares = np.einsum("nd,nd->n", centred, centred, dtype=np.float64)
    lengths = np.sqrt(squares)
    # |computed - true| <= (D + 12) u (|q| + |x|)^2 with u = 2^-24: the dot product's error bound (Higham, "Accuracy and
    # Stability of Numerical Algorithms", section 3.1), the rounding of the differences from the mean (each by u of
    # itself) and six more; the last term is for underflow.
    tolerance = (dimension + 12) * 2.0**-24 * (lengths + lengths.max()) ** 2 + np.finfo(np.float32).tiny
    squares = squares.astype(np.float32)
    for start in range(0, n, size):
        rows = np.arange(start, min(start + size, n))
        distances = centred[rows] @ centred.T
        distances *= -2
        distances += squares[rows, None]
        distances += squares
        yield [_first_hit(embeddings, row, distances[row - start], tolerance[row], relevant_to(row)) for row in rows]


def _first_hit(embeddings, row, distances, tolerance, relevant):
    relevant = relevant[relevant != row]
    if len(relevant) == 0:
        return np.inf
    distances[row] = np.inf  # not among its own neighbours
    about = distances[relevant].min()
    nearer = np.count_nonzero(distances < about - 2 * tolerance)
    unsure = np.flatnonzero((distances >= about - 2 * tolerance) & (distances <= about + 2 * tolerance))
    exact = squared_distances(embeddings[row], embeddings, unsure)
    candidates = np.isin(unsure, relevant)
    nearest = exact[candidates].min()
    first = unsure[candidates & (exact == nearest)][0]
    return 1 + nearer + np.count_nonzero((exact < nearest) | ((exact == nearest) & (unsure < first)))


def squared_distances(query, embeddings, rows):
    """Squared Euclidean distances in float64, each summed in the same order: equal embeddings are equally far.

    Args:
        query: float (D,).
        embeddings: float (N, D).
        rows: integers (n,), those to be measured.

    Returns:
        float64 (n,).

    Example:
        >>> squared_distances(np.ones(2), np.eye(2), [0]).tolist()
        [1.0]
    """
    size = max(1, _EXACT_ENTRIES // embeddings.shape[1])
    query = np.float64(query)
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return np.concatenate([np.sum((embeddings[part] - query) ** 2, axis=1) for part in parts])


def _checked(embeddings):
    """float32 (N, D), whose squared distances fit float32."""
    with np.errstate(over="ignore"):  # float64 values above float32's become inf and are refused below
        embeddings = np.asarray(embeddings, np.float32)
    if embeddings.ndim != 2 or embeddings.size == 0:
        raise ValueError(f"Invalid embeddings. Expected shape (N, D), not empty. Received: shape {embeddings.shape}")
    squares = np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64)
    # Taken from their mean they are at most twice as long; (|q| + |x|)^2 and what leads to it are to stay finite.
    fits = squares < np.finfo(np.float32).max / 32
    if not fits.all():
        raise ValueError(
            "Invalid embeddings. Expected finite values whose squared distances fit float32. "
            f"Received: others in row {fits.argmin()}"
        )
    return embeddings
