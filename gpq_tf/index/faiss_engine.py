"""Faiss beside PQIndex: an index handed over and taken back, and a search by Faiss's scans with exact distances."""

from dataclasses import dataclass

import numpy as np

from gpq_tf.index.arguments import FAISS_LARGEST_K, checked_codebook, checked_metric
from gpq_tf.index.snapshot import checked_table, distance_table

# Faiss's METRIC_INNER_PRODUCT and METRIC_L2, the square of the Euclidean distance; it has no sum of distances.
_FAISS_METRICS = {"inner_product": 0, "squared_l2": 1}
_CHUNK_CODES = 2**20  # converted at a time: Faiss packs from 4 bytes a codeword

_NIBBLE = 16  # up to here Faiss's FastScan serves: a book's table fits one vector register
_BLOCK_QUERIES = 512
_BLOCK_ENTRIES = 2**22  # table entries, or candidates, held at a time however many queries come
# Candidates of the first look are 3 k and some. The scan's time hardly depends on their number; 2 k would leave twice
# as many queries to a second look among 10 million codes, 4 k would cost more than that among 1 million.
_FIRST_LOOK, _SPARE = 3, 32
_SECOND_LOOK = 8  # times as many where the first leave a doubt


def to_faiss(codebook, metric, codes, ids=None):
    """Make a Faiss index of the same codewords and codes.

    For "squared_l2" it answers our distances; for "inner_product" it answers sum_j <q_j, c_j>, largest first, where
    our distance is M minus that. Equal distances may come in another order.

    Args:
        codebook: float (M, K, d), K a power of two, as Faiss numbers codewords with whole bits.
        metric: str, "inner_product" or "squared_l2".
        codes: unsigned (N, M), values below K; or uint8 (N, ceil(M / 2)) for K at most 16, two codewords a byte, the
            first in the low nibble.
        ids: int64 (N,), or None for 0 .. N - 1.

    Returns:
        faiss.IndexPQ; with ids, a faiss.IndexIDMap2 around it. `faiss.write_index` stores it.

    Raises:
        ValueError: if the metric is "l2" or unknown, K is not a power of two from 2 to 65,536, K is below 8 with d = 2
            (Faiss does not search those), or a shape does not fit.

    Example:
        >>> codebook = np.array([[[1.0], [-1.0]]], np.float32)  # one book of two codewords on the line
        >>> index = to_faiss(codebook, "squared_l2", np.array([[0], [1], [1]], np.uint8), np.array([7, 8, 9]))
        >>> index.search(np.array([[3.0]], np.float32), 1)
        (array([[4.]], dtype=float32), array([[7]]))
    """
    import faiss

    codebook = checked_codebook(codebook)
    checked_metric(metric)
    if metric not in _FAISS_METRICS:
        raise ValueError(
            f"Invalid metric. Expected one of {', '.join(_FAISS_METRICS)}. Received: metric={metric!r}, a sum of "
            "Euclidean distances over the books, which no Faiss index computes"
        )
    M, K, d = codebook.shape
    n_bits = K.bit_length() - 1
    if K & (K - 1):
        raise ValueError(f"Invalid codebook. Expected K a power of two from 2 to 65536, as in Faiss. Received: K={K}")
    if d == 2 and K < 8:
        raise ValueError(f"Invalid codebook. Expected K from 8 up with d=2, for Faiss to search. Received: K={K}")
    codes = checked_codes(codes, M, K)
    index = faiss.IndexPQ(M * d, M, n_bits, _FAISS_METRICS[metric])
    faiss.copy_array_to_vector(codebook.ravel(), index.pq.centroids)
    index.is_trained = True
    if ids is not None:
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.shape != (len(codes),):
            raise ValueError(f"Invalid ids. Expected shape (N={len(codes)},). Received: shape {ids.shape}")
        index = faiss.IndexIDMap2(index)
    for at in range(0, len(codes), _CHUNK_CODES):
        chunk = _as_faiss_packs(codes[at : at + _CHUNK_CODES], M, n_bits)
        index.add_sa_codes(chunk, None if ids is None else ids[at : at + _CHUNK_CODES])
    return index


