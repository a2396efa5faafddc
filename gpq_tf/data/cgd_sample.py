"""The sample that CGD can be tried out on, inside this package: images of Tiny ImageNet, 64x64 pixels, with boxes.

Two files: cgd_sample.jpegs has the image files one after the other; cgd_sample.csv tells of each, under a header line,
its part (train or test), its class, where it begins and how long it is, in bytes, and its box, in pixels.
"""

import csv
from pathlib import Path

from gpq_tf.data.image_lists import numbered
from gpq_tf.data.images import FilePart

PARTS = ("train", "test")
COLUMNS = ("part", "class", "offset", "length", "x", "y", "width", "height")
LISTED = Path(__file__).with_name("cgd_sample.csv")
PACKED = Path(__file__).with_name("cgd_sample.jpegs")


def read_sample():
    """The sample's images: of classes to train on, and of others to search among.

    Returns:
        (train, test): ImageLists with boxes, each with classes 0..C-1 of its own.

    Example:
        >>> train, test = read_sample()
        >>> len(train.labels), len(test.labels), set(train.class_names) & set(test.class_names)
        (384, 384, set())
    """
    with open(LISTED, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(_part([row for row in rows if row["part"] == part]) for part in PARTS)


def _part(rows):
    class_names = sorted({row["class"] for row in rows})
    files = [FilePart(str(PACKED), int(row["offset"]), int(row["length"])) for row in rows]
    classes = [class_names.index(row["class"]) for row in rows]
    boxes = [[int(row[name]) for name in ("x", "y", "width", "height")] for row in rows]
    return numbered(files, classes, boxes, class_names.__getitem__, "the embedded sample")
