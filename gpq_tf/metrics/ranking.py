"""Where relevant codes rank, without sorting the gallery: only its distinct codes are sorted."""

import numpy as np

from gpq_tf.index import stable_argsort

_FEW = 8  # a top_n below an eighth of the codes counts as few


class Ranking:
    """The codes of a snapshot, ready to be ranked for many queries.

    Equal codes are equally far from any query, so U distinct codes are sorted instead of N codes, and only the ranks
    of relevant codes are worked out. Codes are named by their place in `snapshot.members`, where equal codes stand
    together in insertion order: `relevance(..., order=snapshot.members)` names them so.

    Args:
        snapshot: `gpq_tf.index.Snapshot` of N codes, U of them distinct.
    """

    def __init__(self, snapshot):
        self._members, self._starts, self._inverse = snapshot.members, snapshot.starts, snapshot.inverse
        self._sizes = np.diff(self._starts)
        self._last = self._starts[1:] - 1  # (U,): the last place of each distinct code
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
        last = len(self) if top_n is None else min(top_n, len(self))
        if last < len(self) / _FEW:
            return self._ranks_of_few(distances, relevant, order, last)
        together = equal_neighbours(distances[order])
        if self._sizes[order[together]].sum() > len(self) / 4:  # as where books have two codewords of unit length
            ranks = self._ranks_by_sorting_all(distances, relevant)
        else:
            ranks = self._ranks_by_distinct_codes(distances, relevant, order, together)
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

    def _ranks_of_few(self, distances, relevant, order, last):
        """All codes up to rank `last`, in order: for few, less than finding the ranks of all that are relevant."""
        ordered = distances[order]
        end = np.searchsorted(np.cumsum(self._sizes[order]), last)
        end = np.searchsorted(ordered, ordered[end], side="right")  # with all that are equally far
        positions = self._in_order(distances, order[:end])[:last]
        return np.flatnonzero(self._is_relevant(relevant)[positions]) + 1

    def _ranks_by_distinct_codes(self, distances, relevant, order, together):
        sizes = self._sizes[order]
        reached = np.cumsum(sizes)  # the last rank of each distinct code, nearest first
        # A code at place p has rank shift[its distinct code] + p: equal codes rank as they stand.
        beyond = 2 * len(self) + 1  # for codes that are too far: what is left of it exceeds all ranks
        shift = np.full(len(self._sizes), beyond)
        shift[order] = reached
        if len(together):
            shift[order[together]] = beyond
        shift -= self._last
        ranks = shift[self._distinct[relevant]] + relevant
        if len(together):
            tied = self._ranks_of_tied(distances, relevant, order[together], reached[together])
            ranks = np.append(ranks, tied)
        ranks.sort()
        return ranks

    def _ranks_of_tied(self, distances, relevant, codes, reached):
        """Different codes, equally far, take turns in insertion order; `codes` come nearest first."""
        sizes = self._sizes[codes]
        return _ranges(reached - sizes + 1, sizes)[self._is_relevant(relevant)[self._in_order(distances, codes)]]

    def _in_order(self, distances, codes):
        """The positions of all codes equal to one of `codes`, which come nearest first, as a stable sort has them."""
        sizes = self._sizes[codes]
        # Sort them by group and position: as in `stable_argsort`, no two keys are equal, and any sort is stable.
        group = np.cumsum(np.diff(distances[codes], prepend=distances[codes[0]]) != 0).astype(np.uint64)
        keys = np.repeat(group << np.uint64(32), sizes)
        keys |= self._members[_ranges(self._starts[codes], sizes)].astype(np.uint64)
        keys.sort()
        return (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)

    def _ranks_by_sorting_all(self, distances, relevant):
        return np.flatnonzero(self._is_relevant(relevant)[stable_argsort(distances[self._inverse])]) + 1

    def _is_relevant(self, relevant):
        """bool (N,), in insertion order."""
        flags = np.zeros(len(self), bool)
        flags[self._members[relevant]] = True
        return flags


def equal_neighbours(ordered):
    """Ascending intp, where an ordered array (n,) holds a value that occurs more than once.

    Example:
        >>> equal_neighbours(np.array([1.0, 2.0, 2.0, 3.0]))
        array([1, 2])
    """
    equal = np.zeros(len(ordered) + 1, bool)  # each value and the one before it
    equal[1:-1] = ordered[1:] == ordered[:-1]
    return np.flatnonzero(equal[1:] | equal[:-1])


def _ranges(starts, sizes):
    """[start + i for start, size in zip(starts, sizes) for i in range(size)]"""
    ends = np.cumsum(sizes)
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(sizes.sum())
