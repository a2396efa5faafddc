"""Folders of classes, and the halving of classes."""

import numpy as np
import pytest

from gpq_tf.data import image_lists
from tests.image_files import picture, write


def folders(root, sizes):
    """Class folders with so many images each; two in a folder below, which is found as well."""
    for name, n in sizes.items():
        for i in range(n):
            place = root / name / ("more" if i >= 2 else "")
            write(place / f"{i}.png", picture(i, 5, 6))


def names_of(images):
    """Class folder and file name of every image."""
    return [tuple(file.split("/")[-2:]) for file in images.files]


def test_classes_are_halved_in_the_order_of_their_names(tmp_path):
    folders(tmp_path, {"owl": 2, "auk": 1, "emu": 2, "jay": 1, "kea": 2})
    train, test = image_lists.read_folders(tmp_path)
    assert train.class_names == ["auk", "emu"] and test.class_names == ["jay", "kea", "owl"]
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0, 1, 1, 2, 2]
    assert names_of(train) == [("auk", "0.png"), ("emu", "0.png"), ("emu", "1.png")]
    assert train.labels.dtype == np.int64 and train.boxes is None and test.boxes is None
    assert train.source == test.source == str(tmp_path)


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    folders(tmp_path / "train", {"b": 1, "a": 4})
    folders(tmp_path / "test", {"c": 2})
    train, test = image_lists.read_folders(tmp_path)
    assert (train.class_names, test.class_names) == (["a", "b"], ["c"])
    assert names_of(train) == [("a", "0.png"), ("a", "1.png"), ("more", "2.png"), ("more", "3.png"), ("b", "0.png")]
    assert train.labels.tolist() == [0, 0, 0, 0, 1] and test.labels.tolist() == [0, 0]
    assert train.source == str(tmp_path / "train")


def test_other_files_and_hidden_ones_are_no_images(tmp_path):
    folders(tmp_path, {"a": 1, "b": 1})
    write(tmp_path / "b" / "UPPER.JPEG", picture(0))
    for name in ("a/notes.txt", "a/.hidden.png", "a/.cache/x.png", ".git/x.png", "readme.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    train, test = image_lists.read_folders(tmp_path)
    assert names_of(train) == [("a", "0.png")]
    assert names_of(test) == [("b", "0.png"), ("b", "UPPER.JPEG")]


def test_a_class_without_images_is_named(tmp_path):
    folders(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"Invalid {tmp_path}/empty\. Expected images \(\.bmp, .*\)\. Found: none$"):
        image_lists.read_folders(tmp_path)


def test_a_folder_without_classes_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"Invalid {tmp_path}\. Expected a folder of images for every class\. Found"):
        image_lists.read_folders(tmp_path)
    with pytest.raises(OSError, match="absent"):
        image_lists.read_folders(tmp_path / "absent")


def test_one_class_cannot_be_halved(tmp_path):
    folders(tmp_path, {"only": 3})
    with pytest.raises(ValueError, match=rf"Invalid {tmp_path}\. Expected at least 2 classes\. Found: 1"):
        image_lists.read_folders(tmp_path)


@pytest.mark.parametrize("n_classes", [2, 5, 196, 200])
def test_halves_share_nothing_and_lose_nothing(n_classes):
    rng = np.random.default_rng(n_classes)
    classes = rng.permutation(np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, 300)]))
    files = [f"{i}.png" for i in range(len(classes))]
    boxes = rng.integers(0, 50, (len(files), 4))
    whole = image_lists.numbered(files, classes, boxes, "bird {}".format, "nowhere")
    train, test = image_lists.split_classes(whole)
    assert (len(train.class_names), len(test.class_names)) == (n_classes // 2, n_classes - n_classes // 2)
    for half, first in ((train, 0), (test, n_classes // 2)):
        index = [int(file.removesuffix(".png")) for file in half.files]
        assert index == sorted(index)
        assert (half.labels + first == classes[index]).all()
        assert (half.boxes == boxes[index]).all()
        assert half.class_names == [f"bird {first + c}" for c in range(len(half.class_names))]
        assert set(half.labels) == set(range(len(half.class_names)))
    assert sorted(train.files + test.files) == sorted(files)


def test_any_integers_can_be_classes():
    images = image_lists.numbered("abcde", [-1, 2**62, 7, -1, 7], None, str, "nowhere")
    assert images.files == list("abcde")
    assert images.labels.tolist() == [0, 2, 1, 0, 1]
    assert images.class_names == ["-1", "7", str(2**62)]


def test_some_images_with_their_boxes():
    boxes = np.arange(12).reshape(3, 4)
    images = image_lists.numbered("abc", [0, 0, 1], boxes, str, "nowhere")
    files, chosen = image_lists.files_and_boxes(images, np.array([2, 0, 2]))
    assert files == ["c", "a", "c"] and chosen.tolist() == boxes[[2, 0, 2]].tolist()
    images = image_lists.numbered("abc", [0, 0, 1], None, str, "nowhere")
    assert image_lists.files_and_boxes(images, [1]) == (["b"], None)
