"""Convert damaged files by the thousand and count what happens.

    python benchmarks/fuzz_convert.py benchmarks/results/fuzz_convert.json --mutants=2000 --seed=0

A small checkpoint, a small .mat file and small PyTorch files (those of the tests) get bits flipped, are cut off, or get
bytes inserted; in one more target the checksum of the index is set right again afterwards, as a forger would. Each is
converted (of the PyTorch files the tensors are read) in a child process with a limit on its memory and on its time.
What happens is one of

    refused   ValueError or OSError of one line
    equal     converted; all weights as without the damage
    changed   converted to other weights; must not happen where the format has a checksum
    crashed   another exception, the process died, or the time ran out

A few minutes for 2,000 files.
"""

import argparse
import collections
import json
import os
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
DATA = "source.data-00000-of-00001"
# target: (the files converted, which of them is damaged, whether the index's checksum is set right)
TARGETS = {
    "index": ("checkpoint", "source.index", False),
    "index, checksum set right": ("checkpoint", "source.index", True),
    "data": ("checkpoint", DATA, False),
    "mat": ("mat", "source.mat", False),
    "mat, compressed": ("compressed", "source.mat", False),
    "pth": ("pth", "source.pth", False),
    "pth, legacy": ("pth_legacy", "source.pth", False),
}
FILES = ("checkpoint", "mat", "compressed", "pth", "pth_legacy")
WITHOUT_CHECKSUM = {"mat", "pth, legacy"}
MEMORY = 2 * 2**30  # bytes that converting may take on top of the libraries
SECONDS = 60  # for one file


def write_whole_files(folder):
    """folder/NAME for each of FILES, with a source to convert; copies in folder/damaged."""
    sys.path.insert(0, str(TESTS))
    import gpq_files
    import torch_files

    for files in FILES:
        (folder / files).mkdir()
    gpq_files.write_checkpoint(folder / "checkpoint" / "source", gpq_files.checkpoint_arrays(adam=True))
    gpq_files.write_mat(folder / "mat" / "source.mat", gpq_files.backbone_arrays())
    gpq_files.write_mat(folder / "compressed" / "source.mat", gpq_files.backbone_arrays(), do_compression=True)
    state = torch_files.state_dict(gpq_files.backbone_arrays())
    (folder / "pth" / "source.pth").write_bytes(torch_files.zip_file(state))
    (folder / "pth_legacy" / "source.pth").write_bytes(torch_files.legacy_file(state))
    for files in FILES:
        shutil.copytree(folder / files, folder / "damaged" / files)


def damage(content, kind, rng, end=None):
    """`content` with one to three bits flipped, cut off, or with up to 16 bytes inserted, before `end`."""
    end = len(content) if end is None else end
    if kind == "cut":
        return content[: rng.integers(end)]
    if kind == "insert":
        place = rng.integers(end + 1)
        return content[:place] + rng.bytes(rng.integers(1, 17)) + content[place:]
    changed = bytearray(content)
    for bit in rng.choice(8 * end, rng.integers(1, 4), replace=False):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def checksum_of(block):
    """The four bytes behind a block of an index."""
    from gpq_tf.convert.crc32c import crc32c

    checksum = crc32c(block)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def first_block_end(index):
    """Length of an index's first block, which lists the variables: where the right checksum follows."""
    return next(end for end in range(len(index)) if index[end : end + 4] == checksum_of(index[:end]))


