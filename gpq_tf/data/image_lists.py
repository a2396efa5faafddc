"""Labelled image files: what metric learning trains on and is measured on. The images are read when they are needed."""

import dataclasses
import os
from pathlib import Path

import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageList:
    """N labelled image files.

    Attributes:
        files: list of N str (paths) or `images.FilePart`.
        labels: int64 (N,), 0..C-1; every class has an image.
        boxes: int64 (N, 4), column and row of the upper left corner, width and height of what to look at in each
            image, in pixels; or None.
        class_names: list of C str; a label indexes it.
        source: str, for the user: where the images come from.
    """

    files: list
    labels: np.ndarray
    boxes: np.ndarray | None
    class_names: list
    source: str


def numbered(files, classes, boxes, name_of, source):
    """An ImageList whose labels are the places of `classes` (any integers) in their order.

    Args:
        files, boxes, source: as the attributes of ImageList.
        classes: integers (N,).
        name_of: callable, name of a class.
        source: str.

    Returns:
        ImageList.

    Example:
        >>> images = numbered(["a.jpg", "b.jpg", "c.jpg"], [7, 3, 7], None, "class {}".format, "nowhere")
        >>> images.labels.tolist(), images.class_names
        ([1, 0, 1], ['class 3', 'class 7'])
    """
    distinct, labels = np.unique(np.asarray(classes, np.int64), return_inverse=True)
    boxes = None if boxes is None else np.asarray(boxes, np.int64).reshape(-1, 4)
    return ImageList(list(files), labels.astype(np.int64), boxes, [name_of(c) for c in distinct.tolist()], source)


def files_and_boxes(images, index):
    """Some images of an ImageList, as `images.read_images` takes them.

    Args:
        images: ImageList.
        index: integers (n,), positions in it.

    Returns:
        (files, boxes): list of n, and int64 (n, 4) or None.

    Example:
        >>> images = numbered(["a.jpg", "b.jpg"], [0, 1], [(0, 0, 8, 8), (2, 2, 4, 4)], str, "nowhere")
        >>> files_and_boxes(images, [1, 0, 1])[0]
        ['b.jpg', 'a.jpg', 'b.jpg']
    """
    return [images.files[i] for i in index], None if images.boxes is None else images.boxes[index]


def split_classes(images):
    """Part the classes in halves: train on the first, search among the images of the other, never seen.

    The usual protocol of CUB-200-2011 (100 and 100 classes) and Cars196 (98 and 98).

    Args:
        images: ImageList of C classes, at least 2.

    Returns:
        (train, test): ImageLists of the first C // 2 classes and of the rest, each with labels from 0.

    Raises:
        ValueError: if there are fewer than 2 classes.
    """
    n_classes = len(images.class_names)
    if n_classes < 2:
        raise ValueError(f"Invalid {images.source}. Expected at least 2 classes. Found: {n_classes}")
    first_unseen = n_classes // 2
    return _classes(images, 0, first_unseen), _classes(images, first_unseen, n_classes)


def _classes(images, start, stop):
    index = np.flatnonzero((images.labels >= start) & (images.labels < stop))
    files, boxes = files_and_boxes(images, index)
    return ImageList(files, images.labels[index] - start, boxes, images.class_names[start:stop], images.source)


def read_folders(data_dir):
    """Image folders: one folder a class, named after it, images anywhere below it.

    Args:
        data_dir: str or Path. If it holds folders `train` and `test`, their folders are the classes of the two lists;
            else its own folders are, in the order of their names, parted by `split_classes`.

    Returns:
        (train, test): ImageLists without boxes.

    Raises:
        OSError: if a folder cannot be read.
        ValueError: if there are no class folders, or one has no image.
    """
    parts = read_parts(data_dir)
    return tuple(parts) if len(parts) == 2 else split_classes(*parts)


def read_parts(data_dir):
    """Image folders as they lie, their classes not parted.

    Args:
        data_dir: as for `read_folders`.

    Returns:
        list of ImageList: that of `train` and that of `test` where it holds both, each with classes 0..C-1 of its own,
        else that of its own folders alone.

    Raises:
        OSError, ValueError: as `read_folders`.
    """
    parts = [Path(data_dir) / name for name in ("train", "test")]
    return [_read_classes(part) for part in (parts if all(part.is_dir() for part in parts) else [Path(data_dir)])]


def _read_classes(folder):
    with os.scandir(folder) as entries:
        class_names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    if not class_names:
        raise ValueError(f"Invalid {folder}. Expected a folder of images for every class. Found: no folders")
    files, labels = [], []
    for label, name in enumerate(class_names):
        found = _images_below(folder / name)
        if not found:
            raise ValueError(f"Invalid {folder / name}. Expected images ({', '.join(sorted(SUFFIXES))}). Found: none")
        files += found
        labels += [label] * len(found)
    return numbered(files, labels, None, class_names.__getitem__, str(folder))


def _images_below(folder):
    """Paths of the images in a folder and its folders, in the order of their names; hidden ones are left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [
            os.path.join(place, name)
            for name in sorted(names)
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    return found
