"""Recall against speed of inverted lists over learned codes, for several numbers of lists looked into.

    python benchmarks/index_lists.py [--codes N] [--output FILE]

1,000,000 codes of 48 bits (12 books of 16 words) and of 64 bits (8 books of 256 words), made as clustered_codes.py
says, top 100 by every metric, searched by PQIndex. Recall is the share of the exact answer's places whose distance the
lists reach. Prints a line each and writes benchmarks/results/index_lists.json. "flat" is the engine "faiss", which
looks at all codes; `build_s` is the first search, which learns the lists.
"""

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--codes", type=int, default=N)
    parser.add_argument("--output", default=RESULT, help="JSON file to write")
    choices = parser.parse_args()

    import faiss

    from gpq_tf.files import write_json
    from gpq_tf.index import PQIndex
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
        codebook, codes, queries = clustered_codes(choices.codes, N_QUERY, M, K, d)
        words = unpacked(codes, M)
        for metric in METRICS:
            index = PQIndex(codebook, metric, engine="faiss")
            index.add(words)
            start = time.perf_counter()
            index.search(queries[:1], K_NEAREST, n_probe=1)
            build = time.perf_counter() - start
            if metric == METRICS[0]:  # what is learned is the same for every metric
                lists = InvertedLists.of(codebook, metric, codes)
                counts = np.sort(np.bincount(lists.lists, minlength=len(lists.centroids)))
                results[kind] = {
                    "lists": len(counts),
                    "build_s": round(build, 1),
                    "codes_a_list": {"median": int(np.median(counts)), "largest": int(counts[-1])},
                    "bytes_a_code": round(lists.nbytes / len(codes), 1),
                }
            nearest = np.stack(
                [
                    np.partition(exact_distances(codebook, metric, words, query), K_NEAREST - 1)[K_NEAREST - 1]
                    for query in queries[:N_ORACLE]
                ]
            )
            rows = {"flat": row(lambda q, i=index: i.search(q, K_NEAREST), queries[: N_FLAT[kind]], nearest)}
            for n_probe in PROBES:
                rows[str(n_probe)] = row(lambda q, i=index, p=n_probe: i.search(q, K_NEAREST, p), queries, nearest)
            results[kind][metric] = rows
            for name, figures in rows.items():
                times = figures["queries_per_s"] / rows["flat"]["queries_per_s"]
                figures["times_flat"] = round(times, 1)
                print(f"{kind} {metric:13} n_probe {name:>4}", *(f"{k} {v}" for k, v in figures.items()), flush=True)
    write_json(
        choices.output,
        {
            "command": "python benchmarks/index_lists.py",
            "codes": f"{choices.codes:,}: 1,000 unequal clusters in 24 dimensions, codebook learned by Faiss: "
            "clustered_codes.py",
            "k": K_NEAREST,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[1]:.1f}",
            "faiss": f"{faiss.__version__}, {faiss.omp_get_max_threads()} threads",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
