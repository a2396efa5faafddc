"""Open damaged and forged index files by the thousand and count what happens.

    python benchmarks/fuzz_index.py benchmarks/results/fuzz_index.json --mutants=12000 --seed=0

A small index with ids, labels, paths and a model is saved; the file is damaged and opened in a child process with a
limit on its memory and on its time, searched, asked for everything it holds, added to and saved again. The damage:

    flip, cut, insert   one to three bits flipped; cut off; up to 16 bytes inserted
    header              a value in the header replaced, removed or added: valid JSON, but not its checksum
    forged header       the same, with the right checksum, as a forger would
    forged data         bits of the tensors flipped, all checksums right

The file is opened with verify=True and, every other time, with verify=False. What happens is one of

    refused   ValueError of one line, when it is opened or (verify=False) used
    equal     it holds what the undamaged file holds
    changed   it holds something else; must not happen unless checksums were forged or the data were not verified
    crashed   another exception, the process died, or the time ran out

About half a minute for 12,000 files.
"""

import collections
import hashlib
import json
import struct
import sys
import tempfile
from pathlib import Path

import fuzzing
import numpy as np

KINDS = ("flip", "cut", "insert", "header", "forged header", "forged data")
UNCHECKED = ("forged header", "forged data")  # what no checksum can see
MEMORY = 2**28  # bytes that opening a small file may take on top of the libraries
SECONDS = 20  # for one file
# what a value in a header is replaced by
ODD_VALUES = (
    *(0, -1, 1, 7, 2**31, 2**40, 2**63 - 1, 2**64, 1e9, 0.5, True, None, "", "0", "-1", "7", "1e3", "9" * 19, "9" * 30),
    *(
        "U8",
        "I64",
        "BOOL",
        "F64",
        "l2",
        "{}",
        "[]",
        "null",
        [],
        [0],
        [-1],
        [2**40],
        [0, 2**40],
        [7, 1],
        {},
        "\ud800",
        "é",
    ),
)


def write_whole_file(path, seed=0):
    """Save a small index with everything an index may hold."""
    from gpq_tf.index import PQIndex

    rng = np.random.default_rng(seed)
    model = {"name": "models/a.keras", "sha256": hashlib.sha256(b"a").hexdigest()}
    index = PQIndex(rng.standard_normal((5, 10, 2)), "l2", model)
    ids = rng.permutation(30) * 5
    index.add(rng.integers(0, 10, (30, 5)), ids, rng.integers(0, 9, 30), [f"{i}.png" for i in range(30)])
    index.save(path)


def parts(content):
    """(header, data) of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data, is_forged):
    """A safetensors file; with the right checksum of its header if forged."""
    metadata = header.get("__metadata__")
    if is_forged and isinstance(metadata, dict):
        metadata["header_sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    if is_forged:
        head = head.replace(b'"header_sha256":"' + b"0" * 64, b'"header_sha256":"' + sha256(head))
    return head + data


def sha256(content):
    return hashlib.sha256(content).hexdigest().encode()


def edited(header, rng):
    """One value, somewhere in the header, replaced, removed, added or exchanged with its neighbour."""
    place = header
    while True:
        key = list(place)[rng.integers(len(place))] if isinstance(place, dict) else int(rng.integers(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    action = rng.integers(4)
    other = list(place)[rng.integers(len(place))] if isinstance(place, dict) else int(rng.integers(len(place)))
    odd = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    if action == 0:
        del place[key]
    elif action == 1:
        place[key], place[other] = place[other], place[key]
    elif action == 2 and isinstance(place, dict):
        place["first_id" if rng.random() < 0.5 else "added"] = odd
    else:
        place[key] = odd
    return header


def damaged(content, kind, rng):
    """`content` with one damage of a kind."""
    if kind in ("flip", "cut", "insert"):
        return fuzzing.damaged(content, kind, rng)
    header, data = parts(content)
    if kind != "forged data":
        return joined(edited(header, rng), data, kind == "forged header")
    data = fuzzing.damaged(data, "flip", rng)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    sums = {name: sha256(data[slice(*entry["data_offsets"])]).decode() for name, entry in entries.items()}
    header["__metadata__"]["sha256"] = json.dumps(sums)
    return joined(header, data, True)


def contents(path, verify):
    """All that the index in a file holds and answers, as a value to compare, after it has been opened."""
    from gpq_tf.index import PQIndex

    index = PQIndex.load(path, verify)
    distances, ids = index.search(np.random.default_rng(0).standard_normal((2, index.M * index.d)), 40)
    labels, paths = index.labels, index.paths
    held = (index.metric, index.model, index.codebook, index.codes, index.ids, labels, paths and list(paths))
    index.positions(index.ids[:3])
    index.describe()
    new_labels = None if labels is None else np.zeros((3, *labels.shape[1:]), int)
    index.add(np.ones((3, index.M), int), None, new_labels, None if paths is None else ["a", "b", "c"])
    index.remove(index.ids[:2])
    index.search(np.zeros((1, index.M * index.d)), 3)
    index.save(path.with_name("again"))
    return repr([v.tolist() if isinstance(v, np.ndarray) else v for v in (*held, distances, ids)])


def child(folder):
    """Answer each line of standard input, "verify" or "map": whether folder/damaged holds what folder/whole holds."""
    whole = contents(folder / "whole", True)
    fuzzing.answer_lines(lambda way: contents(folder / "damaged", way == "verify") == whole, (ValueError,), MEMORY)


def campaign(n, seed):
    """Open n damaged files.

    Args:
        n: int.
        seed: int, of the damage.

    Returns:
        dict: verified and mapped (kind of damage -> outcome -> count); crashes (what happened, at most 20).
    """
    rng, crashes = np.random.default_rng(seed), []
    counts = {way: {kind: collections.Counter() for kind in KINDS} for way in ("verified", "mapped")}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_whole_file(folder / "whole")
        content, worker = (folder / "whole").read_bytes(), fuzzing.Child(__file__, folder, SECONDS)
        for number in range(n):
            kind, verify = KINDS[number // 2 % len(KINDS)], number % 2 == 0
            (folder / "damaged").unlink(missing_ok=True)
            (folder / "damaged").write_bytes(damaged(content, kind, rng))
            outcome, detail = worker.ask("verify" if verify else "map")
            counts["verified" if verify else "mapped"][kind][outcome] += 1
            if outcome == "crashed":
                crashes.append({"number": number, "kind": kind, "verify": verify, "what": detail[:500]})
        worker.close()
    plain = {way: {kind: dict(found) for kind, found in kinds.items()} for way, kinds in counts.items()}
    return {**plain, "crashes": crashes[:20]}


def total(result, outcome, way, kinds=KINDS):
    """Number of files with an outcome."""
    return sum(result[way][kind].get(outcome, 0) for kind in kinds)


def changed_unseen(result):
    """Number of verified files that hold something else although no checksum was forged."""
    return total(result, "changed", "verified", [kind for kind in KINDS if kind not in UNCHECKED])


def summary(result):
    """The number of files with each outcome, and of those that hold something else unseen."""
    return {
        "totals": {
            way: {outcome: total(result, outcome, way) for outcome in ("refused", "equal", "changed", "crashed")}
            for way in ("verified", "mapped")
        },
        "changed_despite_checksum": changed_unseen(result),
    }


if __name__ == "__main__":
    sys.exit(fuzzing.main(__doc__, child, campaign, summary, n=12000))
