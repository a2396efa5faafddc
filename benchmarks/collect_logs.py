"""Collect what trainings said of themselves: the scores in logs of train.py, as one JSON file.

    python benchmarks/collect_logs.py OUT.json NAME=LOG [NAME=LOG ...]

LOG is a .log.jsonl that train.py wrote; a NAME may come several times, for a run that went on in another folder. Of
each run the settings that are no paths and differ from the head's defaults, and for each save and evaluation its epoch
and scores; an epoch that was taken twice, after an interruption, counts once.
"""

import argparse
import json
from pathlib import Path

import command

SCORES = ("mAP", "mAP_of_subset", "R@1", "R@2", "R@4", "R@8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("logs", nargs="+", metavar="NAME=LOG")
    options = parser.parse_args(arguments)

    from gpq_tf import settings
    from gpq_tf.files import write_json

    runs = {}
    for given in options.logs:
        name, _, path = given.partition("=")
        run = runs.setdefault(name, {"settings": [], "epochs": {}})
        for line in Path(path).read_text().splitlines():
            entry = json.loads(line)
            if entry["event"] == "start":
                defaults = settings.defaults_of(entry["settings"]["head"])
                run["settings"].append(changed(entry["settings"], defaults))
            if entry["event"] in ("save", "evaluation"):
                found = {score: round(entry[score], 4) for score in SCORES if score in entry}
                run["epochs"].setdefault(entry["epoch"], {}).update(found)
    for run in runs.values():
        run["epochs"] = [{"epoch": epoch, **found} for epoch, found in sorted(run["epochs"].items())]
        print(run["settings"][-1], run["epochs"][-1])
    write_json(options.out, {"command": "python benchmarks/collect_logs.py OUT.json NAME=LOG ...", "runs": runs})


def changed(given, defaults):
    """Settings that are not the defaults; of files only the names."""
    found = {name: value for name, value in given.items() if value != defaults.get(name) and "_path" not in name}
    return {name: Path(value).name if "/" in str(value) else value for name, value in found.items()}


if __name__ == "__main__":
    command.run(main)
