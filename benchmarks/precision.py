"""Does training in 16 bits learn what it learns in 32? 300 steps of a narrow network in each precision.

    python benchmarks/precision.py            # all heads
    python benchmarks/precision.py --head=spq

On the embedded sample of CIFAR-10 (of cgd on 40 images of each class, as files), at an eighth of the width: three seeds
in float32, and the first of them in mixed_bfloat16 and mixed_float16 (with loss scaling). Prints the last score of each
(mAP of codes, Recall@1 of unseen classes) and whether it lies within the three seeds', writes
benchmarks/results/precision.json and the curves, docs/precision.png. Seeds are 100 apart: the layers of a network draw
from its seed and the numbers that follow.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from interruptible import train_or_go_on
from sample_files import write_sample

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 100, 200)
RUNS = [("float32", seed) for seed in SEEDS] + [("mixed_bfloat16", SEEDS[0]), ("mixed_float16", SEEDS[0])]
# 300 steps each, of spq 294
HEADS = {
    "gpq": ["--dataset=cifar10_sample", "--batch_size=100", "--total_epochs=30"],  # 10 steps an epoch
    "spq": ["--dataset=cifar10_sample", "--batch_size=200", "--total_epochs=6"],  # 49
    "cgd": ["--dataset=image_folders", "--image_size=32", "--batch_size=20", "--total_epochs=30", "--n_dim=96"],  # 10
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
        with tempfile.TemporaryDirectory() as folder:
            runs = [_run(head, precision, seed, Path(folder)) for precision, seed in RUNS]
        scores = [run["score"] for run in runs[: len(SEEDS)]]
        for run in runs[len(SEEDS) :]:
            run["within_the_seeds"] = min(scores) <= run["score"] <= max(scores)
            print(head, run["precision"], run["score"], "of", sorted(scores), run["within_the_seeds"], flush=True)
        report["heads"][head] = {"settings": HEADS[head], "runs": runs}
        write_json(options.out, report)
    plot(report["heads"], options.plot)


def _run(head, precision, seed, folder):
    from gpq_tf import data, heads, settings

    given = [f"--head={head}", *HEADS[head], "--width_multiplier=0.125", f"--precision={precision}", f"--seed={seed}"]
    if head == "cgd":
        given += ["--init=None", f"--data_dir={write_sample(folder / 'images')}"]
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
        "loss": [round(sum(losses[at : at + WINDOW]) / WINDOW, 4) for at in range(0, len(losses), WINDOW)],
    }


def plot(heads, path):
    """Loss by step, a picture for each head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(heads), 4.2), layout="constrained")
    for axes, (head, found) in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads.items(), strict=True):
        for run in found["runs"]:
            steps = [WINDOW * (i + 0.5) for i in range(len(run["loss"]))]
            style = {"color": "0.7"} if run["precision"] == "float32" else {}
            axes.plot(steps, run["loss"], label=f"{run['precision']}, seed {run['seed']}: {run['score']:.3f}", **style)
        axes.set(title=head, xlabel="step", ylabel="loss")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(True, alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
