"""Lists of answers beside the recall that they are the answers of."""

import types

import numpy as np
import pytest

from gpq_tf import recall
from gpq_tf.metrics import recall_at_k


@pytest.fixture
def alike():
    """float32 (60, 48) of unit length that differ in their sixth digit, as those of a network that learned little."""
    drawn = 1 + 1e-6 * np.random.default_rng(0).normal(size=(60, 48))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype("float32")


def test_lists_agree_with_the_recall_of_descriptors_that_are_nearly_alike(alike):
    labels = np.arange(60) % 12
    images = types.SimpleNamespace(read=lambda index: index, labels=labels, class_names=None)
    found = {"embeddings": alike, "index": np.arange(60)}
    lists = [recall.answers(query, found, images) for query in range(60)]
    for k, expected in recall_at_k(alike, labels, (1, 2, 5, 10)).items():
        assert np.mean([any(each["relevant"][:k]) for each in lists]) == pytest.approx(expected)
    exact = np.square(np.float64(alike)[:, None] - np.float64(alike)).sum(axis=-1)
    np.fill_diagonal(exact, np.inf)
    for query, each in enumerate(lists):
        np.testing.assert_array_equal(each["result_images"], np.argsort(exact[query], kind="stable")[:10])


def test_equal_descriptors_come_in_their_order(alike):
    rows, distances = recall.nearest(np.repeat(alike[:2], 3, axis=0), alike[1])
    assert rows.tolist() == [3, 4, 5, 0, 1, 2] and distances[:3].tolist() == [0, 0, 0] and distances[3] > 0
