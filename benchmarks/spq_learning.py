"""Train SPQ from scratch on the whole of CIFAR-10: three seeds, and what the original's faults do to the first of them.

    python benchmarks/spq_learning.py ./cifar10             # ten epochs a run
    python benchmarks/spq_learning.py ./cifar10 --runs=1    # the next one that is missing

Quarter width, 32 bits, bfloat16, no labels; trained by gpq_tf.trainer.train as train.py does. Each epoch is scored by
the published protocol: mAP@1000 of the 10,000 test images among the 50,000 training images. Writes
benchmarks/results/spq_learning.json and the curves, docs/spq_learning.png; prints a line a run and the spread.

A run that is in the JSON file with the same settings is not repeated, and one that was interrupted goes on from its
last epoch, whose model is kept in --work, so the script can be stopped and started again. Seeds are 100 apart: the
layers of a network draw from its seed and the numbers that follow.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import command
from interruptible import train_or_go_on

ROOT = Path(__file__).resolve().parents[1]
COMMON = ("--head=spq", "--width_multiplier=0.25", "--precision=mixed_bfloat16", "--eval_epoch=1")
SEEDS = (0, 100, 200)
RUNS = (*(("default", seed) for seed in SEEDS), ("legacy", SEEDS[0]))
OWN = {"default": (), "legacy": ("--legacy=True",)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--runs", type=int, help="make at most so many runs now")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "spq_learning.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "spq_learning.png")
    parser.add_argument("--work", type=Path, default=Path("models/spq_learning"), help="folder of unfinished runs")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from gpq_tf import data, heads, settings
    from gpq_tf.files import write_json

    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    result["command"] = f"python benchmarks/spq_learning.py ./cifar10 --epochs={options.epochs}"
    wanted, images = [_key(variant, seed, options.epochs) for variant, seed in RUNS], None
    missing = [key for key in wanted if _find(result["runs"], key) is None]
    for key in missing[: options.runs]:
        chosen = settings.resolve([*key["settings"], f"--data_dir={options.data_dir}"], "no config.py")
        images = images or data.load_for(chosen, heads.recipe("spq").PROTOCOL)
        folder = options.work / f"{key['variant']}_{key['seed']}_{options.epochs}"
        result["runs"].append({**key, **_figures(train_or_go_on(chosen, images, folder))})
        write_json(options.out, result)
        print(key["variant"], "seed", key["seed"], result["runs"][-1]["mAP@1000"], flush=True)
    done = [run for run in (_find(result["runs"], key) for key in wanted) if run]
    result["summary"] = {variant: _summary([run for run in done if run["variant"] == variant]) for variant in OWN}
    print(result["summary"])
    write_json(options.out, result)
    plot(done, options.plot)


def _key(variant, seed, epochs):
    given = [*COMMON, *OWN[variant], f"--total_epochs={epochs}", f"--seed={seed}"]
    return {"variant": variant, "seed": seed, "settings": given}


def _find(runs, key):
    return next((run for run in runs if key.items() <= run.items()), None)


def _figures(found):
    """Losses are means of an epoch's steps, as printed by no single one."""
    losses = {}
    for step in found.steps:
        losses.setdefault(step["epoch"], []).append(step["loss"])
    return {
        "loss": [round(statistics.mean(each), 4) for each in losses.values()],
        "mAP@1000": [round(each["mAP"], 4) for each in found.evaluations],
        "steps": len(found.steps),
        "seconds": round(found.seconds, 1),
        "resumed": found.resumed,
    }


def _summary(runs):
    """Of the last epoch's mAP."""
    last = [run["mAP@1000"][-1] for run in runs]
    return {"seeds": len(last)} | (
        {"mean": round(statistics.mean(last), 4), "smallest": min(last), "largest": max(last)} if last else {}
    )


def plot(runs, path):
    """Loss and mAP by epoch, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(1, 2),
        ("loss", "mAP@1000"),
        ("cross-quantized contrastive loss, mean of an epoch", "mAP@1000, 10,000 queries among 50,000 images"),
        strict=True,
    ):
        for run in runs:
            style = "--" if run["variant"] == "legacy" else "-"
            label = f"seed {run['seed']}" + (", legacy" if run["variant"] == "legacy" else "")
            axes.plot(range(1, len(run[what]) + 1), run[what], style, marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    command.run(main)
