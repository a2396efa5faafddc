"""Train GPQ on the whole of CIFAR-10 and score it: several seeds, each loss switched off, several lengths of codes.

    python benchmarks/learning.py ./cifar10 --plan=full        # 3 seeds, full width, 20 epochs
    python benchmarks/learning.py ./cifar10 --plan=ablation    # 6 variants x 3 seeds, width .25, 20 epochs
    python benchmarks/learning.py ./cifar10 --plan=bits --pretrained=FILE   # 12 to 48 bits, with and without the
                                                               # unlabelled images, 60 epochs, 1 seed

FILE is what benchmarks/pretrain.py wrote; the other plans start from scratch. With KERAS_BACKEND=jax on a GPU the plan
bits takes minutes; --variants picks rows of it (--variants "12 bits" "24 bits"), so that several processes can share
it, each with its own --out. --epochs=300 trains as long as published.

Each run is trained by gpq_tf.trainer.train as train.py does, with the published protocol (5,000 labelled, 54,000
unlabelled images that are also the gallery, 1,000 queries), and scored in all the ways of benchmarks/gpq_scoring.py. A
run that is already in benchmarks/results/learning_PLAN.json with the same settings is not repeated, so the script can
be stopped and started again. Prints a line per run and the mean and spread of each variant.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import command
import gpq_scoring

RESULTS = Path(__file__).parent / "results"
COMMON = ("--precision=mixed_bfloat16",)
# seeds, settings, variant: (settings, whether the N-pair loss, which has no weight, counts)
PLANS = {
    "full": ((0, 1, 2), ("--total_epochs=20",), {"published": ((), True)}),
    "bits": (
        (0,),
        ("--total_epochs=60",),
        {
            f"{4 * n_book} bits{what}": ((f"--n_book={n_book}", *own), True)
            for n_book in (3, 6, 8, 12)
            for what, own in (("", ()), (", labelled images alone", ("--lam_1=0",)))
        },
    ),
    "ablation": (
        (0, 1, 2),
        ("--total_epochs=20", "--width_multiplier=0.25"),
        {
            "all losses": ((), True),
            "without the entropy of unlabelled images": (("--lam_1=0",), True),
            "without classification": (("--lam_2=0",), True),
            "without the N-pair loss": ((), False),
            "N-pair loss alone": (("--lam_1=0", "--lam_2=0"), True),
            "all losses, legacy": (("--legacy=True",), True),
        },
    ),
}
# The original's checkpoint of 20 epochs from scratch, as recorded with it (docs/fidelity.md).
RECORDED = {"raw": 0.3517, "normalised": 0.3538}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--pretrained", type=Path, help="backbone to start from, for the plan bits")
    parser.add_argument("--variants", nargs="*", help="rows of the plan to run; all where none is named")
    parser.add_argument("--epochs", type=command.positive, help="in place of the plan's")
    parser.add_argument("--out", type=Path, help="benchmarks/results/learning_PLAN[_EPOCHS].json is the default")
    options = parser.parse_args(arguments)
    if (options.plan == "bits") != bool(options.pretrained):
        parser.error("the plan bits starts from a --pretrained backbone, the others from scratch")
    if options.pretrained and not options.pretrained.is_file():
        parser.error(f"expected a file that benchmarks/pretrain.py wrote, {options.pretrained} does not exist")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    seeds, common, variants = PLANS[options.plan]
    stem = f"learning_{options.plan}"
    if options.epochs:
        common, stem = (*common, f"--total_epochs={options.epochs}"), f"{stem}_{options.epochs}"
    if unknown := set(options.variants or ()) - set(variants):
        parser.error(f"expected variants among {', '.join(map(repr, variants))}, received {', '.join(unknown)}")
    chosen = {variant: variants[variant] for variant in options.variants or variants}
    out = options.out or RESULTS / f"{stem}.json"
    result = json.loads(out.read_text()) if out.exists() else {"runs": []}
    more = " --pretrained=FILE" * bool(options.pretrained) + f" --epochs={options.epochs}" * bool(options.epochs)
    result["command"] = f"python benchmarks/learning.py ./cifar10 --plan={options.plan}{more}"
    result["recorded_with_the_original_after_20_epochs"] = RECORDED
    files = [f"--data_dir={options.data_dir}"]
    if options.pretrained:
        files.append(f"--ImageNet_pretrained_path={options.pretrained}")
        about = options.pretrained.with_suffix(".json")  # which benchmarks/pretrain.py leaves beside its result
        result["pretrained"] = options.pretrained.name
        if about.exists():
            result["pretrained"] = json.loads(about.read_text())["history"][-1]
    for name, (own, with_pairs) in chosen.items():
        for seed in seeds:
            given = [*COMMON, *common, *own, f"--seed={seed}"]
            key = {"variant": name, "settings": given}
            if not any(key.items() <= run.items() for run in result["runs"]):
                result["runs"].append({**key, **_run([*given, *files], with_pairs)})
                print(result["runs"][-1], flush=True)
                _write(out, result)
    result["summary"] = [_summary(name, runs) for name in variants if (runs := _of(name, result["runs"]))]
    for line in result["summary"]:
        print(line)
    _write(out, result)


def _write(out, result):
    from gpq_tf.files import write_json

    out.parent.mkdir(exist_ok=True)
    write_json(out, result)


def _run(given, with_pairs):
    """Train once, score in several ways."""
    import keras

    from gpq_tf import data, losses, settings, trainer
    from gpq_tf.network import load_model

    published = losses.n_pair_product_quantization
    if not with_pairs:
        # A zero with the right dependencies: every variable keeps its (zero) gradient.
        losses.n_pair_product_quantization = lambda similarity, x, q, n_book: 0.0 * keras.ops.sum(x * q)
    try:
        with tempfile.TemporaryDirectory() as folder:
            chosen = settings.resolve([*given, f"--model_save_path={folder}"], "no config.py")
            images = data.load_for(chosen)
            start = time.time()
            _, path = trainer.train(chosen, images)
            seconds = time.time() - start
            scores = gpq_scoring.scores(load_model(path, legacy=True), images)
            (log_file,) = Path(folder).glob("*.log.jsonl")
            log = [json.loads(line) for line in log_file.open()]
    finally:
        losses.n_pair_product_quantization = published
    steps = [entry for entry in log if entry["event"] == "step"]
    return {
        **{f"mAP_{name}": round(score, 5) for name, score in scores.items()},
        "backend": keras.backend.backend(),
        "steps": len(steps),
        "training_seconds": round(seconds, 1),
        "median_images_per_second": statistics.median(entry["images_per_second"] for entry in steps),
        "last_losses": {name: round(steps[-1][name], 4) for name in ("loss", "hash", "cls", "ent")},
    }


def _of(variant, runs):
    return [run for run in runs if run["variant"] == variant]


def _summary(name, runs):
    summary = {"variant": name, "seeds": len(runs)}
    for scoring in (name for name in runs[0] if name.startswith("mAP_")):
        scores = [run[scoring] for run in runs]
        summary[scoring] = {
            "mean": round(statistics.mean(scores), 4),
            "smallest": round(min(scores), 4),
            "largest": round(max(scores), 4),
        }
    return summary


if __name__ == "__main__":
    command.run(main)
