"""Where relevant codes rank, without sorting the gallery: only its distinct codes are sorted."""

import numpy as np

from gpq_tf.index import stable_argsort


class Ranking:
    """The codes of a snapshot, ready to be ranked for many queries.

    Equal codes are equally far from any query, so U distinct codes are sorted instead of N codes, and only the ranks
    of relevant codes are worked out. Codes are named by their place in `snapshot.members`, where equal codes stand
    together in insertion order: `relevance(..., order=snapshot.members)` names them so.

    Args:
        snapshot: `gpq_tf.index.Snapshot` of N codes, U of them distinct.
    """

    def __init__(self, snapshot):
        self._members, self._starts = snapshot.members, snapshot.starts
        self._sizes = np.diff(self._starts)
        self._distinct = np.repeat(np.arange(len(self._sizes)), self._sizes)  # (N,): place -> distinct code

    def __len__(self):
        return len(self._members)

    def ranks(self, distances, relevant, top_n=None):
        """The ranks, from 1, of relevant codes within top_n, equal distances in insertion order.

        Args:
            distances: float32 (U,), of one query to the distinct codes.
            relevant: ascending intp (R,), places of the relevant codes.
            top_n: int >= 1; None means all.

        Returns:
            ascending intp (at most R,).
        """
        order = self._nearest(distances, top_n)
        sizes, starts = self._sizes[order], self._starts[order]
        nearer = np.cumsum(sizes) - sizes
        # A code at place p has rank shift[its distinct code] + p: equal codes rank as they stand.
        beyond = len(self) + 1  # makes ranks that are cut off below
        shift = np.full(len(self._sizes), beyond)
        shift[order] = nearer + 1 - starts
        together = equal_neighbours(distances[order])
        if together.any():
            # Different codes, equally far, take turns in insertion order.
            shift[order[together]] = beyond
            apart = self._ranks_of_tied(
                distances[order[together]], nearer[together], starts[together], sizes[together], relevant
            )
        else:
            apart = np.empty(0, np.intp)
        ranks = np.concatenate([shift[self._distinct[relevant]] + relevant, apart])
        ranks.sort()
        last = len(self) if top_n is None else min(top_n, len(self))
        return ranks[: np.searchsorted(ranks, last, side="right")]

    def groups(self, distances, relevant, top_n=None):
        """The groups of equally far codes, nearest first, as many as reach rank top_n.

        Args:
            distances, relevant, top_n: as for `ranks`.

        Returns:
            sizes: intp (T,), codes in each group.
            hits: intp (T,), relevant codes among them.
        """
        order = self._nearest(distances, top_n)
        hits = np.bincount(self._distinct[relevant], minlength=len(self._sizes))[order]
        ordered = distances[order]
        first = np.ones(len(order), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        first = np.flatnonzero(first)
        return np.add.reduceat(self._sizes[order], first), np.add.reduceat(hits, first)

    def _nearest(self, distances, top_n):
        """The distinct codes, nearest first, as many as can reach rank top_n, with all that are equally far."""
        if top_n is None or top_n >= len(distances):
            return stable_argsort(distances)
        # Each stands for at least one code, so the top_n nearest reach rank top_n.
        near = np.flatnonzero(distances <= np.partition(distances, top_n - 1)[top_n - 1])
        return near[stable_argsort(distances[near])]

    def _ranks_of_tied(self, distances, nearer, starts, sizes, relevant):
        """The ranks of relevant codes among several distinct ones, each equally far as a neighbour; nearest first."""
        group = np.zeros(len(distances), np.uint64)
        group[1:] = np.cumsum(distances[1:] != distances[:-1])
        places = _ranges(starts, sizes)
        keys = np.repeat(group << np.uint64(32), sizes) | self._members[places].astype(np.uint64)
        is_relevant = np.zeros(len(self), bool)
        is_relevant[relevant] = True
        return _ranges(nearer + 1, sizes)[is_relevant[places[np.argsort(keys)]]]


def equal_neighbours(ordered):
    """bool, whether each value of an ordered array (n,) occurs more than once.

    Example:
        >>> equal_neighbours(np.array([1.0, 2.0, 2.0, 3.0]))
        array([False,  True,  True, False])
    """
    equal = np.zeros(len(ordered) + 1, bool)
    if len(ordered):
        equal[1:-1] = ordered[1:] == ordered[:-1]
    return equal[1:] | equal[:-1]


def _ranges(starts, sizes):
    """[start + i for start, size in zip(starts, sizes) for i in range(size)]"""
    ends = np.cumsum(sizes)
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(sizes.sum())
