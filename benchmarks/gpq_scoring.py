"""What a trained GPQ model scores, by what it searches with: one encoding of CIFAR-10, several codebooks.

    python benchmarks/gpq_scoring.py MODEL [MODEL ...] --data_dir=./cifar10 [--precision=mixed_bfloat16] [--out=FILE]

    raw         as the original scores: descriptors and codewords as they are
    normalised  as this library does: unit sub-vectors, unit codewords
    pulled      normalised, with the codewords that training assigned images to, each pulled towards the prototypes
                near it (benchmarks/ship_weights.py --codebook=pulled)
    k-means     normalised, with a codebook of the same size that Faiss, where it is installed, fits to the gallery's
                descriptors
    float32     descriptors that are not quantized at all: what codes of any size could reach

Prints a line a model, and writes all of them to --out, if that is given.
"""

import argparse
import importlib.util
import os
from pathlib import Path

import command

from gpq_tf.settings import PRECISIONS


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data_dir", default="./cifar10")
    parser.add_argument("--dataset", default="cifar10_folder")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from gpq_tf import data, load_model
    from gpq_tf.files import write_json

    # A wrong one is told before an hour of scoring, not after it.
    models = {path: load_model(path, legacy=True, precision=options.precision) for path in options.models}
    for path, model in models.items():
        if model.head_name != "gpq":
            raise ValueError(f"Invalid MODEL. Expected one of the head gpq. Received: {path}, of {model.head_name}")
    images, runs = data.load(options.dataset, options.data_dir), []
    for path, model in models.items():
        found = scores(model, images)
        runs.append({"model": Path(path).name, "precision": options.precision, **found})
        print(runs[-1], flush=True)
    if options.out:
        write_json(options.out, {"command": "python benchmarks/gpq_scoring.py MODEL ...", "runs": runs})


def scores(model, images):
    """dict of name -> mAP of a GPQ model loaded with legacy, whose descriptors are raw; its codebook is overwritten."""
    import numpy as np

    from gpq_tf import PQIndex, codebooks, retrieval
    from gpq_tf.metrics import average_precision, mean_average_precision
    from gpq_tf.ops import l2_normalize, normalize_books

    raw_gallery, raw_queries = model.embed(images.gallery_images), model.embed(images.query_images)
    learned = model.codebook
    n_book, n_word, _ = learned.shape
    gallery, queries = (np.asarray(normalize_books(part, n_book)) for part in (raw_gallery, raw_queries))
    searched = {"normalised": learned}
    searched["pulled"] = np.asarray(model.head.pulled_codebook(model.record["settings"]["alpha"]))
    if importlib.util.find_spec("faiss"):
        searched["k-means"], _ = codebooks.fit(gallery, n_book, n_word)

    def score(codebook, queries):
        model.head.quantizer.codebook.assign(codebook)
        index = PQIndex(codebook, model.search_metric)
        index.add(retrieval.codes_of(model, raw_gallery))
        return mean_average_precision(queries, images.query_labels, index, images.gallery_labels)

    found = {"raw": score(learned, raw_queries)}
    for name, codebook in searched.items():
        found[name] = score(np.asarray(l2_normalize(codebook)), queries)
    ranked = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    relevant = images.gallery_labels[ranked] == images.query_labels[:, None]
    return {**found, "float32": float(average_precision(relevant).mean())}


if __name__ == "__main__":
    command.run(main)
