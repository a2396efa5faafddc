"""Recall@k of a model among images of unseen classes, and the answers that it finds for one of them."""

import numpy as np

from gpq_tf import retrieval
from gpq_tf.metrics.recall import recall_at_k, squared_distances

KS = (1, 2, 4, 8)
# Images described at a time: large ones, read from files.
BATCH_SIZE = 64


def evaluate(model, images, ks=KS, index=None, progress=None):
    """Every image searches among the others for one of its class (see `metrics.recall_at_k`).

    Args:
        model: RetrievalModel.
        images: gpq_tf.data.metric_learning.ImageSet of N images.
        ks: ints >= 1.
        index: int64 (n,), positions of the images that search among one another; None for all.
        progress: callable(iterable of batches, what, total) -> iterable, or None.

    Returns:
        dict: scores (dict of "R@k" -> float; of a model with a codebook also "R@k_of_codes", where codes are searched,
        see `retrieval.recall_of_codes`); embeddings (float32 (n, D)); index (int64 (n,), positions of what was
        described).
    """
    index = np.arange(len(images)) if index is None else index
    embeddings = embed(model, images, index, progress)
    labels = images.labels[index]
    scores = {f"R@{k}": value for k, value in recall_at_k(embeddings, labels, ks).items()}
    if model.architecture["n_book"]:
        codes = retrieval.codes_of(model, embeddings)
        of_codes = retrieval.recall_of_codes(model, embeddings, codes, labels, ks)
        scores |= {f"R@{k}_of_codes": value for k, value in of_codes.items()}
    return {"scores": scores, "embeddings": embeddings, "index": index}


def line(k, recall):
    """A figure as the original's test.py prints it.

    Example:
        >>> line(1, 0.25)
        'R@   1: 0.2500'
    """
    return f"R@{k:4d}: {recall:.4f}"


def headline_of_codes(model):
    """What stands above the recalls of codes: what they are, and what searches them."""
    return f"codes, {retrieval.bytes_a_code(model)} bytes each, searched by float32 descriptors:"


def embed(model, images, index, progress=None):
    """Descriptors of the images at these positions, float32 (n, D); the arguments are those of `evaluate`."""
    n_images = len(index)
    batches = images.batches(BATCH_SIZE, index)
    if progress:
        batches = progress(batches, "images", -(-n_images // BATCH_SIZE))
    return np.concatenate([_embed(model, batch, n_images) for batch in batches])


def _embed(model, batch, n_images):
    size = len(batch)
    if size < BATCH_SIZE < n_images:
        # Filled up, so that the compiled function sees one shape only.
        batch = np.concatenate([batch, np.repeat(batch[-1:], BATCH_SIZE - size, axis=0)])
    return model.embed(batch)[:size]


def answers(query, found, images, k=10):
    """One image and the k others that are nearest to it, as `visualize.ranked_list` takes them.

    Args:
        query: int, row of the embeddings.
        found: dict, what `evaluate` returned.
        images: ImageSet, the same.
        k: int, answers.

    Returns:
        dict: query_image, query_class, result_images, result_classes, relevant, class_names.
    """
    ranked, _ = nearest(found["embeddings"], found["embeddings"][query])
    best = found["index"][ranked[ranked != query][:k]]
    own = found["index"][query]
    return {
        "query_image": images.read([own])[0],
        "query_class": int(images.labels[own]),
        "result_images": images.read(best),
        "result_classes": images.labels[best].tolist(),
        "relevant": (images.labels[best] == images.labels[own]).tolist(),
        "class_names": images.class_names,
    }


def nearest(embeddings, descriptor):
    """Embeddings by their distance from a descriptor, the nearest first; equally far ones in their order.

    Distances are those of `metrics.recall_at_k`, so that lists agree with recalls: descriptors of a network that has
    learned little are nearly alike, and float32 products of them would differ by their rounding.

    Args:
        embeddings: float (N, D).
        descriptor: float (D,).

    Returns:
        (rows, distances): int64 (N,); float64 (N,), squared Euclidean, ascending.

    Example:
        >>> rows, distances = nearest(np.eye(3), np.array([0.0, 0.6, 0.8]))
        >>> rows.tolist(), distances.round(1).tolist()
        ([2, 1, 0], [0.4, 0.8, 2.0])
    """
    distances = squared_distances(descriptor, embeddings, np.arange(len(embeddings)))
    rows = np.argsort(distances, kind="stable")
    return rows, distances[rows]
