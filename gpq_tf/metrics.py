"""How good a ranking is: average precision and its mean over queries; how well the codes use their codebook."""

import numpy as np

from gpq_tf.index import stable_argsort


def average_precision(ranked_relevance, top_n=None):
    """Average precision of ranked answers.

    AP = sum_r P(r) rel(r) / sum_r rel(r) over the ranks r = 1 .. top_n, with P(r) the share of relevant
    answers among the first r. The denominator is the number of relevant answers found within top_n, not of
    all there are, as GPQ and SPQ publish. Without any, AP is 0.

    Args:
        ranked_relevance: bool (Q, N), whether the answer at each rank is relevant, best first.
        top_n: int >= 1, ranks that count; None, or more than N, means all.

    Returns:
        float64 (Q,), in [0, 1].

    Raises:
        ValueError: if `ranked_relevance` is not (Q, N) of 0 and 1, or top_n is not a positive integer.

    Example:
        >>> average_precision([[True, False, True], [False, False, False]])
        array([0.83333333, 0.        ])
    """
    relevance = _zeros_and_ones("ranked_relevance", np.asarray(ranked_relevance))
    if relevance.ndim != 2:
        raise ValueError(f"Invalid ranked_relevance. Expected shape (Q, N). Received: shape {relevance.shape}")
    _check_top_n(top_n)
    return np.array([_average_precision(row, top_n) for row in relevance], np.float64)


def mean_average_precision(queries, query_labels, index, gallery_labels, top_n=None, *, similarity=None):
    """Mean over the queries of `average_precision` when the codes of an index are ranked by distance.

    Equal distances rank in insertion order, so that the figure can be reproduced.

    Args:
        queries: float (Q, D), as for `PQIndex.search`.
        query_labels: (Q,) classes; or (Q, C) of 0 and 1, where a code is relevant if it shares a label.
        index: PQIndex of N codes.
        gallery_labels: (N,) or (N, C); gallery_labels[i] belongs to the i-th living code in insertion order.
        top_n: int >= 1, ranks that count; None means all.
        similarity: (Q, N) of 0 and 1, dense or scipy.sparse: what is relevant to whom. With it both label
            arguments are None.

    Returns:
        float, in [0, 1].

    Raises:
        ValueError: if a shape does not fit, there is no query, or labels and similarity are both or neither
            given, or a value is neither 0 nor 1 where only these are expected, or as in `PQIndex.search`.

    Example:
        >>> from gpq_tf.index import PQIndex
        >>> index = PQIndex([[[1.0], [0.0], [-1.0]]])
        >>> index.add([[0], [1], [2]])
        >>> mean_average_precision([[1.0]], ["cat"], index, ["cat", "dog", "cat"])
        0.8333333333333333
    """
    _check_top_n(top_n)
    queries = index.checked_queries(queries)
    if len(queries) == 0:
        raise ValueError("Invalid queries. Expected at least one. Received: none")
    relevance_of = _relevance(query_labels, gallery_labels, similarity, (len(queries), len(index)))
    snapshot = index.snapshot()

    def block(rows, distances):
        return [
            _average_precision(relevance_of(query)[stable_argsort(to_distinct[snapshot.inverse])], top_n)
            for query, to_distinct in zip(range(rows.start, rows.stop), distances, strict=True)
        ]

    return float(np.mean(np.concatenate(snapshot.map_distances(block, queries))))


def codebook_usage(codes, n_word):
    """How many codewords of each book a gallery uses, and how evenly.

    Args:
        codes: integer (N, M), N at least 1.
        n_word: int K.

    Returns:
        dict of name -> (M,): used, int64, codewords that occur; entropy, float64, in bits: log2(K) where all occur
        equally often, 0 where one takes all.

    Raises:
        ValueError: if `codes` is not (N, M) of integers below n_word, or is empty.

    Example:
        >>> usage = codebook_usage([[0, 1], [1, 1], [2, 1], [3, 1]], n_word=4)
        >>> usage["used"], usage["entropy"]
        (array([4, 1]), array([2., 0.]))
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or codes.size == 0:
        raise ValueError(f"Invalid codes. Expected integers (N, M). Received: {codes.dtype} of shape {codes.shape}")
    if codes.min() < 0 or codes.max() >= n_word:
        raise ValueError(f"Invalid codes. Expected 0 to {n_word - 1}. Received: {codes.min()} to {codes.max()}")
    shares = np.stack([np.bincount(book, minlength=n_word) for book in codes.T]) / len(codes)  # (M, K)
    surprise = -np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return {"used": np.count_nonzero(shares, axis=1), "entropy": np.sum(shares * surprise, axis=1)}


def _average_precision(relevance, top_n):
    ranks = np.flatnonzero(relevance[:top_n]) + 1
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks)) if len(ranks) else 0.0


def _relevance(query_labels, gallery_labels, similarity, shape):
    """A function: query number -> bool (N,), what is relevant to it. Q x N may be too large to hold."""
    if similarity is not None:
        if query_labels is not None or gallery_labels is not None:
            raise ValueError("Invalid similarity. Expected labels or a similarity matrix. Received: both")
        return _relevance_from_similarity(similarity, shape)
    if query_labels is None or gallery_labels is None:
        raise ValueError("Invalid labels. Expected labels of queries and gallery. Received: None")
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    for name, labels, n in (("query", query_labels, shape[0]), ("gallery", gallery_labels, shape[1])):
        if labels.ndim not in (1, 2) or len(labels) != n:
            raise ValueError(
                f"Invalid {name}_labels. Expected shape ({n},) or ({n}, C). Received: shape {labels.shape}"
            )
    if query_labels.shape[1:] != gallery_labels.shape[1:]:
        raise ValueError(
            "Invalid labels. Expected (Q,) and (N,), or (Q, C) and (N, C). "
            f"Received: shapes {query_labels.shape} and {gallery_labels.shape}"
        )
    if query_labels.ndim == 1:
        return lambda query: gallery_labels == query_labels[query]
    query_labels = _zeros_and_ones("query_labels", query_labels)
    by_label = np.ascontiguousarray(_zeros_and_ones("gallery_labels", gallery_labels).T)  # (C, N)
    return lambda query: by_label[query_labels[query]].any(axis=0)


def _relevance_from_similarity(similarity, shape):
    if not hasattr(similarity, "tocsr"):
        similarity = np.asarray(similarity)
    if similarity.shape != shape:
        raise ValueError(f"Invalid similarity. Expected shape {shape}. Received: shape {similarity.shape}")
    if isinstance(similarity, np.ndarray):
        return lambda query: _zeros_and_ones("similarity", similarity[query])
    rows = similarity.tocsr()

    def relevance(query):
        stored = slice(rows.indptr[query], rows.indptr[query + 1])
        relevant = np.zeros(shape[1], bool)
        relevant[rows.indices[stored]] = _zeros_and_ones("similarity", rows.data[stored])
        return relevant

    return relevance


def _zeros_and_ones(name, values):
    if values.dtype == bool:
        return values
    ones = values == 1
    if not (ones | (values == 0)).all():
        raise ValueError(f"Invalid {name}. Expected only 0 and 1. Received: other values")
    return ones


def _check_top_n(top_n):
    if top_n is None:
        return
    if not isinstance(top_n, int | np.integer) or isinstance(top_n, bool) or top_n < 1:
        raise ValueError(f"Invalid top_n. Expected a positive integer or None. Received: top_n={top_n!r}")
