"""Recall of codes against a loop over all of them, and the bytes that a code takes."""

import types

import numpy as np
import pytest

from gpq_tf import retrieval
from gpq_tf.network import RetrievalModel

TINY = {"stem": [4, 3, 2, False, 1e-5, 0.9], "pool": None, "stages": []}


def model(n_book=3, bn_word=3):
    return RetrievalModel("cgd", layout=TINY, n_dim=12, descriptors="MG", n_book=n_book, bn_word=bn_word)


def unit(n, size=12, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("float32")


def plain_recall(model, descriptors, codes, labels, ks):
    """Every image sorts all others by its distance to what their codes stand for, in float64."""
    z = np.array([np.concatenate([book[c] for book, c in zip(model.codebook, row, strict=True)]) for row in codes])
    hits = dict.fromkeys(ks, 0)
    for i, query in enumerate(descriptors.astype(float)):
        others = [j for j in range(len(z)) if j != i]
        ranked = sorted(others, key=lambda j, query=query: round(np.square(query - z[j]).sum(), 6))
        for k in ks:
            hits[k] += any(labels[j] == labels[i] for j in ranked[:k])
    return {k: hits[k] / len(z) for k in ks}


@pytest.mark.parametrize("bn_word", [1, 3])  # of 1 bit, many codes are equal
def test_recall_of_codes_is_the_loop(bn_word):
    quantizing, x, labels = model(bn_word=bn_word), unit(90), np.random.default_rng(1).integers(0, 12, 90)
    labels[5] = 99  # alone
    codes = retrieval.codes_of(quantizing, x)
    ks = (1, 2, 8, 89, 500)
    found = retrieval.recall_of_codes(quantizing, x, codes, labels, ks)
    assert found == pytest.approx(plain_recall(quantizing, x, codes, labels, ks))
    assert 0 < found[1] < found[8] < found[89] == found[500] < 1


def test_more_than_a_block_of_queries(monkeypatch):
    quantizing, x, labels = model(), unit(70), np.arange(70) % 9
    codes = retrieval.codes_of(quantizing, x)
    whole = retrieval.recall_of_codes(quantizing, x, codes, labels)
    monkeypatch.setattr(retrieval, "_ENCODED", 32)
    np.testing.assert_array_equal(retrieval.codes_of(quantizing, x), codes)
    assert retrieval.recall_of_codes(quantizing, x, codes, labels) == whole


def test_an_image_does_not_find_itself():
    quantizing, x = model(), unit(2)
    codes = retrieval.codes_of(quantizing, x)
    assert retrieval.recall_of_codes(quantizing, x, codes, [0, 1], (1, 2)) == {1: 0.0, 2: 0.0}
    assert retrieval.recall_of_codes(quantizing, x, codes, [0, 0], (1,)) == {1: 1.0}
    assert retrieval.recall_of_codes(quantizing, x[:1], codes[:1], [0], (1,)) == {1: 0.0}


def test_codes_of_descriptors_are_those_of_the_images():
    quantizing = model()
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), "uint8")
    np.testing.assert_array_equal(retrieval.codes_of(quantizing, quantizing.embed(images)), quantizing.encode(images))
    assert retrieval.codes_of(quantizing, np.empty((0, 12), "float32")).shape == (0, 3)


@pytest.mark.parametrize(
    ("n_book", "bn_word", "n_bytes"), [(32, 8, 32), (5, 4, 3), (8, 4, 4), (6, 1, 3), (7, 5, 7), (4, 9, 8), (4, 16, 8)]
)
def test_bytes_are_those_of_the_index(n_book, bn_word, n_bytes):
    stand_in = types.SimpleNamespace(architecture={"n_book": n_book, "bn_word": bn_word})
    assert retrieval.bytes_a_code(stand_in) == n_bytes
    index = retrieval.PQIndex(np.zeros((n_book, 2**bn_word, 1)))
    index.add(np.zeros((10, n_book), int))
    assert f"bytes: codes {10 * n_bytes}," in index.describe()


@pytest.mark.parametrize("name, change", [("codes", {"codes": np.zeros((2, 3), int)}), ("labels", {"labels": [0]})])
def test_numbers_must_agree(name, change):
    given = {"descriptors": unit(3), "codes": np.zeros((3, 3), int), "labels": [0, 1, 0], **change}
    with pytest.raises(ValueError, match=rf"^Invalid {name}\. Expected one for each of 3 descriptors\. Received: \d$"):
        retrieval.recall_of_codes(model(), **given)
