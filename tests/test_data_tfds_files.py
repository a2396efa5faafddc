"""Sets that tensorflow-datasets prepared, written here at small scale, read without it."""

import re

import numpy as np
import pytest

from gpq_tf.data import images, tfds_files
from tests.image_files import encoded, picture

N_CLASSES = 4
CLASSES = [2, 0, 3, 1, 1, 0, 2, 3, 0]  # of nine pictures; the last three are the split "test"


@pytest.fixture(autouse=True)
def no_other_place(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def box_of(i):
    """(x, y, width, height) in picture i."""
    return 3 * i, i, 20 + i, 11 + 2 * i


def pixels_of(i):
    return picture(i, 37 + i, 61 + i)


def store(root, name, version="1.0.0", n_train=6):
    """Prepare a small set with the features that tensorflow-datasets has for `name`."""
    import tensorflow_datasets as tfds

    class_feature = "class_id" if name == "stanford_online_products" else "label"
    features = {"image": tfds.features.Image(), class_feature: tfds.features.ClassLabel(num_classes=N_CLASSES)}
    if name != "stanford_online_products":
        features["bbox"] = tfds.features.BBoxFeature()
    if name == "caltech_birds2011":
        features["label_name"] = tfds.features.Text()
        features["segmentation_mask"] = tfds.features.Image(shape=(None, None, 1))

    def example(i):
        x, y, width, height = box_of(i)
        n_rows, n_columns, _ = pixels_of(i).shape
        path = root / "pictures" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels_of(i), ".jpg"))
        values = {
            "image": str(path),
            class_feature: CLASSES[i],
            "bbox": tfds.features.BBox(
                y / n_rows, x / n_columns, min((y + height) / n_rows, 1.0), min((x + width) / n_columns, 1.0)
            ),
            "label_name": f"bird {CLASSES[i]}",
            "segmentation_mask": np.zeros((4, 4, 1), np.uint8),
        }
        return i, {feature: values[feature] for feature in features}

    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        data_dir=root,
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": list(map(example, range(n_train))), "test": list(map(example, range(n_train, 9)))},
    )
    return root / name / version


def numbers_of(found):
    """Which picture each file of an ImageList is, told by its pixels."""
    decoded = [images.decode(encoded(pixels_of(i), ".jpg"), "") for i in range(9)]
    numbers = []
    for file in found.files:
        with open(file.path, "rb") as whole:
            whole.seek(file.offset)
            pixels = images.decode(whole.read(file.length), str(file))
        numbers += [i for i in range(9) if pixels.shape == decoded[i].shape and (pixels == decoded[i]).all()]
    assert len(numbers) == len(found.files)
    return numbers


@pytest.mark.parametrize(
    ("name", "class_names"),
    [("caltech_birds2011", [f"bird {c}" for c in range(4)]), ("cars196", list("0123"))],
)
def test_both_splits_are_taken_and_the_classes_halved(tmp_path, name, class_names):
    folder = store(tmp_path, name)
    train, test = tfds_files.read_tfds(name, tmp_path)
    assert train.class_names + test.class_names == class_names
    assert train.source == test.source == f"{folder} (tensorflow-datasets)"
    for half, first in ((train, 0), (test, 2)):
        numbers = numbers_of(half)
        assert sorted(numbers) == [i for i in range(9) if CLASSES[i] in (first, first + 1)]
        assert half.labels.tolist() == [CLASSES[i] - first for i in numbers]
        clipped = [
            (x, y, min(width, 61 + i - x), min(height, 37 + i - y))
            for i in numbers
            for x, y, width, height in [box_of(i)]
        ]
        assert half.boxes.tolist() == [list(box) for box in clipped]


def test_stanford_online_products_is_split_as_published(tmp_path):
    store(tmp_path, "stanford_online_products")
    train, test = tfds_files.read_tfds("stanford_online_products", tmp_path)
    assert train.boxes is None and test.boxes is None
    assert sorted(numbers_of(train)) == list(range(6)) and sorted(numbers_of(test)) == [6, 7, 8]
    assert train.labels.tolist() == [CLASSES[i] for i in numbers_of(train)] and train.class_names == list("0123")
    assert test.class_names == ["0", "2", "3"]
    assert [test.class_names[label] for label in test.labels] == [str(CLASSES[i]) for i in numbers_of(test)]


