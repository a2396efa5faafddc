"""SPQ's augmentation: images a second, and its share of a training step.

    python benchmarks/augment_speed.py --step-seconds=S     # KERAS_BACKEND=jax for the same on JAX

S is the time of a whole training step with two views of 256 images, as benchmarks/spq_speed.py measures it. What is
timed is what such a step does: drawing for both views (NumPy), then both views in one compiled call, from float32
images that lie on the device. Both recipes, images of 32x32 and 64x64, with XLA and, on TensorFlow, without. Printed
are medians; they go to benchmarks/results/augment_speed_BACKEND.json.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

BATCH = 256
SIZES = (32, 64)
WARM_UP = 3


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step-seconds", type=float, default=None, help="of a whole step, to print the share of it")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--out", default=None)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras

    from gpq_tf.augment import RECIPES
    from gpq_tf.files import write_json

    backend = keras.backend.backend()
    results = {}
    for size in SIZES:
        for recipe in RECIPES:
            for jit in (True, False) if backend == "tensorflow" else (True,):
                name = f"{recipe} {size}x{size}{'' if jit else ', without XLA'}"
                row = results[name] = _measure(recipe, size, jit, options.runs)
                if options.step_seconds and size == SIZES[0]:
                    seconds = (row["draw_ms"] + row["apply_ms"]) / 1e3
                    row["share_of_a_step"] = round(seconds / options.step_seconds, 4)
                print(f"{name:28} {row}", flush=True)
    write_json(
        options.out or Path(__file__).parent / "results" / f"augment_speed_{backend}.json",
        {
            "command": "python benchmarks/augment_speed.py --step-seconds=S",
            "step_seconds": options.step_seconds,
            "images": f"2 views of {BATCH}",
            "runs": options.runs,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "keras": f"{keras.__version__} on {backend}",
            "results": results,
        },
    )


def _measure(recipe, size, jit, runs):
    from keras import ops

    from gpq_tf.augment import apply_views, draw_views, generator
    from gpq_tf.ops import compiled

    pixels = np.random.default_rng(0).random((BATCH, size, size, 3), dtype="float32")
    images = ops.convert_to_tensor(pixels)
    views = compiled(lambda images, *draws: [apply_views(images, view, recipe) for view in draws], jit)
    draw_ms, apply_ms = [], []
    for step in range(WARM_UP + runs):
        start = time.perf_counter()
        draws = [draw_views(generator(0, step, stream), BATCH, (size, size), recipe) for stream in (0, 1)]
        drawn = time.perf_counter()
        for view in views(images, *draws):
            np.asarray(view)
        draw_ms.append(1e3 * (drawn - start))
        apply_ms.append(1e3 * (time.perf_counter() - drawn))
    draw, apply = statistics.median(draw_ms[WARM_UP:]), statistics.median(apply_ms[WARM_UP:])
    return {
        "first_call_s": round(apply_ms[0] / 1e3, 2),
        "draw_ms": round(draw, 2),
        "apply_ms": round(apply, 1),
        "images_per_s": round(2 * BATCH / ((draw + apply) / 1e3)),
    }


if __name__ == "__main__":
    main()
