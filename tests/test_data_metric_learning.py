"""The door to the collections: each kind is found, with boxes and without."""

import dataclasses
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from gpq_tf import settings
from gpq_tf.data import cub, image_lists, images, lazy, metric_learning, resize, tfds_files
from tests import golden
from tests.image_files import exif_jpeg, picture, write

STAND_IN = golden.SHARED / "data" / "tinyimagenet_cub_layout.zip"


@pytest.fixture
def meta(tmp_path):
    (tmp_path / "meta").mkdir()
    for name, label in (("train", 3), ("test", 5)):
        (tmp_path / "meta" / f"{name}.txt").write_text(f"image_id class_id path\n{label} 0 images/{name}.png\n")
        write(tmp_path / "images" / f"{name}.png", picture(label))
    (tmp_path / "meta" / "bbox.txt").write_text("3 1 2 3 4\n5 6 7 8 9\n")
    return tmp_path


def test_image_lists_lie_in_meta_unless_told(meta):
    train, test = metric_learning.load("image_lists", meta)
    assert train.files == [str(meta / "images/train.png")] and test.files == [str(meta / "images/test.png")]
    assert train.boxes.tolist() == [[1, 2, 3, 4]] and test.boxes.tolist() == [[6, 7, 8, 9]]
    moved = [(meta / "meta" / f"{name}.txt").rename(meta / f"my_{name}.txt") for name in ("train", "test", "bbox")]
    train, test = metric_learning.load("image_lists", meta, *moved)
    assert (train.source, test.source) == tuple(map(str, moved[:2]))
    assert test.boxes.tolist() == [[6, 7, 8, 9]]


def test_without_boxes_their_file_is_not_needed(meta):
    (meta / "meta" / "bbox.txt").unlink()
    assert [found.boxes for found in metric_learning.load("image_lists", meta, boxes=False)] == [None, None]
    with pytest.raises(OSError, match=r"bbox\.txt"):
        metric_learning.load("image_lists", meta)


@pytest.mark.parametrize(
    ("dataset", "module", "name"),
    [
        ("cub200", cub, "read_cub"),
        ("image_folders", image_lists, "read_folders"),
        *((name, tfds_files, "read_tfds") for name in tfds_files.NAMES),
    ],
)
@pytest.mark.parametrize("boxes", [True, False])
def test_the_other_kinds_have_their_readers(monkeypatch, tmp_path, dataset, module, name, boxes):
    both = tuple(image_lists.numbered([part], [0], [(1, 2, 3, 4)], str, part) for part in ("train", "test"))
    asked = []
    whole = tuple(dataclasses.replace(images, boxes=None) for images in both)
    given = whole if module is cub and not boxes else both  # which does not read them then
    monkeypatch.setattr(module, name, lambda *arguments: asked.append(arguments) or given)
    found = metric_learning.load(dataset, tmp_path, boxes=boxes, download=True)
    expected = {tfds_files: (dataset, tmp_path, True), cub: (tmp_path, boxes), image_lists: (tmp_path,)}
    assert asked == [expected[module]]
    assert [part.files for part in found] == [["train"], ["test"]]
    assert all((part.boxes is not None) == boxes for part in found)


def test_every_kind_is_named():
    assert metric_learning.DATASETS[:3] == ("image_lists", "cub200", "image_folders")
    message = r"^Invalid dataset\. Expected one of image_lists, .*, cgd_sample\. Received: dataset='sop'$"
    with pytest.raises(ValueError, match=message):
        metric_learning.load("sop", ".")


def test_nothing_heavy_is_imported_to_find_images(meta):
    program = (
        "import sys; from gpq_tf.data import metric_learning; "
        f"metric_learning.load('image_lists', {str(meta)!r}); "
        "print({'PIL', 'tensorflow', 'tensorflow_datasets', 'scipy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.skipif(not STAND_IN.is_file(), reason="the stand-in for CUB200 does not lie beside this checkout")
def test_the_stand_in_is_read(tmp_path):
    """Its lists as they are; of its pictures the first of every tenth class, the others empty."""
    with zipfile.ZipFile(STAND_IN) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("meta/")])
        lines = [
            line.split()
            for name in ("train", "test")
            for line in (tmp_path / "meta" / f"{name}.txt").read_text().splitlines()[1:]
        ]
        for path in {path.rpartition("/")[0] for _, _, path in lines}:
            (tmp_path / path).mkdir(parents=True)
        for _, _, path in lines:
            (tmp_path / path).touch()
        archive.extractall(tmp_path, [path for _, _, path in lines[::600]])
    train, test = metric_learning.load("image_lists", tmp_path)
    for part in (train, test):
        assert np.bincount(part.labels).tolist() == [60] * 100
        assert len(set(part.class_names)) == 100
        found = images.read_images(part.files[::600], part.boxes[::600], 64, 64)
        assert found.shape == (10, 64, 64, 3) and len({image.tobytes() for image in found}) == 10
    assert not set(train.class_names) & set(test.class_names)


# --- images at one size, as settings ask for them


