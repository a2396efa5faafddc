"""Codes grouped by equality, with distances summed from a table once for each distinct code: what metrics rank."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

_WORKERS = min(8, os.cpu_count() or 1)
_BLOCK_QUERIES = 64  # queries answered together: one look-up then fetches 64 neighbouring table entries
_BLOCK_ENTRIES = 2**24  # float32 distances a worker holds at most, 64 MiB, however large the gallery is
_CHUNK_ENTRIES = 2**16  # of them summed at a time, so that the sums stay in the processor's cache


@dataclass(frozen=True)
class Snapshot:
    """N codes as they are at one moment, grouped by equality into U distinct ones.

    Attributes:
        codebook: float32 (M, K, d).
        metric: str, as in `PQIndex`.
        distinct: unsigned (M, U), the distinct codes in lexicographic order, one row a book.
        inverse: intp (N,), which distinct code each code is: codes == distinct.T[inverse].
        members: intp (N,), the positions of the codes, those of distinct code u in insertion order at
            members[starts[u]:starts[u + 1]].
        starts: intp (U + 1,).
    """

    codebook: np.ndarray
    metric: str
    distinct: np.ndarray
    inverse: np.ndarray
    members: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, codebook, metric, codes):
        """Group `codes` (N, M)."""
        members = np.lexsort(codes.T[::-1])  # a stable radix sort per book for the usual uint8 and uint16
        ordered = codes[members]
        first = np.ones(len(codes), bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        inverse = np.empty(len(codes), np.intp)
        inverse[members] = np.cumsum(first) - 1
        starts = np.append(np.flatnonzero(first), len(codes))
        distinct = np.ascontiguousarray(ordered[first].T)
        return cls(codebook, metric, distinct, inverse, members, starts)

    @property
    def nbytes(self):
        """int, bytes of memory."""
        return sum(array.nbytes for array in (self.distinct, self.inverse, self.members, self.starts))

    def map_distances(self, function, queries):
        """Call `function(rows, distances)` on blocks of queries, several threads at once.

        The blocks are so small that memory stays bounded for any number of queries.

        Args:
            function: gets `rows`, the slice of `queries`, and `distances`, float32 (len(rows), U) to the
                distinct codes; `distances[i][self.inverse]` are those to all codes in insertion order.
            queries: float32 (Q, D).

        Returns:
            list of what `function` returned, in the order of the queries.

        Raises:
            ValueError: naming the row, if a query is so large that distances would overflow float32.
        """
        books, words, _ = self.codebook.shape
        widest = max(self.distinct.shape[1], books * words)
        size = min(_BLOCK_QUERIES, max(1, _BLOCK_ENTRIES // widest))
        blocks = [slice(at, min(at + size, len(queries))) for at in range(0, len(queries), size)]

        def work(rows):
            return function(rows, self._distances(queries, rows))

        if len(blocks) < 2:
            return [work(rows) for rows in blocks]
        with ThreadPoolExecutor(_WORKERS) as pool:
            return list(pool.map(work, blocks))

    def _distances(self, queries, rows):
        """float32 (len(rows), U): the sums of table entries over the books, first book first.

        For every query q and distinct code u: sum(table[j, distinct[j, u], q] for j in range(M)), in float32.
        """
        table = checked_table(self.codebook, self.metric, queries, rows)
        n_queries, n_codes = table.shape[2], self.distinct.shape[1]
        distances = np.empty((n_queries, n_codes), np.float32)
        chunk = _CHUNK_ENTRIES // n_queries
        for at in range(0, n_codes, chunk):
            words = self.distinct[:, at : at + chunk].astype(np.intp)
            total = table[0].take(words[0], axis=0)
            for book in range(1, len(table)):
                total += table[book].take(words[book], axis=0)
            distances[:, at : at + chunk] = total.T
        return distances


def checked_table(codebook, metric, queries, rows):
    """`distance_table` of queries[rows], refused where a sum of its entries could overflow float32.

    Args:
        codebook: float32 (M, K, d).
        metric: str, one of `METRICS`.
        queries: float32 (Q, M * d).
        rows: slice with a start.

    Returns:
        float32 (M, K, n).

    Raises:
        ValueError: naming the row.
    """
    table = distance_table(queries[rows], codebook, metric)
    # Infinite terms of both signs would make NaN, which has no place in an order.
    fits = np.abs(table).max(axis=(0, 1)) < np.finfo(np.float32).max / len(table)
    if not fits.all():
        row = rows.start + fits.argmin()
        raise ValueError(f"Invalid queries. Expected distances that fit float32. Received: larger in row {row}")
    return table


def distance_table(queries, codebook, metric):
    """Tabulate what each codeword adds to the distance of each query.

    With q_j the j-th sub-vector: 1 - <q_j, c_jk>, ||q_j - c_jk|| or ||q_j - c_jk||^2. Every entry is computed
    in float64, component by component in order, and rounded once, so that it depends on its query and
    codeword alone: a matrix product adds in another order for another number of queries. For the same reason
    this is NumPy, not a compiled function: the compiler would choose the order.

    Args:
        queries: float32 (Q, M * d).
        codebook: float32 (M, K, d).
        metric: str, one of `METRICS`.

    Returns:
        float32 (M, K, Q).

    Example:
        >>> distance_table(np.array([[3.0, 4.0]]), np.zeros((1, 1, 2)), "l2")
        array([[[5.]]], dtype=float32)
    """
    books, words, length = codebook.shape
    parts = queries.reshape(-1, books, length).transpose(1, 2, 0).astype(np.float64)  # (M, d, Q)
    total = np.zeros((books, words, len(queries)))
    for i in range(length):
        if metric == "inner_product":
            total += codebook[:, :, i, None] * parts[:, None, i]
        else:
            total += (codebook[:, :, i, None] - parts[:, None, i]) ** 2
    if metric == "inner_product":
        total = 1.0 - total
    elif metric == "l2":
        total = np.sqrt(total)
    with np.errstate(over="ignore"):  # the caller refuses what does not fit
        return total.astype(np.float32)


def stable_argsort(distances):
    """The order of `np.argsort(distances, kind="stable")`, several times faster.

    A float32's bits, with the sign turned, order as the number does; with the position below them no two keys
    are equal, and any sort is stable. NumPy sorts 64-bit integers with vector instructions.

    Args:
        distances: float32 (N,), no NaN and no -0.0 (a sum whose first term is not -0.0 never is), N < 2**32.

    Returns:
        intp (N,).

    Example:
        >>> stable_argsort(np.array([2.0, -1.0, 2.0, -3.0], np.float32))
        array([3, 1, 0, 2])
    """
    keys = sortable_bits(distances) << np.uint64(32)
    keys |= np.arange(len(distances), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)


def sortable_bits(distances):
    """Whole numbers below 2**32 that order as the distances do.

    Args:
        distances: float32, any shape, no NaN and no -0.0.

    Returns:
        uint64, the same shape.
    """
    bits = distances.view(np.uint32)
    # Negative numbers: all bits flipped, as larger magnitudes come first. Others: the sign bit alone.
    flip = (distances.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000)
    return (bits ^ flip).astype(np.uint64)
