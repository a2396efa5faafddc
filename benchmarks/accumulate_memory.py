"""Memory of a training step whose batch goes through the network in parts (--accumulate).

    python benchmarks/accumulate_memory.py                    # every head, 1, 2 and 4 parts
    python benchmarks/accumulate_memory.py --head=spq --parts 1 4

The published batches, of cgd a quarter, full width; each measurement in a process of its own. "Above" is the largest
resident memory of the process after three steps, less that after the model, data and optimiser were made. Prints a line
each, and writes benchmarks/results/accumulate_memory.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import command

RESULT = Path(__file__).parent / "results" / "accumulate_memory.json"
GIVEN = {"gpq": {}, "spq": {}, "cgd": {"batch_size": 32}}
N_STEP = 3


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head", choices=GIVEN, nargs="*", default=list(GIVEN))
    parser.add_argument("--parts", type=command.positive, nargs="*", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", action="store_true", help="measure one head and number in this process")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.one:
        print(json.dumps(measure(options.head[0], options.parts[0])))
        return
    runs = []
    for head in options.head:
        for parts in options.parts:
            one = [sys.executable, __file__, "--one", f"--head={head}", f"--parts={parts}"]
            ran = subprocess.run(one, stdout=subprocess.PIPE, check=True, text=True)
            runs.append({"head": head, "parts": parts, **json.loads(ran.stdout.splitlines()[-1])})
            print(runs[-1], flush=True)

    from gpq_tf.files import write_json

    write_json(options.out, {"command": "python benchmarks/accumulate_memory.py", "runs": runs})


def measure(head, parts):
    """dict: peak memory above what was there before the first step, in MB, and the last loss."""
    import our_steps

    from gpq_tf import heads

    chosen = our_steps.settings_of(head, accumulate=parts, **GIVEN[head])
    data = our_steps.random_data(chosen)
    _, step = our_steps.make(chosen, data)
    before = peak()
    for number in range(N_STEP):
        loss = float(step(heads.recipe(head).draw_batch(data, chosen, number))["loss"])
    return {"above_MB": round(peak() - before), "loss": round(loss, 4)}


def peak():
    """The largest resident memory of this process so far, in MB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    command.run(main)
