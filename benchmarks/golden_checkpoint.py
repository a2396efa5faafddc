"""Score a TensorFlow 1 checkpoint of GPQ on the whole of CIFAR-10, raw and normalised, in both splits.

    python benchmarks/golden_checkpoint.py 48bits_example.ckpt ./cifar10 [--labels data.npz]

Beside each mAP of ours stands that of a plain NumPy reading of the original's RetrievalTest.py (distance table, stable
argsort, loop over the hits) on the same descriptors. With --labels, the label vector that was recorded with the
original's figures (key big_labels) is compared with the order of the images in the folder: the split, and with it every
figure, follows from that order. All 60,000 images are encoded once (2 to 3 minutes on 2 cores).
"""

import argparse
import os
from pathlib import Path

import numpy as np

RECORDED = {"raw": 0.3517, "normalised": 0.3538, "distinct codes": 24395}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("data_dir")
    parser.add_argument("--labels", default=None)
    parser.add_argument("--out", default=Path(__file__).parent / "results" / "golden_checkpoint.json")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from gpq_tf import PQIndex, convert, metrics
    from gpq_tf.data import pickles, protocol
    from gpq_tf.data.cifar10 import BATCHES
    from gpq_tf.files import write_json

    models = {legacy: convert.convert(options.checkpoint, legacy=legacy)[0] for legacy in (True, False)}
    parts = [pickles.load_cifar_batch(Path(options.data_dir, name), 10) for name in BATCHES]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    raw = models[True].embed(images)
    blocks = range(0, len(raw), 1000)
    codes = np.concatenate([np.asarray(models[True].head.encode(raw[i : i + 1000])) for i in blocks])
    normalised = np.concatenate([np.asarray(models[False].head.embed(raw[i : i + 1000])) for i in blocks])

    rows = []
    for legacy_split in (True, False):
        _, gallery, query = protocol.split_index(labels, 10, legacy_split)
        for scoring, descriptors in (("raw", raw), ("normalised", normalised)):
            codebook = models[scoring == "raw"].codebook
            index = PQIndex(codebook)
            index.add(codes[gallery])
            score = metrics.mean_average_precision(descriptors[query], labels[query], index, labels[gallery])
            reference = _reference(codebook, codes[gallery], descriptors[query], labels[gallery], labels[query])
            rows.append(
                {
                    "split": "numpy 1.16" if legacy_split else "stable",
                    "scoring": scoring,
                    "mAP": score,
                    "mAP_reference": reference,
                    "distinct_codes": len(np.unique(codes[gallery], axis=0)),
                }
            )
            print(rows[-1], flush=True)
    result = {"recorded_with_the_checkpoint": RECORDED, "rows": rows}
    if options.labels:
        recorded = np.load(options.labels)["big_labels"]
        result["labels_in_the_recorded_order"] = int((recorded == labels).sum())
        print(
            f"{result['labels_in_the_recorded_order']} of {len(labels)} labels stand where the recorded order has them"
        )
    write_json(options.out, result)


def _reference(codebook, codes, queries, gallery_labels, query_labels):
    """The original's arithmetic, one query at a time: float32 table, sums book by book, stable sort, AP over hits."""
    n_book, _, length = codebook.shape
    scores = []
    for descriptor, label in zip(queries, query_labels, strict=True):
        sub_vectors = descriptor.reshape(n_book, length)
        distance = np.zeros(len(codes), np.float32)
        for book in range(n_book):
            distance += (1 - codebook[book] @ sub_vectors[book]).astype(np.float32)[codes[:, book]]
        hits = np.flatnonzero(gallery_labels[np.argsort(distance, kind="stable")] == label) + 1
        scores.append(np.mean(np.arange(1, len(hits) + 1) / hits) if len(hits) else 0.0)
    return float(np.mean(scores))


if __name__ == "__main__":
    main()
