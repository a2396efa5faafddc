"""Precision and recall at each rank: by definition, and beside scikit-learn."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from gpq_tf.index import METRICS, PQIndex
from gpq_tf.metrics import precision_at_k, precision_recall_curve
from tests import rankings


def plain_curve(ranked, ranks):
    """Means over rankings (Q, N) of precision and recall, each hit counted."""
    hits = [[sum(map(bool, row[:rank])) for rank in ranks] for row in ranked]
    precision = [np.mean([row[i] / rank for row in hits]) for i, rank in enumerate(ranks)]
    of_all = [max(1, sum(map(bool, row))) for row in ranked]
    recall = [np.mean([row[i] / n for row, n in zip(hits, of_all, strict=True)]) for i in range(len(ranks))]
    return precision, recall


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_curve_by_definition(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    n = data.draw(st.integers(0, 60), "n")
    whole, metric = data.draw(st.booleans(), "whole"), data.draw(st.sampled_from(METRICS), "metric")
    index, queries = rankings.random_problem(rng, n=n, whole=whole, metric=metric)
    ranks = data.draw(st.none() | st.lists(st.integers(1, 70), min_size=1, max_size=5), "ranks")
    query_labels, gallery_labels = rng.integers(0, 3, 5), rng.integers(0, 4, n)
    relevance = query_labels[:, None] == gallery_labels
    ranked = rankings.stable(rankings.distances_to_all(index, queries), relevance)
    expected = plain_curve(ranked, ranks or range(1, n + 1))
    actual = precision_recall_curve(queries, query_labels, index, gallery_labels, ranks)
    np.testing.assert_array_equal(actual[0], ranks or np.arange(1, n + 1))
    np.testing.assert_allclose(actual[1:], expected, rtol=1e-13)
    if ranks:
        at_k = precision_at_k(queries, query_labels, index, gallery_labels, ks=ranks)
        assert at_k == dict(zip(ranks, actual[1].tolist(), strict=True))

    for similarity in (relevance, scipy.sparse.coo_array(relevance)):
        again = precision_recall_curve(queries, None, index, None, ranks, similarity=similarity)
        np.testing.assert_array_equal(again[1:], actual[1:])
    classes = np.eye(4)
    again = precision_recall_curve(queries, classes[query_labels], index, classes[gallery_labels], ranks)
    np.testing.assert_array_equal(again[1:], actual[1:])


def test_the_sum_over_blocks_does_not_depend_on_threads():
    # 1000 queries are 16 blocks. Their recalls are thirds and sevenths: another order of adding shows.
    rng = np.random.default_rng(0)
    index, queries = rankings.random_problem(rng, n=70, n_queries=1000, whole=False)
    relevance = rng.random((1000, 70)) < rng.random((1000, 1))
    curves = [precision_recall_curve(queries, None, index, None, similarity=relevance) for _ in range(5)]
    ranked = rankings.stable(rankings.distances_to_all(index, queries), relevance)
    hits = np.cumsum(ranked, axis=1)
    np.testing.assert_allclose(curves[0][1], hits.mean(axis=0) / np.arange(1, 71), rtol=1e-12)
    np.testing.assert_allclose(curves[0][2], (hits / np.maximum(hits[:, -1:], 1)).mean(axis=0), rtol=1e-12)
    for curve in curves[1:]:
        np.testing.assert_array_equal(curve, curves[0])


def test_scikit_learn_draws_the_same_curve():
    """Its points are the ends of the groups of equal scores, where ties do not matter."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    for whole in (False, True):
        index, queries = rankings.random_problem(rng, n=80, whole=whole)
        relevance = rng.random((5, 80)) < 0.3
        for query, row, distances in zip(queries, relevance, rankings.distances_to_all(index, queries), strict=True):
            precision, recall, thresholds = metrics.precision_recall_curve(row, -distances)
            ends = np.count_nonzero(-distances >= thresholds[:, None], axis=1)
            for ties in ("stable", "expected"):
                actual = precision_recall_curve(query[None], None, index, None, ends, ties=ties, similarity=row[None])
                np.testing.assert_allclose(actual[1:], [precision[:-1], recall[:-1]], rtol=1e-12)
            # Its average precision gives all hits of a group the precision at the group's end: a third convention.
            score = metrics.average_precision_score(row, -distances)
            _, ours, share = (each[::-1] for each in actual)
            assert score == pytest.approx(np.sum(np.diff(share, prepend=0) * ours), rel=1e-12)


def test_precision_beyond_the_gallery_divides_by_k():
    index = PQIndex([[[1.0], [0.0]]])
    index.add([[0], [1]])
    assert precision_at_k([[1.0]], [1], index, [1, 1], ks=(1, 2, 4)) == {1: 1.0, 2: 1.0, 4: 0.5}


@pytest.mark.parametrize("ties", ["stable", "expected"])
def test_an_empty_gallery_has_an_empty_curve(ties):
    index = PQIndex([[[1.0], [0.0]]])
    ranks, precision, recall = precision_recall_curve([[1.0]], [1], index, [], ties=ties)
    assert ranks.shape == precision.shape == recall.shape == (0,)
    assert precision_at_k([[1.0]], [1], index, [], ks=[3], ties=ties) == {3: 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": ()}, "Invalid ks. Expected positive integers. Received: ks=[]"),
        ({"ks": (1, 0)}, "Invalid ks. Expected positive integers. Received: ks=[1, 0]"),
        ({"ks": (1.0,)}, "Invalid ks. Expected positive integers. Received: ks=[1.0]"),
        ({"ties": "none"}, "Invalid ties. Expected one of stable, expected. Received: ties='none'"),
        ({"queries": np.zeros((0, 4))}, "Invalid queries. Expected at least one. Received: none"),
    ],
)
def test_precision_at_k_refuses(change, message):
    index, queries = rankings.random_problem(np.random.default_rng(4))
    arguments = {"queries": queries, "query_labels": np.zeros(5), "gallery_labels": np.zeros(60)}
    with pytest.raises(ValueError) as error:
        precision_at_k(index=index, **arguments | change)
    assert str(error.value) == message
