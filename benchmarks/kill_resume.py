"""Kill a training run at random moments, resume it each time from its newest save, compare with a run left alone.

    python benchmarks/kill_resume.py --head=gpq --kills=10

Both runs are `python train.py` on the embedded sample (of cgd, and of spq with --short, on 400 of its images, as
files), at 1/16 of the width, saving after every epoch. The killed one gets SIGKILL at a random moment of every life
and is started again with --resume=last; whatever carries the name of a save must load. At the end every weight, every
variable of the optimiser and the logged losses must be equal bit for bit. Prints a line per kill, writes JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sample_files import write_sample

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "gpq": ["--dataset=cifar10_sample", "--batch_size=250"],
    "spq": ["--dataset=cifar10_sample", "--batch_size=250", "--eval_epoch=5"],
    "cgd": ["--dataset=image_folders", "--image_size=32", "--batch_size=20", "--n_dim=12", "--init=None"],
}
# An epoch of SPQ on the whole sample is 39 steps.
SHORT = {
    **SETTINGS,
    "spq": ["--dataset=image_folders", "--image_size=32", "--batch_size=100", "--eval_epoch=4"],
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head", choices=SETTINGS, default="gpq")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--short", action="store_true", help="spq on 400 images")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None)
    options = parser.parse_args(arguments)
    settings = [f"--head={options.head}", "--width_multiplier=0.0625", "--save_term=1", "--keep=None", "--resume=last"]
    data = (SHORT if options.short else SETTINGS)[options.head]
    settings += [*data, f"--total_epochs={options.epochs}", f"--precision={options.precision}"]
    with tempfile.TemporaryDirectory() as folder:
        if "--dataset=image_folders" in data:
            settings.append(f"--data_dir={write_sample(Path(folder, 'images'))}")
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        start = time.time()
        _end(_train([*settings, f"--model_save_path={whole}"], folder))
        start_seconds, epoch_seconds = _seconds(whole, start)
        rng, lives = random.Random(options.seed), []
        while True:
            newest = max(_saves(killed), default=0)
            if newest == options.epochs:
                break
            process = _train([*settings, f"--model_save_path={killed}"], folder)
            was_killed = False
            if len(lives) < options.kills:
                # By its saves, not by the clock: all kills are to come before the run is done, however busy a machine.
                epoch = newest + rng.uniform(0, 1.8) * (options.epochs - newest) / (options.kills - len(lives) + 1)
                epoch = min(epoch, options.epochs - 0.5)
                was_killed = _kill(process, killed, epoch, epoch_seconds if int(epoch) > newest else start_seconds)
            if not was_killed:
                _end(process)
            lives.append({"resumed_from_epoch": newest or None, "killed": was_killed})
            leftovers = [file.name for file in killed.glob(".*")] if killed.is_dir() else []
            lives[-1]["temporary_files_left"] = leftovers
            print(lives[-1], flush=True)
        result = {
            "settings": [setting for setting in settings if not setting.startswith("--data_dir")],
            "lives": lives,
            "kills": sum(life["killed"] for life in lives),
            **_compare(whole, killed, options.epochs),
        }
    print({name: value for name, value in result.items() if name not in ("settings", "lives")})
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    return result


def _train(arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )


def _seconds(folder, start):
    """(Seconds until the first save of a run, seconds from one save to the next)."""
    times = [path.stat().st_mtime for _, path in sorted(_saves(folder).items())]
    return times[0] - start, (times[-1] - times[0]) / max(len(times) - 1, 1)


def _kill(process, folder, epoch, seconds):
    """Wait for the save of epoch's whole part, then for the rest of it times `seconds`, and kill; whether that hit."""
    while max(_saves(folder), default=0) < int(epoch) and process.poll() is None:
        time.sleep(0.02)
    try:
        process.wait(epoch % 1 * seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def _end(process):
    """Wait for the end of a run, which must be a good one."""
    if status := process.wait():
        raise SystemExit(f"train.py ended with status {status}")


def _saves(folder):
    """dict of epoch -> path."""
    numbers = {path: path.stem.rpartition("_")[2] for path in folder.glob("*.keras")}
    return {int(number): path for path, number in numbers.items() if number.isdecimal()}


def _compare(whole, killed, epochs):
    from gpq_tf import load_model, model_file

    paths = [_saves(folder)[epochs] for folder in (whole, killed)]
    weights = [[np.asarray(weight) for weight in load_model(path).weights] for path in paths]
    states = [model_file.training_state(model_file.read(path)) for path in paths]
    losses = [_losses(next(folder.glob("*.log.jsonl"))) for folder in (whole, killed)]
    return {
        "weights_equal": all(np.array_equal(a, b) for a, b in zip(*weights, strict=True)),
        "optimiser_equal": all(np.array_equal(states[0][key], states[1][key]) for key in states[0]),
        "losses_equal": losses[0] == losses[1],
        "steps": len(losses[0]),
    }


def _losses(path):
    """Step -> loss; a step that was taken again after a kill counts as it was logged last."""
    found = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the kill hit this line
        if entry["event"] == "step":
            found[entry["step"]] = entry["loss"]
    return found


if __name__ == "__main__":
    main()
