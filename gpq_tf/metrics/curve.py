"""Precision and recall of an index at each rank."""

import threading

import numpy as np

from gpq_tf.metrics.checks import TIES, check_choice, checked_queries, checked_ranks
from gpq_tf.metrics.ranking import Ranking
from gpq_tf.metrics.relevance import relevance


def precision_at_k(queries, query_labels, index, gallery_labels, ks=(1, 10, 100), *, ties="stable", similarity=None):
    """Mean over the queries of the share of relevant codes among the k nearest.

    P@k = |relevant and among the first k| / k, also where the index holds fewer than k codes (as trec_eval divides).

    Args:
        queries, query_labels, index, gallery_labels, ties, similarity: as for `mean_average_precision`.
        ks: ints >= 1.

    Returns:
        dict of k -> float, in [0, 1].

    Raises:
        ValueError: if `ks` is empty or holds anything but positive integers, or as in `mean_average_precision`.

    Example:
        >>> from gpq_tf.index import PQIndex
        >>> index = PQIndex([[[1.0], [0.0], [-1.0]]])
        >>> index.add([[0], [1], [2]])
        >>> precision_at_k([[1.0]], ["cat"], index, ["cat", "dog", "cat"], ks=(1, 2))
        {1: 1.0, 2: 0.5}
    """
    ks = checked_ranks("ks", ks)
    _, precision, _ = precision_recall_curve(
        queries, query_labels, index, gallery_labels, ks, ties=ties, similarity=similarity
    )
    return dict(zip(ks.tolist(), precision.tolist(), strict=True))


def precision_recall_curve(queries, query_labels, index, gallery_labels, ranks=None, *, ties="stable", similarity=None):
    """Precision and recall at each rank, each averaged over the queries.

    With h_q(n) the relevant codes among the n nearest of query q, and R_q all that are relevant to it,

        precision(n) = mean_q h_q(n) / n        recall(n) = mean_q h_q(n) / R_q

    A query without relevant codes counts as 0 in both. This recall is the share of the relevant codes that is found;
    the Recall@k of metric learning, whether any is found, is `recall_at_k`.

    Args:
        queries, query_labels, index, gallery_labels, similarity: as for `mean_average_precision`.
        ranks: ints >= 1, where to read the curve; None for 1 .. N.
        ties: str, "stable" (insertion order) or "expected" (mean over all orders of equal distances: hits rise
            evenly along a group).

    Returns:
        ranks: int64 (n,).
        precision: float64 (n,).
        recall: float64 (n,).

    Raises:
        ValueError: if `ranks` is empty or holds anything but positive integers, or as in `mean_average_precision`.

    Example:
        >>> from gpq_tf.index import PQIndex
        >>> index = PQIndex([[[1.0], [0.0], [-1.0]]])
        >>> index.add([[0], [1], [2], [0]])
        >>> precision_recall_curve([[1.0]], ["cat"], index, ["cat", "dog", "cat", "dog"])
        (array([1, 2, 3, 4]), array([1.        , 0.5       , 0.33333333, 0.5       ]), array([0.5, 0.5, 0.5, 1. ]))
    """
    check_choice("ties", ties, TIES)
    queries, snapshot = checked_queries(index, queries), index.snapshot()
    ranking = Ranking(snapshot)
    relevant_to = relevance(
        query_labels, gallery_labels, similarity, (len(queries), len(ranking)), order=snapshot.members
    )
    ranks = np.arange(1, len(ranking) + 1) if ranks is None else checked_ranks("ranks", ranks)
    last = max(ranks.tolist(), default=1)

    def hits_at_ranks(*given):
        if ties == "stable":
            for found, n_relevant in ranking.ranks(*given):
                yield np.searchsorted(found, ranks, side="right"), n_relevant
        else:
            for sizes, hits, n_relevant in ranking.groups(*given):
                yield np.interp(ranks, np.append(0, np.cumsum(sizes)), np.append(0, np.cumsum(hits))), n_relevant

    total = _SumInOrder(np.zeros((2, len(ranks))))

    def block(rows, distances):
        part = np.zeros((2, len(ranks)))
        for hits, n_relevant in hits_at_ranks(distances, lambda row: relevant_to(rows.start + row), last):
            part += hits, hits / max(n_relevant, 1)
        total.add(rows, part)

    snapshot.map_distances(block, queries)
    hits, recall = total.value / len(queries)
    return ranks, hits / ranks, recall


class _SumInOrder:
    """Adds parts in the order of their rows, whenever they arrive: the sum's last bit must not depend on threads."""

    def __init__(self, zero):
        self.value = zero
        self._n_added = 0
        self._waiting = {}
        self._lock = threading.Lock()

    def add(self, rows, part):
        with self._lock:
            self._waiting[rows.start] = rows.stop, part
            while self._n_added in self._waiting:
                self._n_added, part = self._waiting.pop(self._n_added)
                self.value += part
