"""The losses against plain float64 loops, their limits, and where their gradients go."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpq_tf import losses

from golden import worst
from gradients import numerical_gradients, random_cases, value_and_gradients

SIZES = st.integers(1, 5)


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def similarity_of(labels):
    """Rows that sum to 1, equal weight on all of the row's class."""
    same = (labels[:, None] == labels[None, :]).astype("float32")
    return same / same.sum(axis=1, keepdims=True)


def unit(vector):
    return vector / math.sqrt(max(float(np.dot(vector, vector)), 1e-12))


def log_softmax(row):
    return row - row.max() - math.log(np.sum(np.exp(row - row.max())))


def plain_n_pair(similarity, x, q, n_book, l2_weight=0.002):
    total = 0.0
    for i in range(len(x)):
        logits = np.array([n_book * np.dot(unit(x[i]), unit(q[j])) for j in range(len(q))])
        total -= np.dot(similarity[i], log_softmax(logits))
        total += 0.25 * l2_weight * (np.dot(x[i], x[i]) + np.dot(q[i], q[i]))
    return total / len(x)


def plain_classification(targets, logits):
    return -np.mean([np.dot(targets[i], log_softmax(logits[i])) for i in range(len(logits))])


def plain_book_similarity(x, prototypes, n_book):
    d = x.shape[1] // n_book
    out = np.zeros((len(x), len(prototypes)))
    for b in range(len(x)):
        for c in range(len(prototypes)):
            for j in range(n_book):
                part = slice(j * d, (j + 1) * d)
                out[b, c] += np.dot(x[b, part], prototypes[c, part]) / n_book
    return out


def plain_entropy(x, prototypes, n_book):
    total = 0.0
    for row in plain_book_similarity(x, prototypes, n_book):
        p = np.exp(log_softmax(row))
        total += np.sum(p * np.log(p + 1e-5))
    return total / len(x)


def plain_cosine(x, y):
    lengths = (max(math.sqrt(np.dot(vector, vector)), 1e-8) for vector in (x, y))
    return np.dot(x, y) / math.prod(lengths)


def plain_contrastive(x_a, x_b, z_a, z_b, temperature=0.5):
    total, size = 0.0, len(x_a)
    for first, second in ((x_a, z_b), (x_b, z_a)):
        rows = [*first, *second]
        for i, row in enumerate(rows):
            similarities = [plain_cosine(row, other) / temperature for other in rows]
            partner = similarities[(i + size) % (2 * size)]
            others = np.array(similarities[:i] + similarities[i + 1 :])
            total += others.max() + math.log(np.sum(np.exp(others - others.max()))) - partner
    return total / (2 * size)


@random_cases
@given(SIZES, SIZES, SIZES, st.integers(1, 4))
def test_n_pair_loss_is_the_loop(n, n_book, d, n_classes):
    similarity = similarity_of(np.arange(n) % n_classes)
    x, q = normals(0, n, n_book * d), normals(1, n, n_book * d)
    value = losses.n_pair_product_quantization(similarity, x, q, n_book)
    assert worst(value, plain_n_pair(similarity, x.astype("float64"), q.astype("float64"), n_book)) < 3e-6


@random_cases
@given(SIZES, SIZES)
def test_classification_is_the_loop(n, n_classes):
    targets = np.eye(n_classes, dtype="float32")[np.arange(n) % n_classes]
    logits = 5 * normals(2, n, n_classes)
    value = float(losses.classification(targets, logits))
    assert value == pytest.approx(plain_classification(targets, logits.astype("float64")), abs=3e-6)


@random_cases
@given(SIZES, SIZES, SIZES, st.integers(2, 5))
def test_entropy_and_similarity_are_the_loops(n, n_book, d, n_classes):
    x, prototypes = normals(3, n, n_book * d), normals(4, n_classes, n_book * d)
    doubles = x.astype("float64"), prototypes.astype("float64"), n_book
    assert worst(losses.mean_book_similarity(x, prototypes, n_book), plain_book_similarity(*doubles)) < 3e-6
    assert float(losses.subspace_entropy(x, prototypes, n_book)) == pytest.approx(plain_entropy(*doubles), abs=3e-6)


@random_cases
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([0.05, 0.5, 3.0]), st.floats(-3, 3))
def test_contrastive_loss_is_the_loop(n, width, temperature, exponent):
    inputs = [normals([21, i], n, width) * np.float32(10.0**exponent) for i in range(4)]
    value = float(losses.cross_quantized_contrastive(*inputs, temperature))
    expected = plain_contrastive(*(x.astype("float64") for x in inputs), temperature)
    # cosines are right to 2e-7, and the temperature divides them
    assert value == pytest.approx(expected, rel=2e-6, abs=1e-6 / temperature)


