"""PQIndex: a searchable collection of product-quantization codes."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

METRICS = ("inner_product", "l2", "squared_l2")

_WORKERS = min(8, os.cpu_count() or 1)
_BLOCK_QUERIES = 64  # queries answered together: one look-up then fetches 64 neighbouring table entries
_BLOCK_ENTRIES = 2**24  # float32 distances a worker holds at most, 64 MiB, however large the gallery is
_CHUNK_ENTRIES = 2**16  # of them summed at a time, so that the sums stay in the processor's cache
_INT64_MAX = np.iinfo(np.int64).max


class PQIndex:
    """Exact search among codes of a learned codebook.

    A code c (M,) stands for the vector whose j-th part is the codeword codebook[j, c[j]]. A query is compared
    with it part by part, without being quantized itself (the asymmetric distance of Jegou, Douze and Schmid,
    "Product Quantization for Nearest Neighbor Search", TPAMI 2011), by one of

        "inner_product"   M - sum_j <q_j, c_j>          as GPQ ranks
        "l2"              sum_j ||q_j - c_j||           as SPQ ranks
        "squared_l2"      sum_j ||q_j - c_j||^2         the textbook's

    Per query, the M * K distances of its parts to all codewords are tabulated; the distance to a code is the
    float32 sum of its M entries, first book first. So equal codes have bit-equal distances, wherever they lie
    and however many queries come along. Only distinct codes are summed: learned codes repeat.

    Args:
        codebook: float (M, K, d), M books of K codewords of length d, finite.
        metric: str, one of the above.

    Raises:
        ValueError: if the codebook is not three-dimensional, empty or not finite, or the metric is unknown.

    Example:
        >>> codebook = np.array([[[1.0, 0.0], [0.0, 1.0]]])  # one book of two codewords in the plane
        >>> index = PQIndex(codebook)
        >>> index.add([[1], [0], [1]])
        >>> distances, ids = index.search([[0.0, 1.0]], k=4)
        >>> distances
        array([[ 0.,  0.,  1., inf]], dtype=float32)
        >>> ids
        array([[ 0,  2,  1, -1]])
    """

    def __init__(self, codebook, metric="inner_product"):
        if metric not in METRICS:
            raise ValueError(f"Invalid metric. Expected one of {', '.join(METRICS)}. Received: metric={metric!r}")
        with np.errstate(over="ignore"):  # float64 values above float32's become inf and are refused below
            codebook = np.array(codebook, np.float32)
        if codebook.ndim != 3 or codebook.size == 0:
            raise ValueError(
                f"Invalid codebook. Expected a non-empty array of shape (M, K, d). Received: shape {codebook.shape}"
            )
        if not np.isfinite(codebook).all():
            book, word = np.argwhere(~np.isfinite(codebook))[0, :2]
            raise ValueError(
                f"Invalid codebook. Expected finite values. Received: NaN or infinity in book {book}, word {word}"
            )
        codebook.setflags(write=False)
        self.codebook = codebook
        self.metric = metric
        self._codes = np.empty((0, self.M), np.min_scalar_type(self.K - 1))
        self._ids = np.empty(0, np.int64)
        self._size = 0  # rows of _codes and _ids in use; the rest is room to grow
        self._next_id = 0
        self._snapshot = None

    @property
    def M(self):
        """int, number of books."""
        return self.codebook.shape[0]

    @property
    def K(self):
        """int, codewords a book."""
        return self.codebook.shape[1]

    @property
    def d(self):
        """int, length of a codeword; queries have D = M * d values."""
        return self.codebook.shape[2]

    @property
    def codes(self):
        """The living codes in insertion order: (N, M), read-only, in the smallest unsigned type for K - 1."""
        return _read_only(self._codes[: self._size])

    @property
    def ids(self):
        """The ids of `codes`: int64 (N,), read-only."""
        return _read_only(self._ids[: self._size])

    def __len__(self):
        return self._size

    def add(self, codes, ids=None):
        """Append codes. Nothing is added when anything is refused.

        Args:
            codes: integer (n, M) of any integer type, values in [0, K).
            ids: integer (n,), unique among the living ones, any int64 but -1 (which marks "nothing found").
                None counts on from the largest id ever given, from 0 at first.

        Raises:
            ValueError: if a shape or type is wrong, a code is out of range, or an id is taken or repeated.
        """
        codes = _integers("codes", codes)
        if codes.ndim != 2 or codes.shape[1] != self.M:
            raise ValueError(f"Invalid codes. Expected shape (n, M={self.M}). Received: shape {codes.shape}")
        wrong = (codes < 0) | (codes >= self.K)
        if wrong.any():
            row, book = np.argwhere(wrong)[0]
            raise ValueError(
                f"Invalid codes. Expected values in [0, K={self.K}). "
                f"Received: {codes[row, book]} in row {row}, book {book}"
            )
        ids = self._new_ids(len(codes)) if ids is None else self._checked_ids(ids, len(codes))
        if len(codes) == 0:
            return
        size = self._size + len(codes)
        if size > len(self._codes):
            # Doubling: N codes added one by one are copied fewer than 2 N times. Rows in use are never
            # written again, so the views that `codes` and `ids` handed out keep their content.
            self._codes = _resized(self._codes, max(size, 2 * len(self._codes)))
            self._ids = _resized(self._ids, len(self._codes))
        self._codes[self._size : size] = codes
        self._ids[self._size : size] = ids
        self._size = size
        self._next_id = max(self._next_id, int(ids.max()) + 1)
        self._snapshot = None

    def remove(self, ids):
        """Remove codes by id; what stays keeps its order. Nothing is removed when an id is unknown.

        Args:
            ids: integer (n,), living ids.

        Raises:
            ValueError: if an id is not in the index.
        """
        ids = _int64_ids(ids)
        unknown = ids[~np.isin(ids, self.ids)]
        if len(unknown):
            raise ValueError(f"Invalid ids. Expected ids in the index. Received: unknown id {unknown[0]}")
        keep = ~np.isin(self.ids, ids)
        self._codes, self._ids = self.codes[keep], self.ids[keep]
        self._size = len(self._ids)
        self._snapshot = None

    def search(self, queries, k):
        """Find the k nearest codes of each query.

        Args:
            queries: float (Q, D), finite; compared as float32.
            k: int >= 1; may exceed the number of codes.

        Returns:
            distances: float32 (Q, k), lowest first, +inf past the end.
            ids: int64 (Q, k); equal distances in insertion order, -1 past the end.

        Raises:
            ValueError: if queries have another shape, or hold NaN, infinity or values whose distances
                overflow float32 (the row is named), or k is not a positive integer.
        """
        queries = self.checked_queries(queries)
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise ValueError(f"Invalid k. Expected a positive integer. Received: k={k!r}")
        ids, snapshot = self.ids, self.snapshot()
        nearest_distances = np.full((len(queries), k), np.inf, np.float32)
        nearest_ids = np.full((len(queries), k), -1, np.int64)

        def fill(rows, distances):
            for row, to_distinct in zip(range(rows.start, rows.stop), distances, strict=True):
                positions = snapshot.nearest(to_distinct, k)
                nearest_distances[row, : len(positions)] = to_distinct[snapshot.inverse[positions]]
                nearest_ids[row, : len(positions)] = ids[positions]

        snapshot.map_distances(fill, queries)
        return nearest_distances, nearest_ids

    def checked_queries(self, queries):
        """`queries` as float32 (Q, D), or ValueError, as in `search`."""
        with np.errstate(over="ignore"):  # float64 values above float32's become inf and are refused below
            queries = np.asarray(queries)
            if queries.dtype.kind not in "fiub":
                raise ValueError(f"Invalid queries. Expected real numbers. Received: dtype {queries.dtype}")
            queries = queries.astype(np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.M * self.d:
            raise ValueError(
                f"Invalid queries. Expected shape (Q, D={self.M * self.d}). Received: shape {queries.shape}"
            )
        finite = np.isfinite(queries).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"Invalid queries. Expected finite values. Received: NaN or infinity in row {finite.argmin()}"
            )
        return queries

    def snapshot(self):
        """The living codes as a `Snapshot`, made when first needed after `add` or `remove`."""
        if self._snapshot is None:
            self._snapshot = Snapshot.of(self.codebook, self.metric, self.codes)
        return self._snapshot

    def _new_ids(self, n):
        if self._next_id + n > _INT64_MAX:
            raise ValueError(f"Invalid ids. Expected explicit ids. Received: None after the id {self._next_id - 1}")
        return np.arange(self._next_id, self._next_id + n)

    def _checked_ids(self, ids, n):
        ids = _int64_ids(ids)
        if len(ids) != n:
            raise ValueError(f"Invalid ids. Expected one for each of {n} codes. Received: {len(ids)}")
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"Invalid ids. Expected unique ids. Received: {values[counts.argmax()]} twice")
        if -1 in values:
            raise ValueError("Invalid ids. Expected ids other than -1, the mark of nothing found. Received: -1")
        # Ids that are all larger than any before need no looking up.
        if n and values[0] < self._next_id:
            taken = values[np.isin(values, self.ids)]
            if len(taken):
                raise ValueError(f"Invalid ids. Expected new ids. Received: {taken[0]}, which is in the index")
        return ids


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

    def nearest(self, distances, k):
        """The positions of the k nearest codes, or of all if fewer, nearest first, ties in insertion order.

        Args:
            distances: float32 (U,), of one query to the distinct codes.
            k: int.
        """
        # The k nearest distinct codes stand for at least k codes: none farther can be among the nearest.
        farthest = np.partition(distances, k - 1)[k - 1] if k < len(distances) else np.inf
        near = np.flatnonzero(distances <= farthest)
        # Of equal codes the first k suffice.
        counts = np.minimum(self.starts[near + 1] - self.starts[near], k)
        ends = np.cumsum(counts)
        # [starts[u] + i for u in near for i in range(counts[u])]
        places = np.repeat(self.starts[near] - (ends - counts), counts) + np.arange(counts.sum())
        positions = np.sort(self.members[places])
        return positions[stable_argsort(distances[self.inverse[positions]])[:k]]

    def _distances(self, queries, rows):
        """float32 (len(rows), U): the sums of table entries over the books, first book first.

        For every query q and distinct code u: sum(table[j, distinct[j, u], q] for j in range(M)), in float32.
        """
        table = distance_table(queries[rows], self.codebook, self.metric)
        # Infinite terms of both signs would make NaN, which has no place in an order.
        fits = np.abs(table).max(axis=(0, 1)) < np.finfo(np.float32).max / len(table)
        if not fits.all():
            row = rows.start + fits.argmin()
            raise ValueError(f"Invalid queries. Expected distances that fit float32. Received: larger in row {row}")
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
    bits = distances.view(np.uint32)
    # Negative numbers: all bits flipped, as larger magnitudes come first. Others: the sign bit alone.
    flip = (distances.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000)
    keys = (bits ^ flip).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(distances), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)


def _integers(name, values):
    values = np.asarray(values)
    if values.dtype.kind not in "iu" and values.size:
        raise ValueError(f"Invalid {name}. Expected integers. Received: dtype {values.dtype}")
    return values if values.dtype.kind in "iu" else values.astype(np.int64)


def _int64_ids(ids):
    ids = _integers("ids", ids)
    if ids.ndim != 1:
        raise ValueError(f"Invalid ids. Expected shape (n,). Received: shape {ids.shape}")
    if ids.size and ids.max() > _INT64_MAX:
        raise ValueError(f"Invalid ids. Expected int64. Received: {ids.max()}")
    return ids.astype(np.int64)


def _resized(array, length):
    resized = np.empty((length, *array.shape[1:]), array.dtype)
    resized[: len(array)] = array
    return resized


def _read_only(view):
    view.setflags(write=False)
    return view
