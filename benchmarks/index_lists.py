"""Recall against speed of inverted lists over learned codes, for several numbers of lists looked into.

    python benchmarks/index_lists.py

1,000,000 codes of 48 bits (12 books of 16 words) and of 64 bits (8 books of 256 words), made as clustered_codes.py
says, top 100 by every metric. Recall is the share of the exact answer's places whose distance the lists reach. Prints
a line each and writes benchmarks/results/index_lists.json. "flat" is `FaissEngine`, which looks at all codes.
"""

import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
from clustered_codes import clustered_codes, exact_distances, unpacked

N, N_QUERY, N_ORACLE, K_NEAREST, N_ROUND = 1_000_000, 1000, 50, 100, 3
KINDS = {"48 bits": (12, 16, 12), "64 bits": (8, 256, 16)}
METRICS = ("inner_product", "l2", "squared_l2")
PROBES = (1, 4, 16, 64, 256)
N_FLAT = {"48 bits": 200, "64 bits": 50}  # queries a batch
RESULT = Path(__file__).parent / "results" / "index_lists.json"


def main():
    import faiss

    from gpq_tf.files import write_json
    from gpq_tf.index.faiss_engine import FaissEngine
    from gpq_tf.index.inverted_lists import InvertedLists

    def row(search, batch, nearest):
        search(queries[:8])
        times, singles = [], []
        for _ in range(N_ROUND):
            start = time.perf_counter()
            search(batch)
            times.append((time.perf_counter() - start) / len(batch))
            for i in range(10):
                start = time.perf_counter()
                search(queries[i : i + 1])
                singles.append(time.perf_counter() - start)
        return {
            "recall": round(float((search(queries[:N_ORACLE])[0] <= nearest[:, None]).mean()), 4),
            "queries_per_s": round(1 / statistics.median(times)),
            "one_query_ms": round(1e3 * statistics.median(singles), 3),
        }

    results = {}
    for kind, (M, K, d) in KINDS.items():
        codebook, codes, queries = clustered_codes(N, N_QUERY, M, K, d)
        words = unpacked(codes, M)
        start = time.perf_counter()
        lists = InvertedLists.of(codebook, METRICS[0], codes)
        results[kind] = {"lists": len(lists.centroids), "build_s": round(time.perf_counter() - start, 1)}
        counts = np.sort(np.bincount(lists.lists, minlength=len(lists.centroids)))
        results[kind]["codes_a_list"] = {"median": int(np.median(counts)), "largest": int(counts[-1])}
        for metric in METRICS:
            # What is learned is the same for every metric.
            lists = InvertedLists(codebook, metric, codes, lists.centroids, lists.lists, lists.scan)
            flat = FaissEngine.of(codebook, metric, codes)
            nearest = np.stack(
                [
                    np.partition(exact_distances(codebook, metric, words, query), K_NEAREST - 1)[K_NEAREST - 1]
                    for query in queries[:N_ORACLE]
                ]
            )
            rows = {"flat": row(lambda q, e=flat: e.search(q, K_NEAREST), queries[: N_FLAT[kind]], nearest)}
            for n_probe in PROBES:
                rows[str(n_probe)] = row(lambda q, e=lists, p=n_probe: e.search(q, K_NEAREST, p), queries, nearest)
            results[kind][metric] = rows
            for name, figures in rows.items():
                times = figures["queries_per_s"] / rows["flat"]["queries_per_s"]
                figures["times_flat"] = round(times, 1)
                print(f"{kind} {metric:13} n_probe {name:>4}", *(f"{k} {v}" for k, v in figures.items()), flush=True)
    write_json(
        RESULT,
        {
            "command": "python benchmarks/index_lists.py",
            "codes": f"{N:,}: 1,000 unequal clusters in 24 dimensions, codebook learned by Faiss: clustered_codes.py",
            "k": K_NEAREST,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[1]:.1f}",
            "faiss": f"{faiss.__version__}, {faiss.omp_get_max_threads()} threads",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
