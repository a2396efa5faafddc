"""What the tests of the metrics share: the definitions as plain loops, and small problems full of ties."""

import itertools
import math

import numpy as np

from gpq_tf.index import PQIndex


def average_precision(relevance, top_n=None, denominator="found"):
    """Of one ranking, best first."""
    hits, total = 0, 0.0
    for rank, relevant in enumerate(relevance[:top_n], start=1):
        if relevant:
            hits += 1
            total += hits / rank
    divisor = hits if denominator == "found" else sum(map(bool, relevance))
    return total / divisor if divisor else 0.0


def distances_to_all(index, queries):
    """(Q, N), column i for the i-th living code."""
    distances, ids = index.search(queries, max(1, len(index)))
    column = {number: i for i, number in enumerate(index.ids.tolist())}
    full = np.empty((len(queries), len(index)), np.float32)
    for row, rank in np.ndindex(full.shape):
        full[row, column[int(ids[row, rank])]] = distances[row, rank]
    return full


def stable(distances, relevance):
    """The relevance (Q, N) as a stable sort of the distances (Q, N) ranks it."""
    return np.take_along_axis(relevance, np.argsort(distances, axis=1, kind="stable"), axis=1)


def all_orders(distances, relevance):
    """Every ranking of the relevance (N,) that sorts the distances (N,), each as often as the others."""
    groups = [relevance[distances == distance].tolist() for distance in np.unique(distances)]
    for order in itertools.product(*map(itertools.permutations, groups)):
        yield list(itertools.chain(*order))


def mean(values):
    """With one rounding."""
    values = list(values)
    return math.fsum(values) / len(values)


def random_problem(rng, M=2, K=3, d=2, n=60, n_queries=5, whole=True, metric="inner_product"):
    """Whole numbers in a small range: equal codes, and different codes that are equally far."""
    draw = (lambda s: rng.integers(-1, 2, s)) if whole else rng.standard_normal
    index = PQIndex(draw((M, K, d)), metric)
    index.add(rng.integers(0, K, (n, M)))
    return index, draw((n_queries, M * d)).astype(np.float32)
