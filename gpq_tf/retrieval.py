"""Encode a gallery, search it with queries, measure the answers: what Demo.py, evaluate and training's check share."""

import time

import numpy as np
from keras import ops

from gpq_tf.index import PQIndex
from gpq_tf.metrics import mean_average_precision
from gpq_tf.metrics.checks import checked_ranks

# Descriptors quantized at a time: their scores with all codewords take 4 * M * K bytes each.
_ENCODED = 1024


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


def codes_of(model, descriptors):
    """Codes of descriptors that are there already, and need not be computed again from images.

    Args:
        model: RetrievalModel with a codebook.
        descriptors: float (N, D), what `model.embed` returned.

    Returns:
        int32 (N, M), the codes that `model.encode` gives the same images.

    Raises:
        ValueError: if D is another.
    """
    starts = range(0, len(descriptors), _ENCODED)
    parts = [ops.convert_to_numpy(model.head.encode(descriptors[at : at + _ENCODED])) for at in starts]
    return np.concatenate([np.empty((0, model.architecture["n_book"]), np.int32), *parts])


def bytes_a_code(model):
    """int, bytes that the codes of a model take: two codewords share one up to K = 16, and above 256 each takes two."""
    n_book, bits = model.architecture["n_book"], model.architecture["bn_word"]
    return (n_book + 1) // 2 if bits <= 4 else n_book * (1 if bits <= 8 else 2)


def recall_of_codes(model, descriptors, codes, labels, ks=(1, 2, 4, 8)):
    """Recall@k where what is searched are codes: `metrics.recall_at_k` at the price of quantization.

    Each image queries the codes of all others by its descriptor, which is not quantized (the asymmetric distance). Its
    own code, which it would nearly always find first, is left out by its id.

    Args:
        model: RetrievalModel with a codebook.
        descriptors: float (N, D), what `model.embed` returned.
        codes: integer (N, M), theirs.
        labels: (N,), classes.
        ks: ints >= 1; more than N - 1 means all others.

    Returns:
        dict of k -> float, in [0, 1]. An image alone in its class is a miss, equally far codes rank in their order.

    Raises:
        ValueError: if the numbers of descriptors, codes and labels differ, or an argument does not fit.
    """
    labels, ks = np.asarray(labels), checked_ranks("ks", ks).tolist()
    for name, value in {"codes": codes, "labels": labels}.items():
        if len(value) != len(descriptors):
            raise ValueError(
                f"Invalid {name}. Expected one for each of {len(descriptors)} descriptors. Received: {len(value)}"
            )
    index = PQIndex(model.codebook, model.search_metric)
    index.add(codes)
    n = len(codes)
    ranks = []
    for at in range(0, n, _ENCODED):
        own = np.arange(at, min(at + _ENCODED, n))[:, None]
        _, found = index.search(descriptors[at : at + _ENCODED], min(n, max(ks) + 1))
        others = found != own
        right = others & (labels[found] == labels[own])
        ranks.append(np.where(right, np.cumsum(others, axis=1), np.inf).min(axis=1))
    ranks = np.concatenate(ranks)
    return {k: float(np.mean(ranks <= k)) for k in ks}


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
