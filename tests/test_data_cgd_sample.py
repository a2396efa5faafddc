"""The sample of CGD inside the package: read as any list of images, and taken where nothing else is there."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from gpq_tf import settings
from gpq_tf.data import cgd_sample, images, metric_learning

NO_FILE = "no config.py"


def test_every_image_is_whole_and_its_box_lies_inside():
    content = cgd_sample.PACKED.read_bytes()
    with open(cgd_sample.LISTED, newline="") as file:
        rows = list(csv.DictReader(file))
    ends = [int(row["offset"]) + int(row["length"]) for row in rows]
    assert [int(row["offset"]) for row in rows] == [0, *ends[:-1]] and ends[-1] == len(content)
    for part in cgd_sample.read_sample():
        assert np.bincount(part.labels).tolist() == [16] * 24
        assert all(images.decode(images._content(file), str(file)).shape == (64, 64, 3) for file in part.files)
        corners, sizes = part.boxes[:, :2], part.boxes[:, 2:]
        assert (corners >= 0).all() and (sizes > 0).all() and (corners + sizes <= 64).all()


def test_pixels_are_those_of_the_packed_file():
    """Against Pillow alone: the second image of the list, its box cut out."""
    with open(cgd_sample.LISTED, newline="") as file:
        row = {
            name: int(value) if value.isdecimal() else value for name, value in list(csv.DictReader(file))[1].items()
        }
    start, stop = row["offset"], row["offset"] + row["length"]
    picture = Image.open(io.BytesIO(cgd_sample.PACKED.read_bytes()[start:stop])).convert("RGB")
    cut = np.asarray(picture)[row["y"] : row["y"] + row["height"], row["x"] : row["x"] + row["width"]]
    train, _ = cgd_sample.read_sample()
    found = images.read_images(train.files[1:2], train.boxes[1:2], row["height"], row["width"])
    np.testing.assert_array_equal(found[0], cut)
    assert train.class_names[train.labels[1]] == row["class"]


def test_it_is_taken_where_nothing_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test, source = metric_learning.load_test_for(settings.resolve(["--head=cgd", "--image_size=16"], NO_FILE))
    assert test.pixels.shape == (384, 16, 16, 3)
    assert source == (
        "384 images of 24 unseen classes, from the embedded sample of Tiny ImageNet, "
        "since ./data/CUB_200_2011 does not exist"
    )
    (tmp_path / "data" / "CUB_200_2011").mkdir(parents=True)
    with pytest.raises(OSError, match=r"classes\.txt"):
        metric_learning.load_test_for(settings.resolve(["--head=cgd"], NO_FILE))


@pytest.mark.parametrize("given", [["--dataset=cub200"], ["--data_dir=birds"], []])
def test_it_never_replaces_what_was_asked_for_nor_is_trained_on_unasked(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    asked = settings.resolve(["--head=cgd", *given], NO_FILE)
    load = metric_learning.load_test_for if given else metric_learning.load_for
    with pytest.raises(
        ValueError, match=r"^Invalid data_dir '.*'\. Expected the folder .* --dataset=cgd_sample takes 768"
    ):
        load(asked)


def test_it_is_trained_on_when_asked_for():
    asked = settings.resolve(["--head=cgd", "--dataset=cgd_sample", "--image_size=16"], NO_FILE)
    data = metric_learning.load_for(asked)
    assert (len(data.train), data.train.side, len(data.test)) == (384, 18, 384)
    assert data.source == (
        "384 images of 24 classes to train on, 384 images of 24 unseen classes, "
        "from the embedded sample of Tiny ImageNet"
    )
