"""Images that CGD embeds in a second, beside the original's MXNet 1.9.1.

    python benchmarks/cgd_speed.py --python38=PATH

PATH is a Python 3.8 with mxnet==1.9.1 and numpy==1.23.5. It makes a checkpoint, ResNet-50 v1 with SPoC, MAC and GeM
reduced to 1,536 values (original_cgd.py), which gpq-tf converts: both compute the same network, and their embeddings
are compared. Images are 224x224 pixels, one or 32 at a time. Each program runs in a process of its own, in turn,
--rounds times; the first pass over the images, which compiles, does not count. Ours takes uint8 images and normalises
them, the original's are normalised before the clock starts.

Printed are medians over all rounds, ratios to the original, and from TensorFlow's profiler which operations take the
time. Results go to benchmarks/results/cgd_speed.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from side_by_side import machine, profile, take_turns, without_profile

HERE = Path(__file__).parent
PRECISIONS = ("float32", "mixed_bfloat16")
BATCHES = (1, 32)
N_IMAGES, REPEATS, SIDE = 32, 3, 224


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python38", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=HERE / "results" / "cgd_speed.json")
    parser.add_argument("--ours", choices=PRECISIONS, default=None, help="one process of ours; prints JSON")
    parser.add_argument("--prefix", default=None, help="of that process: the checkpoint")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.ours:
        print(json.dumps(measure(options.ours, options.prefix)))
        return
    if options.python38 is None:
        parser.error("--python38 is needed: MXNet makes the network")

    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "cgd")
        np.save(images_of(prefix), np.random.default_rng(0).integers(0, 256, (N_IMAGES, SIDE, SIDE, 3), "uint8"))
        original = [options.python38, str(HERE / "original_cgd.py")]
        subprocess.run([*original, "make", prefix], check=True, stderr=subprocess.DEVNULL)
        sizes = [str(REPEATS), *map(str, BATCHES)]
        programs = {"original": [*original, "measure", prefix, images_of(prefix), *sizes]}
        for precision in PRECISIONS:
            programs[precision] = [sys.executable, __file__, f"--ours={precision}", f"--prefix={prefix}"]
        runs = take_turns(programs, options.rounds)
    result = summary(options, runs)
    for key in ("images_per_s", "times_the_original", "farthest_from_the_original", "profile"):
        for name, found in result[key].items():
            print(key, name, found)

    from gpq_tf.files import write_json

    write_json(options.out, result)


def images_of(prefix):
    """The file of the images that are embedded with a checkpoint."""
    return f"{prefix}-images.npy"


def summary(options, runs):
    speed = {name: {batch: median_speed(found, batch) for batch in BATCHES} for name, found in runs.items()}
    return {
        "command": "python benchmarks/cgd_speed.py --python38=PATH",
        "machine": machine(),
        "rounds": options.rounds,
        "images_per_s": speed,
        "times_the_original": {
            name: {batch: round(speed[name][batch] / speed["original"][batch], 2) for batch in BATCHES}
            for name in PRECISIONS
        },
        "farthest_from_the_original": {name: runs[name][0]["farthest"] for name in PRECISIONS},
        "profile": {name: runs[name][0]["profile"] for name in PRECISIONS},
        "runs": {name: without_profile(found) for name, found in runs.items()},
    }


def median_speed(runs, batch):
    """Images a second."""
    return round(1 / statistics.median(each for run in runs for each in run[f"seconds_an_image_{batch}"]), 2)


def measure(precision, prefix):
    """Seconds an image of ours, how far an embedding is from the original's, and a profile of a batch of 32."""
    from gpq_tf import convert
    from gpq_tf.cgd_command import FREEZE_BELOW
    from gpq_tf.network import in_precision

    images = np.load(images_of(prefix))
    found = {}
    for batch in BATCHES:
        model = in_precision(convert.convert(prefix)[0], precision)
        if batch < FREEZE_BELOW:  # as gpq-tf cgd does
            model.freeze()
        seconds = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            parts = [model.embed(images[at : at + batch]) for at in range(0, len(images), batch)]
            seconds.append((time.perf_counter() - start) / len(images))
        found[f"seconds_an_image_{batch}"] = seconds[1:]
    found["farthest"] = float(np.abs(np.concatenate(parts) - np.load(f"{prefix}.npy")).max())
    found["profile"] = profile(lambda: model.embed(images))
    return found


if __name__ == "__main__":
    main()
