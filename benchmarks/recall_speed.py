"""Recall@1, 2, 4, 8 among the test images of Stanford Online Products: time and memory, ours and the original's way.

    python benchmarks/recall_speed.py [--size N] [--original-sizes N ...]

Ours measures 60,502 descriptors of 512 values, as many as there are test images. The original's way needs a matrix of
all distances, so it is measured at 5,924 (the test images of CUB-200-2011) and 12,000 and extrapolated: its time and
its memory grow with the square. Each measurement has a process of its own; memory is the peak of all it holds.

The descriptors are random: unit vectors scattered around the centres of classes of two to eight, so that many of them
have a neighbour of their class. Ours measures the smallest number a second time with descriptors that are nearly alike,
as those of a network that has hardly learned: the same with a common vector of length 50 added.

Results go to benchmarks/results/recall_speed.json.
"""

import argparse
import concurrent.futures
import multiprocessing
import time
from pathlib import Path

import numpy as np
from metrics_speed import memory_mib, unit
from side_by_side import machine

from gpq_tf.files import write_json
from gpq_tf.metrics import recall_at_k

N, ORIGINAL_SIZES, LENGTH = 60_502, (5_924, 12_000), 512
KS = (1, 2, 4, 8)
SCATTER = 2.6  # length of what is added to a class's centre of length 1
COMMON = 50  # length of what is added to all descriptors that are to be nearly alike
RESULT = Path(__file__).parent / "results" / "recall_speed.json"


def make_problem(n, alike=False):
    """Descriptors float32 (n, 512) and labels (n,)."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(n), rng.integers(2, 9, n))[:n]
    centres = unit(rng.standard_normal((labels[-1] + 1, LENGTH), np.float32))
    noise = rng.standard_normal((n, LENGTH), np.float32)
    noise *= SCATTER / LENGTH**0.5
    noise += centres[labels]
    if alike:
        noise = unit(noise) + COMMON * unit(rng.standard_normal((1, LENGTH), np.float32))
    return unit(noise), labels


def originals_way(descriptors, labels, ks):
    """As the original program goes about it: the matrix of all distances, then a partition of each row for each k."""
    squares = np.sum(descriptors**2.0, axis=1, keepdims=True)
    distances = squares + squares.T - 2.0 * np.dot(descriptors, descriptors.T)
    np.fill_diagonal(distances, 1e10)
    hits = {k: [labels[i] in labels[np.argpartition(row, k)[:k]] for i, row in enumerate(distances)] for k in ks}
    return {k: float(np.mean(hits[k])) for k in ks}


WAYS = {"ours": recall_at_k, "original's way": originals_way}


def measure(way, n, alike=False):
    """In a fresh process on Linux: seconds, MiB held before and at the peak, and the recalls."""
    descriptors, labels = make_problem(n, alike)
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew: making the problem is not measured
    before, start = memory_mib("VmRSS"), time.perf_counter()
    recalls = WAYS[way](descriptors, labels, KS)
    taken = round(time.perf_counter() - start, 2)
    return {
        "n": n,
        "seconds": taken,
        "before_mib": before,
        "peak_mib": memory_mib("VmHWM"),
        "recalls": {str(k): recall for k, recall in recalls.items()},
    }


def in_a_process(way, n, alike=False):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(measure, way, n, alike).result()
    print(f"{way:15} {found}", flush=True)
    return found


def extrapolated(found, n):
    """What a measurement becomes at `n`, if what it takes grows with the square."""
    grown = (n / found["n"]) ** 2
    memory = found["before_mib"] + (found["peak_mib"] - found["before_mib"]) * grown
    return {"from": found["n"], "minutes": round(found["seconds"] * grown / 60, 1), "gib": round(memory / 1024, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=N)
    parser.add_argument("--original-sizes", type=int, nargs="*", default=ORIGINAL_SIZES)
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    arguments = parser.parse_args()
    ours = [in_a_process("ours", n) for n in (*arguments.original_sizes, arguments.size)]
    alike = in_a_process("ours", min(*arguments.original_sizes, arguments.size), alike=True)
    original = [in_a_process("original's way", n) for n in arguments.original_sizes]
    expected = [extrapolated(found, arguments.size) for found in original]
    equal = all(a["recalls"] == b["recalls"] for a, b in zip(ours, original, strict=False))
    print(f"original's way at {arguments.size}, extrapolated: {expected}; equal recalls: {equal}")
    write_json(
        arguments.output,
        {
            "command": "python benchmarks/recall_speed.py",
            "machine": machine(),
            "numpy": np.__version__,
            "length": LENGTH,
            "ours": ours,
            "ours_nearly_alike": alike,
            "originals_way": original,
            "originals_way_extrapolated": expected,
            "equal_recalls": equal,
        },
    )


if __name__ == "__main__":
    main()
