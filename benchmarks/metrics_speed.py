"""Time of mean average precision: ours, the original's way, and plain NumPy; and memory on a large gallery.

    python benchmarks/metrics_speed.py [--queries Q] [--gallery N] [--large-queries Q ...] [--large-gallery N]

Scores 1,000 queries against 54,000 codes of 48 bits over all ranks, all three from the same arrays in one run, prints a
line for each and writes benchmarks/results/metrics_speed.json. Then scores 200 and 10,000 queries against 1,000,000
codes, each in a process of its own, and prints its time and the peak of its memory, all it holds included: the peak
must not grow with the queries, and stay below 2 GiB.

The codes are synthetic: ten classes of descriptors scattered around their centres, some images more than others and
some around a wrong one, so that codes repeat as those of a trained model do (24,395 distinct of 54,000 there; the
number here is in the result).
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from gpq_tf.files import write_json
from gpq_tf.index import PQIndex
from gpq_tf.metrics import average_precision, mean_average_precision

M, K, D_SUB, N_CLASS = 12, 16, 12, 10
N_QUERY, N_GALLERY = 1000, 54_000
SCATTER = (0.03, 0.15)  # of a component, against centres of unit length: the most and the least typical image
ODD = 0.2  # share of images that look like those of some class, not of their own
CHUNK = 20_000  # descriptors drawn at a time, so that making them does not set the peak of memory
N_RUNS = 5
LARGE_GALLERY, LARGE_QUERIES = 1_000_000, (200, 10_000)
RESULT = Path(__file__).parent / "results" / "metrics_speed.json"


def make_problem(n_gallery, n_query, n_book=M, length=D_SUB):
    """codebook (M, K, d), gallery codes and labels, queries (Q, D) normalised per book, and labels."""
    rng = np.random.default_rng(0)
    codebook = unit(rng.standard_normal((n_book, K, length)))
    centres = unit(rng.standard_normal((N_CLASS, n_book, length)))

    def draw(n):
        labels = rng.integers(0, N_CLASS, n)
        looks_like = np.where(rng.random(n) < ODD, rng.integers(0, N_CLASS, n), labels)
        scatter = rng.uniform(*SCATTER, (n, 1, 1)).astype(np.float32)
        return unit(centres[looks_like] + scatter * rng.standard_normal((n, n_book, length), np.float32)), labels

    codes, gallery_labels = [], []
    for at in range(0, n_gallery, CHUNK):
        descriptors, labels = draw(min(CHUNK, n_gallery - at))
        words = [np.argmax(descriptors[:, book] @ codebook[book].T, axis=1) for book in range(n_book)]
        codes.append(np.stack(words, axis=1).astype(np.uint8))
        gallery_labels.append(labels)
    queries, query_labels = draw(n_query)
    queries = queries.reshape(n_query, n_book * length)
    return codebook, np.concatenate(codes), np.concatenate(gallery_labels), queries, query_labels


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def ours(codebook, codes, gallery_labels, queries, query_labels, **choices):
    """From codes to figure, the grouping of equal codes included."""
    index = PQIndex(codebook)
    index.add(codes)
    return mean_average_precision(queries, query_labels, index, gallery_labels, **choices)


def originals_way(codebook, codes, gallery_labels, queries, query_labels):
    """As the original program goes about it: one np.dot a table entry, a look-up a book, argsort, a loop over ranks."""
    codes = codes.astype(int)
    similarity = np.eye(N_CLASS)[query_labels] @ np.eye(N_CLASS)[gallery_labels].T
    distances = np.zeros((len(queries), len(codes)), np.float32)
    table = np.zeros((M, K), np.float32)
    for query, row in zip(queries.reshape(len(queries), M, D_SUB), distances, strict=True):
        for book in range(M):
            for word in range(K):
                table[book, word] = 1 - np.dot(query[book], codebook[book, word])
        total = table[0][codes[:, 0]]
        for book in range(1, M):
            total = np.add(total, table[book][codes[:, book]])
        row[:] = total
    ranking = np.argsort(distances.T, axis=0)
    scores = np.zeros(len(queries))
    for query in range(len(queries)):
        ranked, hits, total = ranking[:, query], 0, 0.0
        for rank in range(len(codes)):
            if similarity[query, ranked[rank]] == 1:
                hits += 1
                total += float(hits) / (rank + 1)
        scores[query] = total / hits if hits else 0.0
    return float(scores.mean())


def plain_numpy(codebook, codes, gallery_labels, queries, query_labels):
    """Each step one NumPy call a query: the table, the look-ups, a stable argsort, the sum of precisions."""
    scores, books = [], np.arange(M)
    for query, label in zip(queries.reshape(len(queries), M, D_SUB), query_labels, strict=True):
        table = 1 - np.einsum("mkd,md->mk", codebook, query)
        order = np.argsort(table[books, codes].sum(axis=1), kind="stable")
        ranks = np.flatnonzero(gallery_labels[order] == label) + 1
        scores.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    return float(np.mean(scores))


def by_sorting_the_index(codebook, codes, gallery_labels, queries, query_labels):
    """What `ours` must equal: all distances of the index, block by block, and NumPy's stable sort."""
    index = PQIndex(codebook)
    index.add(codes)
    snapshot = index.snapshot()

    def block(rows, distances):
        order = np.argsort(distances[:, snapshot.inverse], axis=1, kind="stable")
        return average_precision(gallery_labels[order] == query_labels[rows, None])

    scores = snapshot.map_distances(block, queries)
    return float(np.mean(np.concatenate(scores)))


