"""Codebooks fitted by Faiss: their codes and error against plain loops, the rotation, and models that get one."""

import sys

import faiss
import numpy as np
import pytest

from gpq_tf import codebooks, retrieval
from gpq_tf.network import RetrievalModel, load_model

TINY = {"stem": [4, 3, 2, False, 1e-5, 0.9], "pool": None, "stages": []}
RNG = np.random.default_rng


def clustered(n=400, size=12, seed=0):
    """Unit descriptors around 20 centres whose variance is not the same in all books."""
    rng = RNG(seed)
    centres = rng.normal(size=(20, size)) * np.linspace(3, 0.2, size)
    rows = centres[rng.integers(0, 20, n)] + 0.3 * rng.normal(size=(n, size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("float32")


def error(descriptors, codebook):
    """Mean squared distance to the nearest codewords, plainly, in float64."""
    parts = descriptors.astype(float).reshape(len(descriptors), len(codebook), 1, -1)
    return np.square(parts - codebook).sum(axis=3).min(axis=2).sum(axis=1).mean()


def test_the_codewords_are_the_means_of_what_they_are_nearest_to():
    x = clustered()
    codebook, rotation = codebooks.fit(x, n_book=3, n_word=8)
    assert (codebook.shape, codebook.dtype, rotation) == ((3, 8, 4), np.float32, None)
    # 25 rounds of k-means have nearly converged: one round more moves no centre far
    for j, book in enumerate(codebook):
        own = x[:, 4 * j : 4 * j + 4].astype(float)
        nearest = np.square(own[:, None] - book).sum(axis=2).argmin(axis=1)
        means = np.array([own[nearest == k].mean(axis=0) for k in range(8)])
        assert np.abs(means - book).max() < 0.02


def test_more_books_and_more_words_err_less():
    x = clustered()
    errors = {sizes: error(x, codebooks.fit(x, *sizes)[0]) for sizes in ((2, 4), (2, 64), (6, 64))}
    assert 1 > errors[2, 4] > 2 * errors[2, 64] > 4 * errors[6, 64] > 0
    everything, _ = codebooks.fit(x[:16], n_book=3, n_word=16)
    assert error(x[:16], everything) < 1e-12  # each its own codeword


def test_opq_rotates_and_errs_less():
    x = clustered()
    plain, _ = codebooks.fit(x, n_book=4, n_word=8)
    codebook, rotation = codebooks.fit(x, n_book=4, n_word=8, method="opq")
    assert (rotation.shape, rotation.dtype) == ((12, 12), np.float32)
    np.testing.assert_allclose(rotation.T.astype(float) @ rotation, np.eye(12), atol=1e-6)
    assert error(x @ rotation, codebook) < 0.8 * error(x, plain)


def test_a_seed_decides():
    fits = [codebooks.fit(clustered(), 3, 8, seed=seed)[0] for seed in (0, 0, 1, 2**31)]
    np.testing.assert_array_equal(fits[0], fits[1])
    np.testing.assert_array_equal(fits[0], fits[3])
    assert not np.array_equal(fits[0], fits[2])


def test_faiss_says_nothing(capfd):
    codebooks.fit(clustered(40), 3, 32, "opq")
    assert "".join(capfd.readouterr()) == ""


def model(**sizes):
    return RetrievalModel("cgd", layout=TINY, n_dim=12, descriptors="MG", n_classes=3, **sizes)


def images(n=64, seed=0):
    return RNG(seed).integers(0, 256, (n, 9, 7, 3), "uint8")


@pytest.mark.parametrize("method", codebooks.METHODS)
def test_a_model_gets_a_codebook_and_keeps_it_in_its_file(tmp_path, method):
    plain = model(seed=3)
    plain.record = {"epochs": 2}
    x = plain.embed(images())
    codebook, rotation = codebooks.fit(x, n_book=3, n_word=8, method=method)
    made = codebooks.with_codebook(plain, codebook, rotation)
    turned = x if rotation is None else x @ rotation
    np.testing.assert_allclose(made.embed(images()), turned, atol=1e-6)
    np.testing.assert_allclose(made.codebook, codebook, rtol=0, atol=1e-7)
    also = codebooks.with_codebook(plain, codebook, rotation, turned)
    np.testing.assert_allclose(also.codebook, codebook, rtol=0, atol=1e-7)
    np.testing.assert_allclose(also.head.quantizer.centre, turned.mean(axis=0), rtol=0, atol=1e-7)
    assert float(also.head.quantizer.spread) == pytest.approx(np.std(turned - turned.mean(axis=0)), rel=1e-5)
    assert {name: made.architecture[name] for name in ("n_book", "bn_word", "rotated")} == {
        "n_book": 3,
        "bn_word": 3,
        "rotated": method == "opq",
    }
    assert made.record == {"epochs": 2}
    np.testing.assert_array_equal(made.head.classifier.kernel, plain.head.classifier.kernel)
    made.save(tmp_path / "quantized.keras")
    again = load_model(tmp_path / "quantized.keras")
    assert again.architecture == made.architecture
    np.testing.assert_array_equal(again.embed(images()), made.embed(images()))
    codes = again.encode(images())
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, made.encode(images()))
    by_faiss = faiss.ProductQuantizer(12, 3, 3)
    faiss.copy_array_to_vector(codebook.ravel(), by_faiss.centroids)
    expected = np.unpackbits(by_faiss.compute_codes(made.embed(images())), axis=1, bitorder="little")[:, :9]
    np.testing.assert_array_equal(codes, expected.reshape(-1, 3, 3) @ [1, 2, 4])


def test_codes_go_into_an_index_and_are_found():
    plain = model(seed=3)
    made = codebooks.with_codebook(plain, *codebooks.fit(plain.embed(images()), 3, 8, "opq"))
    index = retrieval.encode_gallery(made, images())
    assert (index.metric, len(index)) == (made.search_metric, 64)
    distances, ids = index.search(made.embed(images()), 64)
    assert np.isfinite(distances).all()
    assert all(sorted(row) == list(range(64)) for row in ids.tolist())


def test_a_second_codebook_replaces_the_first_and_its_rotation_follows():
    plain = model(seed=3)
    x = plain.embed(images())
    first = codebooks.with_codebook(plain, *codebooks.fit(x, 3, 8, "opq"))
    turned = first.embed(images())
    kept = codebooks.with_codebook(first, codebooks.fit(turned, 2, 4)[0])
    np.testing.assert_array_equal(kept.embed(images()), turned)
    assert kept.codebook.shape == (2, 4, 6)
    codebook, rotation = codebooks.fit(turned, 3, 8, "opq")
    twice = codebooks.with_codebook(first, codebook, rotation)
    np.testing.assert_allclose(twice.embed(images()), turned @ rotation, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_book": 5}, "Invalid n_book. Expected a positive integer up to 256 dividing D=12. Received: n_book=5"),
        ({"n_book": 0}, "Invalid n_book. Expected a positive integer up to 256 dividing D=12. Received: n_book=0"),
        ({"n_word": 12}, "Invalid n_word. Expected a power of two from 2 to 65536. Received: n_word=12"),
        ({"n_word": 1}, "Invalid n_word. Expected a power of two from 2 to 65536. Received: n_word=1"),
        ({"method": "lsq"}, "Invalid method. Expected one of kmeans, opq. Received: method='lsq'"),
        ({"n_word": 64}, "Invalid descriptors. Expected at least n_word=64, one for each codeword. Received: 40"),
        ({"descriptors": np.ones(12)}, "Invalid descriptors. Expected shape (N, D). Received: shape (12,)"),
        (
            {"descriptors": np.where(np.arange(40)[:, None] == 7, np.nan, np.ones((40, 12)))},
            "Invalid descriptors. Expected finite values. Received: others in row 7",
        ),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        codebooks.fit(**{"descriptors": clustered(40), "n_book": 3, "n_word": 8, **arguments})
    assert str(caught.value) == message


def test_without_faiss_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"^Invalid installation\. Expected Faiss, .*pip install faiss-cpu"):
        codebooks.fit(clustered(40), 3, 8)


def test_models_that_get_none():
    with pytest.raises(ValueError, match=r"^Invalid model\. Expected one of the head cgd.* Received: spq$"):
        codebooks.with_codebook(RetrievalModel("spq", width_multiplier=1 / 64), np.ones((3, 8, 4)))
    with pytest.raises(ValueError, match=r"^Invalid codebook\. Expected shape \(3, 8, 4\)\. Received: \(3, 8, 5\)$"):
        codebooks.with_codebook(model(), np.ones((3, 8, 5)))
