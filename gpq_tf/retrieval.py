"""Encode a gallery, search it with queries, measure the answers: what Demo.py, evaluate and training's check share."""

import time

import numpy as np

from gpq_tf.index import PQIndex
from gpq_tf.metrics import mean_average_precision


def encode_gallery(model, images, progress=None):
    """Put the codes of a gallery into an index; ids are positions.

    Args:
        model: RetrievalModel.
        images: uint8 (N, H, W, 3).
        progress: callable that wraps the iterable of batches, or None.

    Returns:
        PQIndex of N codes.
    """
    index = PQIndex(model.codebook, model.search_metric, model.source)
    index.add(model.encode(images, progress))
    return index


def evaluate(model, data, top_n=None, similarity=None, progress=None):
    """Mean average precision of a model on a split image set.

    Args:
        model: RetrievalModel.
        data: gpq_tf.data.RetrievalData.
        top_n: int, ranks that enter the mAP, or None for all.
        similarity: (Q, N) of 0 and 1, dense or scipy.sparse, instead of the labels, or None.
        progress: callable(iterable of batches, what) -> iterable, where `what` is a word for the user, or None.

    Returns:
        dict: mAP (float); index (PQIndex); queries (float32 (Q, D)); seconds (dict of phase -> float).
    """
    seconds = {}

    def timed(phase, function):
        start = time.perf_counter()
        result = function()
        seconds[phase] = time.perf_counter() - start
        return result

    def bar(what):
        return (lambda batches: progress(batches, what)) if progress else None

    index = timed("encode gallery", lambda: encode_gallery(model, data.gallery_images, bar("gallery")))
    queries = timed("embed queries", lambda: model.embed(data.query_images, bar("queries")))
    labels = (None, None) if similarity is not None else (data.query_labels, data.gallery_labels)
    score = timed(
        "rank and score",
        lambda: mean_average_precision(queries, labels[0], index, labels[1], top_n, similarity=similarity),
    )
    return {"mAP": score, "index": index, "queries": queries, "seconds": seconds}


def answers(query, found, data, similarity=None, k=10):
    """One query and its k best answers, as `visualize.ranked_list` takes them.

    Args:
        query: int, position among the queries.
        found: dict, what `evaluate` returned.
        data: gpq_tf.data.RetrievalData, the same.
        similarity: the same.
        k: int, answers.

    Returns:
        dict: query_image, query_class, result_images, result_classes, relevant.
    """
    _, ids = found["index"].search(found["queries"][query : query + 1], k)
    best = ids[0][ids[0] >= 0]
    if similarity is None:
        relevant = data.gallery_labels[best] == data.query_labels[query]
    else:
        relevant = np.asarray(similarity[query].todense()).ravel()[best] > 0
    return {
        "query_image": data.query_images[query],
        "query_class": int(data.query_labels[query]),
        "result_images": data.gallery_images[best],
        "result_classes": data.gallery_labels[best].tolist(),
        "relevant": relevant.tolist(),
    }
