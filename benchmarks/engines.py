"""The searches that the benchmarks compare, of the same codebook and codes: how each is built, kept in a file, used.

What is compared answers by inner product. "exact", "faiss" and "lists" are PQIndex: its two engines, and 16 inverted
lists a query. The others are Faiss's own indexes with our codewords, and ScaNN, which takes no codewords: it gets what
our codes stand for and learns as many books and codewords of its own.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from clustered_codes import exact_distances, unpacked

METRIC, N_PROBE = "inner_product", 16
# Distances a batch at most; what is not named gets all the queries. Faiss scans K = 256 slowly as well.
SLOW = {"exact": 4e8, "IndexPQ": 4e8}
SLOW_256 = {**SLOW, "faiss": 4e8}
_CHUNK = 100_000


@dataclass(frozen=True)
class Engine:
    """One way to search.

    Attributes:
        build: callable(codebook (M, K, d), packed codes (n, W)) -> index.
        search: callable(index, queries, k) -> (distances or similarities, positions), each (Q, k).
        write: callable(index, path).
        read: callable(path) -> index.
        Ks: tuple of int, numbers of codewords that it serves.
    """

    build: Callable
    search: Callable
    write: Callable
    read: Callable
    Ks: tuple = (16, 256)


def _pq_index(engine, **how):
    from gpq_tf.index import PQIndex

    def build(codebook, codes):
        index = PQIndex(codebook, METRIC, engine=engine)
        for at in range(0, len(codes), _CHUNK):
            index.add(unpacked(codes[at : at + _CHUNK], len(codebook)))
        return index

    return Engine(
        build,
        search=lambda index, queries, k: index.search(queries, k, **how),
        write=lambda index, path: index.save(path),
        read=lambda path: PQIndex.load(path, engine=engine),
    )


def _faiss(make, **how):
    import faiss

    return Engine(
        make,
        search=lambda index, queries, k: index.search(queries, k),
        write=lambda index, path: faiss.write_index(index, str(path)),
        read=lambda path: faiss.read_index(str(path)),
        **how,
    )


def _index_pq(codebook, codes):
    from gpq_tf.index.faiss_engine import to_faiss

    return to_faiss(codebook, METRIC, codes)


def _fast_scan(codebook, codes):
    import faiss

    return faiss.IndexPQFastScan(_index_pq(codebook, codes))


def _scann():
    from scann import scann_ops_pybind

    def build(codebook, codes):
        M, K, d = codebook.shape
        decoded = np.empty((len(codes), M * d), np.float32)
        for at in range(0, len(codes), _CHUNK):
            words = unpacked(codes[at : at + _CHUNK], M)
            decoded[at : at + _CHUNK] = codebook[np.arange(M), words].reshape(len(words), M * d)
        builder = scann_ops_pybind.builder(decoded, 100, "dot_product")
        return builder.score_ah(d, hash_type="lut16" if K == 16 else "lut256").build()

    def search(index, queries, k):
        if len(queries) == 1:
            positions, similarities = index.search(queries[0], k)
            return similarities[None], positions[None]
        positions, similarities = index.search_batched_parallel(queries, k)
        return similarities, positions

    def write(index, path):
        path.mkdir()
        index.serialize(str(path))

    return Engine(build, search, write, read=lambda path: scann_ops_pybind.load_searcher(str(path)))


def engine(name):
    """Engine, by its name in the results."""
    made = {
        "exact": lambda: _pq_index("exact"),
        "faiss": lambda: _pq_index("faiss"),
        "lists": lambda: _pq_index("faiss", n_probe=N_PROBE),
        "IndexPQ": lambda: _faiss(_index_pq),
        "IndexPQFastScan": lambda: _faiss(_fast_scan, Ks=(16,)),
        "ScaNN, its own codewords": _scann,
    }
    return made[name]()


def scann_is_there():
    """Import ScaNN; bool, whether it is installed.

    ScaNN loads operations for TensorFlow where it finds one, and fails where that is not the version it was built
    for. Its Python interface needs none.
    """
    if importlib.util.find_spec("scann") is None:
        return False
    tensorflow = sys.modules.get("tensorflow")
    sys.modules["tensorflow"] = None
    try:
        import scann  # noqa: F401
    finally:
        del sys.modules["tensorflow"]
        if tensorflow is not None:
            sys.modules["tensorflow"] = tensorflow
    return True


def batch_size(name, K, n, most):
    """int, how many queries a batch has: so many that slow engines take seconds, not minutes, among n codes."""
    slow = SLOW if K == 16 else SLOW_256
    return int(np.clip(slow.get(name, np.inf) / n, min(20, most), most))


def seconds(function, *arguments):
    """Wall time of a call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def share_right(codebook, words, queries, found):
    """float, the share of places whose code is as far as the exact answer's at that place.

    Args:
        codebook: float32 (M, K, d).
        words: unsigned (n, M), unpacked codes.
        queries: float32 (Q, M * d).
        found: integer (Q, k), positions; below 0 for none.
    """
    return float(np.mean([reached <= nearest for reached, nearest in _compared(codebook, words, queries, found)]))


def recall(codebook, words, queries, found):
    """float, the share of the k found that are among the k nearest, or as far as the last of them."""
    return float(np.mean([reached <= nearest[-1] for reached, nearest in _compared(codebook, words, queries, found)]))


def _compared(codebook, words, queries, found):
    """Yield the distances of what was found and of what is nearest, lowest first, for each query."""
    for query, positions in zip(queries, found, strict=True):
        distances = exact_distances(codebook, METRIC, words, query)
        k = min(len(positions), len(distances))
        reached = np.sort(np.where(positions < 0, np.inf, distances[positions]))
        yield reached[:k], np.sort(np.partition(distances, k - 1)[:k])


def memory_mb(field):
    """float, MB of this process: "VmRSS" what it holds, "VmHWM" the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def forget_peak():
    """Begin the peak of memory anew."""
    Path("/proc/self/clear_refs").write_text("5")
