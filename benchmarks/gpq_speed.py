"""GPQ at full width: time of a training step and of encoding, beside the original's where TensorFlow 1.14 is installed.

    python benchmarks/gpq_speed.py --original=CHECKOUT --python37=PATH

CHECKOUT is a copy of the original's repository, PATH a Python 3.7 with tensorflow==1.14.0, tflearn==0.3.2,
numpy==1.16.6, matplotlib==3.2.1, scipy, pillow and "protobuf<3.21". Without them our own figures are printed alone.

A step is what train.py does: 500 labelled and 500 unlabelled images drawn, augmented, forward, backward, Adam. Each
program runs in a process of its own, in turn, --rounds times; the first two steps of a process, which compile, do not
count. Printed are medians over all rounds, ratios to the original, the share of drawing and augmentation, and from
TensorFlow's profiler which operations take a step's time. Results go to benchmarks/results/gpq_speed.json.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from side_by_side import machine, medians, profile, take_turns, times_the_original, without_profile

HERE = Path(__file__).parent
PRECISIONS = ("float32", "mixed_bfloat16")
WARM_UP, STEPS, ORIGINAL_STEPS = 2, 5, 5
ENCODED, REPEATS = 2000, 4


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--original", default=None)
    parser.add_argument("--python37", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=HERE / "results" / "gpq_speed.json")
    parser.add_argument("--ours", choices=PRECISIONS, default=None, help="one process of ours; prints JSON")
    options = parser.parse_args(arguments)
    if options.ours:
        print(json.dumps(_measure(options.ours)))
        return

    programs = {precision: [sys.executable, __file__, f"--ours={precision}"] for precision in PRECISIONS}
    if options.original and options.python37:
        sizes = [str(ORIGINAL_STEPS), str(ENCODED)]
        programs["original"] = [options.python37, str(HERE / "original_gpq.py"), options.original, *sizes]
    runs = take_turns(programs, options.rounds)
    result = {
        "command": "python benchmarks/gpq_speed.py --original=CHECKOUT --python37=PATH",
        "machine": machine(),
        "rounds": options.rounds,
        "medians": {name: medians(found, WARM_UP) for name, found in runs.items()},
        "profile_of_a_step": {name: runs[name][0]["profile"] for name in PRECISIONS},
        "runs": {name: without_profile(found) for name, found in runs.items()},
    }
    if "original" in runs:
        result["times_the_original"] = {
            name: times_the_original(result["medians"][name], result["medians"]["original"]) for name in PRECISIONS
        }
    for key in ("medians", "times_the_original", "profile_of_a_step"):
        for name, found in result.get(key, {}).items():
            print(key, name, found)

    from gpq_tf.files import write_json

    write_json(options.out, result)


def _measure(precision):
    """Seconds of our steps, of drawing, of augmentation alone, of encoding an image; and a profile."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import our_steps

    from gpq_tf import augment, heads
    from gpq_tf.backbones import vgg
    from gpq_tf.ops import compiled

    chosen = our_steps.settings_of("gpq", precision=precision)
    data, recipe = our_steps.random_data(chosen), heads.recipe("gpq")
    model, step = our_steps.make(chosen, data)
    result = {"draw_s": [], "step_s": [], "augment_s": [], "encode_s": []}
    for number in range(WARM_UP + STEPS):
        start = time.perf_counter()
        batch = recipe.draw_batch(data, chosen, number)
        drawn = time.perf_counter()
        _ = {name: float(value) for name, value in step(batch).items()}
        result["step_s"].append(time.perf_counter() - start)
        result["draw_s"].append(drawn - start)
    result["profile"] = profile(lambda: float(step(batch)["loss"]))

    augmentation = compiled(
        lambda batch: augment.flip_and_crop(vgg.preprocess(batch["images"]), batch["flips"], batch["offsets"]), False
    )
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        np.asarray(augmentation(batch))
        result["augment_s"].append(time.perf_counter() - start)
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        model.embed(data.unlabelled_images[:ENCODED])
        result["encode_s"].append((time.perf_counter() - start) / ENCODED)
    return result


if __name__ == "__main__":
    main()
