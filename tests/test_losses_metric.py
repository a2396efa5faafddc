"""CGD's losses against float64 loops: hardest pairs, batch-hard triplets, smoothed labels."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpq_tf import losses

from golden import worst
from gradients import numerical_gradients, random_cases, value_and_gradients


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def units(seed, n, length):
    rows = normals(seed, n, length)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain_distance(x, y, squared):
    square = sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True))
    return square if squared else math.sqrt(square)


def plain_hinges(embeddings, labels, margin, squared):
    n, hinges = len(embeddings), []
    for anchor in range(n):
        of = {other: plain_distance(embeddings[anchor], embeddings[other], squared) for other in range(n)}
        positives = [of[other] for other in range(n) if other != anchor and labels[other] == labels[anchor]]
        negatives = [of[other] for other in range(n) if labels[other] != labels[anchor]]
        apart = max(positives, default=0.0) - min(negatives, default=math.inf) + margin
        hinges.append(max(0.0, apart))
    return np.array(hinges)


def plain_smoothed(labels, logits, temperature, smoothing):
    n_classes, total = logits.shape[1], 0.0
    for label, row in zip(labels, logits.astype("float64"), strict=True):
        log_normalizer = math.log(sum(math.exp(v / temperature) for v in row))
        for c in range(n_classes):
            target = smoothing / n_classes + (1 - smoothing if c == label else 0.0)
            total -= target * (row[c] / temperature - log_normalizer)
    return total / len(labels)


BATCHES = st.lists(st.integers(0, 3), min_size=1, max_size=9)


@random_cases
@given(BATCHES, st.integers(1, 6), st.booleans())
def test_pairs_with_others_are_the_loop(labels, length, squared):
    n = len(labels)
    embeddings, others = units(n, n, length), normals(n + 1, n, length)
    positive, negative, positive_index, negative_index = losses.hardest_pairs(embeddings, labels, squared, others)
    for i in range(n):
        of = [plain_distance(embeddings[i], others[j], squared) for j in range(n)]
        positives = [of[j] for j in range(n) if j != i and labels[j] == labels[i]] or [of[i]]
        negatives = [of[j] for j in range(n) if labels[j] != labels[i]]
        assert float(positive[i]) == pytest.approx(max(positives), rel=1e-5, abs=1e-6)
        assert of[int(positive_index[i])] == pytest.approx(max(positives), rel=1e-5, abs=1e-5)
        assert float(negative[i]) == pytest.approx(min(negatives, default=math.inf), rel=1e-5, abs=1e-6)
        if negatives:
            assert of[int(negative_index[i])] == pytest.approx(min(negatives), rel=1e-5, abs=1e-5)


def test_others_must_be_as_many():
    with pytest.raises(ValueError, match=r"Invalid others\. Expected the shape of the embeddings, \(2, 3\)"):
        losses.hardest_pairs(np.ones((2, 3), "float32"), [0, 1], others=np.ones((3, 3), "float32"))


@random_cases
@given(BATCHES, st.integers(1, 6), st.booleans(), st.sampled_from([0.0, 0.1, 1.0]))
def test_triplets_are_the_loop(labels, length, squared, margin):
    embeddings = units(len(labels), len(labels), length)
    hinges = losses.batch_hard_hinges(embeddings, labels, margin, squared)
    expected = plain_hinges(embeddings, labels, margin, squared)
    np.testing.assert_allclose(hinges, expected, atol=1e-6)
    assert abs(losses.batch_hard_triplet(embeddings, labels, margin, squared) - expected.mean()) < 1e-6


@pytest.mark.parametrize("squared", [False, True])
def test_gradients_are_the_slopes(squared):
    embeddings, labels = units(0, 8, 5), [0, 0, 1, 1, 1, 2, 2, 3]

    def loss(embeddings):
        return losses.batch_hard_triplet(embeddings, labels, 0.3, squared)

    _, (gradient,) = value_and_gradients(loss, [embeddings], 1.0)
    (slopes,) = numerical_gradients(lambda x: plain_hinges(x, labels, 0.3, squared).mean(), [embeddings], 1.0)
    assert worst(gradient, slopes) < 2e-6


def test_the_order_of_a_batch_does_not_matter():
    embeddings, labels = units(1, 9, 4), np.array([0, 0, 0, 1, 1, 1, 2, 2, 5])
    order = np.random.default_rng(2).permutation(9)
    hinges = np.asarray(losses.batch_hard_hinges(embeddings, labels))
    np.testing.assert_allclose(losses.batch_hard_hinges(embeddings[order], labels[order]), hinges[order], atol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_images_at_one_place_have_no_slope(squared):
    """A collapsed network: every distance is 0, every hinge the margin."""
    embeddings = np.tile(units(3, 1, 6), (6, 1))

    def loss(embeddings):
        return losses.batch_hard_triplet(embeddings, [0, 0, 1, 1, 2, 2], 0.1, squared)

    value, (gradient,) = value_and_gradients(loss, [embeddings], 1.0)
    assert abs(value - 0.1) < 1e-7
    assert (gradient == 0).all()


def test_an_image_alone_in_its_class_is_its_own_positive():
    embeddings = units(4, 4, 3)
    positive, _, positive_index, _ = losses.hardest_pairs(embeddings, [0, 0, 1, 2])
    assert np.asarray(positive_index).tolist() == [1, 0, 2, 3]
    assert np.asarray(positive)[2:].tolist() == [0, 0]
    assert (np.asarray(positive)[:2] > 0).all()


def test_a_batch_of_one_class_has_nothing_to_rank():
    embeddings = units(5, 4, 3)
    value, (gradient,) = value_and_gradients(lambda x: losses.batch_hard_triplet(x, [7] * 4), [embeddings], 1.0)
    assert value == 0
    assert (gradient == 0).all()
    assert np.isposinf(losses.hardest_pairs(embeddings, [7] * 4)[1]).all()


def test_distances_do_not_suffer_from_cancellation():
    """By inner products alone, distances of 1e-4 between unit vectors would have no right digit in float32."""
    centres = np.repeat(units(6, 2, 64), 2, axis=0)
    embeddings = (centres + 1e-5 * normals(7, 4, 64)).astype("float32")
    positive, negative, _, _ = losses.hardest_pairs(embeddings, [0, 0, 1, 1])
    exact = [plain_distance(embeddings[a], embeddings[b], squared=False) for a, b in ((0, 1), (1, 0), (2, 3), (3, 2))]
    assert max(exact) < 2e-4
    np.testing.assert_allclose(positive, exact, rtol=1e-5)
    np.testing.assert_allclose(negative, np.linalg.norm(centres[0] - centres[2]), rtol=1e-3)


@pytest.mark.parametrize("squared", [False, True])
def test_the_nearest_of_descriptors_that_are_nearly_alike(squared):
    """As those of a network that has learned little: products of float32 do not tell them apart."""
    embeddings = (units(8, 1, 64) + 1e-5 * normals(9, 40, 64)).astype("float32")
    labels = np.arange(40) % 5
    distances = np.square(embeddings[:, None].astype(float) - embeddings).sum(axis=-1)
    same = labels[:, None] == labels
    nearest, farthest = np.where(same, np.inf, distances).min(axis=1), np.where(same, distances, -1).max(axis=1)
    positive, negative, _, _ = losses.hardest_pairs(embeddings, labels, squared)
    power = 1 if squared else 0.5
    np.testing.assert_allclose(positive, farthest**power, rtol=1e-5)
    np.testing.assert_allclose(negative, nearest**power, rtol=1e-5)


def test_what_is_not_a_number_is_not_hidden_by_the_margin():
    embeddings = np.array([[0.0], [1.0], [3.0], [np.nan]], "float32")
    assert np.isnan(losses.batch_hard_triplet(embeddings, [0, 0, 1, 1]))


def test_the_nearest_and_farthest_are_found():
    embeddings = np.array([[0.0], [1.0], [3.0], [3.5], [10.0]], "float32")
    positive, negative, positive_index, negative_index = losses.hardest_pairs(embeddings, [0, 0, 0, 1, 1])
    assert np.asarray(positive_index).tolist() == [2, 2, 0, 4, 3]
    assert np.asarray(negative_index).tolist() == [3, 3, 3, 2, 2]
    np.testing.assert_array_equal(positive, [3, 2, 3, 6.5, 6.5])
    np.testing.assert_array_equal(negative, [3.5, 2.5, 0.5, 0.5, 7])


@random_cases
@given(BATCHES, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.1, 0.7]))
def test_smoothed_classification_is_the_loop(labels, temperature, smoothing):
    logits = 3 * normals(len(labels), len(labels), 4)
    value = losses.classification_smoothed(labels, logits, temperature, smoothing)
    # Logits that nearly cancel leave the rounding of the largest of them.
    rounding = 2e-7 * np.abs(logits / temperature).max()
    assert abs(value - plain_smoothed(labels, logits, temperature, smoothing)) < rounding


def test_smoothing_makes_certainty_cost():
    labels = [2]
    certain, fair = np.array([[0, 0, 50]], "float32"), np.array([[0, 0, 1.7]], "float32")
    assert float(losses.classification_smoothed(labels, certain, 1.0, 0.0)) < 1e-6
    costs = [float(losses.classification_smoothed(labels, logits, 1.0, 0.1)) for logits in (certain, fair)]
    assert costs[0] > 3 > 1 > costs[1]


def test_without_temperature_and_smoothing_it_is_plain_classification():
    logits, labels = normals(8, 5, 3), [0, 2, 1, 1, 0]
    plain = losses.classification(np.eye(3, dtype="float32")[labels], logits)
    assert abs(losses.classification_smoothed(labels, logits, 1.0, 0.0) - plain) < 1e-6


def test_a_low_temperature_is_a_larger_scale():
    logits, labels = normals(9, 6, 4), [0, 1, 2, 3, 0, 1]
    values = [losses.classification_smoothed(labels, logits * t, t, 0.1) for t in (0.25, 1.0, 4.0)]
    for one, other in itertools.pairwise(values):
        assert abs(one - other) < 1e-6


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Invalid labels\. Expected the shape of the embeddings' first axis, \(4,\)"):
        losses.batch_hard_triplet(units(0, 4, 3), [0, 1])
    with pytest.raises(ValueError, match=r"Invalid labels\. Expected the shape of logits, \(4, 3\)"):
        losses.classification_smoothed([0, 1], normals(0, 4, 3))
