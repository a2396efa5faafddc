"""Convert damaged files by the thousand and count what happens.

    python benchmarks/fuzz_convert.py benchmarks/results/fuzz_convert.json --mutants=2000 --seed=0

A small checkpoint, a small .mat file, small PyTorch files and a small MXNet checkpoint (those of the tests) get bits
flipped, are cut off, or get bytes inserted; in one more target the checksum of the index is set right again afterwards,
as a forger would. Each is converted (of the PyTorch files the tensors are read) in a child process with a limit on its
memory and on its time. What happens is one of

    refused   ValueError or OSError of one line
    equal     converted; all weights as without the damage
    changed   converted to other weights, all finite; must not happen where the format has a checksum
    crashed   another exception, weights that are not finite, the process died, or the time ran out

A few minutes for 2,000 files.
"""

import collections
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import fuzzing
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
    "mxnet symbol": ("mxnet", "source-symbol.json", False),
    "mxnet params": ("mxnet", "source-0000.params", False),
}
FILES = ("checkpoint", "mat", "compressed", "pth", "pth_legacy", "mxnet")
WITHOUT_CHECKSUM = {"mat", "pth, legacy", "mxnet symbol", "mxnet params"}
MEMORY = 2 * 2**30  # bytes that converting may take on top of the libraries
SECONDS = 60  # for one file


def write_whole_files(folder):
    """folder/NAME for each of FILES, with a source to convert; copies in folder/damaged."""
    sys.path.insert(0, str(TESTS))
    import gpq_files
    import mxnet_files
    import torch_files

    for files in FILES:
        (folder / files).mkdir()
    gpq_files.write_checkpoint(folder / "checkpoint" / "source", gpq_files.checkpoint_arrays(adam=True))
    gpq_files.write_mat(folder / "mat" / "source.mat", gpq_files.backbone_arrays())
    gpq_files.write_mat(folder / "compressed" / "source.mat", gpq_files.backbone_arrays(), do_compression=True)
    state = torch_files.state_dict(gpq_files.backbone_arrays())
    (folder / "pth" / "source.pth").write_bytes(torch_files.zip_file(state))
    (folder / "pth_legacy" / "source.pth").write_bytes(torch_files.legacy_file(state))
    network = mxnet_files.cgd(stages=((16, 1), (32, 1), (64, 1), (128, 1)))
    mxnet_files.write_checkpoint(folder / "mxnet" / "source", *network)
    for files in FILES:
        shutil.copytree(folder / files, folder / "damaged" / files)


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
            kind, content = "flip", fuzzing.damaged(whole[target], "flip", rng, end - 1)
            content = content[:end] + checksum_of(content[:end]) + content[end + 4 :]
        else:
            kind = ("flip", "flip", "cut", "insert")[number // len(TARGETS) % 4]
            content = fuzzing.damaged(whole[target], kind, rng)
        yield target, kind, files, name, content


def child(folder):
    """Answer each line of standard input, a kind of files: whether folder/damaged/FILES/source converts as it did."""
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

    def is_equal(files):
        found = weights(folder / "damaged", files)
        if not files.startswith("pth") and not all(np.isfinite(values).all() for values in found):
            raise ArithmeticError("weights that are not finite")
        return len(found) == len(whole[files]) and all(map(np.array_equal, found, whole[files]))

    fuzzing.answer_lines(is_equal, (ValueError, OSError), MEMORY)


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
        worker = fuzzing.Child(__file__, folder, SECONDS)
        for number, (target, kind, files, name, content) in enumerate(mutants(n, seed, folder)):
            path = folder / "damaged" / files / name
            path.write_bytes(content)
            outcome, detail = worker.ask(files)
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


def summary(result):
    """The number of files with each outcome, and of those changed although the format has a checksum."""
    return {
        "totals": {outcome: total(result, outcome) for outcome in ("refused", "equal", "changed", "crashed")},
        "changed_despite_checksum": total(
            result, "changed", [target for target in TARGETS if target not in WITHOUT_CHECKSUM]
        ),
    }


if __name__ == "__main__":
    sys.exit(fuzzing.main(__doc__, child, campaign, summary, n=2000))