def from_faiss(index):
    """Take codewords and codes out of a Faiss index, trained by Faiss or made by `to_faiss`.

    Args:
        index: faiss.IndexPQ, or faiss.IndexIDMap2 around one. One that `faiss.read_index` read from a stranger's file
            is only as safe as Faiss's reader.

    Returns:
        codebook: float32 (M, K, d).
        metric: str, "inner_product" or "squared_l2".
        codes: unsigned (N, M), in the smallest type for K - 1.
        ids: int64 (N,), or None without an IndexIDMap2.

    Raises:
        ValueError: if it is another kind of index, is not trained, measures by another metric, has more than 16 bits
            a codeword, or its arrays do not have the sizes that its numbers say.

    Example:
        >>> codebook = np.array([[[1.0], [-1.0]]], np.float32)
        >>> taken, metric, codes, ids = from_faiss(to_faiss(codebook, "squared_l2", np.array([[0], [1]], np.uint8)))
        >>> metric, codes.tolist(), ids
        ('squared_l2', [[0], [1]], None)
    """
    import faiss

    outer = inner = faiss.downcast_index(index)
    kind = type(outer).__name__
    if isinstance(outer, faiss.IndexIDMap2):
        inner = faiss.downcast_index(outer.index)
        kind += f" around {type(inner).__name__}"
    if type(inner) is not faiss.IndexPQ:
        raise ValueError(f"Invalid index. Expected a faiss.IndexPQ, or an IndexIDMap2 around one. Received: {kind}")
    if not inner.is_trained:
        raise ValueError("Invalid index. Expected a trained one. Received: is_trained=False")
    metrics = {number: name for name, number in _FAISS_METRICS.items()}
    if inner.metric_type not in metrics:
        raise ValueError(
            "Invalid index. Expected METRIC_INNER_PRODUCT or METRIC_L2. "
            f"Received: metric_type={inner.metric_type}, neither of them"
        )
    pq = inner.pq
    if pq.nbits > 16:
        raise ValueError(f"Invalid index. Expected at most 16 bits a codeword. Received: nbits={pq.nbits}")
    # Faiss believes its numbers; a copy of the wrong size would read past the end.
    _check_size("pq.centroids", pq.centroids.size(), pq.M * pq.ksub * pq.dsub)
    width = (pq.M * pq.nbits + 7) // 8
    _check_size("codes", inner.codes.size(), inner.ntotal * width)
    codebook = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    packed = faiss.vector_to_array(inner.codes).reshape(inner.ntotal, width)
    codes = np.empty((inner.ntotal, pq.M), np.min_scalar_type(pq.ksub - 1))
    for at in range(0, len(codes), _CHUNK_CODES):
        codes[at : at + _CHUNK_CODES] = faiss.unpack_bitstrings(packed[at : at + _CHUNK_CODES], pq.M, pq.nbits)
    ids = None
    if outer is not inner:
        ids = faiss.vector_to_array(outer.id_map)
        _check_size("id_map", len(ids), inner.ntotal)
    return codebook, metrics[inner.metric_type], codes, ids


