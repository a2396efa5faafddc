"""What settings ask for, as a split image set of the size they name: CIFAR-10, a user's own folders, or CGD's sets."""

import dataclasses

import numpy as np

from gpq_tf.data import cifar10, image_lists, images, lazy, metric_learning, protocol
from gpq_tf.settings import CIFAR10

# Where no folder says which images are test images, of so many of a class one is: CIFAR-10's share.
_TEST_STEP = 6


def load_for(settings, split="gpq"):
    """Load and split the images that settings ask for, resized to image_size where theirs is another.

    Args:
        settings: gpq_tf.settings.Settings.
        split: str, "gpq" (`protocol.split`), "train_test" (`protocol.train_test`) or "unseen_classes"
            (`metric_learning.load_for`).

    Returns:
        RetrievalData, or metric_learning.UnseenClasses.

    Raises:
        ValueError, OSError: as `cifar10.load_asked`, `load_folders` and `metric_learning.load_for`; also if the
            dataset is not made for the split.
    """
    fitting = metric_learning.DATASETS if split == "unseen_classes" else (*CIFAR10, "image_folders")
    if settings.dataset not in fitting:
        raise ValueError(
            f"Invalid dataset. Expected one of {', '.join(fitting)} with head={settings.head}. "
            f"Received: dataset={settings.dataset}"
        )
    if split == "unseen_classes":
        return metric_learning.load_for(settings)
    if settings.dataset == "image_folders":
        return load_folders(settings.data_dir, settings.image_size, split, settings.legacy)
    return resized(cifar10.load_asked(settings, split), settings.image_size)


def load_folders(data_dir, size, split="gpq", legacy=False):
    """Load and split a user's own images, a folder a class.

    Args:
        data_dir: str or Path, a folder of class folders, or of `train` and `test` with class folders in either; a class
            is known by its folder's name.
        size: int, pixels; height and width that images are resized to (`images.smooth_resize`), turned as EXIF asks and
            laid on white.
        split: str. "gpq" splits all images together (`protocol.split`). "train_test" takes the images of `test` as
            queries and those of `train` as gallery; where there are no such folders, every sixth image of a class is a
            query.
        legacy: bool, as for `protocol.split`.

    Returns:
        RetrievalData; where memory would not hold the images (`lazy.are_held`) they are read when they are asked for.

    Raises:
        ValueError: if a class has no image, there are fewer than two classes, a class of `test` is not in `train`
            ("train_test"), a file is no image, or there are too few images to split them. The message names the folder
            or file.
        OSError: if a folder or file cannot be read.
    """
    protocol.check_name(split)
    parts = image_lists.read_parts(data_dir)
    class_names = sorted({name for part in parts for name in part.class_names})
    if len(class_names) < 2:
        raise ValueError(f"Invalid {data_dir}. Expected at least 2 classes. Found: {', '.join(class_names)}")
    number = {name: i for i, name in enumerate(class_names)}
    labels = np.array([number[part.class_names[label]] for part in parts for label in part.labels])
    in_test = np.repeat(np.arange(len(parts)), [len(part.files) for part in parts]) == 1
    if split == "train_test":
        if len(parts) == 1:
            in_class = np.concatenate([np.arange(n) for n in np.bincount(labels)])
            in_test = in_class % _TEST_STEP == _TEST_STEP - 1
        _check_parts(data_dir, class_names, labels, in_test)
    else:
        _check_split(data_dir, len(class_names), labels, legacy)
    files = [file for part in parts for file in part.files]
    source = f"{len(files):,} images of {len(class_names)} classes from {data_dir}"

    def read(index):
        return images.read_images([files[i] for i in index], None, size, size, resize="fast", upright=True)

    pixels = lazy.images(len(files), size, read)
    if split == "train_test":
        data = protocol.train_test(pixels, labels, class_names, source, in_test)
    else:
        data = protocol.split(pixels, labels, class_names, source, legacy)
    identity = f"{size} {images.file_sizes(files).tolist()}".encode()
    return dataclasses.replace(data, identity=identity, files=files)


def _check_parts(data_dir, class_names, labels, in_test):
    if not in_test.any():
        raise ValueError(
            f"Invalid {data_dir}. Expected a class of at least {_TEST_STEP} images, or folders train and test. "
            f"Found: classes of up to {np.bincount(labels).max()} images"
        )
    missing = sorted(set(labels[in_test].tolist()) - set(labels[~in_test].tolist()))
    if missing:
        names = ", ".join(class_names[label] for label in missing)
        raise ValueError(
            f"Invalid {data_dir}. Expected in train every class of test, to be found. Found only in test: {names}"
        )


def _check_split(data_dir, n_classes, labels, legacy):
    """Find out before all images are read whether they can be split."""
    try:
        protocol.split_index(labels, n_classes, legacy)
    except ValueError as error:
        raise ValueError(f"Invalid {data_dir}. {error}") from error


def resized(data, size):
    """A split image set at another size.

    Args:
        data: RetrievalData.
        size: int, pixels; height and width (`images.smooth_resize`).

    Returns:
        RetrievalData; `data` itself where its images have that size.
    """
    if data.query_images.shape[1:3] == (size, size):
        return data
    labelled, gallery, query = (
        _resized(part, size) for part in (data.labelled_images, data.gallery_images, data.query_images)
    )
    return dataclasses.replace(
        data,
        labelled_images=labelled,
        unlabelled_images=gallery,
        gallery_images=gallery,
        query_images=query,
        source=f"{data.source}; resized to {size}x{size}",
        identity=f"{size} {data.fingerprint()}".encode(),
    )


def _resized(pixels, size):
    def resize(index):
        out = np.empty((len(index), size, size, 3), np.uint8)
        for i, position in enumerate(index):
            out[i] = images.smooth_resize(pixels[position], size, size)
        return out

    return lazy.images(len(pixels), size, resize)


def check_image_size(settings, data):
    """Refuse an image_size or img_channels that is not the data's (ValueError)."""
    size, expected = data.image_shape, (settings.image_size, settings.image_size, settings.img_channels)
    if size != expected:
        raise ValueError(f"Invalid image_size. Expected the data's, {size}. Received: {expected}")
