import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpq_tf.data import protocol
from tests import golden

NAMES = [f"class {i}" for i in range(10)]


def images_of(labels):
    """uint8 (N, 1, 1, 3) images that hold their own number."""
    number = np.arange(len(labels))
    return np.stack([number // 65536, number // 256 % 256, number % 256], axis=-1).astype(np.uint8)[:, None, None]


def number_of(images):
    return images.reshape(-1, 3).astype(np.int64) @ [65536, 256, 1]


@golden.needs_golden
def test_legacy_gives_the_images_the_original_returned():
    recorded = golden.load("data.npz")
    data = protocol.split(images_of(recorded["labels"]), recorded["labels"], NAMES, "golden", legacy=True)
    assert number_of(data.labelled_images).tolist() == recorded["source_index"].tolist()
    assert number_of(data.unlabelled_images).tolist() == recorded["target_index"].tolist()
    assert number_of(data.gallery_images).tolist() == recorded["gallery_index"].tolist()
    assert number_of(data.query_images).tolist() == recorded["query_index"].tolist()
    assert data.labelled_labels.tolist() == recorded["source_y"].tolist()


@golden.needs_golden
def test_default_is_the_same_rule_on_the_stable_order():
    recorded = golden.load("data.npz")
    data = protocol.split(images_of(recorded["labels"]), recorded["labels"], NAMES, "golden")
    assert data.labelled_index.tolist() == recorded["source_index_stable_order"].tolist()
    assert data.gallery_index.tolist() == recorded["target_index_stable_order"].tolist()
    assert data.query_index.tolist() == recorded["query_index_stable_order"].tolist()


@golden.needs_golden
@pytest.mark.parametrize("legacy", [False, True])
def test_whole_set_has_the_paper_sizes(legacy):
    labels = golden.load("data.npz")["big_labels"].astype(np.int64)
    labelled, gallery, query = protocol.split_index(labels, 10, legacy)
    assert np.bincount(labels[labelled]).tolist() == [500] * 10
    assert np.bincount(labels[gallery]).tolist() == [5400] * 10
    assert np.bincount(labels[query]).tolist() == [100] * 10


@settings(max_examples=50, deadline=None)
@given(st.integers(600, 1500), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_default_follows_the_rule_told_as_a_loop(n, n_classes, seed):
    labels = np.random.default_rng(seed).integers(0, n_classes, n)
    order = sorted(range(n), key=lambda i: (labels[i], i))
    queries, labelled, gallery = [], [], []
    for position, i in enumerate(order):
        if position % 60 == 0:
            queries.append(i)
        elif sum(labels[j] == labels[i] for j in labelled) < n // 120:
            labelled.append(i)
        else:
            gallery.append(i)
    data = protocol.split(images_of(labels), labels, NAMES[:n_classes], "random")
    assert data.query_index.tolist() == queries
    assert data.labelled_index.tolist() == labelled
    assert data.gallery_index.tolist() == gallery
    for role in ("labelled", "gallery", "query"):
        index = getattr(data, f"{role}_index")
        assert (number_of(getattr(data, f"{role}_images")) == index).all()
        assert (getattr(data, f"{role}_labels") == labels[index]).all()


def test_unlabelled_images_take_no_memory_of_their_own_and_the_data_is_frozen():
    labels = np.arange(600) % 10
    data = protocol.split(images_of(labels), labels, NAMES, "somewhere")
    assert data.unlabelled_images is data.gallery_images
    assert (data.source, data.class_names) == ("somewhere", NAMES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.source = "elsewhere"


def test_legacy_cuts_equal_parts_wherever_a_class_ends():
    labels = np.array([0] * 700 + [1] * 500)
    labelled, _, _ = protocol.split_index(labels, 2, legacy=True)
    assert labels[labelled].tolist() == [0] * 20  # the second half of the order begins with class 0
    labelled, _, _ = protocol.split_index(labels, 2)
    assert labels[labelled].tolist() == [0] * 10 + [1] * 10


@pytest.mark.parametrize(
    ("labels", "legacy", "message"),
    [
        (np.arange(119) % 3, False, "Expected at least 120 images"),
        (np.array([0] * 500 + [1] * 100), False, "Received: 600 images, 0 of class 2"),
        (
            np.array([0] * 590 + [1] * 5 + [2] * 5),
            False,
            "more than the 5 to be labelled. Received: 600 images, 5 of",
        ),
        (
            np.arange(601) % 3,
            True,
            "Expected 3 equal parts of the images that are no queries. Received: 590 such",
        ),
        (np.arange(600) % 4, False, r"Invalid labels. Expected 0..2. Received: 0..3"),
        (np.arange(600) % 3 - 1, False, r"Invalid labels. Expected 0..2. Received: -1..1"),
        (np.zeros(600), False, r"Invalid labels. Expected integers \(600,\). Received: float64 \(600,\)"),
        (
            np.zeros((600, 1), int),
            False,
            r"Invalid labels. Expected integers \(600,\). Received: int64 \(600, 1\)",
        ),
    ],
)
def test_refuses_labels_it_cannot_split(labels, legacy, message):
    with pytest.raises(ValueError, match=message):
        protocol.split(np.zeros((len(labels), 1, 1, 3), np.uint8), labels, NAMES[:3], "here", legacy=legacy)


def test_refuses_images_that_are_not_uint8_nhwc():
    with pytest.raises(ValueError, match=r"Expected uint8 \(N, H, W, 3\). Received: float64 \(600, 1, 1, 3\)"):
        protocol.split(np.zeros((600, 1, 1, 3)), np.arange(600) % 10, NAMES, "here")


# --- SPQ's split


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_train_test_is_the_rule_told_as_a_loop(n, n_classes, seed):
    rng = np.random.default_rng(seed)
    labels, in_test = rng.integers(0, n_classes, n), rng.random(n) < 0.4
    in_test[:2] = [True, False]
    data = protocol.train_test(images_of(labels), labels, NAMES[:n_classes], "random", in_test)
    assert data.gallery_index.tolist() == [i for i in range(n) if not in_test[i]]
    assert data.query_index.tolist() == [i for i in range(n) if in_test[i]]
    for role in ("labelled", "gallery", "query"):
        index = getattr(data, f"{role}_index")
        assert (number_of(getattr(data, f"{role}_images")) == index).all()
        assert (getattr(data, f"{role}_labels") == labels[index]).all()
    assert data.unlabelled_images is data.gallery_images
    assert (data.source, data.class_names) == ("random", NAMES[:n_classes])


def test_train_test_shows_no_label_to_training():
    data = protocol.train_test(images_of(range(9)), np.arange(9) % 3, NAMES[:3], "here", np.arange(9) > 5)
    assert (data.labelled_images.shape, data.labelled_labels.shape) == ((0, 1, 1, 3), (0,))
    assert data.labelled_index.dtype == data.gallery_index.dtype == data.query_index.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "in_test", "message"),
    [
        (
            np.arange(4),
            np.ones(4, bool),
            r"Expected bool \(4,\), some true and some false. Received: bool \(4,\), 4 true",
        ),
        (np.arange(4), np.zeros(4, bool), r"Invalid in_test. .* Received: bool \(4,\), 0 true"),
        (np.arange(4), np.arange(4), r"Invalid in_test. .* Received: int64 \(4,\), 3 true"),
        (np.arange(4), np.arange(3) > 1, r"Invalid in_test. Expected bool \(4,\), .* Received: bool \(3,\), 1 true"),
        (np.arange(4) + 1, np.arange(4) > 1, r"Invalid labels. Expected 0..3. Received: 1..4"),
        (np.arange(4.0), np.arange(4) > 1, r"Invalid labels. Expected integers \(4,\). Received: float64 \(4,\)"),
    ],
)
def test_train_test_refuses_what_it_cannot_split(labels, in_test, message):
    with pytest.raises(ValueError, match=message):
        protocol.train_test(images_of(range(4)), labels, NAMES[:4], "here", in_test)
