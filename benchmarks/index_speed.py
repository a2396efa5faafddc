"""Top-100 among many codes: our engines beside Faiss's own indexes and ScaNN.

    python benchmarks/index_speed.py [--sizes N ...] [--bits 48|64] [--scann-sizes N ...]

54,000 and 1,000,000 codes of 48 bits (12 books of 16 words) and of 64 bits (8 books of 256 words); `--sizes` chooses
others, `--bits` one kind, leaving the other's figures. Prints a line for each engine and writes
benchmarks/results/index_speed.json:

    queries_per_s, one_query_ms   medians; the engines take turns, so that a ratio compares what ran side by side
    build_s                       from packed codes to the first answer
    share_right                   of the places, those whose code is as far as the exact answer's
    memory_*                      what a process of its own grows by from its imports on (for "exact" XLA has been
                                  started, which takes 50 MB): with the index read from its file, after a search for 8
                                  queries, and at most, a whole batch of queries included; ratios to the packed codes

How the codes are made: clustered_codes.py; what is compared: engines.py. The slow engines get fewer queries; throughput
is per query. ScaNN is measured where it is installed. Building it takes more than 1 kB of memory a code, so it has
sizes of its own.
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
from clustered_codes import clustered_codes, unpacked
from engines import METRIC, batch_size, engine, forget_peak, memory_mb, scann_is_there, seconds, share_right

K_NEAREST = 100
KINDS = {"48 bits": (12, 16, 12), "64 bits": (8, 256, 16)}
N_QUERY, N_ORACLE, N_SINGLE, N_ROUND, N_MEMORY = 1000, 20, 7, 3, 8
NAMES, SCANN = ("exact", "faiss", "IndexPQ", "IndexPQFastScan"), "ScaNN, its own codewords"
RESULT = Path(__file__).parent / "results" / "index_speed.json"


def grown_memory(name, folder):
    """Run in a process of its own: prints what its memory grows by, in MB."""
    if name == SCANN:
        scann_is_there()
    elif name != "exact":
        import faiss  # noqa: F401
    else:
        from gpq_tf.ops import compiled

        compiled(lambda x: x + 1)(np.zeros(1, np.float32))
    used, queries = engine(name), np.load(folder / "queries.npy")
    forget_peak()
    before = memory_mb("VmRSS")
    index = used.read(folder / "index")
    opened = memory_mb("VmRSS") - before
    used.search(index, queries[:N_MEMORY], K_NEAREST)
    searched = memory_mb("VmRSS") - before
    used.search(index, queries, K_NEAREST)
    print(json.dumps([opened, searched, memory_mb("VmHWM") - before]))


def memory_of(name, index, queries):
    """What `grown_memory` finds."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        engine(name).write(index, folder / "index")
        np.save(folder / "queries.npy", queries)
        command = [sys.executable, __file__, "--memory", name, str(folder)]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def measured(kind, codebook, codes, queries, names):
    """dict: codes; packed_MB; engines (name -> figures)."""
    K, packed = codebook.shape[1], codes.nbytes / 1e6
    used = {name: engine(name) for name in names if K in engine(name).Ks}
    indexes, built = {}, {}
    for name, how in used.items():
        start = time.perf_counter()
        indexes[name] = how.build(codebook, codes)
        how.search(indexes[name], queries[:1], K_NEAREST)
        built[name] = time.perf_counter() - start
    batches = {name: queries[: batch_size(name, K, len(codes), N_QUERY)] for name in used}
    batch, single = {name: [] for name in used}, {name: [] for name in used}
    for name, how in used.items():
        how.search(indexes[name], batches[name], K_NEAREST)  # so that what is compiled has been compiled
    for _ in range(N_ROUND):
        for name, how in used.items():
            batch[name].append(seconds(how.search, indexes[name], batches[name], K_NEAREST) / len(batches[name]))
            single[name] += [seconds(how.search, indexes[name], queries[i : i + 1], K_NEAREST) for i in range(N_SINGLE)]
    words, rows = unpacked(codes, len(codebook)), {}
    for name, how in used.items():
        per_query = statistics.median(batch[name])
        _, found = how.search(indexes[name], queries[:N_ORACLE], K_NEAREST)
        opened, searched, most = memory_of(name, indexes[name], batches[name])
        rows[name] = {
            "queries_per_s": round(1 / per_query, 1),
            "Gcodes_per_s": round(len(codes) / per_query / 1e9, 3),
            "one_query_ms": round(1e3 * statistics.median(single[name]), 3),
            "build_s": round(built[name], 3),
            "share_right": round(share_right(codebook, words, queries[:N_ORACLE], found), 5),
            "queries_a_batch": len(batches[name]),
            "memory_opened_MB": round(opened, 2),
            "memory_searched_MB": round(searched, 2),
            "memory_at_most_MB": round(most, 2),
            "memory_opened_ratio": round(opened / packed, 2),
            "memory_searched_ratio": round(searched / packed, 2),
        }
        for other in ("IndexPQ", "IndexPQFastScan"):
            if other in batch and other != name:
                ratios = [b / a for a, b in zip(batch[name], batch[other], strict=True)]
                rows[name][f"times_{other}"] = round(statistics.median(ratios), 2)
        print(
            f"{kind} {len(codes):>9,} {name:24}", *(f"{key} {value}" for key, value in rows[name].items()), flush=True
        )
    return {"codes": len(codes), "packed_MB": round(packed, 2), "engines": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[54_000, 1_000_000], metavar="N", help="codes")
    parser.add_argument("--scann-sizes", type=int, nargs="+", default=[54_000, 1_000_000], metavar="N")
    parser.add_argument("--bits", choices=("48", "64"), help="one kind of code only")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--memory", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        return grown_memory(arguments.memory[0], Path(arguments.memory[1]))

    has_scann = scann_is_there()
    import faiss

    from gpq_tf.files import write_json

    results = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else {}
    report = {
        "codes": "1,000 unequal clusters in 24 dimensions, codebook learned by Faiss: clustered_codes.py",
        "k": K_NEAREST,
        "metric": METRIC,
        "rounds": N_ROUND,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "faiss": f"{faiss.__version__}, {faiss.omp_get_max_threads()} threads",
        "results": results,
    }
    for kind in KINDS if arguments.bits is None else [f"{arguments.bits} bits"]:
        M, K, d = KINDS[kind]
        codebook, codes, queries = clustered_codes(max(arguments.sizes), N_QUERY, M, K, d)
        command = f"python benchmarks/index_speed.py --sizes {' '.join(map(str, arguments.sizes))}"
        results[kind] = {"command": command, "sizes": []}
        for n in arguments.sizes:
            names = (*NAMES, SCANN) if has_scann and n in arguments.scann_sizes else NAMES
            figures = measured(kind, codebook, codes[:n], queries, names)
            results[kind]["sizes"].append(figures | {"load_average": round(os.getloadavg()[0], 1)})
            write_json(arguments.output, report)
    return None


if __name__ == "__main__":
    main()
