"""Inverted lists over learned codes: a search that looks at a small part of a large gallery."""

import math
from dataclasses import dataclass

import numpy as np

from gpq_tf.index.arguments import FAISS_LARGEST_K, checked_codebook, checked_metric, checked_positive
from gpq_tf.index.faiss_engine import (
    Lookup,
    checked_codes,
    packed_nibbles,
    query_blocks,
    rerank,
    simplex_words,
    unit_words,
)
from gpq_tf.index.snapshot import checked_table

_NIBBLE = 16
_SAMPLES_PER_LIST = 40  # Faiss's own advice for k-means
_CHUNK_VALUES = 2**23  # decoded values held at a time
_FAST_SCAN_BLOCK = 32  # codes; Faiss fills every list up to a multiple
_SPARE = 32


@dataclass(frozen=True)
class InvertedLists:
    """Codes in lists by what they decode to; a query looks into the nearest lists only.

    The inverted file of Jegou, Douze and Schmid ("Product Quantization for Nearest Neighbor Search", TPAMI 2011), but
    over codes that exist: the centroids come from k-means on decoded codes, and a list holds whole codes, no residuals.
    So the codebook stays the learned one, and a code's distance does not depend on its list. A list is as far as its
    centroid. Faiss scans the chosen lists (see `FaissEngine`: FastScan for K up to 16, float tables up to 256), and the
    2 k candidates are sorted by their exact distances.

    Nothing here is changed by `search` or `extended`: threads may share it.

    Attributes:
        codebook: float32 (M, K, d).
        metric: str, as in `PQIndex`.
        codes: uint8 (N, M), or (N, ceil(M / 2)) with two codewords a byte. Not copied: do not change them.
        centroids: float32 (L, D), of the L lists.
        lists: int32 (N,), the list of each code.
        scan: faiss.IndexIVFPQFastScan; for K above 16 faiss.IndexIVFPQ. Holds a copy of the codes, and 8 bytes a code
            for its position.

    Example:
        >>> codebook = np.array([[[1.0, 0.0], [0.0, 1.0]]], np.float32)
        >>> lists = InvertedLists.of(codebook, "l2", np.array([[0], [1], [1]], np.uint8), n_lists=2)
        >>> lists.search(np.array([[0.0, 1.0]], np.float32), k=3, n_probe=1)
        (array([[ 0.,  0., inf]], dtype=float32), array([[ 1,  2, -1]]))
    """

    codebook: np.ndarray
    metric: str
    codes: np.ndarray
    centroids: np.ndarray
    lists: np.ndarray
    scan: object

    @classmethod
    def of(cls, codebook, metric, codes, n_lists=None):
        """Learn centroids of some codes and sort the codes into lists.

        Args:
            codebook: float (M, K, d), K at most 256.
            metric: str, one of `METRICS`.
            codes: unsigned (N, M), values below K, or packed as in the attribute.
            n_lists: int >= 1, at most N; None for the square root of N, rounded down.

        Raises:
            ValueError: if K is larger, the metric is unknown, a shape does not fit or n_lists is not from 1 to N.
        """
        codebook, metric = checked_codebook(codebook), checked_metric(metric)
        M, K, d = codebook.shape
        if K > FAISS_LARGEST_K:
            raise ValueError(f"Invalid lists. Expected K at most {FAISS_LARGEST_K} for Faiss's scans. Received: K={K}")
        codes = checked_codes(codes, M, K).astype(np.uint8, copy=False)
        if len(codes) == 0:
            nothing = np.empty((0, M * d), np.float32), np.empty(0, np.int32), None
            return cls(codebook, metric, codes, *nothing)
        n_lists = math.isqrt(len(codes)) if n_lists is None else n_lists
        if not 1 <= n_lists <= len(codes):
            raise ValueError(f"Invalid n_lists. Expected 1 to N={len(codes)}. Received: n_lists={n_lists}")
        centroids = _centroids(codebook, codes, n_lists)
        lists = _nearest_centroids(codebook, codes, centroids)
        return cls(codebook, metric, codes, centroids, lists, _lists_of_codes(codebook, codes, lists, n_lists))

    def extended(self, codes):
        """Lists of `codes`, of which these are the first; this one stays as it is.

        Only the new codes look for their lists; all are then sorted into lists anew, which is a small part of the time
        that learning took. The centroids are kept while there are at least half as many as `of` would learn; so once
        there are four times the codes they are learned again.

        Args:
            codes: uint8 (N, M) or (N, ceil(M / 2)), those already here first.

        Raises:
            ValueError: if there are fewer codes than before, or a shape does not fit.
        """
        codes = checked_codes(codes, *self.codebook.shape[:2]).astype(np.uint8, copy=False)
        if len(codes) < len(self.codes):
            raise ValueError(f"Invalid codes. Expected at least {len(self.codes)}. Received: {len(codes)}")
        if 2 * len(self.centroids) <= math.isqrt(len(codes)):
            return InvertedLists.of(self.codebook, self.metric, codes)
        new = _nearest_centroids(self.codebook, codes[len(self.codes) :], self.centroids)
        lists = np.concatenate([self.lists, new])
        scan = _lists_of_codes(self.codebook, codes, lists, len(self.centroids))
        return InvertedLists(self.codebook, self.metric, codes, self.centroids, lists, scan)

    def __len__(self):
        return len(self.codes)

    @property
    def nbytes(self):
        """int, bytes of memory beside `codes`, which are not copied here but in `scan`."""
        M, K, _ = self.codebook.shape
        lengths = np.bincount(self.lists)
        if K <= _NIBBLE:
            lengths = -(-lengths // _FAST_SCAN_BLOCK) * _FAST_SCAN_BLOCK
        copied = int(lengths.sum()) * ((M + 1) // 2 if K <= _NIBBLE else M) + 8 * len(self.codes)
        return self.centroids.nbytes + self.lists.nbytes + copied

    def search(self, queries, k, n_probe):
        """Find the k nearest codes of the n_probe nearest lists of each query.

        Args:
            queries: float32 (Q, D), finite.
            k: int >= 1.
            n_probe: int >= 1, lists looked into; above their number means all.

        Returns:
            distances: float32 (Q, k), lowest first, bit for bit those of `PQIndex.search` for the codes returned; +inf
                where the lists hold fewer than k codes.
            positions: int64 (Q, k), rows of `codes`; -1 there.

        Raises:
            ValueError: naming the row, if a query is so large that distances would overflow float32; if n_probe is
                not a positive integer.
        """
        n_probe = min(checked_positive("n_probe", n_probe), len(self.centroids))
        distances = np.full((len(queries), k), np.inf, np.float32)
        positions = np.full((len(queries), k), -1, np.int64)
        if len(self.codes) == 0:
            return distances, positions
        K = self.codebook.shape[1]
        n_candidates = min(2 * k + _SPARE, len(self.codes))
        for rows in query_blocks(len(queries), self.codebook, max(n_candidates, len(self.centroids))):
            table = checked_table(self.codebook, self.metric, queries, rows)
            probed = _nearest_lists(queries[rows], self.centroids, self.metric, n_probe)
            lookup = Lookup.of(table)
            found = self._scan(lookup.query if K <= _NIBBLE else lookup.negated, n_candidates, probed)
            rerank(table, self.codes, found, distances[rows], positions[rows])
        return distances, positions

    def _scan(self, unit_queries, n, probed):
        """int64 (Q, n): positions of candidates, -1 for none."""
        import faiss

        seen = np.empty((len(probed), n), np.float32)
        positions = np.empty((len(probed), n), np.int64)
        no_coarse = np.zeros(probed.shape, np.float32)  # codes are whole: the centroid adds nothing to a distance
        # Faiss's Python wrapper takes the number of lists from an attribute, which threads would share.
        parameters = faiss.IVFSearchParameters(nprobe=probed.shape[1])
        arrays = (faiss.swig_ptr(array) for array in (probed, no_coarse, seen, positions))
        self.scan.search_preassigned_c(len(probed), faiss.swig_ptr(unit_queries), n, *arrays, False, parameters)
        return positions


def _centroids(codebook, codes, n_lists):
    """float32 (L, D): k-means of a sample of decoded codes."""
    import faiss

    n = min(len(codes), n_lists * _SAMPLES_PER_LIST)
    sample = np.random.default_rng(0).choice(len(codes), n, replace=False)
    sample.sort()
    clustering = faiss.Clustering(codebook.shape[0] * codebook.shape[2], n_lists)
    clustering.niter = 10
    clustering.min_points_per_centroid = 1  # or it warns on standard error
    clustering.max_points_per_centroid = _SAMPLES_PER_LIST
    clustering.train(_decoded(codebook, codes[sample]), faiss.IndexFlatL2(clustering.d))
    return faiss.vector_to_array(clustering.centroids).reshape(n_lists, clustering.d)


def _nearest_centroids(codebook, codes, centroids):
    """int32 (N,): the centroid nearest to each decoded code."""
    import faiss

    flat = faiss.IndexFlatL2(centroids.shape[1])
    flat.add(centroids)
    lists = np.empty(len(codes), np.int32)
    chunk = max(1, _CHUNK_VALUES // centroids.shape[1])
    for at in range(0, len(codes), chunk):
        lists[at : at + chunk] = flat.search(_decoded(codebook, codes[at : at + chunk]), 1)[1][:, 0]
    return lists


def _nearest_lists(queries, centroids, metric, n_probe):
    """int64 (Q, n_probe): the lists whose centroids are nearest, nearest first.

    By inner product, or by squared Euclidean distance: also for "l2", as the sum of distances takes a square root a
    book, many times the work, and finds no better lists.
    """
    distances = -(queries @ centroids.T)
    if metric != "inner_product":
        distances = (centroids**2).sum(axis=1) + 2 * distances
    nearest = np.argpartition(distances, n_probe - 1, axis=1)[:, :n_probe]
    order = np.argsort(np.take_along_axis(distances, nearest, axis=1), axis=1)
    return np.ascontiguousarray(np.take_along_axis(nearest, order, axis=1), np.int64)


def _lists_of_codes(codebook, codes, lists, n_lists):
    """Faiss's inverted lists of codes as they are, with words as in `FaissEngine`."""
    import faiss

    M, K, _ = codebook.shape
    if K <= _NIBBLE:
        n_bits, words, metric = 4, simplex_words(M, K), faiss.METRIC_L2
    else:
        n_bits, words, metric = 8, unit_words(M, K), faiss.METRIC_INNER_PRODUCT
    # Faiss asks for something that assigns queries to lists; we pass each query's lists with it.
    nothing = faiss.IndexFlat(M * words.shape[2], metric)
    plain = faiss.IndexIVFPQ(nothing, nothing.d, n_lists, M, n_bits, metric)
    plain.by_residual = False
    faiss.copy_array_to_vector(words.ravel(), plain.pq.centroids)
    plain.is_trained = True
    order = np.argsort(lists, kind="stable")
    ends = np.cumsum(np.bincount(lists, minlength=n_lists))
    for number, positions in enumerate(np.split(order, ends[:-1])):
        members = codes[positions]
        members = packed_nibbles(members, M) if K <= _NIBBLE else np.ascontiguousarray(members)
        plain.invlists.add_entries(number, len(positions), faiss.swig_ptr(positions), faiss.swig_ptr(members))
    plain.ntotal = len(codes)
    if K > _NIBBLE:
        return plain
    fast = faiss.IndexIVFPQFastScan(plain)
    fast.referenced_objects = [nothing]  # as Faiss's own wrappers keep what the C++ side points to
    return fast


def _decoded(codebook, codes):
    """float32 (n, D): the codewords that codes stand for."""
    M, _, d = codebook.shape
    if codes.shape[1] != M:
        words = np.empty((len(codes), M), np.uint8)
        words[:, ::2], words[:, 1::2] = codes & 15, codes[:, : M // 2] >> 4
        codes = words
    return codebook[np.arange(M), codes].reshape(len(codes), M * d)
