"""The exact engine: all distances, chunk by chunk, and of them the nearest, right to the last tied code.

Three ways to compute the distances were measured (benchmarks/exact_ways.py): decoding the codes and multiplying by the
queries, multiplying one-hot codes by the distance table, and adding up entries of the table that the codes look up.
Looking up is the fastest by far once the sum over the books is one loop, which XLA makes of it, and neighbouring
entries belong to different queries of the same codeword. It is also the definition: float32 sums, first book first.
NumPy adds in the same order and gets the same bits; small searches are left to it, since compiling takes longer.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpq_tf.index.snapshot import checked_table, stable_argsort

_WORKERS = min(8, os.cpu_count() or 1)
_BLOCK_QUERIES = 64  # answered together: one look-up then fetches 64 neighbouring entries of the table
_TABLE_ENTRIES = 2**24  # float32 entries of a table at most, 64 MiB, however many books and codewords
_CHUNK_CODES = 2**14  # codes whose distances are held at a time: 4 MiB for 64 queries
_NUMPY_CHUNK_CODES = 2**11  # the same for NumPy, whose sums should stay in the processor's cache
_GROUP_BOOKS = 16  # books of one compiled function: more would take long to compile
_COMPILED_FROM = 2**24  # distances; below, NumPy is done before a function is compiled
_SAMPLE = 16  # times k: distances of the first chunk from which the first limits are taken


def nearest(codebook, metric, rows, packed, queries, k):
    """The k nearest codes of each query.

    Memory is bounded whatever the number of codes: a chunk of distances for a block of queries, a few times over.

    Args:
        codebook: float32 (M, K, d).
        metric: str, one of `METRICS`.
        rows: unsigned (N, W), codes below K as `store.pack` makes them.
        packed: bool, whether two codewords share a byte.
        queries: float32 (Q, M * d), finite.
        k: int >= 1.

    Returns:
        distances: float32 (Q, k), lowest first, +inf past the end.
        positions: int64 (Q, k), rows; equal distances in order of rows, -1 past the end.

    Raises:
        ValueError: naming the row, if a query is so large that distances would overflow float32.
    """
    n_book, n_word, _ = codebook.shape
    distances = np.full((len(queries), k), np.inf, np.float32)
    positions = np.full((len(queries), k), -1, np.int64)
    compile_it = len(rows) * len(queries) >= _COMPILED_FROM
    size = min(_CHUNK_CODES if compile_it else _NUMPY_CHUNK_CODES, _power_of_two(len(rows)))
    block = min(_BLOCK_QUERIES, _power_of_two(len(queries)), max(1, _TABLE_ENTRIES // (n_book * n_word)))
    blocks = [slice(at, min(at + block, len(queries))) for at in range(0, len(queries), block)]

    def fill(inside):
        table = checked_table(codebook, metric, queries, inside)
        # Filled up to a whole block, so that compiled functions see few shapes.
        table = np.pad(table, ((0, 0), (0, 0), (0, block - table.shape[2])))
        sums = (_compiled_sums if compile_it else _numpy_sums)(table, packed)
        found = _chunks(rows, sums, size, inside.stop - inside.start)
        _nearest_of_chunks(found, distances[inside], positions[inside])

    if len(blocks) < 2:
        for inside in blocks:
            fill(inside)
    else:
        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(fill, blocks))
    return distances, positions


def _chunks(rows, sums, size, n_queries):
    """Yield (position of the first, float32 (n, n_queries) distances) for `size` codes at a time."""
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        n = len(chunk)
        if n < size:
            chunk = np.concatenate([chunk, np.zeros((size - n, rows.shape[1]), rows.dtype)])
        yield first, sums(chunk)[:n, :n_queries]


def _numpy_sums(table, packed):
    def sums(chunk):
        total = np.zeros((len(chunk), table.shape[2]), np.float32)
        for book in range(len(table)):
            total += table[book].take(_words(chunk, book, packed, np.right_shift).astype(np.intp), axis=0)
        return total

    return sums


def _compiled_sums(table, packed):
    from keras import ops

    groups = [slice(at, at + _GROUP_BOOKS) for at in range(0, len(table), _GROUP_BOOKS)]
    tables = [ops.convert_to_tensor(table[group]) for group in groups]
    add, zeros = _compiled_add(packed), np.zeros((1, table.shape[2]), np.float32)

    def sums(chunk):
        total = zeros  # of one row: filling and handing over one for every code would take longer than the sums
        for group, part in zip(groups, tables, strict=True):
            columns = slice(group.start // 2, (group.stop + 1) // 2) if packed else group
            total = add(total, chunk[:, columns], part)
        return ops.convert_to_numpy(total)

    return sums


@functools.cache
def _compiled_add(packed):
    """add(total (n or 1, q), some books' columns of n rows, their table (m, K, q)) -> total plus entries (n, q)."""
    from keras import ops

    from gpq_tf.ops import compiled

    def add(total, rows, table):
        rows = ops.cast(rows, "int32")
        for book in range(table.shape[0]):
            total = total + ops.take(table[book], _words(rows, book, packed, ops.right_shift), axis=0)
        return total

    return compiled(add)


def _words(rows, book, packed, right_shift):
    """The codewords of one book, (n,)."""
    if not packed:
        return rows[:, book]
    pair = rows[:, book // 2]
    return right_shift(pair, 4) if book % 2 else pair & 15


def _nearest_of_chunks(chunks, best, positions):
    """Fill the lists of the nearest, `best` and `positions` (q, k), from chunks of distances (n, q)."""
    n_queries, k = best.shape
    waiting, n_waiting = [], 0
    for first, found in chunks:
        limits = best[:, -1]
        if len(found) > k and np.isinf(limits).any():
            # Lists that are not yet full would take everything, but none farther than the k-th of some can stay.
            kth = np.partition(found[: _SAMPLE * k].T, k - 1, axis=1)[:, k - 1]
            limits = np.minimum(limits, np.nextafter(kth, np.float32(np.inf)))
        # Of equal distances the earlier stays, so that only smaller ones get in.
        places = np.flatnonzero(found < limits)
        rows, queries = np.divmod(places, n_queries)
        waiting.append((queries, first + rows, found[rows, queries]))
        n_waiting += len(places)
        if n_waiting >= n_queries * k:  # the limits are tightened about once for every doubling of what was seen
            _merge(waiting, best, positions)
            waiting, n_waiting = [], 0
    if n_waiting:
        _merge(waiting, best, positions)


def _merge(waiting, best, positions):
    """Let what waits, (query, position, distance) in order of position, into the lists of the nearest."""
    queries, rows, found = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
    order = np.argsort(queries, kind="stable")
    ends = np.searchsorted(queries[order], np.arange(len(best) + 1))
    for query in np.flatnonzero(np.diff(ends)):
        these = order[ends[query] : ends[query + 1]]
        distances = np.concatenate([best[query], found[these]])
        keep = stable_argsort(distances)[: best.shape[1]]
        best[query] = distances[keep]
        positions[query] = np.concatenate([positions[query], rows[these]])[keep]


def _power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
