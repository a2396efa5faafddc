"""Recall@k of a model among images of unseen classes, and the answers that it finds for one of them."""

import numpy as np

from gpq_tf import retrieval
from gpq_tf.metrics import recall_at_k

KS = (1, 2, 4, 8)
# Images described at a time: large ones, read from files.
BATCH_SIZE = 64


def evaluate(model, images, ks=KS, step=1, progress=None):
    """Every image searches among the others for one of its class (see `metrics.recall_at_k`).

    Args:
        model: RetrievalModel.
        images: gpq_tf.data.metric_learning.ImageSet of N images.
        ks: ints >= 1.
        step: int, 1 for all images, 5 for every fifth of them.
        progress: callable(iterable of batches, what, total) -> iterable, or None.

    Returns:
        dict: scores (dict of "R@k" -> float; of a model with a codebook also "R@k_of_codes", where codes are searched,
        see `retrieval.recall_of_codes`); embeddings (float32 (N / step, D)); index (int64 (N / step,), positions of
        what was described).
    """
    index = np.arange(0, len(images), step)
    embeddings = embed(model, images, step, progress)
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


def embed(model, images, step=1, progress=None):
    """Descriptors of every step-th image, float32 (N / step, D); the arguments are those of `evaluate`."""
    n_images = len(range(0, len(images), step))
    batches = images.batches(BATCH_SIZE, step)
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
    """One image and the k others with the largest inner products, as `visualize.ranked_list` takes them.

    Args:
        query: int, row of the embeddings.
        found: dict, what `evaluate` returned.
        images: ImageSet, the same.
        k: int, answers.

    Returns:
        dict: query_image, query_class, result_images, result_classes, relevant, class_names.
    """
    ranked = nearest(found["embeddings"], found["embeddings"][query])
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
    """Rows of the embeddings by their inner product with a descriptor, the largest first; equal ones in their order.

    Args:
        embeddings: float (N, D).
        descriptor: float (D,).

    Returns:
        int64 (N,).

    Example:
        >>> nearest(np.eye(3), np.array([0.0, 0.6, 0.8])).tolist()
        [2, 1, 0]
    """
    return np.argsort(-(embeddings @ descriptor), kind="stable")
