"""CUB-200-2011 in two layouts: the text files of the original CGD, and the data set's own."""

import errno
import math
import os
from pathlib import Path

from gpq_tf.data.image_lists import numbered, split_classes

HEADER = "image_id class_id path"
_WHERE_FROM = (
    "expected the lists train.txt, test.txt and bbox.txt of github.com/naver/cgd (dataset image_lists) or the text "
    "files of CUB-200-2011's archive (cub200); --dataset=image_folders takes a folder a class"
)


def read_meta(data_dir, train_txt, test_txt, bbox_txt=None):
    """Read the original's layout: one text file for either list, one for the boxes of both.

    A list begins with a header line, then a line `image_id class_id path` an image, the path relative to `data_dir`.
    A line of the boxes is `image_id x y width height`; fractions of a pixel are cut off. No image_id occurs twice in a
    file.

    Args:
        data_dir: str or Path.
        train_txt: str or Path.
        test_txt: str or Path.
        bbox_txt: str or Path, or None to take the images whole.

    Returns:
        (train, test): ImageLists in the order of the files. Classes are numbered in the order of their ids, each list
        by itself, and named after the folder of their first image.

    Raises:
        OSError: if a file cannot be opened.
        ValueError: if a line is not as described, an image has no box or does not exist; the message names file and
            line.
    """
    boxes = None if bbox_txt is None else _read_boxes(bbox_txt)
    return tuple(_read_list(path, data_dir, boxes, bbox_txt) for path in (train_txt, test_txt))


def _read_list(path, data_dir, boxes, bbox_txt):
    ids, seen, classes, files, names = [], set(), [], [], {}
    lines = _lines(path)
    number, text = next(lines, (1, ""))
    # The original drops the first line whatever it says: without a header, an image would be lost.
    if not text or _is_number(text.split()[0]):
        raise _invalid(path, number, f"a header line such as {HEADER!r}", text)
    for number, text in lines:
        fields = text.split(maxsplit=2)  # the path may contain blanks
        if not _is_image(fields):
            raise _invalid(path, number, f"{HEADER!r}, two integers and a path", text)
        if int(fields[0]) in seen:  # it would find itself
            raise _invalid(path, number, "another image_id than in the lines before", text)
        ids.append(int(fields[0]))
        seen.add(ids[-1])
        classes.append(int(fields[1]))
        files.append(_existing(path, number, data_dir, fields[2]))
        if boxes is not None and ids[-1] not in boxes:
            raise _invalid(path, number, f"an image_id that {bbox_txt} has a box of", text)
        names.setdefault(classes[-1], Path(fields[2]).parent.name or fields[1])
    if not files:
        raise _invalid(path, number + 1, f"images, a line {HEADER!r} each", "")
    return numbered(files, classes, boxes and [boxes[image_id] for image_id in ids], names.get, str(path))


def _is_image(fields):
    return len(fields) == 3 and all(_is_integer(field) for field in fields[:2])


def read_cub(data_dir, boxes=True):
    """Read CUB-200-2011 as its archive unpacks: images.txt, image_class_labels.txt, bounding_boxes.txt, classes.txt.

    Args:
        data_dir: str or Path, the folder of these files; the pictures are in its folder `images`.
        boxes: bool; False leaves bounding_boxes.txt alone.

    Returns:
        (train, test): ImageLists of the first 100 classes and of the other 100 (see `image_lists.split_classes`), with
        boxes if asked for.

    Raises:
        OSError: if a file cannot be opened.
        ValueError: if a line is not as expected, an image has no class or no box, or does not exist; the message names
            file and line.
    """
    data_dir = Path(data_dir)
    path = data_dir / "images.txt"
    names = _read_ids(data_dir / "classes.txt", "class_id class_name", str)
    classes = _read_ids(data_dir / "image_class_labels.txt", "image_id class_id", int)
    boxes = _read_boxes(data_dir / "bounding_boxes.txt") if boxes else None
    files = {}
    for number, text in _lines(path):
        image_id, name = _two(path, number, text, "image_id path", str)
        if image_id in files:
            raise _invalid(path, number, "another image_id than in the lines before", text)
        if classes.get(image_id) not in names:
            raise _invalid(path, number, "an image_id that image_class_labels.txt has a class of classes.txt for", text)
        if boxes is not None and image_id not in boxes:
            raise _invalid(path, number, "an image_id that bounding_boxes.txt has a box of", text)
        files[image_id] = _existing(path, number, data_dir / "images", name)
    of_files = (table and [table[image_id] for image_id in files] for table in (classes, boxes))
    return split_classes(numbered(files.values(), *of_files, names.get, f"CUB-200-2011 in {data_dir}"))


def _read_boxes(path):
    """{image_id: (x, y, width, height)}."""
    expected = "'image_id x y width height', a box of at least one pixel that begins inside the image"
    boxes = {}
    for number, text in _lines(path):
        fields = text.split()
        if len(fields) != 5 or not _is_integer(fields[0]):
            raise _invalid(path, number, expected, text)
        try:
            x, y, width, height = (math.trunc(float(field)) for field in fields[1:])
        except (ValueError, OverflowError):  # no number, not a number, infinite
            raise _invalid(path, number, expected, text) from None
        if min(x, y) < 0 or min(width, height) < 1 or max(x, y, width, height) >= 2**31:
            raise _invalid(path, number, expected, text)
        if int(fields[0]) in boxes:
            raise _invalid(path, number, "one box for each image_id", text)
        boxes[int(fields[0])] = x, y, width, height
    return boxes


def _read_ids(path, header, parse):
    """{id: value} of a file of two columns."""
    return dict(_two(path, number, text, header, parse) for number, text in _lines(path))


def _two(path, number, text, header, parse):
    fields = text.split(maxsplit=1)
    if len(fields) != 2 or not _is_integer(fields[0]) or (parse is int and not _is_integer(fields[1])):
        raise _invalid(path, number, repr(header), text)
    return int(fields[0]), parse(fields[1])


def _lines(path):
    """(line number from 1, text) of every line of a text file that is not blank."""
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, f"No such file; {_WHERE_FROM}", str(path))
    with open(path, encoding="utf-8-sig") as file:  # some editors put a mark of the encoding first
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"Invalid {path}. Expected text. Found: {error}") from error


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_integer(text):
    try:
        return -(2**63) <= int(text) < 2**63
    except ValueError:
        return False


def _existing(path, number, folder, name):
    file = os.path.join(folder, name)
    if not os.path.isfile(file):
        raise _invalid(path, number, "the path of an image", f"no file {file}")
    return file


def _invalid(path, number, expected, found):
    return ValueError(f"Invalid {path}, line {number}. Expected {expected}. Found: {found or 'nothing'}")