@dataclass(frozen=True)
class FaissEngine:
    """Search by Faiss's scans, with the exact engine's distances.

    Faiss finds candidates, whose distances are then computed as `PQIndex.search` computes them and sorted by (distance,
    position). What is returned is therefore right to the last bit of float32; what may be missing is a nearer code that
    was no candidate. Faiss scans:

    - K up to 16 with FastScan (Andre, Kermarrec and Le Scouarnec, "Cache locality is not enough", VLDB 2015), on tables
      rounded to 255 steps: the scan is off by half a step a book at most. So the 3 k candidates prove their own answer
      if the k-th distance lies that much below the last candidate's. A query without proof is scanned again for 8 times
      as many, its steps as fine as the k-th distance found allows.
    - K up to 256 with IndexPQ's scan of float32 tables, straight over `codes`.

    Every metric goes the same way: the scan does not see the codebook, but words and queries whose distances are the
    entries of the distance table (`Lookup`).

    Nothing here is changed by `search` or `extended`: threads may share an engine. Faiss itself uses as many threads as
    `faiss.omp_get_max_threads()` says.

    Attributes:
        codebook: float32 (M, K, d).
        metric: str, as in `PQIndex`.
        codes: uint8 (N, M), or (N, ceil(M / 2)) with two codewords a byte. Not copied: do not change them.
        scans: tuple of faiss.IndexPQFastScan, of consecutive codes; for K above 16 one faiss.ProductQuantizer.

    Example:
        >>> codebook = np.array([[[1.0, 0.0], [0.0, 1.0]]], np.float32)
        >>> engine = FaissEngine.of(codebook, "l2", np.array([[0], [1], [1]], np.uint8))
        >>> engine.search(np.array([[0.0, 1.0]], np.float32), k=2)
        (array([[0., 0.]], dtype=float32), array([[1, 2]]))
    """

    codebook: np.ndarray
    metric: str
    codes: np.ndarray
    scans: tuple

    @classmethod
    def of(cls, codebook, metric, codes):
        """Build the engine of some codes.

        Args:
            codebook: float (M, K, d), K at most 256.
            metric: str, one of `METRICS`.
            codes: unsigned (N, M), values below K, or packed as in the attribute.

        Raises:
            ValueError: if K is larger, the metric is unknown or a shape does not fit.
        """
        codebook = checked_codebook(codebook)
        checked_metric(metric)
        M, K, _ = codebook.shape
        if K > FAISS_LARGEST_K:
            raise ValueError(f"Invalid engine. Expected K at most {FAISS_LARGEST_K} for Faiss's scans. Received: K={K}")
        empty = np.empty((0, M), np.uint8)
        engine = cls(codebook, metric, empty, () if K <= _NIBBLE else (_unit_vector_quantizer(M, K),))
        return engine.extended(codes)

    def extended(self, codes):
        """An engine of `codes`, of which this one's are the first. Shares what is built; this one stays as it is.

        FastScan structures grow as a binary counter does: a new one swallows those before it that are no larger, so a
        code added one of N is built into log2(N) structures at most, and as many are scanned.

        Args:
            codes: uint8 (N, M) or (N, ceil(M / 2)), those of this engine first.

        Raises:
            ValueError: if there are fewer codes than before, or a shape does not fit.
        """
        M, K, _ = self.codebook.shape
        codes = checked_codes(codes, M, K)
        if len(codes) < len(self.codes):
            raise ValueError(f"Invalid codes. Expected at least {len(self.codes)}. Received: {len(codes)}")
        if codes.dtype != np.uint8:
            codes = codes.astype(np.uint8)
        if K > _NIBBLE:
            return FaissEngine(self.codebook, self.metric, np.ascontiguousarray(codes), self.scans)
        scans, start = list(self.scans), len(self.codes)
        while start < len(codes) and scans and scans[-1].ntotal <= len(codes) - start:
            start -= scans.pop().ntotal
        if start < len(codes):
            scans.append(_fast_scan(codes[start:], M, K))
        return FaissEngine(self.codebook, self.metric, codes, tuple(scans))

    def __len__(self):
        return len(self.codes)

    def search(self, queries, k):
        """Find the k nearest codes of each query.

        Args:
            queries: float32 (Q, D), finite.
            k: int >= 1; may exceed the number of codes.

        Returns:
            distances: float32 (Q, k), lowest first, +inf past the end; bit for bit those of `PQIndex.search` for the
                codes returned, and at 99.9 % of the places or better those of its answer.
            positions: int64 (Q, k), rows of `codes`, -1 past the end; where many codes are equally far, which of them
                are returned is Faiss's choice, in rising order among those returned.

        Raises:
            ValueError: naming the row, if a query is so large that distances would overflow float32.
        """
        return self.search_with_proof(queries, k)[:2]

    def search_with_proof(self, queries, k):
        """`search`, and whether the distances are proved to be those of the k nearest.

        Returns:
            distances, positions: as `search`.
            proved: bool (Q,), whether no code that was not looked at can be nearer than the last of the k.
        """
        distances = np.full((len(queries), k), np.inf, np.float32)
        positions = np.full((len(queries), k), -1, np.int64)
        proved = np.ones(len(queries), bool)
        n_candidates = _FIRST_LOOK * k + _SPARE
        for rows in query_blocks(len(queries), self.codebook, n_candidates):
            table = checked_table(self.codebook, self.metric, queries, rows)
            self._look(table, n_candidates, distances[rows], positions[rows], proved[rows])
        again = np.flatnonzero(~proved)
        if len(self.codebook[0]) > _NIBBLE:
            return distances, positions, proved
        n_candidates *= _SECOND_LOOK
        for rows in query_blocks(len(again), self.codebook, n_candidates):
            chosen = again[rows]
            table = distance_table(queries[chosen], self.codebook, self.metric)
            found = distances[chosen], positions[chosen], proved[chosen]
            self._look(table, n_candidates, *found, farthest=distances[chosen, -1])
            distances[chosen], positions[chosen], proved[chosen] = found
        return distances, positions, proved

    def _look(self, table, n, distances, positions, proved, farthest=None):
        """Fill in the answers of a block of queries from n candidates, or from n of each of the scans."""
        M, K, _ = self.codebook.shape
        lookup = Lookup.of(table, farthest)
        parts, bound = [], np.full(table.shape[2], np.inf)
        for first, length, scan in self._ranges():
            if length <= n:
                parts.append(np.broadcast_to(np.arange(first, first + length), (table.shape[2], length)))
                continue
            if K <= _NIBBLE:
                seen, found = scan.search(lookup.query, n)
                seen = seen[:, -1] - lookup.constant
            else:
                seen, found = _search_tables(scan, lookup.negated, self.codes, n)
                seen = -seen[:, -1]
            parts.append(np.where(found < 0, -1, found + first))
            # What is no candidate is as far as the last candidate, as the scan sees it, or farther.
            bound = np.minimum(bound, seen)
        if parts:
            rerank(table, self.codes, np.concatenate(parts, axis=1), distances, positions)
            error = lookup.rounding + M * (0.5 + 1e-3) / 255 if K <= _NIBBLE else lookup.rounding
            proved[:] = lookup.scaled(distances[:, -1]) <= np.maximum(bound - error, 0)

    def _ranges(self):
        """(first position, number of codes, what scans them)."""
        if len(self.codebook[0]) > _NIBBLE:
            return [(0, len(self.codes), self.scans[0])] if len(self.codes) else []
        lengths = [scan.ntotal for scan in self.scans]
        firsts = np.cumsum([0, *lengths])[:-1].tolist()
        return list(zip(firsts, lengths, self.scans, strict=True))


