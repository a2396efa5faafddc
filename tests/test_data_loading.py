"""What settings ask for: a user's own folders, and CIFAR-10 at another size."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from gpq_tf import data as gpq_data
from gpq_tf import settings as settings_module
from gpq_tf.data import images, loading, protocol
from tests import cifar10_files
from tests.image_files import exif_jpeg, picture, write


def loaded(split="gpq", **given):
    arguments = [f"--{name}={value}" for name, value in given.items()]
    return gpq_data.load_for(settings_module.resolve(arguments, "no_such_config.py"), split)


def numbers_of(pixels):
    """The numbers that `numbered_folders` painted, from resized images."""
    return np.rint(pixels[..., 0].mean(axis=(1, 2))).astype(int).tolist()


def numbered_folders(root, sizes, first=0):
    """One-coloured images of many sizes and two formats; red is the running number."""
    number = first
    for name, n in sizes.items():
        for i in range(n):
            pixels = np.full((20 + i % 7, 30, 3), number, np.uint8)
            write(root / name / f"{i:03d}{'.png' if i % 2 else '.bmp'}", pixels)
            number += 1
    return number


def test_train_and_test_folders_are_gallery_and_queries(tmp_path):
    n = numbered_folders(tmp_path / "train", {"owl": 3, "auk": 2, "jay": 1})
    numbered_folders(tmp_path / "test", {"owl": 1, "auk": 2}, first=n)
    data = loaded("train_test", dataset="image_folders", data_dir=tmp_path, image_size=16)
    assert data.class_names == ["auk", "jay", "owl"]
    assert data.gallery_labels.tolist() == [0, 0, 1, 2, 2, 2] and data.query_labels.tolist() == [0, 0, 2]
    assert data.gallery_images.shape == (6, 16, 16, 3) and data.query_images.shape == (3, 16, 16, 3)
    assert numbers_of(data.gallery_images) == [3, 4, 5, 0, 1, 2] and numbers_of(data.query_images) == [7, 8, 6]
    assert data.unlabelled_images is data.gallery_images and len(data.labelled_images) == 0
    assert data.source == f"9 images of 3 classes from {tmp_path}"


def test_without_such_folders_every_sixth_image_of_a_class_is_a_query(tmp_path):
    numbered_folders(tmp_path, {"a": 10, "b": 1, "c": 12})
    data = loaded("train_test", dataset="image_folders", data_dir=tmp_path, image_size=16)
    assert numbers_of(data.query_images) == [5, 16, 22]
    assert numbers_of(data.gallery_images) == [i for i in range(23) if i not in (5, 16, 22)]
    assert data.query_labels.tolist() == [0, 2, 2]


@pytest.mark.parametrize("parts", [False, True])
def test_gpq_splits_all_images_together(tmp_path, parts):
    if parts:
        n = numbered_folders(tmp_path / "train", {"a": 60, "b": 40})
        numbered_folders(tmp_path / "test", {"a": 10, "b": 20}, first=n)
        labels = np.repeat([0, 1, 0, 1], [60, 40, 10, 20])
    else:
        numbered_folders(tmp_path, {"a": 70, "b": 60})
        labels = np.repeat([0, 1], [70, 60])
    data = loaded("gpq", dataset="image_folders", data_dir=tmp_path, image_size=8)
    for part, index in zip(("labelled", "gallery", "query"), protocol.split_index(labels, 2), strict=True):
        assert numbers_of(getattr(data, f"{part}_images")) == index.tolist()
        assert getattr(data, f"{part}_labels").tolist() == labels[index].tolist()
    assert len(data.query_labels) == 3


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    """A photograph that lies on its side, and one with a transparent half."""
    upright = picture(1, 40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a" / "turned.png", exif=exif)
    transparent = np.dstack([upright, np.where(np.arange(60) < 30, 255, 0) * np.ones((40, 1))]).astype(np.uint8)
    Image.fromarray(transparent).save(tmp_path / "b" / "half.png")
    for i in range(5):
        write(tmp_path / "b" / f"a{i}.png", picture(i))  # so that the other image of b is its sixth
    data = loading.load_folders(tmp_path, 32, "train_test")
    np.testing.assert_array_equal(data.gallery_images[0], images.smooth_resize(upright, 32, 32))
    white = np.where(np.arange(60)[None, :, None] < 30, upright, 255).astype(np.uint8)
    np.testing.assert_array_equal(data.query_images[0], images.smooth_resize(white, 32, 32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_right(orientation):
    content = exif_jpeg(picture(3, 64, 96), orientation)
    stored = images.decode(content, "photo")
    assert stored.shape == (64, 96, 3)
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(stored),
    }[orientation]
    np.testing.assert_array_equal(images.decode(content, "photo", upright=True), shown)


def test_a_turned_jpeg_is_decoded_no_smaller_than_needed():
    content = exif_jpeg(picture(3, 64, 512), 6)  # shown 64 wide and 512 high
    found = images.decode(content, "photo", enough=(8, 256), upright=True)
    assert found.shape[0] >= 256 and found.shape[1] >= 8


@pytest.mark.parametrize("mode", ["LA", "P", "RGB", "L", "1", "I;16", "CMYK"])
def test_what_is_transparent_is_white_in_every_mode(mode):
    grey = np.full((4, 4), 60, np.uint8)
    content = io.BytesIO()
    if mode == "LA":
        Image.fromarray(np.dstack([grey, 0 * grey]), "LA").save(content, "PNG")
        expected = 255
    elif mode in ("P", "RGB", "L"):
        key = {"P": 60, "L": 60, "RGB": (60, 60, 60)}[mode]
        Image.fromarray(grey).convert(mode).save(content, "PNG", transparency=key)
        expected = 255
    elif mode == "1":
        Image.fromarray(0 * grey).convert("1").save(content, "PNG")
        expected = 0
    elif mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 256).save(content, "PNG")
        expected = 60
    else:
        Image.fromarray(grey).convert("CMYK").save(content, "TIFF")
        expected = 60
    found = images.decode(content.getvalue(), "drawing", upright=True)
    assert found.shape == (4, 4, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        ({"only": 9}, "train_test", "Expected at least 2 classes. Found: only"),
        ({"a": 2, "b": 3}, "train_test", "of at least 6 images, or folders train and test. Found: classes of up to 3"),
        ({"train/a": 2, "train/b": 2, "test/c": 2, "test/a": 1}, "train_test", "Found only in test: c"),
        ({"a": 30, "b": 31}, "gpq", "Expected at least 120 images"),
        ({"a": 130, "b": 1}, "gpq", "Received: 131 images, 1 of class 1"),
        ({"a": 130, "b": 1}, "spq", "Invalid split. Expected one of gpq, train_test. Received: split='spq'"),
    ],
)
def test_folders_that_cannot_be_split_are_named(tmp_path, make, split, message):
    numbered_folders(tmp_path, make)
    with pytest.raises(ValueError) as caught:
        loading.load_folders(tmp_path, 8, split)
    assert message in str(caught.value)
    assert split == "spq" or str(tmp_path) in str(caught.value)


def test_damaged_and_absent_files_are_named(tmp_path):
    numbered_folders(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "b" / "002.bmp").write_bytes(b"BM, but no picture")
    with pytest.raises(ValueError, match=r"b/002\.bmp: expected an image"):
        loading.load_folders(tmp_path, 8, "train_test")
    with pytest.raises(OSError, match="nowhere"):
        loading.load_folders(tmp_path / "nowhere", 8)


def test_cifar10_is_resized_when_asked_to(tmp_path, monkeypatch):
    pixels, labels = cifar10_files.numbered_images(600), np.arange(600) % 10
    cifar10_files.write_folder(tmp_path, pixels, labels)
    small, large = (loaded("gpq", data_dir=tmp_path, image_size=size) for size in (32, 48))
    assert large.unlabelled_images is large.gallery_images
    for role in ("labelled", "gallery", "query"):
        before, after = (getattr(data, f"{role}_images") for data in (small, large))
        assert after.shape == (len(before), 48, 48, 3)
        for i in range(0, len(before), 31):
            np.testing.assert_array_equal(after[i], images.smooth_resize(before[i], 48, 48))
    assert large.source == f"{small.source}; resized to 48x48"
    for field in dataclasses.fields(small):
        if not field.name.endswith("images") and field.name not in ("source", "identity"):
            np.testing.assert_array_equal(getattr(small, field.name), getattr(large, field.name))


def test_the_size_it_has_changes_nothing():
    data = loading.load_for(settings_module.resolve(["--dataset=cifar10_sample"], "no_such_config.py"))
    assert loading.resized(data, 32) is data


def test_enlarging_is_bilinear():
    """Against the definition: half-pixel centres, clamped at the border."""
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    found = images.smooth_resize(image, 12, 9)
    for y in range(12):
        for x in range(9):
            row, column = (y + 0.5) * 5 / 12 - 0.5, (x + 0.5) * 7 / 9 - 0.5
            top, left = int(np.floor(row)), int(np.floor(column))
            mixed = np.zeros(3)
            for r, row_share in ((top, 1 - (row - top)), (top + 1, row - top)):
                for c, column_share in ((left, 1 - (column - left)), (left + 1, column - left)):
                    mixed += row_share * column_share * image[min(max(r, 0), 4), min(max(c, 0), 6)]
            assert np.abs(found[y, x] - mixed).max() <= 1