def mutants(n, seed, folder):
    """Yield (target, kind, kind of files, name of the damaged file, its content), n of them."""
    rng = np.random.default_rng(seed)
    whole = {target: (folder / files / name).read_bytes() for target, (files, name, _) in TARGETS.items()}
    end = first_block_end(whole["index"])
    for number in range(n):
        target = list(TARGETS)[number % len(TARGETS)]
        files, name, is_forged = TARGETS[target]
        if is_forged:
            # Other damage would move the blocks behind it and be seen at once.
            kind, content = "flip", damage(whole[target], "flip", rng, end - 1)
            content = content[:end] + checksum_of(content[:end]) + content[end + 4 :]
        else:
            kind = ("flip", "flip", "cut", "insert")[number // len(TARGETS) % 4]
            content = damage(whole[target], kind, rng)
        yield target, kind, files, name, content


class Child:
    """A process that converts what it is told to, started again when it has died."""

    def __init__(self, folder):
        self.folder, self.process = folder, None

    def convert(self, files):
        """(outcome, detail) of converting folder/damaged/files/source."""
        if self.process is None:
            command = [sys.executable, __file__, "--child", str(self.folder)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._answer(600)  # it is ready
        self.process.stdin.write(files + "\n")
        self.process.stdin.flush()
        answer = self._answer(SECONDS)
        if answer:
            return json.loads(answer)
        self.process.kill()
        status = self.process.wait()
        self.process = None
        return "crashed", f"no answer, exit status {status}"

    def _answer(self, seconds):
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else ""

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def child(folder):
    """Answer each line of standard input, a kind of files, with a line of JSON: (outcome, detail)."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from gpq_tf import convert
    from gpq_tf.convert import pth

    def weights(parent, files):
        import keras

        if files.startswith("pth"):
            arrays = pth.read(parent / files / "source.pth")
            return [np.array(list(arrays)), *arrays.values()]
        model, _ = convert.convert(parent / files / "source")
        keras.backend.clear_session(free_memory=False)
        return [keras.ops.convert_to_numpy(weight) for weight in model.weights]

    whole = {files: weights(folder, files) for files in FILES}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        files = line.strip()
        try:
            found = weights(folder / "damaged", files)
            equal = len(found) == len(whole[files]) and all(map(np.array_equal, found, whole[files]))
            answer = ("equal" if equal else "changed", "")
        except (ValueError, OSError) as error:
            answer = ("crashed" if "\n" in str(error) else "refused", str(error))
        except Exception as error:
            answer = ("crashed", repr(error))
        print(json.dumps(answer), flush=True)


def campaign(n, seed):
    """Convert n damaged files.

    Args:
        n: int.
        seed: int, of the damage.

    Returns:
        dict: targets (target -> kind of damage -> outcome -> count); crashes (what happened, at most 20).
    """
    counts = {target: collections.defaultdict(collections.Counter) for target in TARGETS}
    crashes = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_whole_files(folder)
        worker = Child(folder)
        for number, (target, kind, files, name, content) in enumerate(mutants(n, seed, folder)):
            path = folder / "damaged" / files / name
            path.write_bytes(content)
            outcome, detail = worker.convert(files)
            shutil.copy(folder / files / name, path)
            counts[target][kind][outcome] += 1
            if outcome == "crashed":
                crashes.append({"number": number, "target": target, "kind": kind, "what": detail[:500]})
        worker.close()
    return {
        "targets": {target: {kind: dict(found) for kind, found in kinds.items()} for target, kinds in counts.items()},
        "crashes": crashes[:20],
    }


def total(result, outcome, targets=tuple(TARGETS)):
    """Number of files with an outcome."""
    return sum(found.get(outcome, 0) for target in targets for found in result["targets"][target].values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    result = campaign(arguments.mutants, arguments.seed)
    totals = {outcome: total(result, outcome) for outcome in ("refused", "equal", "changed", "crashed")}
    changed = total(result, "changed", [target for target in TARGETS if target not in WITHOUT_CHECKSUM])
    report = {
        "mutants": arguments.mutants,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "totals": totals,
        "changed_despite_checksum": changed,
        **result,
    }
    from gpq_tf.files import write_json

    write_json(arguments.output, report)
    print(json.dumps({name: report[name] for name in ("mutants", "seconds", "totals", "changed_despite_checksum")}))
    return 1 if totals["crashed"] or changed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        sys.exit(main())
