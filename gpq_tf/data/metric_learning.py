"""Image collections to learn a metric from: training classes, and other classes to search among."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from gpq_tf.data import cgd_sample, cub, image_lists, images, lazy, tfds_files
from gpq_tf.settings import METRIC_LEARNING

DATASETS = METRIC_LEARNING
# Read as a viewer shows them: a user's own, and what is upright as it is.
UPRIGHT = ("image_folders", "cgd_sample")
SAMPLE = "the embedded sample of Tiny ImageNet"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of a list at one size: read from their files when they are asked for, or held in memory.

    Attributes:
        listed: image_lists.ImageList of N images.
        side: int, pixels; height and width.
        upright: bool, see `images.decode`.
        pixels: uint8 (N, side, side, 3), or None to read them.
    """

    listed: image_lists.ImageList
    side: int
    upright: bool = False
    pixels: np.ndarray | None = None

    @property
    def labels(self):
        """int64 (N,)."""
        return self.listed.labels

    @property
    def class_names(self):
        """list of C str."""
        return self.listed.class_names

    def __len__(self):
        return len(self.listed.labels)

    def read(self, index):
        """Some images: integers (n,) -> uint8 (n, side, side, 3).

        Raises:
            OSError, ValueError: naming the file that cannot be read.
        """
        if self.pixels is not None:
            return self.pixels[index]
        files, boxes = image_lists.files_and_boxes(self.listed, index)
        return images.read_images(files, boxes, self.side, self.side, upright=self.upright)

    def batches(self, size, index):
        """The images at these positions, as uint8 (size, side, side, 3) a time; the last batch may be shorter."""
        if self.pixels is not None:
            return (self.pixels[index[start : start + size]] for start in range(0, len(index), size))
        files, boxes = image_lists.files_and_boxes(self.listed, index)
        return images.image_batches(files, boxes, self.side, self.side, size, upright=self.upright)

    def fingerprint(self):
        """sha256 of labels, boxes, and the sizes of the files in bytes: reading all of them could take minutes."""
        boxes = np.empty(0, np.int64) if self.listed.boxes is None else self.listed.boxes
        digest = hashlib.sha256(f"{self.side} {self.upright}".encode())
        for array in (self.labels, boxes, images.file_sizes(self.listed.files)):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class UnseenClasses:
    """What a metric is learned from, and what it is measured on: images of other classes.

    Attributes:
        train: ImageSet, larger than `image_size` for windows to be cut out of it.
        test: ImageSet of side `image_size`, each of whose images is a query among the others.
        source: str, one line for the user: where the images come from.
    """

    train: ImageSet
    test: ImageSet
    source: str

    @property
    def class_names(self):
        """list of C str, of the training classes."""
        return self.train.class_names

    @property
    def image_shape(self):
        """(height, width, channels) of what the network takes."""
        return (self.test.side, self.test.side, 3)

    def fingerprint(self):
        """sha256 of what training sees: a resumed run must see the same."""
        return self.train.fingerprint()


def load_for(settings):
    """Find the images that settings ask for, and read those that memory holds (`lazy.are_held`).

    Images are read as the original does it (see `images`), stretched to image_size; those to train on to 9/8 of that,
    252 for 224 pixels as in the paper. A user's own (image_folders) are turned as EXIF asks and laid on white.

    Args:
        settings: gpq_tf.settings.Settings.

    Returns:
        UnseenClasses.

    Raises:
        ValueError, OSError: as `load`; naming the file that is no image, or of which a box does not begin inside it.
    """
    train, test = _found(settings)
    train, test = _image_set(train, settings, settings.image_size * 9 // 8), _image_set(test, settings)
    source = f"{_count(train)} classes to train on, {_count(test)} {_unseen(train, test)}, from {_place(settings)}"
    return UnseenClasses(train, test, source)


def load_test_for(settings):
    """The images of unseen classes alone, and a line for the user: where they come from.

    Where neither dataset nor data_dir was given, and there is no such folder, they are those of the embedded sample.

    Args and Raises: as `load_for`.

    Returns:
        (ImageSet, str).
    """
    place = _place(settings)
    if not settings.given & {"dataset", "data_dir"} and not Path(settings.data_dir).exists():
        place = f"{SAMPLE}, since {settings.data_dir} does not exist"
        settings = settings.completed({"dataset": "cgd_sample"})
    train, test = _found(settings)
    unseen, test = _unseen(train, test), _image_set(test, settings)
    return test, f"{_count(test)} {unseen}, from {place}"


def _unseen(train, test):
    """What to call the classes of test: folders below train and test may have the same names."""
    both = len(set(train.class_names) & set(test.class_names))
    return f"classes, {both} of which are NOT unseen: training has them too" if both else "unseen classes"


def _place(settings):
    return SAMPLE if settings.dataset == "cgd_sample" else settings.data_dir


def _found(settings):
    if settings.dataset in ("image_lists", "cub200", "image_folders") and not Path(settings.data_dir).is_dir():
        raise ValueError(
            f"Invalid data_dir {str(settings.data_dir)!r}. Expected the folder of dataset {settings.dataset}. "
            "Received: no folder. --dataset=cgd_sample takes 768 images inside the package"
        )
    names = ("train.txt", "test.txt", "bbox.txt")
    lists = (None,) * 3 if settings.meta_dir is None else [Path(settings.meta_dir) / name for name in names]
    return load(settings.dataset, settings.data_dir, *lists, boxes=settings.boxes, download=settings.download)


def _count(image_set):
    return f"{len(image_set):,} images of {len(image_set.class_names)}"


def _image_set(listed, settings, side=None):
    side = side or settings.image_size
    found = ImageSet(listed, side, upright=settings.dataset in UPRIGHT)
    if not lazy.are_held(len(found), side):
        return found
    return dataclasses.replace(found, pixels=found.read(np.arange(len(found))))


def load(dataset, data_dir, train_txt=None, test_txt=None, bbox_txt=None, boxes=True, download=False):
    """Find the labelled images of a metric-learning set. No image is read yet.

    Args:
        dataset: str. "image_lists": three text files in the layout of the original CGD (see `cub.read_meta`).
            "cub200": CUB-200-2011 as its archive unpacks. "image_folders": a folder a class, below `train` and `test`
            or halved (see `image_lists.read_folders`). "caltech_birds2011", "cars196", "stanford_online_products":
            prepared by tensorflow-datasets (see `tfds_files.read_tfds`). "cgd_sample": 768 images inside this package,
            24 classes to train on and 24 others.
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
        return cub.read_cub(data_dir, boxes)
    elif dataset == "cgd_sample":
        both = cgd_sample.read_sample()
    elif dataset == "image_folders":
        both = image_lists.read_folders(data_dir)
    elif dataset in tfds_files.NAMES:
        both = tfds_files.read_tfds(dataset, data_dir, download)
    else:
        raise ValueError(f"Invalid dataset. Expected one of {', '.join(DATASETS)}. Received: dataset={dataset!r}")
    return both if boxes else tuple(dataclasses.replace(images, boxes=None) for images in both)