def seconds(function, arguments, n_runs, **choices):
    """Wall and processor time (of all threads; other programs on the machine hardly touch it) and the value."""
    wall, processor = [], []
    for _ in range(n_runs):
        start = time.perf_counter(), time.process_time()
        value = function(*arguments, **choices)
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    figures = {
        "median_s": statistics.median(wall),
        "smallest_s": min(wall),
        "median_processor_s": statistics.median(processor),
    }
    return {name: round(figure, 3) for name, figure in figures.items()} | {"runs": n_runs, "mAP": value}


def memory_on_a_large_gallery(n_gallery, n_query):
    """In a fresh process on Linux: what is held before the queries are scored and at the peak, in MiB, and the time."""
    codebook, codes, gallery_labels, queries, query_labels = make_problem(n_gallery, n_query)
    index = PQIndex(codebook)
    index.add(codes)
    n_distinct = index.snapshot().distinct.shape[1]
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew: making the problem is not measured
    before = memory_mib("VmRSS")
    start = time.perf_counter()
    score = mean_average_precision(queries, query_labels, index, gallery_labels)
    taken = round(time.perf_counter() - start, 2)
    return {
        "queries": n_query,
        "distinct": n_distinct,
        "before_mib": before,
        "peak_mib": memory_mib("VmHWM"),
        "seconds": taken,
        "mAP": score,
    }


def memory_mib(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return round(int(line.split()[1]) / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=N_QUERY)
    parser.add_argument("--gallery", type=int, default=N_GALLERY)
    parser.add_argument("--large-queries", type=int, nargs="*", default=LARGE_QUERIES)
    parser.add_argument("--large-gallery", type=int, default=LARGE_GALLERY)
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    arguments = parser.parse_args()
    problem = make_problem(arguments.gallery, arguments.queries)
    n_distinct = len(np.unique(problem[1], axis=0))
    results = {
        "ours": seconds(ours, problem, N_RUNS),
        "ours_expected_ties": seconds(ours, problem, N_RUNS, ties="expected"),
        "ours_top_1000": seconds(ours, problem, N_RUNS, top_n=1000),
        "plain_numpy": seconds(plain_numpy, problem, 1),
        "originals_way": seconds(originals_way, problem, 1),
    }
    for name, row in results.items():
        print(
            f"{name:20} {row['median_s']:7.3f} s, {row['median_processor_s']:7.3f} processor s, mAP {row['mAP']:.12f}"
        )
    ratios = {
        name: {
            time: round(results[name][time] / results["ours"][time], 1) for time in ("median_s", "median_processor_s")
        }
        for name in ("plain_numpy", "originals_way")
    }
    equal = results["ours"]["mAP"] == by_sorting_the_index(*problem)
    print(f"{n_distinct} distinct of {arguments.gallery} codes; equal to the stable sort's value: {equal}")
    print(f"times ours: {ratios}")
    memory = []
    for n_query in arguments.large_queries:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            memory.append(pool.submit(memory_on_a_large_gallery, arguments.large_gallery, n_query).result())
        print(f"{n_query} queries against {arguments.large_gallery} codes: {memory[-1]}", flush=True)
    write_json(
        arguments.output,
        {
            "command": "python benchmarks/metrics_speed.py",
            "sizes": {
                "Q": arguments.queries,
                "N": arguments.gallery,
                "M": M,
                "K": K,
                "d": D_SUB,
                "classes": N_CLASS,
            },
            "codes": f"synthetic, {n_distinct} distinct of {arguments.gallery}",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the end",
            "numpy": np.__version__,
            "results": results,
            "times_ours": ratios,
            "equal_to_stable_sort": equal,
            "memory": {"N": arguments.large_gallery, "processes": memory},
        },
    )


if __name__ == "__main__":
    main()
