"""The quantizer that goes along with its descriptors, against the plain one on what is standardised by hand."""

import keras
import numpy as np
import pytest
from keras import ops

from gpq_tf.centred_quantizer import CentredQuantizer
from gpq_tf.quantizer import hard_assign, soft_assign_l2

FAR, NEAR = 0.7, 3e-3  # descriptors that lie close together, far from zero


def descriptors(n=200, size=12, seed=0):
    return (FAR + NEAR * np.random.default_rng(seed).normal(size=(n, size))).astype("float32")


def settled(x, n_word=16):
    quantizer = CentredQuantizer(3, n_word, x.shape[1] // 3, seed=4)
    for _ in range(80):
        quantizer.watch(x)
    return quantizer


def test_what_is_watched_is_what_codes_are_taken_by():
    x = descriptors()
    quantizer = settled(x)
    mean, spread = x.mean(axis=0, dtype=float), np.sqrt(np.mean(np.square(x - x.mean(axis=0, dtype=float))))
    np.testing.assert_allclose(quantizer.centre, mean, rtol=0, atol=1e-6)
    assert float(quantizer.spread) == pytest.approx(spread, rel=1e-3)
    standard = ((x - mean) / spread).astype("float32")
    codes = np.asarray(quantizer.encode(x))
    assert (codes == np.asarray(hard_assign(standard, quantizer.codebook.value, "l2"))).mean() > 0.999
    assert all(len(np.unique(column)) > 8 for column in codes.T)  # though all descriptors are nearly alike
    words = quantizer.words()
    exact = np.square(x.astype(float).reshape(-1, 3, 1, 4) - words).sum(axis=-1)
    chosen = np.take_along_axis(exact, codes[..., None].astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, exact.min(axis=-1), rtol=5e-3)
    np.testing.assert_allclose(quantizer.decode(codes), words[np.arange(3), codes].reshape(-1, 12), rtol=0, atol=1e-7)


def test_training_takes_the_batch_as_it_lies():
    """Wherever it lies and however wide it is, and before anything has been watched."""
    quantizer, x = CentredQuantizer(3, 16, 4, seed=4), descriptors(size=12)
    mean, spread = x.mean(axis=0, dtype=float), np.sqrt(np.mean(np.square(x - x.mean(axis=0, dtype=float))))
    expected = soft_assign_l2(((x - mean) / spread).astype("float32"), quantizer.codebook.value, 7.0 / 4)
    found = (np.asarray(quantizer(x, alpha=7.0), float) - mean) / spread
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
    moved = (np.asarray(quantizer(3 * (x - FAR), alpha=7.0), float) - 3 * (mean - FAR)) / (3 * spread)
    np.testing.assert_allclose(moved, expected, rtol=0, atol=2e-3)


def test_placed_codewords_are_where_they_were():
    words = descriptors(3 * 16, 4).reshape(3, 16, 4)
    quantizer = CentredQuantizer(3, 16, 4)
    quantizer.place(words, words.mean(axis=1).reshape(-1), NEAR)
    np.testing.assert_allclose(quantizer.words(), words, rtol=0, atol=1e-7)
    assert 0.5 < float(ops.std(quantizer.codebook.value)) < 2


def test_descriptors_that_are_all_alike_are_finite():
    quantizer = settled(np.full((8, 12), 12**-0.5, "float32"))
    x = np.full((4, 12), 12**-0.5, "float32")
    assert np.isfinite(quantizer(x)).all() and np.asarray(quantizer.encode(x)).shape == (4, 3)


def test_it_comes_back_from_its_configuration():
    quantizer = CentredQuantizer(3, 16, 4, seed=9)
    again = CentredQuantizer.from_config(quantizer.get_config())
    np.testing.assert_array_equal(again.words(), quantizer.words())
    trained = [variable.path.rpartition("/")[2] for variable in quantizer.trainable_variables]
    assert trained == ["codebook"] and len(quantizer.variables) == 3
    assert keras.saving.get_registered_name(CentredQuantizer) == "gpq_tf>CentredQuantizer"
