"""Score a TensorFlow 1 checkpoint of GPQ on the whole of CIFAR-10, raw and normalised, in both splits.

    python benchmarks/golden_checkpoint.py 48bits_example.ckpt ./cifar10 [--labels data.npz] [--images step.npz]

Beside each mAP of ours stands that of a plain NumPy reading of the original's RetrievalTest.py (distance table, stable
argsort, loop over the hits) on the same descriptors. Then come the effects of the original's other habits, one at a
time: this NumPy's unstable sort, average precision at 1,000 ranks over the hits found or over all that could be, and
a search with the codewords as training's losses see them, softly assigned to the class prototypes.

The split, and with it every figure, follows from the order of the images in the files. So the raw mAP is printed for
five random orders too; with --labels the label vector that was recorded with the original's figures (key big_labels) is
compared with the order in the folder, and with --images recorded images whose place in data_batch_1 is known (keys
images_L, index_L_in_data_batch_1, ...) are looked up. All 60,000 images are encoded once (2 to 3 minutes on 2 cores).
"""

import argparse
import os
from pathlib import Path

import numpy as np

TOP_N, N_ORDERS, ALPHA = 1000, 5, 20.0
RECORDED = {"raw": 0.3517, "normalised": 0.3538, "distinct codes": 24395}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("data_dir")
    parser.add_argument("--labels", default=None)
    parser.add_argument("--images", default=None)
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

    def raw_index(order):
        """Index, gallery labels, queries and their labels of the stable split of the images in another order."""
        _, gallery, query = (order[part] for part in protocol.split_index(labels[order], 10, False))
        index = PQIndex(models[True].codebook)
        index.add(codes[gallery])
        return index, labels[gallery], raw[query], labels[query]

    index, gallery_labels, queries, query_labels = raw_index(np.arange(len(labels)))
    result["effects"] = _effects(index, gallery_labels, queries, query_labels)
    result["effects"] |= _with_training_codewords(models[False], normalised, labels)
    print(result["effects"], flush=True)
    result["mAP_of_random_orders"] = []
    for seed in range(N_ORDERS):
        index, gallery_labels, queries, query_labels = raw_index(np.random.default_rng(seed).permutation(len(labels)))
        score = metrics.mean_average_precision(queries, query_labels, index, gallery_labels)
        result["mAP_of_random_orders"].append(round(score, 5))
    print("raw mAP of random orders of the files:", result["mAP_of_random_orders"], flush=True)
    if options.labels:
        recorded = np.load(options.labels)["big_labels"]
        result["labels_in_the_recorded_order"] = int((recorded == labels).sum())
        print(
            f"{result['labels_in_the_recorded_order']} of {len(labels)} labels stand where the recorded order has them"
        )
    if options.images:
        result["images_in_their_recorded_place"] = _places(np.load(options.images), images)
        print(f"images that stand where they were recorded: {result['images_in_their_recorded_place']}")
    write_json(options.out, result)


def _effects(index, gallery_labels, queries, query_labels):
    """mAP of one ranking under the original's habits, each beside what replaces it."""
    from gpq_tf.index import distance_table

    stable, unstable, by_found, by_all = [], [], [], []
    for query, label in zip(queries, query_labels, strict=True):
        table = np.asarray(distance_table(query[None], index.codebook, index.metric))[..., 0]  # (M, K)
        distance = np.zeros(len(index), np.float32)
        for book in range(index.M):
            distance += table[book][index.codes[:, book]]
        relevant = gallery_labels == label
        for scores, kind in ((stable, "stable"), (unstable, None)):
            ranks = np.flatnonzero(relevant[np.argsort(distance, kind=kind)]) + 1
            scores.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
            if kind == "stable":
                found = ranks[ranks <= TOP_N]
                precision = np.sum(np.arange(1, len(found) + 1) / found)
                by_found.append(precision / max(len(found), 1))
                by_all.append(precision / min(TOP_N, relevant.sum()))
    means = {
        "stable sort": stable,
        f"unstable sort of NumPy {np.__version__}": unstable,
        f"AP at {TOP_N} divided by the hits found": by_found,
        f"AP at {TOP_N} divided by the hits possible": by_all,
    }
    return {name: round(float(np.mean(scores)), 5) for name, scores in means.items()}


def _with_training_codewords(model, descriptors, labels):
    """mAP of the stable split, normalised, with the codebook of the search and with that of the training's losses."""
    from keras import ops

    from gpq_tf import PQIndex, metrics
    from gpq_tf.data import protocol
    from gpq_tf.heads.gpq import as_codebook
    from gpq_tf.ops import join_books, normalize_books
    from gpq_tf.quantizer import hard_assign, soft_assign

    head = model.head
    n_book = head.quantizer.n_book
    prototypes = as_codebook(normalize_books(ops.convert_to_tensor(head.prototypes), n_book), n_book)
    codewords = join_books(ops.transpose(head.quantizer.codebook, (1, 0, 2)))
    of_training = ops.convert_to_numpy(as_codebook(soft_assign(codewords, prototypes, ALPHA), n_book))
    _, gallery, query = protocol.split_index(labels, 10, False)
    scores = {}
    for name, codebook in (("codewords of the search", model.codebook), ("codewords of training", of_training)):
        index = PQIndex(codebook)
        for start in range(0, len(gallery), 1000):
            codes = hard_assign(ops.convert_to_tensor(descriptors[gallery[start : start + 1000]]), codebook)
            index.add(ops.convert_to_numpy(codes))
        score = metrics.mean_average_precision(descriptors[query], labels[query], index, labels[gallery])
        scores[name] = round(score, 5)
    return scores


def _places(recorded, images):
    """How many recorded images stand in the folder's first file where the recorded first file had them."""
    found = total = 0
    for part in "LU":
        here = images[recorded[f"index_{part}_in_data_batch_1"]]
        found += int((here == recorded[f"images_{part}"]).all(axis=(1, 2, 3)).sum())
        total += len(here)
    return f"{found} of {total}"


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