@dataclass(frozen=True)
class Lookup:
    """Distance tables as the scans take them: per query shifted, scaled and negated.

    The lowest entry of each book becomes 0 and `unit` becomes 1, whatever the size of the query, so that nothing is
    lost to rounding beside a large constant.

    Attributes:
        n_books: int, M.
        negated: float32 (Q, M * K), in [-1, 0].
        lowest: float64 (Q,), the sum of the books' lowest entries: no distance is below it.
        unit: float64 (Q,), in distances.
        rounding: float64 (Q,), in units: how far float32 sums may be off.
    """

    n_books: int
    negated: np.ndarray
    lowest: np.ndarray
    unit: np.ndarray
    rounding: np.ndarray

    @classmethod
    def of(cls, table, farthest=None):
        """Scale the tables.

        Args:
            table: float32 (M, K, Q), from `distance_table`.
            farthest: float32 (Q,), distances that are near enough to look no farther: entries above are cut, as a code
                with such an entry is farther anyway, and the unit is smaller.
        """
        above = table.astype(np.float64)
        lowest = above.min(axis=1)
        above -= lowest[:, None]
        rounding = len(table) * 2.0**-23 * np.abs(table).max(axis=1).sum(axis=0, dtype=np.float64)
        unit = above.max(axis=(0, 1))
        if farthest is not None:
            unit = np.minimum(unit, farthest - lowest.sum(axis=0) + rounding)
        unit = np.maximum(unit, np.finfo(np.float32).tiny)  # all entries may be equal
        negated = -np.minimum(above / unit, 1).astype(np.float32)
        negated = np.ascontiguousarray(negated.transpose(2, 0, 1)).reshape(table.shape[2], -1)
        return cls(len(table), negated, lowest.sum(axis=0), unit, rounding / unit + len(table) ** 2 * 2.0**-23)

    @property
    def query(self):
        """float32 (Q, M * max(K - 1, 1)), whose squared distance to a code's `simplex_words` is the code's in units,
        plus `constant`.

        FastScan is not asked for inner products: from those Faiss 1.15 never returns a code whose every part is the
        farthest of its book. The words have fewer than 16 components, as Faiss would tabulate longer ones by a
        threaded matrix product, which delays a single query.
        """
        table = self._table
        # ||q - e_k||^2 - ||q||^2 = 1 - 2 q_k = t_k - t_0
        parts = (1 - (table[:, :, 1:] - table[:, :, :1])) / 2
        return np.ascontiguousarray(parts if parts.size else np.zeros_like(table)).reshape(len(table), -1)

    @property
    def constant(self):
        """float64 (Q,)."""
        return (self.query.astype(np.float64) ** 2).sum(axis=1) - self._table[:, :, 0].sum(axis=1, dtype=np.float64)

    @property
    def _table(self):
        return -self.negated.reshape(len(self.negated), self.n_books, -1)

    def scaled(self, distances):
        """Distances (Q,) in units above the lowest."""
        return (distances - self.lowest) / self.unit


