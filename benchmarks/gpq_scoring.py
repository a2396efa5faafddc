"""What a trained GPQ model scores, by what it searches with: one encoding of CIFAR-10, several codebooks.

    python benchmarks/gpq_scoring.py MODEL --data_dir=./cifar10 [--precision=mixed_bfloat16]

    raw         as the original scores: descriptors and codewords as they are
    normalised  as this library does: unit sub-vectors, unit codewords
    pulled      normalised, with the codewords that training assigned images to, each pulled towards the prototypes
                near it (benchmarks/ship_weights.py --pull)
    k-means     normalised, with a codebook of the same size that Faiss fits to the gallery's descriptors
    float32     descriptors that are not quantized at all: what codes of any size could reach

Prints a line each, and a line of JSON with all of them.
"""

import argparse
import json
import os


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data_dir", default="./cifar10")
    parser.add_argument("--dataset", default="cifar10_folder")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import numpy as np

    from gpq_tf import PQIndex, codebooks, data, load_model
    from gpq_tf.metrics import mean_average_precision
    from gpq_tf.ops import normalize_books

    images = data.load(options.dataset, options.data_dir)
    model = load_model(options.model, legacy=True, precision=options.precision)
    raw_gallery, raw_queries = model.embed(images.gallery_images), model.embed(images.query_images)
    n_book = model.architecture["n_book"]
    gallery, queries = (np.asarray(normalize_books(part, n_book)) for part in (raw_gallery, raw_queries))

    def score(queries, codebook, codes):
        index = PQIndex(codebook, model.search_metric)
        index.add(codes)
        return mean_average_precision(queries, images.query_labels, index, images.gallery_labels)

    def nearest(codebook):
        similarities = np.einsum("nmd,mkd->nmk", gallery.reshape(len(gallery), n_book, -1), codebook)
        return similarities.argmax(axis=2)

    def unit(codebook):
        return codebook / np.linalg.norm(codebook, axis=2, keepdims=True)

    plain = np.asarray(model.head.quantizer.codebook)
    fitted, _ = codebooks.fit(gallery, n_book, plain.shape[1], "kmeans")
    pulled = np.asarray(model.head.pulled_codebook(model.record["settings"]["alpha"]))
    found = {"raw": score(raw_queries, plain, nearest(unit(plain)))}
    for name, codebook in (("normalised", plain), ("pulled", pulled), ("k-means", fitted)):
        found[name] = score(queries, unit(codebook), nearest(unit(codebook)))
    ranked = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    found["float32"] = mean_of_rankings(images.gallery_labels[ranked] == images.query_labels[:, None])
    for name, value in found.items():
        print(f"{name:10s} {value:.4f}")
    print(json.dumps({"model": os.path.basename(options.model), "precision": options.precision, **found}))


def mean_of_rankings(relevant):
    """Mean average precision of rankings, bool (Q, N), best first."""
    import numpy as np

    positions = np.arange(1, relevant.shape[1] + 1)
    precisions = np.cumsum(relevant, axis=1) / positions
    return float(np.mean((precisions * relevant).sum(axis=1) / relevant.sum(axis=1)))


if __name__ == "__main__":
    main()
