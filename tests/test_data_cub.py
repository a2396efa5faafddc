"""The two layouts of CUB-200-2011, each line of them right or wrong."""

import re

import numpy as np
import pytest

from gpq_tf.data import cub
from tests import golden
from tests.image_files import picture, write

FOLDER = golden.CGD / "dataset"


@golden.needs_golden
def test_the_originals_lists():
    recorded = golden.load("dataset.npz", golden.CGD)
    train, test = cub.read_meta(FOLDER, FOLDER / "train.txt", FOLDER / "test.txt", FOLDER / "bbox.txt")
    assert test.files == [str(FOLDER / path) for path in recorded["test_paths"]]
    _, first, labels = np.unique(recorded["test_labels"], return_index=True, return_inverse=True)
    np.testing.assert_array_equal(test.labels, labels)
    np.testing.assert_array_equal(test.boxes, recorded["test_bbox_int_xywh"])
    assert test.class_names == [path.split("/")[-2] for path in recorded["test_paths"][first]]
    # The original counts how often the label changes, and calls that classes.
    for images, n_changes in ((train, recorded["num_train_ids"]), (test, recorded["num_test_ids"])):
        assert 1 + np.count_nonzero(np.diff(images.labels)) == n_changes


META = {
    "train.txt": "image_id class_id path\n1 5 images/a/1.png\n2 3 images/b/2.png\n3 5 images/a/3 of 3.png\n",
    "test.txt": "image_id class_id path\n4 0 images/c/4.png\n",
    "bbox.txt": "1 0 1 2 3\n2 1.9 -0.9 1e1 7.5\n3 0.0 0.0 500 500\n4 5 4 1 1\n9 0 0 1 1\n",
}
PATHS = ("images/a/1.png", "images/b/2.png", "images/a/3 of 3.png", "images/c/4.png")


@pytest.fixture
def meta(tmp_path):
    for name, text in META.items():
        (tmp_path / name).write_text(text)
    for path in PATHS:
        write(tmp_path / path, picture(0, 5, 6))
    return tmp_path


def read(folder, boxes=True):
    return cub.read_meta(folder, folder / "train.txt", folder / "test.txt", folder / "bbox.txt" if boxes else None)


def test_labels_are_numbered_and_named(meta):
    train, test = read(meta)
    assert train.files == [str(meta / path) for path in PATHS[:3]]
    assert train.labels.tolist() == [1, 0, 1] and train.class_names == ["b", "a"]
    assert test.labels.tolist() == [0] and test.class_names == ["c"]
    assert train.boxes.dtype == train.labels.dtype == np.int64
    assert train.boxes.tolist() == [[0, 1, 2, 3], [1, 0, 10, 7], [0, 0, 500, 500]]
    assert (train.source, test.source) == (str(meta / "train.txt"), str(meta / "test.txt"))


def test_boxes_can_be_left_out(meta):
    (meta / "bbox.txt").unlink()
    assert [images.boxes for images in read(meta, boxes=False)] == [None, None]


def test_blank_lines_and_line_ends_of_windows_change_nothing(meta):
    expected = read(meta)
    for name, text in META.items():
        (meta / name).write_bytes((text.replace("\n", "\r\n\r\n") + " \r\n").encode())
    for found, images in zip(read(meta), expected, strict=True):
        assert (found.files, found.class_names) == (images.files, images.class_names)
        assert (found.labels == images.labels).all() and (found.boxes == images.boxes).all()


def test_an_image_in_no_folder_has_the_class_id_for_a_name(meta):
    write(meta / "4.png", picture(0))
    (meta / "test.txt").write_text("image_id class_id path\n4 17 4.png\n")
    assert read(meta)[1].class_names == ["17"]


LINE = "'image_id class_id path', two integers and a path"
HEADER = "a header line such as 'image_id class_id path'"
BOX = "'image_id x y width height', a box of at least one pixel that begins inside the image"


