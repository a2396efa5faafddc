"""Average precision: by definition, by the originals' recorded figures, with ties to the last item."""

import collections
import math
import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from gpq_tf.index import METRICS, PQIndex
from gpq_tf.metrics import average_precision, codebook_usage, mean_average_precision, precision_recall_curve, ranking
from gpq_tf.metrics.ap import DENOMINATORS
from tests import golden, rankings
from tests.rankings import random_problem


def brute_force(index, queries, relevance, top_n=None, denominator="found"):
    """All distances of all codes, then a stable argsort of each row."""
    ranked = rankings.stable(rankings.distances_to_all(index, queries), relevance)
    return np.mean([rankings.average_precision(row, top_n, denominator) for row in ranked])


@settings(derandomize=True, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 30),
    st.floats(0, 1),
    st.none() | st.integers(1, 40),
    st.sampled_from(DENOMINATORS),
)
def test_average_precision_by_definition(seed, n, share, top_n, denominator):
    relevance = np.random.default_rng(seed).random((4, n)) < share
    expected = [rankings.average_precision(row, top_n, denominator) for row in relevance]
    actual = average_precision(relevance, top_n, denominator)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-14)


def test_average_precision_by_hand():
    ranked = [[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(average_precision(ranked), [(1 / 2 + 2 / 4) / 2, 1, 0, 1 / 4], rtol=1e-15)
    # Within two ranks, query 0 has one of its two: the denominator is one.
    np.testing.assert_array_equal(average_precision(ranked, top_n=2), [1 / 2, 1, 0, 0])
    np.testing.assert_array_equal(average_precision(ranked, top_n=99), average_precision(ranked))
    # Of all there are, the second is missed.
    np.testing.assert_array_equal(average_precision(ranked, top_n=2, denominator="all"), [1 / 4, 1, 0, 0])


def test_average_precision_equals_scikit_learn_without_ties():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    relevance = np.random.default_rng(0).random((20, 50)) < 0.3
    expected = [sklearn_metrics.average_precision_score(row, -np.arange(50)) for row in relevance]
    np.testing.assert_allclose(average_precision(relevance), expected, rtol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data())
def test_mean_average_precision_equals_brute_force(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    index, queries = random_problem(
        rng,
        M=data.draw(st.integers(1, 4), "M"),
        K=data.draw(st.integers(2, 5), "K"),
        n=data.draw(st.integers(1, 80), "n"),
        whole=data.draw(st.booleans(), "whole"),
        metric=data.draw(st.sampled_from(METRICS), "metric"),
    )
    denominator = data.draw(st.sampled_from(DENOMINATORS), "denominator")
    if data.draw(st.booleans(), "removed"):
        index.remove(index.ids[rng.random(len(index)) < 0.3])
    top_n = data.draw(st.none() | st.integers(1, 90), "top_n")
    query_labels, gallery_labels = rng.integers(0, 3, 5), rng.integers(0, 4, len(index))
    relevance = query_labels[:, None] == gallery_labels
    expected = brute_force(index, queries, relevance, top_n, denominator)
    actual = mean_average_precision(queries, query_labels, index, gallery_labels, top_n, denominator=denominator)
    assert isinstance(actual, float)
    assert actual == pytest.approx(expected, rel=1e-13)

    as_similarity = {
        "dense": relevance,
        "float": relevance * 1.0,
        "sparse": scipy.sparse.csc_array(relevance),
    }
    for similarity in as_similarity.values():
        choices = {"denominator": denominator, "similarity": similarity}
        assert mean_average_precision(queries, None, index, None, top_n, **choices) == actual


def test_equally_far_codes_interleave_in_gallery_order():
    # Two different codes, equally far from the query, take turns in the gallery.
    index = PQIndex([[[1.0, 0.0], [0.0, 1.0]]])
    index.add([[1], [0], [1], [0]])
    labels = ["b", "a", "a", "b"]
    assert mean_average_precision([[1.0, 1.0]], ["a"], index, labels) == (1 / 2 + 2 / 3) / 2
    assert mean_average_precision([[1.0, 1.0]], ["b"], index, labels) == (1 / 1 + 2 / 4) / 2


@pytest.mark.parametrize("top_n", [None, 7, 150, 400])
def test_a_few_different_codes_are_equally_far(top_n):
    """Neither none nor most of the gallery, which are ranked in other ways."""
    rng = np.random.default_rng(6)
    codebook = rng.standard_normal((4, 6, 2))
    codebook[0, 5] = codebook[0, 4]
    index = PQIndex(codebook)
    index.add(np.where(rng.random((300, 4)) < 0.97, rng.integers(0, 5, (300, 4)), rng.integers(4, 6, (300, 4))))
    index.add(index.codes[rng.permutation(300)[:30]])
    twins = index.codes[index.codes[:, 0] >= 4].copy()[:12]
    twins[:, 0] = 9 - twins[:, 0]
    index.add(twins)
    queries = rng.standard_normal((20, 8)).astype(np.float32)
    distances, n = rankings.distances_to_all(index, queries), len(index)
    n_codes = [len(np.unique(index.codes[distances[0] == value], axis=0)) for value in distances[0]]
    assert 0 < np.count_nonzero(np.array(n_codes) > 1) < n / 4
    relevance = rng.random((20, n)) < 0.3
    actual = mean_average_precision(queries, None, index, None, top_n, similarity=relevance)
    assert actual == pytest.approx(brute_force(index, queries, relevance, top_n), rel=1e-13)


@pytest.mark.parametrize("sample", [1, 20, 2048])
@pytest.mark.parametrize("places", [1, 2**17])
def test_the_first_ranks_do_not_depend_on_the_sample_that_finds_them(monkeypatch, sample, places):
    """A sample of one code, the nearest to half of the queries, suggests too little to hold the first 30."""
    monkeypatch.setattr(ranking, "_SAMPLE", sample)
    monkeypatch.setattr(ranking, "_PLACES", places)
    rng = np.random.default_rng(8)
    index = PQIndex(np.sort(rng.standard_normal((3, 9, 1)), axis=1))
    index.add(rng.integers(0, 9, (500, 3)))
    index.add(np.repeat(index.codes[:3], 50, axis=0))
    queries = np.concatenate([np.full((10, 3), -9.0), rng.standard_normal((10, 3))]).astype(np.float32)
    labels = rng.integers(0, 4, 670)
    relevance = labels[:20, None] == labels[20:]
    actual = mean_average_precision(queries, labels[:20], index, labels[20:], 30)
    assert actual == pytest.approx(brute_force(index, queries, relevance, 30), rel=1e-13)
    assert mean_average_precision(queries, None, index, None, 30, similarity=relevance) == actual


def test_no_matrix_of_queries_by_codes_is_held():
    rng = np.random.default_rng(7)
    index = PQIndex(rng.standard_normal((4, 16, 2)))
    index.add(rng.integers(0, 16, (20_000, 4)))
    queries, labels = rng.standard_normal((2000, 8)).astype(np.float32), rng.integers(0, 10, 22_000)
    index.snapshot()
    for metric, ranks in ((mean_average_precision, None), (precision_recall_curve, [1, 20_000])):
        tracemalloc.start()
        metric(queries, labels[:2000], index, labels[2000:], ranks)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2000 * 20_000 * 4 / 2  # bytes of their float32 distances


def test_multi_hot_labels_are_relevant_when_one_is_shared():
    rng = np.random.default_rng(1)
    index, queries = random_problem(rng, whole=False)
    query_labels, gallery_labels = rng.integers(0, 2, (5, 4)), rng.integers(0, 2, (60, 4))
    query_labels[0] = 0  # no label: nothing is relevant
    expected = brute_force(index, queries, query_labels @ gallery_labels.T > 0)
    for dtype in (bool, int, np.float32):
        actual = mean_average_precision(queries, query_labels.astype(dtype), index, gallery_labels.astype(dtype))
        assert actual == pytest.approx(expected, rel=1e-13)


def test_stored_zeros_of_a_sparse_similarity_do_not_count():
    rng = np.random.default_rng(2)
    index, queries = random_problem(rng, n=6, n_queries=2)
    relevance = np.array([[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1]])
    similarity = scipy.sparse.csr_matrix(np.ones((2, 6)))
    similarity.data[:] = relevance.ravel()
    actual = mean_average_precision(queries, None, index, None, similarity=similarity)
    assert similarity.nnz == 12
    assert actual == pytest.approx(brute_force(index, queries, relevance), rel=1e-13)


def test_labels_follow_insertion_order_not_ids():
    index = PQIndex([[[1.0], [0.0], [-1.0]]])
    index.add([[0], [1], [2]], ids=[30, 20, 10])
    index.remove([20])
    assert mean_average_precision([[1.0]], [7], index, [7, 8]) == 1.0
    assert mean_average_precision([[1.0]], [7], index, [8, 7]) == 0.5


def test_an_empty_gallery_scores_nothing():
    index, queries = random_problem(np.random.default_rng(3), n=0)
    assert mean_average_precision(queries, np.zeros(5), index, np.zeros(0)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query_labels": np.zeros(4)},
            "Invalid query_labels. Expected shape (5,) or (5, C). Received: shape (4,)",
        ),
        (
            {"gallery_labels": 0},
            "Invalid gallery_labels. Expected shape (60,) or (60, C). Received: shape ()",
        ),
        ({"query_labels": np.zeros((5, 2))}, "Received: shapes (5, 2) and (60,)"),
        (
            {"query_labels": np.zeros((5, 2)), "gallery_labels": np.full((60, 2), 3)},
            "Invalid gallery_labels. Expected only 0 and 1. Received: other values",
        ),
        ({"query_labels": None}, "Invalid labels. Expected labels of queries and gallery. Received: None"),
        ({"similarity": np.zeros((5, 60))}, "Expected labels or a similarity matrix. Received: both"),
        (
            {"query_labels": None, "gallery_labels": None, "similarity": np.zeros((60, 5))},
            "Invalid similarity. Expected shape (5, 60). Received: shape (60, 5)",
        ),
        (
            {"query_labels": None, "gallery_labels": None, "similarity": np.full((5, 60), 0.5)},
            "Invalid similarity. Expected only 0 and 1. Received: other values",
        ),
        ({"top_n": 0}, "Invalid top_n. Expected a positive integer or None. Received: top_n=0"),
        ({"top_n": 2.0}, "Invalid top_n. Expected a positive integer or None. Received: top_n=2.0"),
        ({"queries": np.full((5, 4), np.nan)}, "Expected finite values. Received: NaN or infinity in row 0"),
        (
            {"denominator": "min"},
            "Invalid denominator. Expected one of found, all. Received: denominator='min'",
        ),
        ({"ties": "random"}, "Invalid ties. Expected one of stable, expected. Received: ties='random'"),
        ({"queries": np.zeros((0, 4))}, "Invalid queries. Expected at least one. Received: none"),
    ],
)
def test_mean_average_precision_refuses(change, message):
    index, queries = random_problem(np.random.default_rng(4))
    arguments = {"queries": queries, "query_labels": np.zeros(5), "gallery_labels": np.zeros(60)}
    with pytest.raises(ValueError) as error:
        mean_average_precision(index=index, **arguments | change)
    assert str(error.value).endswith(message)


@pytest.mark.parametrize("labels", [np.array(["a", "bb", "a"]), np.array([1.5, np.nan, 1.5])])
def test_any_labels_that_compare_will_do(labels):
    index = PQIndex([[[1.0], [0.0], [-1.0]]])
    index.add([[0], [1], [2]])
    assert mean_average_precision([[1.0]], labels[:1], index, labels) == (1 / 1 + 2 / 3) / 2
    # A class that the gallery lacks; and NaN, which equals nothing.
    other = "c" if labels.dtype.kind == "U" else np.nan
    assert mean_average_precision([[1.0]], [other], index, labels) == 0.0


@pytest.mark.parametrize(
    ("relevance", "message"),
    [
        ([0, 1], "Invalid ranked_relevance. Expected shape (Q, N). Received: shape (2,)"),
        ([[0, 2]], "Invalid ranked_relevance. Expected only 0 and 1. Received: other values"),
    ],
)
def test_average_precision_refuses(relevance, message):
    with pytest.raises(ValueError) as error:
        average_precision(relevance)
    assert str(error.value) == message


@golden.needs_golden
@pytest.mark.parametrize("configuration", ["b12_k16_d12", "b8_k64_d8"])
def test_golden_gpq(configuration):
    stored = golden.load("retrieval.npz")
    get = {name.split("/")[1]: value for name, value in stored.items() if name.startswith(configuration)}
    index = PQIndex(get["Z"].reshape(len(get["Z"]), get["codes"].shape[1], -1).transpose(1, 0, 2))
    index.add(get["codes"])
    _, ids = index.search(get["query"], len(index))
    relevance = get["class_query"][:, None] == get["class_gallery"]
    labels = get["class_query"], get["class_gallery"]
    for name, top_n in (("all", None), ("small", int(get["top_N_small"])), ("1", 1)):
        for suffix, rank in (("", get["rank_full"].T), ("_stable", ids)):
            ranked = np.take_along_axis(relevance, rank.astype(int), axis=1)
            expected = get[f"AP_{name}{suffix}"]
            np.testing.assert_allclose(average_precision(ranked, top_n), expected, rtol=1e-12)
        mean = mean_average_precision(get["query"], labels[0], index, labels[1], top_n)
        assert mean == pytest.approx(float(get[f"mAP_{name}_stable"]), rel=1e-12)
    # The original with the row of query 0 emptied: its AP counts as 0, and it stays in the mean.
    relevance[0] = False
    ranked = np.take_along_axis(relevance, get["rank_full"].T.astype(int), axis=1)
    without = float(get["mAP_all_query0_without_relevant"])
    assert average_precision(ranked).mean() == pytest.approx(without, rel=1e-12)


@golden.needs_golden
@pytest.mark.parametrize("case", ["noties", "noties_w256", "multilabel", "ties"])
def test_golden_spq(case):
    """SPQ's own scoring: sums of Euclidean distances, multi-hot labels; float32 figures."""
    stored = golden.load("../spq/ops.npz")
    get = {name.split("/")[1]: value for name, value in stored.items() if name.startswith(f"map_{case}/")}
    codebook = get["C"].reshape(len(get["C"]), int(get["N_books"]), -1).transpose(1, 0, 2)
    index = PQIndex(codebook, metric="l2")
    index.add(get["gallery_codes"])
    distances, ids = index.search(get["query_codes"], len(index))
    assert golden.worst(distances, np.take_along_axis(get["dist"], ids, axis=1)) < 3e-7
    np.testing.assert_array_equal(ids, get["argsort_stable"])
    for top_n, expected in zip(get["topk"], get["mAP_stable"], strict=True):
        actual = mean_average_precision(
            get["query_codes"],
            get["query_labels"],
            index,
            get["gallery_labels"],
            top_n=None if top_n == -1 else int(top_n),
        )
        assert actual == pytest.approx(float(expected), rel=2e-7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_codebook_usage_counts(n, n_book, n_word, seed):
    codes = np.random.default_rng(seed).integers(0, n_word, (n, n_book)).astype("uint8")
    usage = codebook_usage(codes, n_word)
    for book in range(n_book):
        counts = collections.Counter(codes[:, book].tolist())
        assert usage["used"][book] == len(counts)
        entropy = -sum(count / n * math.log2(count / n) for count in counts.values())
        assert usage["entropy"][book] == pytest.approx(entropy, abs=1e-12)
        assert 0 <= usage["entropy"][book] <= math.log2(n_word) + 1e-12


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((0, 3), int), r"Expected integers \(N, M\)"),
        (np.zeros(3, int), r"Expected integers \(N, M\)"),
        (np.zeros((2, 3)), "Received: float64"),
        (np.full((2, 3), 4), "Expected 0 to 3. Received: 4 to 4"),
        (np.full((2, 3), -1), "Received: -1 to -1"),
    ],
)
def test_codebook_usage_refuses(codes, message):
    with pytest.raises(ValueError, match=message):
        codebook_usage(codes, 4)
