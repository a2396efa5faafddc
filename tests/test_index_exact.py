"""The exact engine by NumPy and compiled: the same bits, as the five lines that define them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpq_tf.index import METRICS, exact
from gpq_tf.index.snapshot import distance_table
from gpq_tf.index.store import PACKED_K, pack

from gradients import random_cases


def oracle(codebook, metric, codes, queries, k):
    table = distance_table(queries, codebook, metric)  # (M, K, Q)
    distances = np.zeros((len(queries), len(codes)), np.float32)
    for book in range(len(codebook)):
        distances += table[book][codes[:, book]].T
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), order


def check(monkeypatch, compiled_from, M, K, d, N, Q, k, metric, seed, distinct=None):
    rng = np.random.default_rng(seed)
    codebook = rng.integers(-3, 4, (M, K, d)).astype("float32") / 4  # few values: many ties
    codes = rng.integers(0, K, (distinct or N, M))
    codes = codes[rng.integers(0, len(codes), N)] if distinct else codes
    queries = rng.integers(-3, 4, (Q, M * d)).astype("float32") / 4
    with monkeypatch.context() as patched:
        patched.setattr(exact, "_COMPILED_FROM", compiled_from)
        distances, positions = exact.nearest(codebook, metric, pack(codes, K), K <= PACKED_K, queries, k)
    expected_distances, expected_positions = oracle(codebook, metric, codes, queries, k)
    n = min(N, k)
    np.testing.assert_array_equal(distances[:, :n], expected_distances)
    np.testing.assert_array_equal(positions[:, :n], expected_positions)
    assert (distances[:, n:] == np.inf).all()
    assert (positions[:, n:] == -1).all()
    assert (distances.dtype, positions.dtype, distances.shape) == (np.float32, np.int64, (Q, k))


CASES = [
    # M, K, d, N, Q, k, distinct
    (12, 16, 2, 5000, 70, 100, None),  # packed, more than a block of queries
    (3, 16, 2, 40_000, 3, 7, 50),  # an odd number of books, several chunks, nothing but ties
    (17, 4, 1, 900, 2, 900, None),  # two groups of books, all that there are
    (33, 16, 1, 64, 1, 3, None),
    (2, 300, 3, 2100, 65, 50, 300),  # two bytes a codeword
    (1, 2, 1, 1, 1, 5, None),
    (5, 17, 2, 10, 4, 12, None),
]


@pytest.mark.parametrize("compiled_from", [0, 2**62])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_both_ways_give_the_bits_of_the_oracle(monkeypatch, compiled_from, metric, case):
    M, K, d, N, Q, k, distinct = case
    check(monkeypatch, compiled_from, M, K, d, N, Q, k, metric, 0, distinct)


@random_cases
@given(st.data())
def test_any_sizes(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    sizes = draw(1, 20), draw(2, 40), draw(1, 3), draw(1, 300), draw(1, 70), draw(1, 320)
    metric, seed = data.draw(st.sampled_from(METRICS)), draw(0, 2**32 - 1)
    check(pytest.MonkeyPatch(), 2**62, *sizes, metric, seed, data.draw(st.none() | st.integers(1, 20)))


def test_chunks_and_limits_of_any_size_change_nothing(monkeypatch):
    for name, value in (("_NUMPY_CHUNK_CODES", (8, 8)), ("_SAMPLE", 1), ("_BLOCK_QUERIES", 4), ("_GROUP_BOOKS", 2)):
        monkeypatch.setattr(exact, name, value)
        for k in (1, 3, 50):
            check(monkeypatch, 2**62, 5, 16, 2, 333, 9, k, "inner_product", 1, 40)
    monkeypatch.setattr(exact, "_CHUNK_CODES", 16)
    check(monkeypatch, 0, 5, 16, 2, 333, 9, 10, "l2", 1, 40)


@pytest.mark.parametrize(("every", "misled"), [(7, False), (10, True)])
def test_a_sample_that_misleads_costs_time_alone(monkeypatch, every, misled):
    """Every tenth code is looked at beforehand; where just these are near, more than they must be searched."""
    for name, value in (("_NUMPY_CHUNK_CODES", (64, 64)), ("_NUMPY_CHUNK_ENTRIES", 1), ("_EXPECTED", 4)):
        monkeypatch.setattr(exact, name, value)
    passes = []
    whole = exact._nearest_of_chunks
    monkeypatch.setattr(exact, "_nearest_of_chunks", lambda *given: passes.append(given[-1]) or whole(*given))
    rng = np.random.default_rng(3)
    codebook = np.arange(16, dtype="float32").reshape(1, 16, 1)
    codes = rng.integers(1, 16, (333, 1))
    codes[::every] = 0
    for k in (41, 40):
        passes.clear()
        found = exact.nearest(codebook, "l2", pack(codes, 16), True, np.zeros((2, 1), "float32"), k)
        for actual, expected in zip(found, oracle(codebook, "l2", codes, np.zeros((2, 1), "float32"), k), strict=True):
            np.testing.assert_array_equal(actual, expected)
        assert [np.isinf(ceiling).all() for ceiling in passes] == [False, True][: 1 + misled]


def test_the_compiled_way_is_taken_where_it_pays(monkeypatch):
    taken = []
    monkeypatch.setattr(exact, "_COMPILED_FROM", 1000)
    monkeypatch.setattr(exact, "_compiled_sums", lambda *_: taken.append("compiled") or exact._numpy_sums(*_))
    for n_codes, expected in ((499, []), (500, ["compiled"])):
        check(monkeypatch, 1000, 2, 16, 1, n_codes, 2, 3, "l2", 0)
        assert taken == expected
