"""Time of hard assignment, soft assignment and decoding with and without XLA.

    python benchmarks/quantize_speed.py

Prints a line for each and writes benchmarks/results/quantize_speed.json. The published setting: 5,000 descriptors of
12 books of 16 codewords of length 12.
"""

import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

N, N_BOOK, N_WORD, LEN_CODE, ALPHA = 5000, 12, 16, 12, 20.0
N_RUNS = 200
RESULT = Path(__file__).parent / "results" / "quantize_speed.json"


def milliseconds(function, *arguments):
    """Median and smallest time of a call, the result brought to NumPy."""
    for _ in range(5):
        np.asarray(function(*arguments))
    times = []
    for _ in range(N_RUNS):
        start = time.perf_counter()
        np.asarray(function(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": round(statistics.median(times), 3), "smallest": round(min(times), 3)}


def main():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras
    from keras import ops

    from gpq_tf.files import write_json
    from gpq_tf.ops import normalize_books
    from gpq_tf.quantizer import ProductQuantizer, decode, hard_assign, soft_assign

    rng = np.random.default_rng(0)
    quantizer = ProductQuantizer(N_BOOK, N_WORD, LEN_CODE)
    codebook = ops.convert_to_tensor(quantizer.codebook)
    x = normalize_books(ops.convert_to_tensor(rng.normal(size=(N, N_BOOK * LEN_CODE)).astype("float32")), N_BOOK)
    codes = quantizer.encode(x)
    # (plain operations one by one, the same compiled by XLA), arguments
    cases = {
        "hard_assign": (lambda x: hard_assign(x, codebook), quantizer.encode, x),
        "soft_assign": (lambda x: soft_assign(x, codebook, ALPHA), lambda x: quantizer(x, alpha=ALPHA), x),
        "decode": (lambda codes: decode(codes, codebook), quantizer.decode, codes),
    }
    results = {}
    for name, (plain, xla, argument) in cases.items():
        difference = float(np.abs(np.asarray(plain(argument)) - np.asarray(xla(argument))).max())
        results[name] = {
            "plain_ms": milliseconds(plain, argument),
            "xla_ms": milliseconds(xla, argument),
            "largest_difference": difference,
        }
        row = results[name]
        print(
            f"{name:12} plain {row['plain_ms']['median']:7.2f} ms   XLA {row['xla_ms']['median']:7.2f} ms   "
            f"largest difference {difference:.1e}"
        )
    RESULT.parent.mkdir(exist_ok=True)
    write_json(
        RESULT,
        {
            "command": "python benchmarks/quantize_speed.py",
            "sizes": {"B": N, "M": N_BOOK, "K": N_WORD, "d": LEN_CODE},
            "runs": N_RUNS,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "keras": f"{keras.__version__} on {keras.backend.backend()}",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
