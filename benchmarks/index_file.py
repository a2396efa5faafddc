"""What an index takes in memory and on disk, and how long saving, loading and changing it last.

    python benchmarks/index_file.py benchmarks/results/index_file.json --codes=170000000

Codes of 48 bits (M=12, K=16), random, added in 20 pieces; 170 million of them make a file of about 1 GB. Loading is
timed with the file in the page cache, sha256 alone beside it. Changes are timed on 10 million codes with ids in random
order, the slow way. Takes 3 GB of memory at most.
"""

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from gpq_tf.files import write_json
from gpq_tf.index import PQIndex

M, K, D = 12, 16, 12
PIECES = 20


def resident():
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def seconds(function, repeat=1):
    """(the shortest of `repeat` runs in seconds, what the last returned)."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def grown(n):
    """(index of n random codes, seconds spent in `add`)."""
    rng = np.random.default_rng(0)
    index, adding = PQIndex(rng.standard_normal((M, K, D))), 0.0
    for _ in range(PIECES):
        codes = rng.integers(0, K, (n // PIECES, M), np.uint8)
        adding += seconds(lambda codes=codes: index.add(codes))[0]
    return index, adding


def save_figures(n, path):
    """Memory a code, and the times of add and save."""
    before = resident()
    index, adding = grown(n)
    held = resident() - before
    saving, _ = seconds(lambda: index.save(path))
    return {
        "codes": len(index),
        "file_bytes": path.stat().st_size,
        "file_bytes_a_code": round(path.stat().st_size / len(index), 4),
        "resident_bytes_a_code": round(held / len(index), 3),
        "add_million_codes_a_second": round(len(index) / adding / 1e6, 1),
        "save_seconds_a_gigabyte": round(saving / path.stat().st_size * 1e9, 2),
    }


def load_figures(path):
    """The times of both ways to load, and memory after the verifying one."""
    mapping, _ = seconds(lambda: PQIndex.load(path, verify=False), repeat=5)
    before = resident()
    verifying, index = seconds(lambda: PQIndex.load(path))
    held = resident() - before
    verifying = min(verifying, seconds(lambda: PQIndex.load(path), repeat=2)[0])
    hashing, _ = seconds(lambda: hashlib.sha256(index._store.packed.array.reshape(-1)).digest(), repeat=2)
    gigabytes = path.stat().st_size / 1e9
    return {
        "load_verified_seconds_a_gigabyte": round(verifying / gigabytes, 2),
        "sha256_alone_seconds_a_gigabyte": round(hashing / gigabytes, 2),
        "load_mapped_milliseconds": round(mapping * 1e3, 2),
        "resident_bytes_a_code_after_loading": round(held / len(index), 3),
    }


def change_figures(n):
    """Times of small changes among n codes with ids in random order."""
    rng = np.random.default_rng(1)
    ids, one = rng.permutation(n + 1100), np.zeros((1, M), np.uint8)
    index = PQIndex(rng.standard_normal((M, K, D)))
    index.add(np.zeros((n, M), np.uint8), ids[:n])
    index.add(one, [n + 2000])  # makes room to grow, outside the timing
    first, _ = seconds(lambda: index.add(one, ids[n : n + 1]))
    many, _ = seconds(lambda: [index.add(one, [i]) for i in ids[n + 1 : n + 1001]])
    removing, _ = seconds(lambda: index.remove(ids[:1]))
    finding, _ = seconds(lambda: index.positions(ids[5:15]))
    return {
        "codes": n,
        "first_add_that_looks_up_seconds": round(first, 2),
        "later_adds_of_one_milliseconds": round(many, 4),  # of 1,000: seconds in all are milliseconds each
        "remove_one_seconds": round(removing, 2),
        "positions_of_ten_seconds": round(finding, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--codes", type=int, default=170_000_000)
    parser.add_argument(
        "--folder", help="where the file is written; the system's folder for temporary files by default"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "index.safetensors")
        report = {**save_figures(arguments.codes, path), **load_figures(path), "changes": change_figures(10_000_000)}
    report["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    write_json(arguments.output, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
