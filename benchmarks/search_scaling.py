"""Time of a query against the number of codes, from ten thousand to ten million.

    python benchmarks/search_scaling.py [--sizes N ...] [--output FILE] [--plot FILE]

Codes of 48 bits (12 books of 16 words, made as clustered_codes.py says), top 100, for the exact engine, the Faiss
engine and inverted lists of PQIndex, and for Faiss's own IndexPQ and IndexPQFastScan of the same codewords and codes
(engines.py). Milliseconds a query, in a batch (1,000 queries, fewer for the slow ones) and alone, medians of rounds in
which the engines take turns; and recall, the share of the 100 nearest that are found. Prints a line each and writes
benchmarks/results/search_scaling.json and docs/search_scaling.png.
"""

import argparse
import os
import platform
import statistics
from pathlib import Path

from clustered_codes import clustered_codes, unpacked
from engines import N_PROBE, batch_size, engine, recall, seconds

SIZES = (10_000, 31_623, 100_000, 316_228, 1_000_000, 3_162_278, 10_000_000)
M, K, D, K_NEAREST = 12, 16, 12, 100
N_QUERY, N_SINGLE, N_ROUND, N_ORACLE = 1000, 7, 3, 20
LABELS = {
    "exact": "PQIndex, exact",
    "faiss": "PQIndex, faiss",
    "lists": f"PQIndex, n_probe={N_PROBE}",
    "IndexPQ": "Faiss IndexPQ",
    "IndexPQFastScan": "Faiss IndexPQFastScan",
}
ROOT = Path(__file__).resolve().parents[1]


def measured(codebook, codes, queries):
    """dict: name -> figures of an engine."""
    used, words = {name: engine(name) for name in LABELS}, unpacked(codes, M)
    indexes = {name: how.build(codebook, codes) for name, how in used.items()}
    batches = {name: queries[: batch_size(name, K, len(codes), len(queries))] for name in used}
    batch, single = {name: [] for name in used}, {name: [] for name in used}
    for name, how in used.items():  # so that what is built or compiled at first has been
        how.search(indexes[name], batches[name], K_NEAREST)
    for _ in range(N_ROUND):
        for name, how in used.items():
            batch[name].append(seconds(how.search, indexes[name], batches[name], K_NEAREST) / len(batches[name]))
            single[name] += [seconds(how.search, indexes[name], queries[i : i + 1], K_NEAREST) for i in range(N_SINGLE)]
    rows = {}
    for name, how in used.items():
        _, found = how.search(indexes[name], queries[:N_ORACLE], K_NEAREST)
        rows[name] = {
            "batch_ms": round(1e3 * statistics.median(batch[name]), 5),
            "one_query_ms": round(1e3 * statistics.median(single[name]), 5),
            "recall": round(recall(codebook, words, queries[:N_ORACLE], found), 4),
            "queries_a_batch": len(batches[name]),
        }
        print(f"{len(codes):>10,} {name:16}", *(f"{key} {value}" for key, value in rows[name].items()), flush=True)
    return rows


def plot(sizes, path):
    """Two pictures side by side, time against codes, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("batch_ms", "one_query_ms"),
        ("queries in a batch", "one query at a time"),
        strict=True,
    ):
        for (name, label), marker in zip(LABELS.items(), "osD^v", strict=True):
            times = [size["engines"][name][what] for size in sizes]
            axes.loglog([size["codes"] for size in sizes], times, marker=marker, markersize=4, label=label)
        axes.set(title=title, xlabel="codes of 48 bits")
        axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.axes[0].set_ylabel("milliseconds a query, top 100")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="codes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "search_scaling.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "search_scaling.png")
    arguments = parser.parse_args()

    import faiss

    from gpq_tf.files import write_json

    codebook, codes, queries = clustered_codes(max(arguments.sizes), N_QUERY, M, K, D)
    sizes = []
    for n in sorted(arguments.sizes):
        figures = measured(codebook, codes[:n], queries)
        sizes.append({"codes": n, "engines": figures, "load_average": round(os.getloadavg()[0], 1)})
        write_json(
            arguments.output,
            {
                "command": "python benchmarks/search_scaling.py",
                "codes": "1,000 unequal clusters in 24 dimensions, codebook learned by Faiss: clustered_codes.py",
                "k": K_NEAREST,
                "rounds": N_ROUND,
                "machine": f"{os.cpu_count()} cores, {platform.machine()}",
                "faiss": f"{faiss.__version__}, {faiss.omp_get_max_threads()} threads",
                "sizes": sizes,
            },
        )
    plot(sizes, arguments.plot)


if __name__ == "__main__":
    main()
