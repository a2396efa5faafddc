"""Three ways to compute all distances of an exact search, each by separate operations and by XLA, and NumPy.

    python benchmarks/exact_ways.py            # KERAS_BACKEND=jax for the same on JAX

Decode and multiply: codes -> vectors (N, D), times the queries. One-hot: codes -> (N, M * K) of 0 and 1, times the
distance table. Look up: the M entries of the table that a code names, added. 48-bit codes (12 books of 16 codewords of
length 12), drawn uniformly: none of the three depends on what they are. Prints billions of distances a second (best
of runs, chunks of 32,768 codes, 64 queries), and whether the result has the bits of the definition, float32 sums
first book first. Writes benchmarks/results/exact_ways_BACKEND.json.
"""

import os
import platform
import time
from pathlib import Path

import numpy as np

M, K, D, N_QUERIES, CHUNK, N_CODES, RUNS = 12, 16, 12, 64, 2**15, 2**18, 5


def main():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras
    from keras import ops

    from gpq_tf.files import write_json
    from gpq_tf.index import distance_table

    rng = np.random.default_rng(0)
    codebook = rng.standard_normal((M, K, D)).astype("float32")
    queries = rng.standard_normal((N_QUERIES, M * D)).astype("float32")
    codes = rng.integers(0, K, (N_CODES, M), "uint8")
    table = distance_table(queries, codebook, "inner_product")  # (M, K, Q)
    words = ops.convert_to_tensor(codebook.reshape(M * K, D))
    by_word = ops.convert_to_tensor(table.reshape(M * K, N_QUERIES))
    entries, transposed = ops.convert_to_tensor(table), ops.convert_to_tensor(np.ascontiguousarray(queries.T))

    def decode(chunk):
        rows = ops.cast(chunk, "int32") + K * ops.arange(M, dtype="int32")
        return M - ops.matmul(ops.reshape(ops.take(words, rows, axis=0), (-1, M * D)), transposed)

    def one_hot(chunk):
        return ops.matmul(ops.reshape(ops.one_hot(ops.cast(chunk, "int32"), K), (-1, M * K)), by_word)

    def look_up(chunk):
        chunk = ops.cast(chunk, "int32")
        total = ops.take(entries[0], chunk[:, 0], axis=0)
        for book in range(1, M):
            total = total + ops.take(entries[book], chunk[:, book], axis=0)
        return total

    def definition(chunk):
        total = table[0].take(chunk[:, 0].astype(np.intp), axis=0)
        for book in range(1, M):
            total += table[book].take(chunk[:, book].astype(np.intp), axis=0)
        return total

    ways = {"NumPy, look up": definition}
    for name, way in (("decode and multiply", decode), ("one-hot", one_hot), ("look up", look_up)):
        for jit in (False, True):
            if jit or keras.backend.backend() == "tensorflow":
                ways[f"{name}, {'XLA' if jit else 'operations'}"] = _compiled(way, jit)
    expected, results = definition(codes[:CHUNK]), {}
    for name, way in ways.items():
        found = np.asarray(way(codes[:CHUNK]))
        results[name] = {
            "billion_distances_per_s": round(_speed(way, codes), 3),
            "bits_of_the_definition": bool(np.array_equal(found, expected)),
            "largest_difference": float(np.abs(found - expected).max()),
        }
        print(f"{name:32} {results[name]}", flush=True)
    backend = keras.backend.backend()
    write_json(
        Path(__file__).parent / "results" / f"exact_ways_{backend}.json",
        {
            "command": f"KERAS_BACKEND={backend} python benchmarks/exact_ways.py",
            "backend": backend,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "results": results,
        },
    )


def _compiled(way, jit):
    from gpq_tf.ops import compiled

    return compiled(way, jit)


def _speed(way, codes):
    best = np.inf
    for _ in range(RUNS):
        start = time.perf_counter()
        for at in range(0, len(codes), CHUNK):
            np.asarray(way(codes[at : at + CHUNK]))
        best = min(best, time.perf_counter() - start)
    return len(codes) * N_QUERIES / best / 1e9


if __name__ == "__main__":
    main()