@pytest.mark.parametrize(
    ("name", "text", "line", "expected", "found"),
    [
        ("train.txt", "", 1, HEADER, "nothing"),
        ("train.txt", "1 5 images/a/1.png\n", 1, HEADER, "1 5 images/a/1.png"),
        ("train.txt", "\ufeff1 5 images/a/1.png\n", 1, HEADER, "1 5 images/a/1.png"),
        ("train.txt", "0.0 5 images/a/1.png\n", 1, HEADER, "0.0 5 images/a/1.png"),
        ("test.txt", "id class path\n4 0 images/c/4.png\n4 0 images/c/4.png\n", 3,
         "another image_id than in the lines before", "4 0 images/c/4.png"),
        ("bbox.txt", "1 0 1 2 3\n1 0 0 1 1\n", 2, "one box for each image_id", "1 0 0 1 1"),
        ("train.txt", "id class path\n", 2, "images, a line 'image_id class_id path' each", "nothing"),
        ("train.txt", "id class path\n1 5\n", 2, LINE, "1 5"),
        ("train.txt", "id class path\n\n1 5 images/a/1.png\nx 5 images/a/1.png\n", 4, LINE, "x 5 images/a/1.png"),
        ("test.txt", "id class path\n4 0.5 images/c/4.png\n", 2, LINE, "4 0.5 images/c/4.png"),
        ("test.txt", f"id class path\n4 {2**63} images/c/4.png\n", 2, LINE, f"4 {2**63} images/c/4.png"),
        ("test.txt", "id class path\n8 0 images/c/4.png\n", 2, "an image_id that FOLDER/bbox.txt has a box of",
         "8 0 images/c/4.png"),
        ("test.txt", "id class path\n4 0 images/c/5.png\n", 2, "the path of an image", "no file FOLDER/images/c/5.png"),
        ("test.txt", "id class path\n4 0 images/c\n", 2, "the path of an image", "no file FOLDER/images/c"),
        ("bbox.txt", "1 0 1 2\n", 1, BOX, "1 0 1 2"),
        ("bbox.txt", "1 0 1 2 3\n2 0 1 2 3 4\n", 2, BOX, "2 0 1 2 3 4"),
        ("bbox.txt", "image_id x y width height\n", 1, BOX, "image_id x y width height"),
        ("bbox.txt", "1 0 one 2 3\n", 1, BOX, "1 0 one 2 3"),
        ("bbox.txt", "1 0 nan 2 3\n", 1, BOX, "1 0 nan 2 3"),
        ("bbox.txt", "1 0 0 inf 3\n", 1, BOX, "1 0 0 inf 3"),
        ("bbox.txt", "1 0 0 1e300 3\n", 1, BOX, "1 0 0 1e300 3"),
        ("bbox.txt", "1 -1 0 2 3\n", 1, BOX, "1 -1 0 2 3"),
        ("bbox.txt", "1 0 -2 2 3\n", 1, BOX, "1 0 -2 2 3"),
        ("bbox.txt", "1 0.2 0.3 0.5 0.9\n", 1, BOX, "1 0.2 0.3 0.5 0.9"),
        ("bbox.txt", "1 0 0 5 0\n", 1, BOX, "1 0 0 5 0"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(meta, name, text, line, expected, found):
    (meta / name).write_text(text)
    message = f"Invalid {meta / name}, line {line}. Expected {expected}. Found: {found}".replace("FOLDER", str(meta))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(meta)


@pytest.mark.parametrize("name", META)
def test_an_absent_file_is_an_oserror_that_names_it(meta, name):
    (meta / name).unlink()
    with pytest.raises(OSError, match=re.escape(str(meta / name))):
        read(meta)


@pytest.mark.parametrize("name", META)
def test_what_is_no_text_is_refused(meta, name):
    (meta / name).write_bytes(b"\xff\xd8\xff\xe0" * 10)
    with pytest.raises(ValueError, match=rf"Invalid {re.escape(str(meta / name))}\. Expected text\. Found"):
        read(meta)


CUB = {
    "images.txt": "1 001.Auk/a.png\n2 002.Emu/b.png\n3 003.Jay/c.png\n4 001.Auk/d.png\n5 004.Owl/e.png\n",
    "image_class_labels.txt": "1 1\n2 2\n3 3\n4 1\n5 4\n",
    "bounding_boxes.txt": "".join(f"{i} {i}.0 2.0 3.0 4.0\n" for i in range(1, 6)),
    "classes.txt": "1 001.Auk\n2 002.Emu\n3 003.Jay\n4 004.Owl\n",
}


@pytest.fixture
def archive(tmp_path):
    for name, text in CUB.items():
        (tmp_path / name).write_text(text)
    for line in CUB["images.txt"].splitlines():
        write(tmp_path / "images" / line.split()[1], picture(0, 9, 9))
    return tmp_path


def test_the_archives_own_layout(archive):
    train, test = cub.read_cub(archive)
    assert train.files == [f"{archive}/images/{name}" for name in ("001.Auk/a.png", "002.Emu/b.png", "001.Auk/d.png")]
    assert test.files == [f"{archive}/images/{name}" for name in ("003.Jay/c.png", "004.Owl/e.png")]
    assert train.labels.tolist() == [0, 1, 0] and test.labels.tolist() == [0, 1]
    assert train.class_names == ["001.Auk", "002.Emu"] and test.class_names == ["003.Jay", "004.Owl"]
    assert train.boxes[:, 0].tolist() == [1, 2, 4] and test.boxes.tolist() == [[3, 2, 3, 4], [5, 2, 3, 4]]
    assert train.source == f"CUB-200-2011 in {archive}"


@pytest.mark.parametrize(
    ("name", "text", "line", "expected", "found"),
    [
        ("images.txt", "1\n", 1, "'image_id path'", "1"),
        ("images.txt", "one 001.Auk/a.png\n", 1, "'image_id path'", "one 001.Auk/a.png"),
        ("images.txt", "1 001.Auk/a.png\n6 001.Auk/d.png\n", 2,
         "an image_id that image_class_labels.txt has a class of classes.txt for", "6 001.Auk/d.png"),
        ("images.txt", "1 001.Auk/a.png\n1 001.Auk/d.png\n", 2, "another image_id than in the lines before",
         "1 001.Auk/d.png"),
        ("images.txt", "1 001.Auk/z.png\n", 1, "the path of an image", "no file FOLDER/images/001.Auk/z.png"),
        ("image_class_labels.txt", "1 1\n2 Emu\n", 2, "'image_id class_id'", "2 Emu"),
        ("image_class_labels.txt", "1 1 1\n", 1, "'image_id class_id'", "1 1 1"),
        ("classes.txt", "1\n", 1, "'class_id class_name'", "1"),
        ("bounding_boxes.txt", "1 0 0 0 0\n", 1, BOX, "1 0 0 0 0"),
    ],
)  # fmt: skip
def test_a_wrong_line_of_the_archive_is_named(archive, name, text, line, expected, found):
    (archive / name).write_text(text)
    message = f"Invalid {archive / name}, line {line}. Expected {expected}. Found: {found}"
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('FOLDER', str(archive)))}$"):
        cub.read_cub(archive)


def test_a_class_without_a_name_is_refused_where_an_image_has_it(archive):
    (archive / "classes.txt").write_text("1 001.Auk\n2 002.Emu\n3 003.Jay\n")
    with pytest.raises(
        ValueError, match=r"images\.txt, line 5\. Expected an image_id that image_class_labels\.txt has a class of"
    ):
        cub.read_cub(archive)


@pytest.mark.parametrize("name", CUB)
def test_an_absent_file_of_the_archive_is_an_oserror(archive, name):
    (archive / name).unlink()
    with pytest.raises(OSError, match=re.escape(name)):
        cub.read_cub(archive)


def test_the_archive_without_boxes_needs_no_file_of_them(archive):
    (archive / "images.txt").write_text("1 001.Auk/a.png\n6 001.Auk/d.png\n")
    (archive / "image_class_labels.txt").write_text("1 1\n6 2\n")
    with pytest.raises(ValueError, match=r"line 2\. Expected an image_id that bounding_boxes\.txt has a box of"):
        cub.read_cub(archive)
    (archive / "bounding_boxes.txt").unlink()
    assert [part.boxes for part in cub.read_cub(archive, boxes=False)] == [None, None]
