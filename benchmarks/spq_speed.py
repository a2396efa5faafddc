"""SPQ: time of a training step, augmentation, encoding and retrieval, beside the original's where PyTorch is installed.

    python benchmarks/spq_speed.py --original=CHECKOUT --python311=PATH

CHECKOUT is a copy of the original's repository, PATH a Python 3.11 with torch==2.13.0, kornia==0.5.10, packaging,
numpy, tqdm and pillow. Without them our own figures are printed alone. --batch, --width and --queries make it small to
try; the original has one width, so that its ratios are of use at ours of 1 alone.

A step is what train.py does: 256 images drawn, two views of each, forward, backward, Adam. Each program runs in a
process of its own, in turn, --rounds times; the first two steps of a process, which compile, do not count. Retrieval is
10,000 queries among 50,000 codes of 32 bits, synthetic (metrics_speed.py), the same arrays for both: `evaluate`
groups the codes, ranks and scores the first 1,000, `search` finds the 1,000 nearest. The original answers a few
hundred of the queries, since it takes as long for each.

Printed are medians over all rounds, ratios to the original, and from TensorFlow's profiler which operations take a
step's time. Results go to benchmarks/results/spq_speed.json.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from side_by_side import machine, medians, profile, take_turns, times_the_original, without_profile

HERE = Path(__file__).parent
PRECISIONS = ("float32", "mixed_bfloat16")
WARM_UP, STEPS, ORIGINAL_STEPS = 2, 5, 4
ENCODED, REPEATS = 2048, 4
N_GALLERY, N_BOOK, LENGTH, TOP = 50_000, 8, 16, 1000
ORIGINAL_QUERIES = 200


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--original", default=None)
    parser.add_argument("--python311", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--out", default=HERE / "results" / "spq_speed.json")
    parser.add_argument("--ours", choices=(*PRECISIONS, "retrieval"), default=None, help="one process; prints JSON")
    parser.add_argument("--problem", default=None, help="of that process: what is retrieved, a file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.ours:
        found = measure_retrieval(options) if options.ours == "retrieval" else measure_steps(options)
        print(json.dumps(found))
        return

    with tempfile.TemporaryDirectory() as folder:
        runs = take_turns(make_programs(options, Path(folder) / "problem.npz"), options.rounds)
    result = summary(options, runs)
    for key in ("medians", "retrieval", "times_the_original", "profile_of_a_step"):
        for name, found in result.get(key, {}).items():
            print(key, name, found)

    from gpq_tf.files import write_json

    write_json(options.out, result)


def make_programs(options, problem):
    """The commands that take turns; the problem of retrieval is written to a file."""
    from metrics_speed import make_problem

    names = ("codebook", "codes", "gallery_labels", "queries", "query_labels")
    np.savez(problem, **dict(zip(names, make_problem(N_GALLERY, options.queries, N_BOOK, LENGTH), strict=True)))
    sizes = [f"--batch={options.batch}", f"--width={options.width}", f"--problem={problem}"]
    programs = {
        name: [sys.executable, __file__, f"--ours={name}", f"--queries={options.queries}", *sizes]
        for name in (*PRECISIONS, "retrieval")
    }
    if options.original and options.python311:
        programs["original"] = [
            options.python311,
            str(HERE / "original_spq.py"),
            options.original,
            *map(str, (ORIGINAL_STEPS, options.batch, ENCODED, problem, min(ORIGINAL_QUERIES, options.queries))),
        ]
    return programs


def summary(options, runs):
    steps = {name: medians(found, WARM_UP) for name, found in runs.items() if name != "retrieval"}
    for found in steps.values():
        found["augment_images_per_s"] = round(2 * options.batch / found["augment_s"])
    retrieval = {"ours": runs["retrieval"]}
    if "original" in runs:
        retrieval["original"] = runs["original"]
    retrieval = {name: medians_of_retrieval(found) for name, found in retrieval.items()}
    result = {
        "command": "python benchmarks/spq_speed.py --original=CHECKOUT --python311=PATH",
        "machine": machine(),
        "sizes": {"batch": options.batch, "width": options.width, "queries": options.queries, "gallery": N_GALLERY},
        "rounds": options.rounds,
        "medians": steps,
        "retrieval": retrieval,
        "profile_of_a_step": {name: runs[name][0]["profile"] for name in PRECISIONS},
        "runs": {name: without_profile(found) for name, found in runs.items()},
    }
    if "original" in runs:
        original = steps["original"]
        result["times_the_original"] = {
            name: times_the_original(steps[name], original)
            | {"augmentation": round(original["augment_s"] / steps[name]["augment_s"], 1)}
            for name in PRECISIONS
        }
        result["times_the_original"]["retrieval"] = {
            what: round(retrieval["original"][what] / retrieval["ours"][what], 1)
            for what in ("search_ms_a_query", "evaluate_ms_a_query")
        }
    return result


def medians_of_retrieval(runs):
    """Milliseconds a query; of ours without the first of a process, which compiles."""
    found = {}
    for what in ("search", "evaluate"):
        seconds = [each for run in runs for each in np.atleast_1d(run[f"{what}_s"])[-REPEATS:]]
        found[f"{what}_ms_a_query"] = round(1000 * statistics.median(seconds), 4)
    return found | {key: value for key, value in runs[0].items() if key.startswith(("mAP", "distinct"))}


def measure_steps(options):
    """Seconds of our steps, of drawing, of augmentation alone, of encoding an image; and a profile."""
    import our_steps

    from gpq_tf import augment, heads
    from gpq_tf.ops import compiled

    given = {"precision": options.ours, "batch_size": options.batch, "width_multiplier": options.width}
    chosen = our_steps.settings_of("spq", **given)
    data, recipe = our_steps.random_data(chosen), heads.recipe("spq")
    model, step = our_steps.make(chosen, data)
    found = {"draw_s": [], "step_s": [], "augment_s": [], "encode_s": []}
    for number in range(WARM_UP + STEPS):
        start = time.perf_counter()
        batch = recipe.draw_batch(data, chosen, number)
        drawn = time.perf_counter()
        float(step(batch)["loss"])
        found["step_s"].append(time.perf_counter() - start)
        found["draw_s"].append(drawn - start)
    found["profile"] = profile(lambda: float(step(batch)["loss"]))

    def both_views(batch):
        images = recipe.preprocess(batch["images"])
        return [augment.apply_views(images, batch[view], chosen.augment) for view in ("first", "second")]

    augmentation = compiled(both_views)
    for number in range(1 + REPEATS):
        batch = recipe.draw_batch(data, chosen, number)
        start = time.perf_counter()
        _ = [np.asarray(views) for views in augmentation(batch)]
        found["augment_s"].append(time.perf_counter() - start)
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        model.encode(data.unlabelled_images[:ENCODED])
        found["encode_s"].append((time.perf_counter() - start) / ENCODED)
    return found


def measure_retrieval(options):
    """Seconds a query of ranking and scoring as `gpq_tf.retrieval.evaluate`, and of searching; and the figures."""
    from gpq_tf.index import PQIndex
    from gpq_tf.metrics import mean_average_precision

    arrays = dict(np.load(options.problem))
    queries, labels = arrays["queries"], arrays["query_labels"]
    found = {"search_s": [], "evaluate_s": []}
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        index = PQIndex(arrays["codebook"], "l2")
        index.add(arrays["codes"])
        found["mAP"] = mean_average_precision(queries, labels, index, arrays["gallery_labels"], TOP)
        evaluated = time.perf_counter()
        index.search(queries, TOP)
        found["search_s"].append((time.perf_counter() - evaluated) / len(queries))
        found["evaluate_s"].append((evaluated - start) / len(queries))
    some = slice(min(ORIGINAL_QUERIES, len(queries)))
    for ties in ("stable", "expected"):
        figure = mean_average_precision(queries[some], labels[some], index, arrays["gallery_labels"], TOP, ties=ties)
        found[f"mAP_of_the_originals_queries_{ties}"] = figure
    found["distinct"] = index.snapshot().distinct.shape[1]
    return found


if __name__ == "__main__":
    main()
