"""Average precision and its mean over queries."""

import numpy as np

from gpq_tf.metrics.checks import TIES, check_choice, checked_queries, is_count
from gpq_tf.metrics.expected import Harmonic, expected_average_precision
from gpq_tf.metrics.ranking import Ranking
from gpq_tf.metrics.relevance import relevance, zeros_and_ones

DENOMINATORS = ("found", "all")


def average_precision(ranked_relevance, top_n=None, denominator="found"):
    """Average precision of ranked answers.

    AP = sum_r P(r) rel(r) / R over the ranks r = 1 .. top_n, with P(r) the share of relevant answers among the first
    r. What R counts is a convention, and matters only with top_n:

        "found"   the relevant answers within top_n, as GPQ and SPQ publish; rewards finding few but early
        "all"     all relevant answers in the row, so that what is missed lowers AP; with fewer ranks than relevant
                  answers AP stays below 1 (the textbook's, Manning, Raghavan and Schuetze, "Introduction to
                  Information Retrieval", section 8.4; not min(R, top_n), which some programs divide by)

    Without any relevant answer within top_n, AP is 0.

    Args:
        ranked_relevance: bool (Q, N), whether the answer at each rank is relevant, best first.
        top_n: int >= 1, ranks that count; None, or more than N, means all.
        denominator: str, "found" or "all".

    Returns:
        float64 (Q,), in [0, 1].

    Raises:
        ValueError: if `ranked_relevance` is not (Q, N) of 0 and 1, top_n is not a positive integer, or the denominator
            is unknown.

    Example:
        >>> average_precision([[True, False, True], [False, False, False]])
        array([0.83333333, 0.        ])
        >>> average_precision([[True, False, True]], top_n=2), average_precision([[True, False, True]], 2, "all")
        (array([1.]), array([0.5]))
    """
    relevant = zeros_and_ones("ranked_relevance", np.asarray(ranked_relevance))
    if relevant.ndim != 2:
        raise ValueError(f"Invalid ranked_relevance. Expected shape (Q, N). Received: shape {relevant.shape}")
    _check(top_n, denominator)
    scores = []
    for row in relevant:
        n_relevant = np.count_nonzero(row) if denominator == "all" else None
        scores.append(_from_ranks(np.flatnonzero(row[:top_n]) + 1, n_relevant))
    return np.array(scores, np.float64)


def mean_average_precision(
    queries,
    query_labels,
    index,
    gallery_labels,
    top_n=None,
    *,
    denominator="found",
    ties="stable",
    similarity=None,
):
    """Mean over the queries of `average_precision` when the codes of an index are ranked by distance.

    Short codes repeat, and equal distances can be ranked in any order: two programs that sort differently publish
    different figures for the same codes. Two conventions can be reproduced:

        "stable"     equal distances rank in insertion order, as a stable sort leaves them
        "expected"   the mean of AP over all orders of equal distances: the figure that depends on the codes alone. In
                     closed form (McSherry and Najork, "Computing Information Retrieval Performance Measures
                     Efficiently in the Presence of Tied Scores", ECIR 2008; see `expected_average_precision`)

    Only distinct codes are sorted, and only a block of queries is held at a time.

    Args:
        queries: float (Q, D), as for `PQIndex.search`.
        query_labels: (Q,) classes; or (Q, C) of 0 and 1, where a code is relevant if it shares a label.
        index: PQIndex of N codes.
        gallery_labels: (N,) or (N, C); gallery_labels[i] belongs to the i-th living code in insertion order.
        top_n: int >= 1, ranks that count; None means all.
        denominator: str, "found" (relevant codes within top_n) or "all", as in `average_precision`.
        ties: str, "stable" or "expected".
        similarity: (Q, N) of 0 and 1, dense or scipy.sparse: what is relevant to whom. With it both label
            arguments are None.

    Returns:
        float, in [0, 1]. A query without relevant codes counts as 0.

    Raises:
        ValueError: if a shape does not fit, there is no query, labels and similarity are both or neither given, a value
            is neither 0 nor 1 where only these are expected, a choice is unknown, or as in `PQIndex.search`.

    Example:
        >>> from gpq_tf.index import PQIndex
        >>> index = PQIndex([[[1.0], [0.0], [-1.0]]])
        >>> index.add([[0], [1], [2]])
        >>> mean_average_precision([[1.0]], ["cat"], index, ["cat", "dog", "cat"])
        0.8333333333333333
        >>> index.add([[0]])  # as near as the first: by turns, it ranks before or behind it
        >>> labels = ["cat", "dog", "dog", "dog"]
        >>> mean_average_precision([[1.0]], ["cat"], index, labels)
        1.0
        >>> mean_average_precision([[1.0]], ["cat"], index, labels, ties="expected")
        0.75
    """
    _check(top_n, denominator)
    check_choice("ties", ties, TIES)
    queries, snapshot = checked_queries(index, queries), index.snapshot()
    ranking = Ranking(snapshot)
    relevant_to = relevance(
        query_labels, gallery_labels, similarity, (len(queries), len(ranking)), order=snapshot.members
    )
    harmonic = Harmonic(len(ranking)) if ties == "expected" else None

    def divisor(n_relevant):
        return n_relevant if denominator == "all" else None

    def block(rows, distances):
        given = distances, lambda row: relevant_to(rows.start + row), top_n
        if ties == "stable":
            return [_from_ranks(found, divisor(n)) for found, n in ranking.ranks(*given)]
        return [
            expected_average_precision(sizes, hits, harmonic, top_n, divisor(n))
            for sizes, hits, n in ranking.groups(*given)
        ]

    return float(np.mean(np.concatenate(snapshot.map_distances(block, queries))))


def _from_ranks(ranks, n_relevant):
    """AP of hits at ascending ranks, from 1; divided by their number where n_relevant is None."""
    if len(ranks) == 0:
        return 0.0
    precisions = np.arange(1, len(ranks) + 1) / ranks
    return float(np.sum(precisions) / (len(ranks) if n_relevant is None else n_relevant))


def _check(top_n, denominator):
    if top_n is not None and not is_count(top_n):
        raise ValueError(f"Invalid top_n. Expected a positive integer or None. Received: top_n={top_n!r}")
    check_choice("denominator", denominator, DENOMINATORS)
