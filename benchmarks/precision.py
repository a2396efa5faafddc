"""Does training in 16 bits learn what it learns in 32? 300 steps of a narrow network in each precision.

    python benchmarks/precision.py            # all heads
    python benchmarks/precision.py --head=spq

On the embedded sample of CIFAR-10 (of cgd on 120 images of each class, as files), at an eighth of the width, with three
seeds: float32, mixed_bfloat16 and mixed_float16 (with loss scaling). The last score of a run is the mAP of codes, or
Recall@1 among the 600 images of unseen classes. Prints for each precision the mean and the range of the seeds', how
many of them lie within the range in float32, and how far the mean is from that in float32; writes
benchmarks/results/precision.json and the curves, docs/precision.png. Seeds are 100 apart: the layers of a network draw
from its seed and the numbers that follow. A run that is in the JSON file is not repeated.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from interruptible import train_or_go_on
from sample_files import write_sample

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 100, 200)
PRECISIONS = {"float32": "0.6", "mixed_bfloat16": "tab:blue", "mixed_float16": "tab:orange"}  # and colours
N_IMAGES = 120
# 300 steps each, of spq 294
HEADS = {
    "gpq": ["--dataset=cifar10_sample", "--batch_size=100", "--total_epochs=30"],  # 10 steps an epoch
    "spq": ["--dataset=cifar10_sample", "--batch_size=200", "--total_epochs=6"],  # 49
    "cgd": ["--dataset=image_folders", "--image_size=32", "--batch_size=20", "--total_epochs=10", "--n_dim=96"],  # 30
}
WINDOW = 10  # steps whose mean is drawn


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head", choices=HEADS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "precision.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "precision.png")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from gpq_tf.files import write_json

    report = json.loads(options.out.read_text()) if options.out.exists() else {"heads": {}}
    report["command"] = "python benchmarks/precision.py"
    for head in [options.head] if options.head else HEADS:
        found = report["heads"].setdefault(head, {"settings": HEADS[head], "runs": []})
        with tempfile.TemporaryDirectory() as folder:
            for precision in PRECISIONS:
                for seed in SEEDS:
                    if not any((run["precision"], run["seed"]) == (precision, seed) for run in found["runs"]):
                        found["runs"].append(_run(head, precision, seed, Path(folder)))
                        write_json(options.out, report)
        found["summary"] = {precision: _summary(found["runs"], precision) for precision in PRECISIONS}
        for precision, summary in found["summary"].items():
            print(head, precision, summary, flush=True)
        write_json(options.out, report)
    plot(report["heads"], options.plot)


def _summary(runs, precision):
    scores, others = ([run["score"] for run in runs if run["precision"] == name] for name in (precision, "float32"))
    mean = statistics.mean(scores)
    return {
        "mean": round(mean, 4),
        "range": [min(scores), max(scores)],
        "within_float32": sum(min(others) <= score <= max(others) for score in scores),
        "mean_less_float32": round(mean - statistics.mean(others), 4),
    }


def _run(head, precision, seed, folder):
    from gpq_tf import data, heads, settings

    given = [f"--head={head}", *HEADS[head], "--width_multiplier=0.125", f"--precision={precision}", f"--seed={seed}"]
    if head == "cgd":
        given += ["--init=None", f"--data_dir={write_sample(folder / 'images', N_IMAGES)}"]
    epochs = next(int(each.partition("=")[2]) for each in given if each.startswith("--total_epochs"))
    chosen = settings.resolve([*given, f"--eval_epoch={epochs}"], "no config.py")
    images = data.load_for(chosen, heads.recipe(head).PROTOCOL)
    found = train_or_go_on(chosen, images, folder / f"{precision}_{seed}")
    score = found.evaluations[-1]["R@1" if head == "cgd" else "mAP"]
    losses = [step["loss"] for step in found.steps]
    return {
        "precision": precision,
        "seed": seed,
        "score": round(score, 4),
        "steps": len(losses),
        "loss": [round(statistics.mean(losses[at : at + WINDOW]), 4) for at in range(0, len(losses), WINDOW)],
    }


def plot(heads, path):
    """Loss by step, a picture for each head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(heads), 4.2), layout="constrained")
    for axes, (head, found) in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads.items(), strict=True):
        for run in found["runs"]:
            steps = [WINDOW * (i + 0.5) for i in range(len(run["loss"]))]
            label = run["precision"] if run["seed"] == SEEDS[0] else None
            axes.plot(steps, run["loss"], color=PRECISIONS[run["precision"]], linewidth=1, label=label)
        axes.set(title=head, xlabel="step", ylabel="loss")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(True, alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