def rerank(table, codes, candidates, distances, positions):
    """Sort candidates by their exact distances, ties by position.

    The distance is the float32 sum of table entries, first book first, as in `PQIndex.search`.

    Args:
        table: float32 (M, K, Q), from `distance_table`.
        codes: unsigned (N, M), or uint8 (N, ceil(M / 2)) with two codewords a byte.
        candidates: int64 (Q, n), different positions in a row, -1 for none.
        distances: float32 (Q, k), filled; places that no candidate takes become +inf.
        positions: int64 (Q, k), filled; -1 there.

    Example:
        >>> table = np.array([[[2.0], [1.0]]], np.float32)
        >>> distances, positions = np.empty((1, 3), np.float32), np.empty((1, 3), np.int64)
        >>> rerank(table, np.array([[0], [1], [1]], np.uint8), np.array([[2, 0, 1]]), distances, positions)
        >>> distances, positions
        (array([[1., 1., 2.]], dtype=float32), array([[1, 2, 0]]))
    """
    M, K, n_queries = table.shape
    candidates = np.sort(candidates, axis=1)  # in order of position, where a stable sort leaves ties
    words = codes[np.maximum(candidates, 0)]
    packed = words.shape[2] != M
    entries = np.ascontiguousarray(table.transpose(2, 0, 1)).ravel()
    offset = np.arange(0, n_queries * M * K, M * K, dtype=np.intp)[:, None]
    total = np.zeros(0, np.float32)
    for book in range(M):
        word = (words[:, :, book // 2] >> (4 * (book % 2))) & 15 if packed else words[:, :, book]
        term = entries.take(word + (offset + book * K))
        total = term if book == 0 else total + term
    total[candidates < 0] = np.inf
    order = np.argsort(total, axis=1, kind="stable")[:, : distances.shape[1]]
    n = order.shape[1]
    distances[:, :n], distances[:, n:] = np.take_along_axis(total, order, axis=1), np.inf
    positions[:, :n], positions[:, n:] = np.take_along_axis(candidates, order, axis=1), -1


def query_blocks(n_queries, codebook, n_candidates):
    """Slices of the queries, so small that tables and candidates stay bounded.

    Example:
        >>> query_blocks(600, np.empty((12, 16, 12)), 232)
        [slice(0, 512, None), slice(512, 600, None)]
    """
    widest = max(codebook.shape[0] * codebook.shape[1], n_candidates)
    size = min(_BLOCK_QUERIES, max(1, _BLOCK_ENTRIES // widest))
    return [slice(at, min(at + size, n_queries)) for at in range(0, n_queries, size)]


def unit_words(M, K):
    """Codewords whose inner products with a query are the query's own components.

    Returns:
        float32 (M, 256, K): unit vectors; what is above K is zero, and no code names it.

    Example:
        >>> unit_words(1, 2)[0, :3]
        array([[1., 0.],
               [0., 1.],
               [0., 0.]], dtype=float32)
    """
    words = np.zeros((FAISS_LARGEST_K, K), np.float32)
    np.fill_diagonal(words, 1)
    return np.broadcast_to(words, (M, FAISS_LARGEST_K, K))


def simplex_words(M, K):
    """Codewords from which a query can have squared distances of any K differences: the origin and unit vectors.

    Returns:
        float32 (M, 16, max(K - 1, 1)); above K the origin again, which no code names.

    Example:
        >>> simplex_words(1, 3)[0, :4]
        array([[0., 0.],
               [1., 0.],
               [0., 1.],
               [0., 0.]], dtype=float32)
    """
    words = np.zeros((_NIBBLE, max(K - 1, 1)), np.float32)
    words[np.arange(1, K), np.arange(K - 1)] = 1
    return np.broadcast_to(words, (M, _NIBBLE, words.shape[1]))


def packed_nibbles(codes, M):
    """Codes of K at most 16 as Faiss packs them.

    Args:
        codes: uint8 (N, M), or packed already.
        M: int.

    Returns:
        uint8 (N, ceil(M / 2)), contiguous, the first of two books in the low nibble.

    Example:
        >>> packed_nibbles(np.array([[1, 2, 3]], np.uint8), 3)
        array([[33,  3]], dtype=uint8)
    """
    if codes.shape[1] != M or M == 1:
        return np.ascontiguousarray(codes)
    packed = codes[:, ::2].copy()
    packed[:, : M // 2] |= codes[:, 1::2] << 4
    return packed


def _fast_scan(codes, M, K):
    """faiss.IndexPQFastScan of uint8 codes."""
    import faiss

    words = simplex_words(M, K)
    plain = faiss.IndexPQ(M * words.shape[2], M, 4, faiss.METRIC_L2)
    faiss.copy_array_to_vector(words.ravel(), plain.pq.centroids)
    plain.is_trained = True
    plain.add_sa_codes(packed_nibbles(codes, M))
    return faiss.IndexPQFastScan(plain)


def _unit_vector_quantizer(M, K):
    """faiss.ProductQuantizer of a byte a codeword, to scan codes where they lie."""
    import faiss

    quantizer = faiss.ProductQuantizer(M * K, M, 8)
    faiss.copy_array_to_vector(unit_words(M, K).ravel(), quantizer.centroids)
    return quantizer


def _search_tables(quantizer, negated, codes, n):
    """What IndexPQ.search does with its own copy of the codes."""
    import faiss

    similarities = np.empty((len(negated), n), np.float32)
    positions = np.empty((len(negated), n), np.int64)
    heap = faiss.float_minheap_array_t()
    heap.nh, heap.k = len(negated), n
    heap.val, heap.ids = faiss.swig_ptr(similarities), faiss.swig_ptr(positions)
    quantizer.search_ip(faiss.swig_ptr(negated), len(negated), faiss.swig_ptr(codes), len(codes), heap, True)
    return similarities, positions


def _as_faiss_packs(codes, M, n_bits):
    import faiss

    if n_bits == 8 or codes.shape[1] != M:
        return np.ascontiguousarray(codes)
    return faiss.pack_bitstrings(codes.astype(np.int32), n_bits)


def checked_codes(codes, M, K):
    codes = np.asarray(codes)
    widths = {M, (M + 1) // 2} if K <= _NIBBLE else {M}
    if codes.ndim != 2 or codes.shape[1] not in widths or codes.dtype.kind != "u":
        expected = f"(N, M={M})" + (f" or packed (N, {(M + 1) // 2})" if K <= _NIBBLE else "")
        raise ValueError(
            f"Invalid codes. Expected unsigned integers of shape {expected}. "
            f"Received: {codes.dtype}, shape {codes.shape}"
        )
    return codes


def _check_size(name, size, expected):
    if size != expected:
        raise ValueError(f"Invalid index. Expected {expected} values in {name}. Received: {size}")