@pytest.fixture
def birds(tmp_path):
    """Six images, three classes of which two are trained on, in the original's layout with boxes."""
    lines = {"train": ["1 0", "2 0", "3 4"], "test": ["5 1", "6 1", "7 1"]}
    for name, part in lines.items():
        paths = [f"images/{line.split()[1]}/{line.split()[0]}.png" for line in part]
        (tmp_path / f"{name}.txt").write_text("\n".join(["header", *map(" ".join, zip(part, paths, strict=True))]))
        for line, path in zip(part, paths, strict=True):
            write(tmp_path / path, picture(int(line.split()[0])))
    (tmp_path / "bbox.txt").write_text("\n".join(f"{i} {i} 2 {30 + i} 20" for i in range(1, 8)))
    return tmp_path


def found(birds, *more, dataset="image_lists", size=16):
    given = ["--head=cgd", f"--dataset={dataset}", f"--data_dir={birds}", f"--image_size={size}", *more]
    return metric_learning.load_for(settings.resolve(given, "no_such_config.py"))


@pytest.mark.parametrize("boxes", [True, False])
def test_images_are_cut_and_stretched_and_larger_to_train_on(birds, boxes):
    data = found(birds, f"--meta_dir={birds}", f"--boxes={boxes}")
    assert (data.train.side, data.test.side, data.image_shape) == (18, 16, (16, 16, 3))
    assert data.source == f"3 images of 2 classes to train on, 3 images of 1 unseen classes, from {birds}"
    assert data.class_names == ["0", "4"]
    for part, numbers in ((data.train, (1, 2, 3)), (data.test, (5, 6, 7))):
        for got, number in zip(part.pixels, numbers, strict=True):
            image = picture(number)
            image = image[2:22, number : number + 30 + number] if boxes else image
            np.testing.assert_array_equal(got, resize.resize(image, part.side, part.side))


def test_files_and_memory_hold_the_same_images(birds, monkeypatch):
    held = found(birds, f"--meta_dir={birds}").train
    monkeypatch.setattr(lazy, "LARGEST_IN_MEMORY", 3 * 18 * 18 * 3 - 1)
    read = found(birds, f"--meta_dir={birds}").train
    assert held.pixels is not None and read.pixels is None
    np.testing.assert_array_equal(held.read([2, 0]), read.read([2, 0]))
    for index in (np.arange(3), np.array([2, 0])):
        for ours, theirs in zip(held.batches(2, index), read.batches(2, index), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(np.concatenate(list(read.batches(2, index))), held.pixels[index])
    assert held.fingerprint() == read.fingerprint()


def test_the_fingerprint_tells_other_images_labels_and_boxes(birds):
    before = found(birds, f"--meta_dir={birds}").fingerprint()
    assert before == found(birds, f"--meta_dir={birds}").fingerprint()
    assert before != found(birds, f"--meta_dir={birds}", "--boxes=False").fingerprint()
    assert before != found(birds, f"--meta_dir={birds}", size=24).fingerprint()
    write(birds / "images/0/1.png", picture(9))
    assert before != found(birds, f"--meta_dir={birds}").fingerprint()


def test_own_folders_are_halved_and_turned(tmp_path):
    for name in ("ant", "bee", "cat", "dog"):
        write(tmp_path / name / "0.png", picture(3))
        (tmp_path / name / "1.jpg").write_bytes(exif_jpeg(picture(4), 6))
    data = found(tmp_path, dataset="image_folders")
    assert (data.train.class_names, data.test.class_names) == (["ant", "bee"], ["cat", "dog"])
    expected = images.read_image(tmp_path / "cat" / "1.jpg", None, 16, 16, upright=True)
    np.testing.assert_array_equal(data.test.pixels[1], expected)
    assert (expected != images.read_image(tmp_path / "cat" / "1.jpg", None, 16, 16)).any()


def test_a_damaged_image_is_named(birds):
    (birds / "images/1/6.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"images/1/6\.png: expected an image"):
        found(birds, f"--meta_dir={birds}")


def test_the_unseen_classes_alone(birds):
    given = ["--head=cgd", "--dataset=image_lists", f"--data_dir={birds}", f"--meta_dir={birds}", "--image_size=16"]
    test, source = metric_learning.load_test_for(settings.resolve(given, "no_such_config.py"))
    np.testing.assert_array_equal(test.pixels, found(birds, f"--meta_dir={birds}").test.pixels)
    assert source == f"3 images of 1 unseen classes, from {birds}"


def test_classes_of_both_parts_are_not_called_unseen(tmp_path):
    for part, classes in (("train", "abc"), ("test", "bcd")):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / part / name / "one.png")
    given = ["--head=cgd", "--dataset=image_folders", f"--data_dir={tmp_path}", "--image_size=16"]
    chosen = settings.resolve(given, "no_such_config.py")
    both = f"3 images of 3 classes, 2 of which are NOT unseen: training has them too, from {tmp_path}"
    assert metric_learning.load_for(chosen).source == f"3 images of 3 classes to train on, {both}"
    assert metric_learning.load_test_for(chosen)[1] == both