def test_gradients_of_the_n_pair_loss():
    similarity, inputs = similarity_of(np.array([0, 1, 0])), [normals(5, 3, 4), normals(6, 3, 4)]
    _, found = value_and_gradients(lambda x, q: losses.n_pair_product_quantization(similarity, x, q, 2), inputs, 1.0)
    expected = numerical_gradients(lambda x, q: plain_n_pair(similarity, x, q, 2), inputs, 1.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert worst(ours, theirs) < 1e-5


def test_the_gradient_of_the_classification_loss_is_softmax_minus_target():
    targets, logits = np.eye(4, dtype="float32")[[1, 1, 3]], 3 * normals(7, 3, 4)
    _, (found,) = value_and_gradients(lambda logits: losses.classification(targets, logits), [logits], 1.0)
    softmax = np.exp([log_softmax(row) for row in logits.astype("float64")])
    assert worst(found, (softmax - targets) / 3) < 2e-6


def test_gradients_of_the_entropy():
    inputs = [normals(8, 3, 4), normals(9, 5, 4)]
    _, found = value_and_gradients(lambda x, c: losses.subspace_entropy(x, c, 2), inputs, 1.0)
    expected = numerical_gradients(lambda x, c: plain_entropy(x, c, 2), inputs, 1.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert worst(ours, theirs) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradients_of_the_contrastive_loss(n):
    inputs = [normals([22, i], n, 4) for i in range(4)]
    _, found = value_and_gradients(losses.cross_quantized_contrastive, inputs, 1.0)
    expected = numerical_gradients(plain_contrastive, inputs, 1.0)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_no_gradient_flows_to_labels():
    x, q, logits = normals(10, 3, 4), normals(11, 3, 4), normals(12, 3, 5)
    _, (gradient,) = value_and_gradients(
        lambda labels: losses.n_pair_product_quantization(labels, x, q, 2), [similarity_of(np.arange(3))], 1.0
    )
    assert not gradient.any()
    _, (gradient,) = value_and_gradients(lambda labels: losses.classification(labels, logits), [np.ones((3, 5))], 1.0)
    assert not gradient.any()


def test_the_order_of_the_batch_plays_no_part():
    labels, order = np.array([0, 1, 0, 2, 1]), np.array([3, 0, 4, 1, 2])
    x, q, prototypes = normals(13, 5, 6), normals(14, 5, 6), normals(15, 4, 6)
    targets = np.eye(4, dtype="float32")[labels]
    for first, second in [
        (
            losses.n_pair_product_quantization(similarity_of(labels), x, q, 3),
            losses.n_pair_product_quantization(similarity_of(labels[order]), x[order], q[order], 3),
        ),
        (losses.subspace_entropy(x, prototypes, 3), losses.subspace_entropy(x[order], prototypes[::-1], 3)),
        (losses.classification(targets, x[:, :4]), losses.classification(targets[order], x[order, :4])),
    ]:
        assert float(first) == pytest.approx(float(second), rel=1e-5)


def test_lengths_reach_the_n_pair_loss_through_the_penalty_alone():
    similarity, x, q = similarity_of(np.array([0, 1, 1])), normals(16, 3, 4), normals(17, 3, 4)

    def loss(x, q, weight=0.002):
        return float(losses.n_pair_product_quantization(similarity, x, q, 2, l2_weight=weight))

    assert loss(x, q, 0.0) == pytest.approx(loss(3 * x, 0.2 * q, 0.0), rel=1e-5)
    penalty = 0.25 * 0.8 * (np.sum(x.astype("float64") ** 2) + np.sum(q.astype("float64") ** 2)) / 3
    assert loss(x, q, 0.8) - loss(x, q, 0.0) == pytest.approx(penalty, rel=1e-5)


def test_the_n_pair_loss_of_separated_classes_vanishes_with_many_books():
    """x = q = +-e_1: the loss is log(1 + exp(-2 M)), as each book adds to the similarity."""
    x = np.array([[1.0, 0.0], [-1.0, 0.0]], "float32")
    for n_book in (1, 2, 8, 50):
        value = float(losses.n_pair_product_quantization(np.eye(2), x, x, n_book, l2_weight=0.0))
        assert value == pytest.approx(math.log1p(math.exp(-2 * n_book)), abs=1e-6)


def test_a_batch_of_one_costs_only_its_lengths():
    x = normals(18, 1, 4)
    value = float(losses.n_pair_product_quantization(np.ones((1, 1)), x, 2 * x, 2, l2_weight=0.04))
    assert value == pytest.approx(0.01 * 5 * np.sum(x.astype("float64") ** 2), rel=1e-5)


def test_classification_of_equal_and_of_huge_logits():
    targets = np.eye(7, dtype="float32")[:3]
    assert float(losses.classification(targets, np.zeros((3, 7), "float32"))) == pytest.approx(math.log(7), rel=1e-6)
    assert float(losses.classification(targets, 1e4 * targets)) == 0.0
    wrong = float(losses.classification(targets, -1e4 * targets))
    assert wrong == pytest.approx(1e4 + math.log(6), rel=1e-6)
    logits = normals(19, 3, 7)
    shifted = losses.classification(targets, logits + np.float32(100))
    assert float(shifted) == pytest.approx(float(losses.classification(targets, logits)), abs=1e-5)


def test_the_contrastive_loss_is_the_same_for_either_view_first_and_for_any_order_of_the_images():
    x_a, x_b, z_a, z_b = (normals([23, i], 7, 6) for i in range(4))
    value = float(losses.cross_quantized_contrastive(x_a, x_b, z_a, z_b))
    for other in (
        (x_b, x_a, z_b, z_a),
        (z_a, z_b, x_a, x_b),  # the rows of a contrast change places
        tuple(x[::-1] for x in (x_a, x_b, z_a, z_b)),
        (3 * x_a, 0.1 * x_b, 100 * z_a, z_b),  # cosines know no lengths
    ):
        assert float(losses.cross_quantized_contrastive(*other)) == pytest.approx(value, rel=1e-6)
    assert abs(float(losses.cross_quantized_contrastive(x_a, x_b, z_b, z_a)) - value) > 0.01


@pytest.mark.parametrize("n", [1, 2, 8, 256])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_contrastive_loss_of_equal_cosines(n, temperature):
    x = np.repeat(normals(24, 1, 6), n, axis=0)
    value = float(losses.cross_quantized_contrastive(x, 2 * x, x, 5 * x, temperature))
    # Equal summands are rounded the same way: JAX's mean of 512 times log(511) alone is off by 2.3e-7 of it.
    assert value == pytest.approx(2 * math.log(2 * n - 1), rel=1e-6, abs=5e-6)


def test_the_contrastive_loss_falls_to_that_of_orthogonal_images():
    """Both views equal, images at right angles: 2 log(1 + (2B - 2) exp(-1 / temperature))."""
    x = np.eye(5, dtype="float32")
    value = float(losses.cross_quantized_contrastive(x, x, x, x, 0.5))
    assert value == pytest.approx(2 * math.log(1 + 8 * math.exp(-2)), rel=1e-6)
    assert value < float(losses.cross_quantized_contrastive(*(normals([25, i], 5, 5) for i in range(4)), 0.5))


def test_descriptors_of_zeros_have_a_loss_and_no_gradient():
    zeros = np.zeros((3, 4), "float32")
    value, gradients = value_and_gradients(losses.cross_quantized_contrastive, [zeros] * 4, 1.0)
    assert value == pytest.approx(2 * math.log(5), rel=1e-6)
    for gradient in gradients:
        assert not gradient.any()


def test_entropy_lies_between_certain_and_uniform():
    prototypes = np.eye(6, dtype="float32")
    uniform = float(losses.subspace_entropy(np.zeros((2, 6), "float32"), prototypes, 3))
    assert uniform == pytest.approx(math.log(1 / 6 + 1e-5), rel=1e-6)
    certain = float(losses.subspace_entropy(1e4 * prototypes[:2], prototypes, 3))
    assert certain == pytest.approx(0.0, abs=2e-5)
    some = float(losses.subspace_entropy(normals(20, 2, 6), prototypes, 3))
    assert uniform < some < certain


def test_shapes_that_do_not_fit_are_refused():
    x = np.zeros((3, 4), "float32")
    cases = [
        (
            lambda: losses.n_pair_product_quantization(np.eye(3), x, np.zeros((3, 6), "float32"), 2),
            "Invalid q. Expected the shape of x, (3, 4). Received: shape (3, 6)",
        ),
        (
            lambda: losses.n_pair_product_quantization(np.eye(4), x, x, 2),
            "Invalid labels. Expected the shape of logits, (3, 3). Received: shape (4, 4)",
        ),
        (
            lambda: losses.classification(np.zeros((3, 1)), x),
            "Invalid labels. Expected the shape of logits, (3, 4). Received: shape (3, 1)",
        ),
        (
            lambda: losses.subspace_entropy(x, np.zeros((10, 6), "float32"), 2),
            "Invalid prototypes. Expected (C, 4), as long as the descriptors. Received: shape (10, 6)",
        ),
        *(
            (
                lambda i=i: losses.cross_quantized_contrastive(*[x] * i, x[:2], *[x] * (3 - i)),
                f"Invalid {name}. Expected the shape of x_a, (3, 4). Received: shape (2, 4)",
            )
            for i, name in ((1, "x_b"), (2, "z_a"), (3, "z_b"))
        ),
        (
            lambda: losses.mean_book_similarity(x, x, 3),
            "Invalid n_book. Expected a positive integer dividing D=4. Received: n_book=3",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == message
