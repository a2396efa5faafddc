"""What is relevant to whom: from classes, multi-hot labels or a similarity matrix."""

import functools

import numpy as np


def relevance(query_labels, gallery_labels, similarity, shape, order=None):
    """A function: query number -> ascending intp (R,), the places of the codes that are relevant to it.

    Only one row is made at a time: the whole Q x N matrix may be too large to hold.

    Args:
        query_labels: (Q,) classes, or (Q, C) of 0 and 1, where a code is relevant if it shares a label.
        gallery_labels: (N,) or (N, C).
        similarity: (Q, N) of 0 and 1, dense or scipy.sparse, instead of both labels.
        shape: (Q, N).
        order: intp (N,), the code at each place; None for the gallery's own order.

    Raises:
        ValueError: if a shape does not fit, labels and similarity are both or neither given, or a value is neither
            0 nor 1 where only these are expected (of a similarity matrix: when its row is asked for).

    Example:
        >>> relevant_to = relevance(["cat"], ["cat", "dog", "cat"], None, (1, 3))
        >>> relevant_to(0)
        array([0, 2])
    """
    if similarity is not None:
        if query_labels is not None or gallery_labels is not None:
            raise ValueError("Invalid similarity. Expected labels or a similarity matrix. Received: both")
        return _from_similarity(similarity, shape, order)
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
    if query_labels.ndim == 2:
        query_labels = zeros_and_ones("query_labels", query_labels)
        gallery_labels = zeros_and_ones("gallery_labels", gallery_labels)
    if order is not None:
        gallery_labels = gallery_labels[order]
    if query_labels.ndim == 2:
        by_label = np.ascontiguousarray(gallery_labels.T)  # (C, N)
        return lambda query: np.flatnonzero(by_label[query_labels[query]].any(axis=0))

    @functools.cache  # classes do not overlap: all answers together hold at most N places
    def of_class(label):
        return np.flatnonzero(gallery_labels == label)

    return lambda query: of_class(query_labels[query])


def _from_similarity(similarity, shape, order):
    if not hasattr(similarity, "tocsr"):
        similarity = np.asarray(similarity)
    if similarity.shape != shape:
        raise ValueError(f"Invalid similarity. Expected shape {shape}. Received: shape {similarity.shape}")
    if isinstance(similarity, np.ndarray):
        everything = slice(None) if order is None else order
        return lambda query: np.flatnonzero(zeros_and_ones("similarity", similarity[query])[everything])
    rows = similarity.tocsr()
    place = np.arange(shape[1])
    if order is not None:
        place[order] = np.arange(shape[1])

    def relevant_to(query):
        stored = slice(rows.indptr[query], rows.indptr[query + 1])
        return np.sort(place[rows.indices[stored][zeros_and_ones("similarity", rows.data[stored])]])

    return relevant_to


def zeros_and_ones(name, values):
    """`values` as bool, or ValueError."""
    if values.dtype == bool:
        return values
    ones = values == 1
    if not (ones | (values == 0)).all():
        raise ValueError(f"Invalid {name}. Expected only 0 and 1. Received: other values")
    return ones
