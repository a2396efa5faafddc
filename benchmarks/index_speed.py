"""Top-100 among many codes: our engines beside Faiss's own indexes of the same codebook and codes.

    python benchmarks/index_speed.py [--large] [--bits 48|64]

54,000 and 1,000,000 codes of 48 bits (12 books of 16 words) and of 64 bits (8 books of 256 words); --large adds
10,000,000; --bits measures one kind and leaves the other's figures. Prints a line for each engine and writes
benchmarks/results/index_speed.json: seconds for a batch of queries and for one (medians; the engines take turns, so
that a ratio compares what ran side by side), the share of places whose distance is the exact one, and the memory that
a process grows by from its imports on, codes included. How the codes are made: clustered_codes.py. The slow engines
get fewer queries; throughput is per query.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from clustered_codes import clustered_codes, exact_distances, unpacked

K_NEAREST, METRIC = 100, "inner_product"
KINDS = {"48 bits": (12, 16, 12), "64 bits": (8, 256, 16)}
N_QUERY, N_ORACLE, N_SINGLE, N_ROUND = 1000, 20, 7, 3
SLOW = {"exact": 1e8, "IndexPQ": 4e8}  # distances a batch at most; others get all the queries
SLOW_64 = {"faiss engine": 4e8}
RESULT = Path(__file__).parent / "results" / "index_speed.json"


def engines(codebook, codes, exact):
    """name -> a function that builds the engine and returns its search(queries, k), values first."""
    import faiss

    from gpq_tf.index import PQIndex
    from gpq_tf.index.faiss_engine import FaissEngine, to_faiss

    def exact_engine():
        index = PQIndex(codebook, METRIC)
        index.add(unpacked(codes, len(codebook)))
        return index.search

    def fast_scan():
        plain = to_faiss(codebook, METRIC, codes)
        return faiss.IndexPQFastScan(plain).search

    made = {
        "faiss engine": lambda: FaissEngine.of(codebook, METRIC, codes).search,
        "IndexPQ": lambda: to_faiss(codebook, METRIC, codes).search,
    }
    if codebook.shape[1] == 16:
        made["IndexPQFastScan"] = fast_scan
    if exact:
        made["exact"] = exact_engine
    return made


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def share_right(codebook, codes, queries, found):
    """Share of places whose code is as far as the exact answer's."""
    right = []
    for query, positions in zip(queries, found, strict=True):
        distances = exact_distances(codebook, METRIC, codes, query)
        nearest = np.sort(np.partition(distances, K_NEAREST)[:K_NEAREST])
        right.append(np.sort(distances[positions]) == nearest)
    return float(np.mean(right))


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def grown_memory(name, path):
    """Run in a process of its own: MB that the codes and an engine of them add to the imports."""
    import faiss  # noqa: F401

    import gpq_tf.index.faiss_engine  # noqa: F401

    before = resident_mb()
    with np.load(path) as arrays:
        codebook, codes, queries = arrays["codebook"], arrays["codes"], arrays["queries"]
    search = engines(codebook, codes, exact=True)[name]()
    built = resident_mb() - before
    search(queries[:8], K_NEAREST)
    print(round(built, 2), round(resident_mb() - before, 2), round(codes.nbytes / 1e6, 2))


def measured(kind, n, codebook, all_codes, queries):
    codes = all_codes[:n]
    M = len(codebook)
    made, built = {}, {}
    for name, build in engines(codebook, codes, exact=n <= 1_000_000).items():
        start = time.perf_counter()
        made[name] = build()
        built[name] = time.perf_counter() - start
    slow = SLOW | (SLOW_64 if kind == "64 bits" else {})
    batches = {name: queries[: int(np.clip(slow.get(name, np.inf) / n, 20, N_QUERY))] for name in made}
    for search in made.values():
        search(queries[:2], K_NEAREST)
    batch, single = {name: [] for name in made}, {name: [] for name in made}
    for _ in range(N_ROUND):
        for name, search in made.items():
            batch[name].append(seconds(search, batches[name], K_NEAREST) / len(batches[name]))
            single[name] += [seconds(search, queries[i : i + 1], K_NEAREST) for i in range(N_SINGLE)]
    words = unpacked(codes, M)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "codes.npz")
        np.savez(path, codebook=codebook, codes=codes, queries=queries[:8])
        memory = {}
        for name in made:
            command = [sys.executable, __file__, "--memory", name, path]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            memory[name] = [float(value) for value in output.split()]
    rows = {}
    for name, search in made.items():
        per_query = statistics.median(batch[name])
        grown, searched, packed = memory[name]
        rows[name] = {
            "queries_per_s": round(1 / per_query, 1),
            "Gcodes_per_s": round(n / per_query / 1e9, 3),
            "one_query_ms": round(1e3 * statistics.median(single[name]), 3),
            "build_s": round(built[name], 3),
            "share_right": round(
                share_right(codebook, words, queries[:N_ORACLE], search(queries[:N_ORACLE], K_NEAREST)[1]), 5
            ),
            "queries_a_batch": len(batches[name]),
            "memory_MB": searched,
            "memory_built_MB": grown,
            "memory_ratio": round(searched / packed, 2),
        }
        for other in ("IndexPQ", "IndexPQFastScan"):
            if other in batch and other != name:
                ratios = [b / a for a, b in zip(batch[name], batch[other], strict=True)]
                rows[name][f"times_{other}"] = round(statistics.median(ratios), 2)
        print(f"{kind} {n:>9,} {name:16}", *(f"{key} {value}" for key, value in rows[name].items()), flush=True)
    return {"codes": n, "packed_MB": round(codes.nbytes / 1e6, 2), "engines": rows}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true", help="10,000,000 codes as well")
    parser.add_argument("--bits", choices=("48", "64"), help="one kind of code only")
    parser.add_argument("--memory", nargs=2, metavar=("ENGINE", "CODES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        return grown_memory(*arguments.memory)

    import faiss

    from gpq_tf.files import write_json

    sizes = [54_000, 1_000_000] + [10_000_000] * arguments.large
    results = json.loads(RESULT.read_text())["results"] if RESULT.exists() else {}
    report = {
        "codes": "1,000 unequal clusters in 24 dimensions, codebook learned by Faiss: clustered_codes.py",
        "k": K_NEAREST,
        "metric": METRIC,
        "rounds": N_ROUND,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "faiss": f"{faiss.__version__}, {faiss.omp_get_max_threads()} threads",
        "results": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    for kind in KINDS if arguments.bits is None else [f"{arguments.bits} bits"]:
        M, K, d = KINDS[kind]
        codebook, codes, queries = clustered_codes(sizes[-1], N_QUERY, M, K, d)
        command = "python benchmarks/index_speed.py" + " --large" * arguments.large
        results[kind] = {"command": command, "sizes": []}
        for n in sizes:
            figures = measured(kind, n, codebook, codes, queries)
            results[kind]["sizes"].append(figures | {"load_average": round(os.getloadavg()[0], 1)})
            write_json(RESULT, report)
    return None


if __name__ == "__main__":
    main()
