"""Images that are made when they are asked for: as an array in every way that is used, and as good to train from."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpq_tf import data as gpq_data
from gpq_tf import heads, measures
from gpq_tf import settings as settings_module
from gpq_tf.data import lazy
from gpq_tf.network import RetrievalModel
from tests.small_data import coloured_folders, coloured_images

PIXELS = coloured_images(40)[0]


def lazy_pixels(made=None):
    def make(index):
        if made is not None:
            made.append(index.tolist())
        return PIXELS[index]

    return lazy.LazyImages(make, np.arange(40), 32)


KEYS = st.one_of(
    st.integers(-40, 39),
    st.builds(slice, *[st.one_of(st.none(), st.integers(-50, 50))] * 2, st.sampled_from([None, 1, 3, -2])),
    st.lists(st.integers(-40, 39), max_size=50).map(lambda index: np.array(index, np.int64)),
)


@given(KEYS, st.lists(st.integers(0, 39), min_size=40, max_size=60).map(np.array))
def test_indexing_and_taking_are_those_of_an_array(key, order):
    np.testing.assert_array_equal(lazy_pixels()[key], PIXELS[key])
    taken = lazy.take(lazy_pixels(), order)
    assert isinstance(taken, lazy.LazyImages) and taken.shape == PIXELS[order].shape and len(taken) == len(order)
    np.testing.assert_array_equal(taken[key], lazy.take(PIXELS, order)[key])


def test_nothing_is_made_before_it_is_asked_for():
    made = []
    images = lazy.take(lazy.take(lazy_pixels(made), slice(None, None, 2)), np.array([3, 0]))
    assert made == [] and images.dtype == np.uint8
    np.testing.assert_array_equal(images[:], PIXELS[[6, 0]])
    assert made == [[6, 0]]


def test_memory_decides(monkeypatch):
    monkeypatch.setattr(lazy, "LARGEST_IN_MEMORY", 40 * 32 * 32 * 3)
    assert isinstance(lazy.images(40, 32, PIXELS.__getitem__), np.ndarray)
    assert isinstance(lazy.images(41, 32, PIXELS.__getitem__), lazy.LazyImages)


def both_ways(given, protocol, monkeypatch):
    """What settings ask for, held and lazy."""
    chosen = settings_module.resolve(given, "no config.py")
    held = gpq_data.load_for(chosen, protocol)
    monkeypatch.setattr(lazy, "LARGEST_IN_MEMORY", 1000)
    return chosen, held, gpq_data.load_for(chosen, protocol)


@pytest.mark.parametrize("head", ["gpq", "spq"])
def test_folders_give_the_same_batches_scores_and_fingerprint(tmp_path, monkeypatch, head):
    coloured_folders(tmp_path, {"": 60}, side=40)
    given = [f"--head={head}", "--dataset=image_folders", f"--data_dir={tmp_path}", "--batch_size=3"]
    recipe = heads.recipe(head)
    chosen, held, unread = both_ways(given, recipe.PROTOCOL, monkeypatch)
    for field in dataclasses.fields(held):
        one, other = getattr(held, field.name), getattr(unread, field.name)
        if field.name.endswith("_images"):
            assert isinstance(other, lazy.LazyImages) and isinstance(one, np.ndarray)
            one, other = one[:], other[:]
        np.testing.assert_array_equal(one, other)
    for step in (0, 5):
        one, other = (recipe.draw_batch(data, chosen, step) for data in (held, unread))
        np.testing.assert_array_equal(one["images"], other["images"])
    assert held.fingerprint() == unread.fingerprint()
    (tmp_path / "blue" / "001.png").write_bytes((tmp_path / "blue" / "003.png").read_bytes())
    assert gpq_data.load_for(chosen, recipe.PROTOCOL).fingerprint() != held.fingerprint()
    model = RetrievalModel(head, width_multiplier=1 / 64)
    scores = [measures.MEASURES[recipe.PROTOCOL].watch(model, data, chosen).score for data in (held, unread)]
    assert scores[0] == scores[1]


def test_the_sample_at_another_size(monkeypatch):
    given = ["--head=spq", "--dataset=cifar10_sample", "--image_size=36"]
    _, held, unread = both_ways(given, "train_test", monkeypatch)
    assert unread.gallery_images.shape == held.gallery_images.shape == (len(held.gallery_labels), 36, 36, 3)
    assert unread.gallery_images is unread.unlabelled_images
    index = np.array([7, 1234, 9900])
    np.testing.assert_array_equal(unread.gallery_images[index], held.gallery_images[index])
    assert held.fingerprint() == unread.fingerprint()


def test_a_model_encodes_them_as_an_array(monkeypatch):
    monkeypatch.setattr("gpq_tf.network.BATCH_SIZE", 16)
    model = RetrievalModel(n_book=3, len_code=4, width_multiplier=1 / 64)
    np.testing.assert_array_equal(model.encode(lazy_pixels()), model.encode(PIXELS))
    np.testing.assert_array_equal(model.embed(lazy_pixels()), model.embed(PIXELS))


def test_the_next_one_is_made_while_one_is_used():
    drawn = []

    def draw(step):
        drawn.append(step)
        if step == 6:
            raise ValueError("no sixth")
        return step * 10

    batches = lazy.ahead(draw, range(3, 7))
    assert [next(batches) for _ in range(3)] == [30, 40, 50]
    with pytest.raises(ValueError, match="no sixth"):
        next(batches)
    assert drawn == [3, 4, 5, 6]
    assert list(lazy.ahead(draw, range(0))) == []
