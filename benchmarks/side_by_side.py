"""What the speed benchmarks share: programs that take turns, medians of what they measured, the profile of a step."""

import collections
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# What a step of 20 operations or more is made of, by the beginning of the operation's name.
GROUPS = {
    "convolution, gradient of the kernel": ("Conv2DBackpropFilter",),
    "convolution, gradient of the input": ("Conv2DBackpropInput",),
    "convolution": ("Conv2D", "FusedConv2D"),
    "matrix products (4x4 convolutions, head)": ("MatMul", "BatchMatMul", "FusedMatMul"),
    "batch normalisation": ("FusedBatchNorm",),
    "ReLU": ("Relu",),
    "pooling": ("MaxPool",),
}


def take_turns(programs, rounds):
    """Run every program, in a process of its own, once a round, so that a busy machine slows all of them alike.

    Args:
        programs: dict of name -> command, a list of str, whose last line on standard output is JSON.
        rounds: int.

    Returns:
        dict of name -> list of what it measured.
    """
    runs = collections.defaultdict(list)
    for turn in range(rounds):
        for name, command in programs.items():
            finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            runs[name].append(json.loads(finished.stdout.splitlines()[-1]))
            print(f"round {turn + 1}: {name} done", file=sys.stderr, flush=True)
    return runs


def medians(runs, warm_up):
    """Medians over the runs of a program that trains and encodes; the first steps of each, `warm_up`, do not count."""
    steps = [seconds for run in runs for seconds in run["step_s"][warm_up:]]
    draws = [seconds for run in runs for seconds in run["draw_s"][warm_up:]]
    encodings = [seconds for run in runs for seconds in run["encode_s"][1:]]
    found = {
        "step_s": round(statistics.median(steps), 3),
        "step_s_range": [round(min(steps), 3), round(max(steps), 3)],
        "draw_s": round(statistics.median(draws), 4),
        "encode_images_per_s": round(1 / statistics.median(encodings), 1),
    }
    if "augment_s" in runs[0]:
        augmentation = statistics.median(seconds for run in runs for seconds in run["augment_s"][1:])
        share = (found["draw_s"] + augmentation) / found["step_s"]
        found |= {"augment_s": round(augmentation, 4), "share_of_drawing_and_augmentation": round(share, 4)}
    return found


def times_the_original(ours, original):
    """How many times as fast as the original, of two results of `medians`."""
    return {
        "step": round(original["step_s"] / ours["step_s"], 2),
        "encoding": round(ours["encode_images_per_s"] / original["encode_images_per_s"], 2),
    }


def without_profile(runs):
    return [{key: value for key, value in run.items() if key != "profile"} for run in runs]


def profile(function):
    """Share of each kind of operation in the time of all operations of one call."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            function()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(trace.read_bytes())
    seconds = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                # an operation's event is called "name:Kind" or "name:_MklNativeKind"; the others are the runtime's own
                operation = re.fullmatch(r"[^:]*:_?(Mkl)?(Native)?(\w+)", plane.event_metadata[event.metadata_id].name)
                if operation:
                    seconds[_group(operation[3])] += event.duration_ps / 1e12
    total = sum(seconds.values())
    return {name: round(value / total, 3) for name, value in seconds.most_common()}


def _group(kind):
    for name, beginnings in GROUPS.items():
        if kind.startswith(beginnings):
            return name
    return "all else"


def machine():
    """A few words on this machine."""
    return f"{os.cpu_count()} cores, {platform.machine()}, amx_bf16: {_has_amx()}"


def _has_amx():
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "amx_bf16" in cpu.read_text()
