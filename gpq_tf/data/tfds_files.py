"""Data sets that tensorflow-datasets has prepared: where they are, and their pictures read in place."""

import contextlib
import os
from pathlib import Path

from gpq_tf.data import images
from gpq_tf.data.image_lists import numbered, split_classes

# The feature that holds the class, and where the data set comes from if not by --download=True.
_CLASS = {"caltech_birds2011": "label", "cars196": "label", "stanford_online_products": "class_id"}
_BY_HAND = {
    "caltech_birds2011": (
        "Its archive has to be fetched by hand: unpack CUB_200_2011.tgz and take dataset 'cub200' with its folder"
    ),
    "cars196": (
        "The addresses that tensorflow-datasets has for it no longer exist: put its pictures into a folder a class "
        "and take dataset 'image_folders'"
    ),
}
NAMES = tuple(_CLASS)


def places(data_dir):
    """Folders in which tensorflow-datasets may have been told to keep its data: list of Path."""
    found = [data_dir, os.environ.get("TFDS_DATA_DIR")]
    with contextlib.suppress(RuntimeError):  # a user without a home
        found.append(Path.home() / "tensorflow_datasets")
    return [Path(place) for place in found if place]


def prepared(name, data_dir):
    """Folder of the newest prepared version of a data set in the first place that has one, or None.

    Looked up in the file system: importing tensorflow_datasets takes seconds.
    """
    for folder in places(data_dir):
        versions = {}
        try:
            found = list(folder.glob(f"{name}/*.*.*/dataset_info.json"))
        except PermissionError:  # another user's home
            continue
        for info in found:
            parts = info.parent.name.split(".")
            if all(part.isdecimal() for part in parts):
                versions[tuple(map(int, parts))] = info.parent
        if versions:
            return versions[max(versions)]
    return None


def read_tfds(name, data_dir, download=False):
    """Read a prepared metric-learning data set of tensorflow-datasets.

    The pictures stay in the record files; an ImageList says where each begins.

    Args:
        name: str, "caltech_birds2011" (CUB-200-2011), "cars196" or "stanford_online_products".
        data_dir: str or Path; $TFDS_DATA_DIR and ~/tensorflow_datasets are looked into as well.
        download: bool; True lets tensorflow-datasets fetch Stanford Online Products into `data_dir` where it is not
            there (3 GB). The other two it cannot fetch.

    Returns:
        (train, test): ImageLists. Stanford Online Products is split as published; of the other two, whose published
        splits are made for classification, both are taken, and the classes halved as retrieval does it. Boxes where
        the data set has them.

    Raises:
        ValueError: if `name` is another, or the data set is absent, incomplete or damaged.
        OSError: if it cannot be downloaded.
    """
    if name not in NAMES:
        raise ValueError(f"Invalid dataset. Expected one of {', '.join(NAMES)}. Received: dataset={name!r}")
    folder = prepared(name, data_dir) or _download(name, data_dir, download)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        train, test = (list(_records(builder, split, _CLASS[name])) for split in ("train", "test"))
    except Exception as error:  # tensorflow's errors are no ValueErrors, and tfds's asserts no errors of ours
        raise ValueError(
            f"Invalid {folder}. Expected tensorflow-datasets' {name}: {type(error).__name__}: {error}"
        ) from error
    source = f"{folder} (tensorflow-datasets)"
    if name == "stanford_online_products":
        return _image_list(train, source), _image_list(test, source)
    return split_classes(_image_list(train + test, source))


def _download(name, data_dir, download):
    if name in _BY_HAND or not download:
        how = _BY_HAND.get(name, f"Add --download=True to fetch it into {data_dir} (3 GB, once)")
        looked_into = ", ".join(map(str, places(data_dir)))
        raise ValueError(f"Invalid dataset {name!r}. Expected it prepared in one of {looked_into}. Found none. {how}")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare()
    except Exception as error:  # its own, urllib's, tensorflow's
        raise OSError(f"Cannot download {name} into {data_dir}: {type(error).__name__}: {error}") from error
    return Path(builder.data_dir)


def _records(builder, split, class_feature):
    """Every example of a split, in the order of the files: (where its picture is, class, class's name, box or None)."""
    import tensorflow as tf

    info = builder.info.splits[split]
    names = builder.info.features[class_feature].names
    n_records = 0
    for path in map(str, info.filepaths):
        offset = 0
        # A record lies between 12 bytes (length, checksum) and 4 bytes (checksum), which TFRecordDataset verifies.
        for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            content = feature["image"].bytes_list.value[0]
            where = images.FilePart(path, offset + 12 + record.index(content), len(content))
            class_id = feature[class_feature].int64_list.value[0]
            given = [value.decode() for value in feature["label_name"].bytes_list.value]
            box = feature["bbox"].float_list.value
            yield where, class_id, (given or [names[class_id]])[0], _in_pixels(box, content, where) if box else None
            offset += 12 + len(record) + 4
            n_records += 1
    if not n_records or n_records != info.num_examples:
        raise ValueError(f"expected {info.num_examples} examples of {split}, found {n_records}")


def _in_pixels(box, content, where):
    """(column, row, width, height) of a box given as fractions: upper, left, lower and right border."""
    with images.opened(content, str(where)) as image:
        width, height = image.size
    upper, left, lower, right = (round(border * side) for border, side in zip(box, (height, width) * 2, strict=True))
    return left, upper, right - left, lower - upper


def _image_list(records, source):
    files, classes, names, boxes = zip(*records, strict=True)
    name_of = dict(zip(classes, names, strict=True))
    return numbered(files, classes, None if boxes[0] is None else boxes, name_of.get, source)
