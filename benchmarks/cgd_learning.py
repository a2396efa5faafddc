"""Train CGD from scratch on a set in the layout of the original's CUB-200-2011 and compare what is combined.

    python benchmarks/cgd_learning.py SET --epochs=40            # all of it
    python benchmarks/cgd_learning.py SET --epochs=40 --runs=2   # the next two that are missing

SET holds `meta` (train.txt, test.txt, bbox.txt) and the images. Quarter width, 64 pixels, 384 values, trained by
gpq_tf.trainer.train as train.py does; scored by Recall@k among the images of classes that training never saw. Runs:

    one seed of the seven combinations of S (SPoC), M (MAC) and G (GeM), each with and without the auxiliary loss;
    two more seeds of the best single descriptor and of the best pair of them, with the auxiliary loss;
    one seed of the pairs and of all three added up in place of side by side, and two more of the best such pair where
    it is better than those side by side.

A run that is already in benchmarks/results/cgd_learning.json with the same settings is not repeated, and one that was
interrupted goes on from its last epoch, whose model is kept in --work, so the script can be stopped and started again.
Seeds are 100 apart: the layers of a network draw from its seed and the numbers that follow. Prints a line a run, and a
table of all in the end.
"""

import argparse
import json
import os
from pathlib import Path

import command
from interruptible import train_or_go_on

RESULTS = Path(__file__).parent / "results"
COMMON = (
    "--head=cgd",
    "--dataset=image_lists",
    "--image_size=64",
    "--width_multiplier=0.25",
    "--n_dim=384",
    "--init=None",
    "--precision=mixed_bfloat16",
)
SINGLE, PAIRS, ALL = ("S", "M", "G"), ("SM", "SG", "MG"), "SMG"
SEEDS = (0, 100, 200)
KS = (1, 2, 4, 8)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--runs", type=int, help="make at most so many runs now")
    parser.add_argument("--out", type=Path, default=RESULTS / "cgd_learning.json")
    parser.add_argument("--work", type=Path, default=Path("models/cgd_learning"), help="folder of unfinished runs")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    result["command"] = f"python benchmarks/cgd_learning.py SET --epochs={options.epochs}"
    made, data = 0, None
    while made != options.runs:
        key = next((key for key in _wanted(result["runs"], options.epochs) if _find(result["runs"], key) is None), None)
        if key is None:
            break
        if data is None:
            data = _load(key, options)
            result["data"] = data.source.partition(", from")[0]
            result.setdefault("untrained", _untrained(key, data, options))
        result["runs"].append({**key, **_run(key, data, options)})
        _write(options.out, result)
        made += 1
        run = result["runs"][-1]
        print(f"{run['variant']}, seed {run['seed']}: R@1 {run['best']['R@1']:.4f}, {run['seconds']:.0f} s", flush=True)
    print(markdown(result))


def _wanted(runs, epochs):
    """The keys of the table's runs, in the order in which they are made."""

    def key(letters, auxiliary=True, seed=0, combination="concat"):
        variant = f"{letters} {combination if len(letters) > 1 else ''} {'with' if auxiliary else 'without'} auxiliary"
        own = (f"--descriptors={letters}", f"--combination={combination}", f"--auxiliary={auxiliary}")
        settings = [*COMMON, f"--total_epochs={epochs}", *own]
        return {"variant": " ".join(variant.split()), "settings": settings, "seed": seed}

    yield from (key(letters, auxiliary) for letters in (*SINGLE, *PAIRS, ALL) for auxiliary in (True, False))
    for group in (SINGLE, PAIRS):
        found = {letters: _find(runs, key(letters)) for letters in group}
        best = max(group, key=lambda letters: found[letters]["best"]["R@1"])
        yield from (key(best, seed=seed) for seed in SEEDS[1:])
    yield from (key(letters, combination="sum") for letters in (*PAIRS, ALL))
    sums = {letters: _find(runs, key(letters, combination="sum"))["best"]["R@1"] for letters in PAIRS}
    best = max(sums, key=sums.get)
    if sums[best] > max(_find(runs, key(letters))["best"]["R@1"] for letters in PAIRS):
        yield from (key(best, seed=seed, combination="sum") for seed in SEEDS[1:])


def _find(runs, key):
    return next((run for run in runs if key.items() <= run.items()), None)


def _resolved(key, options):
    from gpq_tf import settings

    given = [*key["settings"], f"--seed={key['seed']}", f"--data_dir={options.data_dir}"]
    return settings.resolve(given, "no config.py")


def _load(key, options):
    from gpq_tf import data

    return data.load_for(_resolved(key, options), "unseen_classes")


def _untrained(key, data, options):
    """Recall of the network of the first row as it is drawn."""
    from gpq_tf import recall, starting, trainer

    chosen = trainer.settings_of_data(_resolved(key, options), data)
    return _rounded(recall.evaluate(starting.initial_model(chosen)[0], data.test)["scores"])


def _run(key, data, options):
    chosen = _resolved(key, options)
    folder = options.work / f"{key['variant']} {key['seed']} {options.epochs}".replace(" ", "_")
    found = train_or_go_on(chosen, data, folder)
    curve = [_rounded({f"R@{k}": each[f"R@{k}"] for k in KS}) for each in found.evaluations]
    best = max(range(len(curve)), key=lambda epoch: curve[epoch]["R@1"])
    last = found.steps[-1]
    return {
        "best": {"epoch": best + 1, **curve[best]},
        "last": curve[-1],
        "R@1_by_epoch": [each["R@1"] for each in curve],
        "last_losses": _rounded({name: last[name] for name in ("loss", "rank", "aux", "active")}),
        "steps": len(found.steps),
        "seconds": round(found.seconds, 1),
        "resumed": found.resumed,
    }


def markdown(result):
    """The best epoch of each run, and of the network before it is trained."""
    lines = ["| | seed | " + " | ".join(f"R@{k}" for k in KS) + " | epoch |", "| --- " * (len(KS) + 3) + "|"]
    rows = [(run["variant"], run["seed"], run["best"]) for run in result["runs"]]
    for name, seed, best in [("S, as drawn", 0, result["untrained"] | {"epoch": 0}), *rows]:
        recalls = " | ".join(f"{best[f'R@{k}']:.4f}".removeprefix("0") for k in KS)
        lines.append(f"| {name} | {seed} | {recalls} | {best['epoch']} |")
    return "\n".join(lines)


def _rounded(values):
    return {name: round(value, 5) for name, value in values.items()}


def _write(out, result):
    from gpq_tf.files import write_json

    out.parent.mkdir(exist_ok=True)
    write_json(out, result)


if __name__ == "__main__":
    command.run(main)
