"""P x K batches: what is in them, how evenly they are drawn, and that a step can be drawn again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gpq_tf.augment import generator
from gpq_tf.data.sampling import class_balanced_batch


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 8), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_batch_has_p_classes_of_k(data, n_classes, k, seed):
    rng = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=n_classes, max_size=n_classes).filter(any))
    labels = rng.permutation(np.repeat(np.arange(n_classes), sizes))
    p = data.draw(st.integers(1, np.count_nonzero(sizes)))
    batch = class_balanced_batch(labels, p, k, rng)
    assert batch.shape == (p * k,) and batch.dtype == np.int64
    classes = set()
    for images in batch.reshape(p, k):
        (label,) = set(labels[images])
        classes.add(label)
        # no image comes again before all of its class have come
        times = np.bincount(images, minlength=len(labels))[labels == label]
        assert times.max() - times.min() <= 1
    assert len(classes) == p


def drawn(labels, p, k, n_steps):
    return np.concatenate([class_balanced_batch(labels, p, k, generator(0, step, 3)) for step in range(n_steps)])


def test_classes_come_equally_often_whatever_their_size():
    labels = np.repeat(np.arange(6), [3, 40, 5, 100, 4, 8])
    counts = np.bincount(labels[drawn(labels, 2, 3, 3000)]) // 3
    assert counts.sum() == 6000
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("k", [1, 3, 4, 6])
def test_images_of_a_class_come_equally_often(k):
    """Also where the class is smaller than K: which of its four come twice is drawn."""
    labels = np.array([0, 1, 0, 0, 1, 0, 2])
    counts = np.bincount(drawn(labels, 1, k, 6000), minlength=7)[labels == 0]
    if k % 4:
        assert stats.chisquare(counts).pvalue > 1e-3
    else:
        assert len(set(counts)) == 1


def test_pairs_of_images_are_independent_of_their_order_in_the_file():
    """All 6 pairs of 4 images, and all 3 pairs of 3 classes, come equally often."""
    labels = np.array([0, 0, 0, 0])
    pairs = np.sort(drawn(labels, 1, 2, 6000).reshape(-1, 2))
    assert stats.chisquare(np.unique(pairs, axis=0, return_counts=True)[1]).pvalue > 1e-3
    labels = np.arange(3)
    pairs = np.sort(drawn(labels, 2, 1, 6000).reshape(-1, 2))
    assert stats.chisquare(np.unique(pairs, axis=0, return_counts=True)[1]).pvalue > 1e-3


def test_a_batch_is_a_function_of_seed_and_step():
    labels = np.repeat(np.arange(50), 10)

    def draw(*place):
        return class_balanced_batch(labels, 8, 4, generator(*place)).tobytes()

    places = [(seed, step, 3) for seed in (0, 1, 2**32 - 1) for step in (0, 1, 10**6)]
    batches = {place: draw(*place) for place in places}
    assert len(set(batches.values())) == len(places)
    for place in reversed(places):
        assert draw(*place) == batches[place]


@pytest.mark.parametrize("p", [0, 4, -1])
def test_refuses_more_classes_than_there_are(p):
    labels = np.array([0, 0, 2, 5])  # 1, 3 and 4 have no image
    message = (
        r"^Invalid n_classes_per_batch\. Expected 1 to 3, the classes that have images\. "
        rf"Received: n_classes_per_batch={p}$"
    )
    with pytest.raises(ValueError, match=message):
        class_balanced_batch(labels, p, 2, np.random.default_rng(0))


def test_refuses_no_images():
    message = r"^Invalid n_images_per_class\. Expected a positive integer\. Received: n_images_per_class=0$"
    with pytest.raises(ValueError, match=message):
        class_balanced_batch(np.array([0, 1]), 2, 0, np.random.default_rng(0))
