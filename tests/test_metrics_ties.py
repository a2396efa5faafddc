"""The expectation over all orders of equal distances: against every permutation, and against many shuffles."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpq_tf.index import PQIndex
from gpq_tf.metrics import mean_average_precision, precision_recall_curve
from gpq_tf.metrics.ap import DENOMINATORS
from gpq_tf.metrics.expected import Harmonic, _hypergeometric, expected_average_precision
from tests import rankings

COLUMN = np.arange(8.0).reshape(1, 8, 1)  # codeword k is k


def ranked_by(distances):
    """An index of one book, and a query whose distance to code k is 1 + k: `distances` are small whole numbers."""
    index = PQIndex(COLUMN)
    index.add(np.reshape(distances, (-1, 1)))
    return index, [[-1.0]]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7),
    st.none() | st.integers(1, 8),
    st.sampled_from(DENOMINATORS),
)
def test_expected_average_precision_is_the_mean_over_all_permutations(items, top_n, denominator):
    distances, relevance = map(np.array, zip(*items, strict=True))
    index, query = ranked_by(distances)
    expected = rankings.mean(
        rankings.average_precision(row, top_n, denominator) for row in rankings.all_orders(distances, relevance)
    )
    actual = mean_average_precision(query, [True], index, relevance, top_n, denominator=denominator, ties="expected")
    assert actual == pytest.approx(expected, rel=1e-13, abs=1e-15)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_expected_curve_is_the_mean_over_all_permutations(items, ranks):
    distances, relevance = map(np.array, zip(*items, strict=True))
    index, query = ranked_by(distances)
    orders = list(rankings.all_orders(distances, relevance))
    _, precision, recall = precision_recall_curve(query, [True], index, relevance, ranks, ties="expected")
    for at, rank in enumerate(ranks):
        hits = rankings.mean(sum(order[:rank]) for order in orders)
        assert precision[at] == pytest.approx(hits / rank, rel=1e-13)
        assert recall[at] == pytest.approx(hits / max(1, relevance.sum()), rel=1e-13)


def test_expected_average_precision_by_hand():
    index, query = ranked_by([1, 1, 1])
    # One of three is relevant: it ranks first, second or third.
    score = functools.partial(mean_average_precision, query, ["a"], index, ["b", "a", "b"], ties="expected")
    assert score() == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, rel=1e-15)
    assert score(top_n=2) == pytest.approx((1 + 1 / 2 + 0) / 3, rel=1e-15)
    # Two of three: the orders are b a a, a b a and a a b. Within two ranks, "found" divides the first two by one.
    score = functools.partial(mean_average_precision, query, ["a"], index, ["b", "a", "a"], ties="expected", top_n=2)
    assert score() == pytest.approx((1 / 2 + 1 + 1) / 3, rel=1e-15)
    assert score(denominator="all") == pytest.approx((1 / 4 + 1 / 2 + 1) / 3, rel=1e-15)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.none() | st.integers(1, 90), st.sampled_from(DENOMINATORS))
def test_without_ties_there_is_one_order(seed, top_n, denominator):
    rng = np.random.default_rng(seed)
    index = PQIndex(rng.standard_normal((3, 5, 2)))
    codes = np.stack(np.unravel_index(rng.permutation(125)[:80], (5, 5, 5)), axis=1)
    index.add(codes)
    queries = rng.standard_normal((4, 6)).astype(np.float32)
    distances = rankings.distances_to_all(index, queries)
    assume(all(len(np.unique(row)) == len(row) for row in distances))  # two random sums are rarely equal in float32
    labels = rng.integers(0, 3, 4), rng.integers(0, 3, 80)
    arguments = queries, labels[0], index, labels[1], top_n
    stable = mean_average_precision(*arguments, denominator=denominator)
    expected = mean_average_precision(*arguments, denominator=denominator, ties="expected")
    assert expected == pytest.approx(stable, rel=1e-13)


@pytest.mark.parametrize(("top_n", "denominator"), [(None, "found"), (70, "found"), (70, "all")])
def test_shuffled_galleries_scatter_around_the_expectation(top_n, denominator):
    rng = np.random.default_rng(5)
    index, queries = rankings.random_problem(rng, n=200, n_queries=8)
    query_labels, gallery_labels = rng.integers(0, 3, 8), rng.integers(0, 3, 200)
    choices = {"top_n": top_n, "denominator": denominator}
    expected = mean_average_precision(queries, query_labels, index, gallery_labels, ties="expected", **choices)
    scores = []
    for _ in range(400):
        order = rng.permutation(200)
        shuffled = PQIndex(index.codebook)
        shuffled.add(index.codes[order])
        scores.append(mean_average_precision(queries, query_labels, shuffled, gallery_labels[order], **choices))
        if len(scores) <= 3:  # the expectation does not see the order
            same = mean_average_precision(
                queries, query_labels, shuffled, gallery_labels[order], ties="expected", **choices
            )
            assert same == expected
    assert np.std(scores) > 1e-3
    assert abs(np.mean(scores) - expected) < 4 * np.std(scores) / math.sqrt(len(scores))


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_hypergeometric_probabilities(data):
    n = data.draw(st.integers(1, 60))
    r, m = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    x, probabilities = _hypergeometric(n, r, m)
    assert probabilities.sum() == pytest.approx(1, rel=1e-14)
    for value, probability in zip(x.tolist(), probabilities, strict=True):
        exact = Fraction(math.comb(r, value) * math.comb(n - r, m - value), math.comb(n, m))
        assert probability == pytest.approx(float(exact), rel=1e-11)


def test_large_groups_keep_their_digits():
    # A million codes at one distance, a tenth of them relevant: precision at place j, if it holds a hit, is
    # (1 + (j - 1) a) / j in expectation, and the mean of that is a + (1 - a) H(n) / n.
    n, r = 1_000_000, 100_000
    a = (r - 1) / (n - 1)
    exact = a + (1 - a) * math.fsum(1 / j for j in range(1, n + 1)) / n
    harmonic = Harmonic(n)
    assert expected_average_precision(np.array([n]), np.array([r]), harmonic) == pytest.approx(exact, rel=1e-14)
    # And sums that start far from 1.
    for start, length in ((999_000, 1000), (999_999, 1), (3, 20)):
        exact = math.fsum(1 / j for j in range(start + 1, start + length + 1))
        assert harmonic(start, length) == pytest.approx(exact, rel=1e-15, abs=0)


def test_a_cut_through_a_large_group():
    # 200,000 codes at one distance, a tenth of them relevant, cut at 1000: about 100 are found, so that dividing by
    # all 20,000 gives about a 200th of dividing by those found.
    sizes, hits, harmonic = np.array([200_000]), np.array([20_000]), Harmonic(200_000)
    found = expected_average_precision(sizes, hits, harmonic, top_n=1000)
    of_all = expected_average_precision(sizes, hits, harmonic, top_n=1000, n_relevant=20_000)
    assert found == pytest.approx(of_all * 20_000 / 100, rel=0.01)
    assert 0.1 < found < 0.11
