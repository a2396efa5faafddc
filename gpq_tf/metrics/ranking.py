"""Where relevant codes rank, without sorting the gallery: only its distinct codes are sorted."""

import numpy as np

from gpq_tf.index import stable_argsort
from gpq_tf.index.snapshot import sortable_bits

_FEW = 8  # a top_n below an eighth of the codes counts as few
_SAMPLE = 2048  # codes whose distances tell about how far the top_n nearest are
_PLACES = 2**17  # ranked at a time, of several queries together
_RELEVANT = 2**23  # places of relevant codes held at a time, 64 MiB


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
        self._sample = self._distinct[:: max(1, len(self) // _SAMPLE)]  # evenly among like codes, which stand together

    def __len__(self):
        return len(self._members)

    def ranks(self, distances, relevant_to, top_n=None):
        """For each query the ranks, from 1, of relevant codes within top_n, equal distances in insertion order.

        Args:
            distances: float32 (n, U), of n queries to the distinct codes.
            relevant_to: callable(int below n) -> ascending intp (R,), places of the relevant codes; of queries that
                share them best one array.
            top_n: int >= 1; None means all.

        Yields:
            (ascending intp (at most R,), R), n times.
        """
        last = len(self) if top_n is None else min(top_n, len(self))
        few = last < len(self) / _FEW
        size = max(1, min(_PLACES // last, _RELEVANT // len(self))) if few else 1
        for at in range(0, len(distances), size):
            some = distances[at : at + size]
            relevant = [relevant_to(query) for query in range(at, at + len(some))]
            ranks = self._ranks_of_few(some, relevant, last) if few else [self._ranks_of_many(*some, *relevant, last)]
            yield from zip(ranks, map(len, relevant), strict=True)

    def groups(self, distances, relevant_to, top_n=None):
        """For each query the groups of equally far codes, nearest first, as many as reach rank top_n.

        Args:
            distances, relevant_to, top_n: as for `ranks`.

        Yields:
            (sizes, hits, R), n times: intp (T,), codes in each group; intp (T,), relevant ones among them; int.
        """
        for query, of_query in enumerate(distances):
            relevant = relevant_to(query)
            order = self._nearest(of_query, top_n)
            hits = np.bincount(self._distinct[relevant], minlength=len(self._sizes))[order]
            first = np.flatnonzero(np.diff(of_query[order], prepend=np.float32(np.nan)) != 0)
            yield np.add.reduceat(self._sizes[order], first), np.add.reduceat(hits, first), len(relevant)

    def _nearest(self, distances, top_n):
        """The distinct codes, nearest first, as many as can reach rank top_n, with all that are equally far."""
        if top_n is None or top_n >= len(distances):
            return stable_argsort(distances)
        near = np.flatnonzero(distances <= _kth(distances, top_n))
        return near[stable_argsort(distances[near])]

    def _ranks_of_few(self, distances, relevant, last):
        """All codes up to rank `last`, in order: for few, less than finding the ranks of all that are relevant."""
        firsts = self._first(distances, last)
        by_array = {}  # queries of one class share what is relevant
        for query, places in enumerate(relevant):
            by_array.setdefault(id(places), (places, []))[1].append(query)
        ranks = [None] * len(relevant)
        for places, queries in by_array.values():
            flags = self._is_relevant(places)
            for query in queries:
                ranks[query] = np.flatnonzero(flags[firsts[query]]) + 1
        return ranks

    def _first(self, distances, last):
        """intp (n, last), the positions of each query's first codes in order, of n queries at once.

        Many small operations for each query would keep threads waiting for one another.
        """
        queries, codes = self._near(distances, last)
        keys = queries.astype(np.uint64) << np.uint64(32) | sortable_bits(distances[queries, codes])
        order = np.argsort(keys)
        keys, queries, codes = keys[order], queries[order], codes[order]
        sizes = self._sizes[codes]
        new = np.diff(keys, prepend=~keys[:1]) != 0
        group = np.cumsum(new) - 1  # of equally far codes of one query
        before = np.cumsum(sizes) - sizes  # codes of a query before each; all before the query's first taken off
        of_query = np.searchsorted(queries, np.arange(len(distances)))
        before -= before[of_query][queries]
        used = before[new][group] < last  # of a group all or none
        queries, sizes = queries[used], sizes[used]
        positions = self._in_order(group[used], codes[used])
        ends = np.cumsum(np.bincount(queries, weights=sizes, minlength=len(distances)).astype(np.intp))
        return positions[np.append(0, ends[:-1])[:, None] + np.arange(last)]

    def _near(self, distances, last):
        """(queries, codes), ascending: distinct codes that together hold the first `last` codes of each query.

        All up to a limit that a sample of the codes suggests; only where that proves too low one is worked out.
        """
        expected = last * len(self._sample) / len(self)
        rank = int(expected + 4 * expected**0.5 + 4)  # four deviations of a Poisson variable: it seldom fails
        limits = _kth(distances[:, self._sample], rank)
        found = self._up_to(distances, limits)
        reached = np.bincount(found[0], weights=self._sizes[found[1]], minlength=len(distances))
        short = np.flatnonzero(reached < last)
        if len(short):
            # Each distinct code stands for at least one, so the nearest `last` of them reach rank `last`.
            limits[short] = _kth(distances[short], last)
            found = self._up_to(distances, limits)
        return found

    def _up_to(self, distances, limits):
        return np.divmod(np.flatnonzero(distances <= limits[:, None]), distances.shape[1])

    def _ranks_of_many(self, distances, relevant, last):
        order = self._nearest(distances, last)
        together = equal_neighbours(distances[order])
        if self._sizes[order[together]].sum() > len(self) / 4:  # as where books have two codewords of unit length
            ranks = self._ranks_by_sorting_all(distances, relevant)
        else:
            ranks = self._ranks_by_distinct_codes(distances, relevant, order, together)
        return ranks[: np.searchsorted(ranks, last, side="right")]

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
        group = np.cumsum(np.diff(distances[codes], prepend=distances[codes[0]]) != 0)
        return _ranges(reached - sizes + 1, sizes)[self._is_relevant(relevant)[self._in_order(group, codes)]]

    def _in_order(self, group, codes):
        """The positions of all codes equal to one of `codes`, group after group, each in insertion order."""
        sizes = self._sizes[codes]
        # As in `stable_argsort` no two keys are equal, and any sort is stable.
        keys = np.repeat(group.astype(np.uint64) << np.uint64(32), sizes)
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


def _kth(distances, k):
    """The k-th smallest (from 1) along the last axis; the largest where there are fewer."""
    k = min(k, distances.shape[-1]) - 1
    return np.partition(distances, k, axis=-1)[..., k]


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
