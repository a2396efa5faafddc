"""Recall@k: by definition, by the original evaluator's recorded figures, with ties to the last item."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from gpq_tf.metrics import recall, recall_at_k
from tests import golden


def plain_recall(embeddings, relevance, ks):
    """Every distance in float64, every list sorted."""
    hits = dict.fromkeys(ks, 0)
    for i, query in enumerate(embeddings):
        others = [j for j in range(len(embeddings)) if j != i]
        others.sort(key=lambda j: float(np.sum((np.float64(embeddings[j]) - np.float64(query)) ** 2)))
        for k in ks:
            hits[k] += any(relevance[i][j] for j in others[:k])
    return {k: hits[k] / len(embeddings) for k in ks}


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.data())
def test_recall_by_definition(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    n, dimension = data.draw(st.integers(1, 40), "n"), data.draw(st.integers(1, 5), "D")
    ks = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True), "ks")
    if data.draw(st.booleans(), "whole"):
        embeddings = rng.integers(-1, 2, (n, dimension)).astype(np.float32)  # many are equally far
    else:
        # Far from the origin a matrix product loses all digits of the small distances.
        scale = data.draw(st.sampled_from([1.0, 1e15]), "scale")
        offset = data.draw(st.sampled_from([0.0, 1000.0]), "offset")
        embeddings = ((rng.standard_normal((n, dimension)) + offset) * scale).astype(np.float32)
        embeddings[rng.integers(0, n, n // 4)] = embeddings[0]
    labels = rng.integers(0, max(2, n // 4), n)
    same = labels[:, None] == labels
    expected = plain_recall(embeddings, same, ks)
    assert recall_at_k(embeddings, labels, ks) == expected
    assert recall_at_k(embeddings, np.eye(n + 1)[labels], ks) == expected  # multi-hot, one label each
    for similarity in (same, scipy.sparse.csr_array(same)):
        assert recall_at_k(embeddings, None, ks, similarity=similarity) == expected


def test_small_blocks_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    embeddings, labels = rng.integers(-1, 2, (50, 4)), rng.integers(0, 20, 50)
    expected = plain_recall(embeddings, labels[:, None] == labels, (1, 2, 4, 8))
    assert 0 < expected[1] < expected[8] < 1
    assert recall_at_k(embeddings, labels) == expected
    monkeypatch.setattr(recall, "_BLOCK_ENTRIES", 120)  # blocks of 2 rows
    monkeypatch.setattr(recall, "_EXACT_ENTRIES", 12)  # 3 distances at a time
    assert recall_at_k(embeddings, labels) == expected


def test_tiny_embeddings_whose_squares_underflow_in_float32():
    rng = np.random.default_rng(2)
    embeddings, labels = (3e-22 * rng.standard_normal((300, 3))).astype(np.float32), rng.integers(0, 20, 300)
    assert recall_at_k(embeddings, labels) == plain_recall(embeddings, labels[:, None] == labels, (1, 2, 4, 8))


def test_no_matrix_of_all_distances_is_held(monkeypatch):
    monkeypatch.setattr(recall, "_BLOCK_ENTRIES", 2**17)
    rng = np.random.default_rng(1)
    embeddings, labels = rng.standard_normal((2000, 8)).astype(np.float32), rng.integers(0, 100, 2000)
    tracemalloc.start()
    recall_at_k(embeddings, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 2000 * 4 / 4


def test_labels_that_overlap_need_not_be_classes():
    # The second shares a label with the first and with the third; they share none. At 0.5 lies one without any.
    labels = [[1, 0], [1, 1], [0, 1], [0, 0]]
    assert recall_at_k([[0.0], [1.0], [2.1], [0.5]], labels, ks=(1, 2, 3)) == {1: 0.25, 2: 0.75, 3: 0.75}


def test_a_class_of_one_is_a_miss_and_stays_in_the_mean():
    assert recall_at_k([[0.0], [1.0], [2.0]], ["a", "b", "a"], ks=(2, 99)) == {2: 2 / 3, 99: 2 / 3}
    assert recall_at_k([[0.0]], ["a"], ks=(1,)) == {1: 0.0}


@golden.needs_golden
@pytest.mark.parametrize("case", ["unit_norm", "raw_random", "singleton_classes", "duplicates", "integer_ties"])
def test_golden_cgd(case):
    stored = golden.load("../cgd/evaluator.npz")
    get = {name.split("/")[1]: value for name, value in stored.items() if name.startswith(f"{case}/")}
    actual = recall_at_k(get["features"], get["labels"], stored["ranks"])
    assert list(actual) == stored["ranks"].tolist()
    actual = np.array(list(actual.values()))
    if case in ("duplicates", "integer_ties"):
        # The original leaves ties to chance, and its rounding parts equal rows: within what all orders allow.
        assert (actual >= get["recall_lower_bound_over_near_ties"]).all()
        assert (actual <= get["recall_upper_bound_over_near_ties"]).all()
    else:
        np.testing.assert_array_equal(actual, get["recall"])
    if case == "integer_ties":  # whole numbers: its float32 distances are exact
        np.testing.assert_array_equal(actual, get["recall_stable_sort"])


@golden.needs_golden
def test_golden_cgd_end_to_end():
    stored = golden.load("../cgd/end_to_end.npz")
    labels = golden.load("../cgd/dataset.npz")["test_labels"]
    cases = [name.removesuffix("/recall") for name in stored if name.endswith("/recall")]
    assert cases
    for case in cases:
        actual = recall_at_k(stored[f"{case}/embeddings"], labels, stored["ranks"])
        np.testing.assert_allclose(list(actual.values()), stored[f"{case}/recall"], rtol=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": np.zeros(4)}, "Expected shape (N, D), not empty. Received: shape (4,)"),
        ({"embeddings": np.zeros((0, 4))}, "Expected shape (N, D), not empty. Received: shape (0, 4)"),
        ({"embeddings": [[0.0], [np.nan], [1.0]]}, "squared distances fit float32. Received: others in row 1"),
        ({"embeddings": [[0.0], [1.0], [1e19]]}, "squared distances fit float32. Received: others in row 2"),
        ({"labels": np.zeros(2)}, "Invalid query_labels. Expected shape (3,) or (3, C). Received: shape (2,)"),
        ({"ks": (0,)}, "Invalid ks. Expected positive integers. Received: ks=[0]"),
        ({"similarity": np.eye(3)}, "Expected labels or a similarity matrix. Received: both"),
        ({"labels": None}, "Invalid labels. Expected labels of queries and gallery. Received: None"),
    ],
)
def test_recall_at_k_refuses(change, message):
    arguments = {"embeddings": np.zeros((3, 1)), "labels": np.zeros(3)}
    with pytest.raises(ValueError) as error:
        recall_at_k(**arguments | change)
    assert str(error.value).endswith(message)


def test_embeddings_that_are_nearly_alike_take_no_longer(monkeypatch):
    """A network that has hardly learned: unit vectors within .01 of each other, of which few need float64."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=256)
    embeddings = mean / np.linalg.norm(mean) + rng.normal(size=(300, 256)) * 5e-4
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype("float32")
    labels = np.arange(300) % 20
    measured, exact = [], recall.squared_distances
    monkeypatch.setattr(
        recall, "squared_distances", lambda e, row, others: measured.append(len(others)) or exact(e, row, others)
    )
    found = recall_at_k(embeddings, labels)
    assert found == plain_recall(embeddings, labels[:, None] == labels, (1, 2, 4, 8))
    assert np.mean(measured) < 10
