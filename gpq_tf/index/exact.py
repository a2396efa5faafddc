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

from gpq_tf.index.snapshot import checked_table, sortable_bits

_WORKERS = min(8, os.cpu_count() or 1)
_BLOCK_QUERIES = 64  # answered together: one look-up then fetches 64 neighbouring entries of the table
_TABLE_ENTRIES = 2**24  # float32 entries of a table at most, 64 MiB, however many books and codewords
_CHUNK_CODES = 2**14  # codes whose distances are held at a time: 4 MiB for 64 queries
_NUMPY_CHUNK_ENTRIES = 2**16  # distances NumPy holds at a time, which should stay in the processor's cache
_NUMPY_CHUNK_CODES = (2**11, 2**15)  # the fewest and the most codes: below, calls take longer than sums
_GROUP_BOOKS = 16  # books of one compiled function: more would take long to compile
_COMPILED_FROM = 2**24  # distances; below, NumPy is done before a function is compiled
_SAMPLE = 16  # times k: distances of the first chunk from which the first limits are taken
_EXPECTED = 64  # of the k nearest in a sample from all codes, which tells about how far they reach
_LIST_ENTRIES = 2**22  # places in the lists of queries that are answered together


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
    compile_it = len(rows) * len(queries) >= _COMPILED_FROM
    most = max(1, min(_BLOCK_QUERIES, _TABLE_ENTRIES // (n_book * n_word), _LIST_ENTRIES // k))
    block = min(1 << (most.bit_length() - 1), _power_of_two(len(queries)))
    fewest, most = _NUMPY_CHUNK_CODES
    size = _CHUNK_CODES if compile_it else min(most, max(fewest, _NUMPY_CHUNK_ENTRIES // block))
    size = min(size, _power_of_two(len(rows)))
    blocks = [slice(at, min(at + block, len(queries))) for at in range(0, len(queries), block)]
    distances = np.empty((len(queries), k), np.float32)
    positions = np.empty((len(queries), k), np.int64)

    def of_block(inside):
        """A function that fills lists of the nearest, (n, k) each, from codes first to last."""
        table = checked_table(codebook, metric, queries, inside)
        # Filled up to a whole block, so that compiled functions see few shapes.
        table = np.pad(table, ((0, 0), (0, 0), (0, block - table.shape[2])))
        sums = (_compiled_sums if compile_it else _numpy_sums)(table, packed)
        n_queries = inside.stop - inside.start

        def fill(best, at, first=0, last=None):
            part = rows[first:last]
            no_ceiling = np.full(n_queries, np.inf, np.float32)
            for ceiling in (_ceiling(part, sums, size, n_queries, k), no_ceiling):
                if ceiling is None:
                    continue
                best[:], at[:] = np.inf, -1
                _nearest_of_chunks(_chunks(part, first, sums, size, n_queries), best, at, ceiling)
                if np.isfinite(best).all():  # otherwise the sample misled, or there are fewer than k
                    break
            return best, at

        return fill

    def answer(inside):
        of_block(inside)(distances[inside], positions[inside])

    if len(blocks) >= _WORKERS:
        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(answer, blocks))
    elif compile_it:  # the workers share the codes; NumPy's sums would wait for one another
        bounds = [len(rows) * part // _WORKERS for part in range(_WORKERS + 1)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            for inside in blocks:
                fill, shape = of_block(inside), distances[inside].shape
                lists = [(np.empty(shape, np.float32), np.empty(shape, np.int64)) for _ in range(_WORKERS)]
                found = list(pool.map(fill, *zip(*lists, strict=True), bounds[:-1], bounds[1:]))
                distances[inside], positions[inside] = _joined(found)
    else:
        for inside in blocks:
            answer(inside)
    return distances, positions


def _joined(parts):
    """The nearest of the nearest in parts of the codes, which come in order."""
    (best, positions), *others = parts
    for distances, rows in others:
        queries, places = np.nonzero(rows >= 0)
        if len(queries):
            _merge([(queries, rows[queries, places], distances[queries, places])], best, positions)
    return best, positions


def _chunks(rows, first, sums, size, n_queries):
    """Yield (position, float32 (n, n_queries) distances) for `size` codes at a time, the first at position `first`."""
    for at in range(0, len(rows), size):
        yield first + at, _distances(rows[at : at + size], sums, size, n_queries)


def _distances(chunk, sums, size, n_queries):
    """float32 (n, n_queries), of at most `size` codes, filled up to as many since `sums` may be compiled."""
    n = len(chunk)
    if n < size:
        chunk = np.concatenate([chunk, np.zeros((size - n, chunk.shape[1]), chunk.dtype)])
    return sums(chunk)[:n, :n_queries]


def _ceiling(rows, sums, size, n_queries, k):
    """float32 (n_queries,), below which the k nearest are thought to be; None where a chunk is too small a sample.

    With it nearly nothing is taken that does not stay; without, limits are tightened chunk by chunk.
    """
    n = _EXPECTED * len(rows) // k
    if n > size or len(rows) <= 2 * size or k > len(rows) // 8:
        return None
    sample = _distances(rows[:: len(rows) // n][:n], sums, _power_of_two(n), n_queries)
    rank = _EXPECTED + 4 * int(_EXPECTED**0.5)  # four deviations of a Poisson variable
    return _just_above(np.partition(sample.T, rank, axis=1)[:, rank])


def _numpy_sums(table, packed):
    if packed:  # tables that are looked up by whole bytes, so that these need not be taken apart
        table = np.pad(table, ((0, 0), (0, 16 - table.shape[1]), (0, 0)))
        table = [part.repeat(16, axis=0) if book % 2 else np.tile(part, (16, 1)) for book, part in enumerate(table)]

    def sums(chunk):
        total = np.zeros((len(chunk), table[0].shape[1]), np.float32)
        for book, part in enumerate(table):
            if not (packed and book % 2):
                entries = chunk[:, book // 2 if packed else book].astype(np.intp)
            total += part.take(entries, axis=0)
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
            total = total + ops.take(table[book], _words(rows, book, packed), axis=0)
        return total

    return compiled(add)


def _words(rows, book, packed):
    """The codewords of one book, (n,)."""
    from keras import ops

    if not packed:
        return rows[:, book]
    pair = rows[:, book // 2]
    return ops.right_shift(pair, 4) if book % 2 else pair & 15


def _nearest_of_chunks(chunks, best, positions, ceiling):
    """Fill the lists of the nearest, `best` and `positions` (q, k), from chunks of distances (n, q).

    Only distances below `ceiling` (q,) are considered.
    """
    n_queries, k = best.shape
    waiting, n_waiting = [], 0
    for first, found in chunks:
        limits = np.minimum(best[:, -1], ceiling)
        if len(found) > k and np.isinf(limits).any():
            # Lists that are not yet full would take everything, but none farther than the k-th of some can stay.
            limits = np.minimum(limits, _just_above(np.partition(found[: _SAMPLE * k].T, k - 1, axis=1)[:, k - 1]))
        # Of equal distances the earlier stays, so that only smaller ones get in.
        places = np.flatnonzero(found < limits)
        rows, queries = np.divmod(places, n_queries)
        waiting.append((queries, first + rows, found[rows, queries]))
        n_waiting += len(places)
        if n_waiting >= 2 * n_queries * k:  # the limits are tightened about once for every doubling of what was seen
            _merge(waiting, best, positions)
            waiting, n_waiting = [], 0
    if n_waiting:
        _merge(waiting, best, positions)


def _merge(waiting, best, positions):
    """Let what waits, (query, position, distance) in order of position, into the lists of the nearest.

    All lists are sorted together, by keys that hold the query, the distance and the place in that order.
    """
    n_queries, k = best.shape
    lists = np.repeat(np.arange(n_queries), k), positions.ravel(), best.ravel()
    queries, rows, found = (np.concatenate(parts) for parts in zip(lists, *waiting, strict=True))
    place_bits = np.uint64(32 - (n_queries - 1).bit_length())
    keys = queries.astype(np.uint64) << np.uint64(32) | sortable_bits(found)
    keys = keys << place_bits | np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    n_of_query = np.bincount(queries, minlength=n_queries)
    nearest = keys[(np.cumsum(n_of_query) - n_of_query)[:, None] + np.arange(k)]
    nearest = (nearest & ((np.uint64(1) << place_bits) - np.uint64(1))).astype(np.intp)
    best[:], positions[:] = found[nearest], rows[nearest]


def _just_above(distances):
    return np.nextafter(distances, np.float32(np.inf))


def _power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
