"""Image collections to learn a metric from: training classes, and other classes to search among."""

import dataclasses
from pathlib import Path

from gpq_tf.data import cub, image_lists, tfds_files

DATASETS = ("image_lists", "cub200", "image_folders", *tfds_files.NAMES)


def load(dataset, data_dir, train_txt=None, test_txt=None, bbox_txt=None, boxes=True, download=False):
    """Find the labelled images of a metric-learning set. No image is read yet.

    Args:
        dataset: str. "image_lists": three text files in the layout of the original CGD (see `cub.read_meta`).
            "cub200": CUB-200-2011 as its archive unpacks. "image_folders": a folder a class, below `train` and `test`
            or halved (see `image_lists.read_folders`). "caltech_birds2011", "cars196", "stanford_online_products":
            prepared by tensorflow-datasets (see `tfds_files.read_tfds`).
        data_dir: str or Path.
        train_txt, test_txt, bbox_txt: str or Path, of "image_lists"; None means train.txt, test.txt, bbox.txt in the
            folder `meta` of `data_dir`.
        boxes: bool; False takes the images whole where there are boxes.
        download: bool; True lets tensorflow-datasets fetch what it can.

    Returns:
        (train, test): ImageLists, each with classes 0..C-1 of its own.

    Raises:
        ValueError: if `dataset` is unknown, or what it asks for is incomplete or damaged.
        OSError: if a file cannot be opened, or a set not be downloaded.

    Example:
        >>> load("cub", ".")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: Invalid dataset. Expected one of image_lists, cub200, ... Received: dataset='cub'
    """
    if dataset == "image_lists":
        meta = Path(data_dir) / "meta"
        lists = train_txt or meta / "train.txt", test_txt or meta / "test.txt"
        return cub.read_meta(data_dir, *lists, (bbox_txt or meta / "bbox.txt") if boxes else None)
    if dataset == "cub200":
        both = cub.read_cub(data_dir)
    elif dataset == "image_folders":
        both = image_lists.read_folders(data_dir)
    elif dataset in tfds_files.NAMES:
        both = tfds_files.read_tfds(dataset, data_dir, download)
    else:
        raise ValueError(f"Invalid dataset. Expected one of {', '.join(DATASETS)}. Received: dataset={dataset!r}")
    return both if boxes else tuple(dataclasses.replace(images, boxes=None) for images in both)