def test_pictures_are_read_where_they_lie(tmp_path):
    store(tmp_path, "cars196")
    train, _ = tfds_files.read_tfds("cars196", tmp_path)
    found = images.read_images(train.files, train.boxes, 16, 16)
    for i, pixels in zip(numbers_of(train), found, strict=True):
        path = tmp_path / "pictures" / f"{i}.jpg"
        np.testing.assert_array_equal(pixels, images.read_image(path, box_of(i), 16, 16))


@pytest.mark.parametrize("place", ["data_dir", "TFDS_DATA_DIR", "home/tensorflow_datasets"])
def test_three_places_are_looked_into_for_the_newest(tmp_path, monkeypatch, place):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "TFDS_DATA_DIR"))
    for version in ("1.9.0", "1.10.0", "2.x.0", "9.9.9.incomplete"):
        folder = tmp_path / place / "cars196" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
    (tmp_path / place / "cars196" / "3.0.0").mkdir()
    assert tfds_files.prepared("cars196", tmp_path / "data_dir") == tmp_path / place / "cars196" / "1.10.0"
    assert tfds_files.prepared("caltech_birds2011", tmp_path / "data_dir") is None


@pytest.mark.parametrize("damage", ["missing shard", "cut shard", "flipped byte", "short shard", "no json"])
def test_a_damaged_set_is_named(tmp_path, damage):
    folder = store(tmp_path, "cars196")
    shard = next(folder.glob("*train*"))
    content = shard.read_bytes()
    if damage == "missing shard":
        shard.unlink()
    elif damage == "cut shard":
        shard.write_bytes(content[:-1000])
    elif damage == "flipped byte":
        shard.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    elif damage == "short shard":
        shard.write_bytes(b"")
    else:
        (folder / "dataset_info.json").write_text("{")
    message = rf"^Invalid {re.escape(str(folder))}\. Expected tensorflow-datasets' cars196: \w+: "
    with pytest.raises(ValueError, match=message):
        tfds_files.read_tfds("cars196", tmp_path)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("caltech_birds2011", r"fetched by hand: unpack CUB_200_2011\.tgz and take dataset 'cub200' with its folder"),
        ("cars196", "no longer exist: put its pictures into a folder a class and take dataset 'image_folders'"),
        ("stanford_online_products", r"Add --download=True to fetch it into \S+ \(3 GB, once\)"),
    ],
)
def test_an_absent_set_says_how_to_get_it(tmp_path, name, how):
    places = f"{tmp_path}, {tmp_path}/home/tensorflow_datasets"
    with pytest.raises(ValueError, match=rf"^Invalid dataset '{name}'\. .* one of {places}\. Found none\. .*{how}$"):
        tfds_files.read_tfds(name, tmp_path)


@pytest.mark.parametrize("name", ["caltech_birds2011", "cars196"])
def test_what_cannot_be_downloaded_is_not_tried(tmp_path, name, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds, "builder", lambda *_, **__: pytest.fail("tried"))
    with pytest.raises(ValueError, match="Found none"):
        tfds_files.read_tfds(name, tmp_path, download=True)


def test_downloads_where_it_can_and_is_asked(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    asked = []

    class Builder:
        def __init__(self, name, data_dir):
            asked.append((name, data_dir))
            self.data_dir = str(data_dir / name / "1.0.0")

        def download_and_prepare(self):
            store(tmp_path, "stanford_online_products")

    monkeypatch.setattr(tfds, "builder", Builder)
    for _ in range(2):  # the second time it is there
        train, _ = tfds_files.read_tfds("stanford_online_products", tmp_path, download=True)
        assert len(train.files) == 6
    assert asked == [("stanford_online_products", tmp_path)]


def test_a_download_that_fails_is_one_oserror(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def no_network(*_, **__):
        raise AssertionError("no route")

    monkeypatch.setattr(tfds, "builder", no_network)
    message = r"^Cannot download stanford_online_products into .*: AssertionError: no route$"
    with pytest.raises(OSError, match=message):
        tfds_files.read_tfds("stanford_online_products", tmp_path, download=True)


def test_refuses_unknown_names(tmp_path):
    message = r"^Invalid dataset\. Expected one of caltech_birds2011, .*\. Received: dataset='mnist'$"
    with pytest.raises(ValueError, match=message):
        tfds_files.read_tfds("mnist", tmp_path)
