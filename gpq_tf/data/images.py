"""Image files of any size: decoded, cut to a box and resized as the original CGD does, many at a time.

Pillow's decoder gives the original's pixels to the bit (it uses libjpeg's accurate integer transform, as OpenCV does):
seen with colour and grey JPEGs, baseline and progressive, at 4:4:4, 4:2:2 and 4:2:0, and with PNG, BMP and TIFF. The
exceptions known are the rare 4:4:0, whose pixels newer versions of libjpeg-turbo smooth (up to 2 of 255 apart), and
TIFFs with alpha or in LAB.
"""

import collections
import contextlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpq_tf.data import resize as opencv

RESIZES = ("opencv", "fast")
_BATCH = 64  # images that `read_images` reads at a time


class FilePart(NamedTuple):
    """An image file that lies inside another file, such as an archive of records."""

    path: str
    offset: int  # bytes
    length: int  # bytes

    def __str__(self):
        return f"{self.path}, bytes {self.offset} to {self.offset + self.length}"


@contextlib.contextmanager
def opened(content, where, expected="an image", formats=None):
    """Open an image file with Pillow; whatever goes wrong with it becomes one ValueError.

    Args:
        content: bytes, the whole file.
        where: str, what to call it in the message.
        expected: str, what to expect in the message.
        formats: list of Pillow's names of formats, or None for all.

    Yields:
        PIL.Image.Image, not decoded yet.

    Raises:
        ValueError: "WHERE: expected EXPECTED: what is wrong".
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{where}: expected {expected}: its format is not known") from error
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise ValueError(f"{where}: expected {expected}: {error}") from error


def decode(content, where, enough=None, upright=False):
    """Decode an image file as the original does: RGB, without alpha, not turned as EXIF may ask.

    Args:
        content: bytes, the whole file.
        where: str, what to call it in an error.
        enough: (width, height) or None. A JPEG is decoded at a half, a quarter or an eighth of its size where that is
            not smaller than this, which takes a fraction of the time.
        upright: bool; True gives what a viewer shows: turned as EXIF asks, what is transparent laid on white.

    Returns:
        uint8 (H, W, 3). Grey images have three equal channels; of 16 bits the upper eight are kept.

    Raises:
        ValueError: if it is no image, or a damaged one; the message begins with `where`.
    """
    with opened(content, where) as image:
        if enough is not None:
            # A turned image needs in its height what it shows in its width.
            image.draft(None, (max(enough), max(enough)) if upright else enough)
        return _rgb(_upright(image) if upright else image)


def _upright(image):
    """What a viewer shows of a Pillow image: turned as EXIF asks, on white where it is transparent."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    # Of the modes that have no alpha channel, a transparent colour is drawn in palettes and 8-bit colours only.
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and not (
        image.mode in ("P", "L", "RGB") and "transparency" in image.info
    ):
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _rgb(image):
    """The pixels of a Pillow image where OpenCV's conversion to RGB is not Pillow's, else Pillow's."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is not known")
    if image.mode[0] == "I":  # 16-bit grey; Pillow cuts off at 255
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "CMYK":
        inks = np.asarray(image).astype(np.int32)
        paper = 255 - inks[..., 3:]
        return (paper - (inks[..., :3] * paper >> 8)).astype(np.uint8)
    if image.mode == "P":  # by way of RGBA: Pillow warns about some transparent palettes
        return np.asarray(image.convert("RGBA"))[..., :3]
    return np.asarray(image.convert("RGB"))


def crop(image, box, where):
    """Cut a box out of an image; what of the box lies beyond the right and lower border is ignored.

    Args:
        image: (H, W, channels).
        box: four integers, column and row of the upper left corner, width and height.
        where: str, what to call the image in an error.

    Returns:
        a view of `image`.

    Raises:
        ValueError: if the box is empty or does not begin inside the image.

    Example:
        >>> crop(np.zeros((40, 60, 3)), (10, 5, 500, 20), "bird.jpg").shape
        (20, 50, 3)
    """
    x, y, width, height = (int(value) for value in box)
    n_rows, n_columns = image.shape[:2]
    if not (0 <= x < n_columns and 0 <= y < n_rows and width > 0 and height > 0):
        raise ValueError(
            f"{where}: expected a box that begins inside the image of {n_columns}x{n_rows} pixels. "
            f"Found: x={x} y={y} width={width} height={height}"
        )
    return image[y : y + height, x : x + width]


def read_image(file, box, height, width, resize="opencv", upright=False):
    """One image of `image_batches`: uint8 (height, width, 3)."""
    where, fast = str(file), resize == "fast"
    image = decode(_content(file), where, (width, height) if fast and box is None else None, upright)
    if box is not None:
        image = crop(image, box, where)
    return smooth_resize(image, height, width) if fast else opencv.resize(image, height, width)


def smooth_resize(image, height, width):
    """Pillow's bilinear filter, which averages all pixels that an output pixel covers when an image shrinks.

    Args:
        image: uint8 (H, W, 3).
        height, width: int > 0, pixels; the aspect ratio is not kept.

    Returns:
        uint8 (height, width, 3).

    Example:
        >>> smooth_resize(np.full((40, 60, 3), 7, np.uint8), 32, 32).shape
        (32, 32, 3)
    """
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _content(file):
    if not isinstance(file, FilePart):
        return Path(file).read_bytes()
    with open(file.path, "rb") as whole:
        whole.seek(file.offset)
        return whole.read(file.length)


def file_sizes(files):
    """Sizes of files in bytes: sequence of N str, Path or FilePart -> int64 (N,)."""
    sizes = [file.length if isinstance(file, FilePart) else Path(file).stat().st_size for file in files]
    return np.array(sizes, np.int64)


def image_batches(files, boxes, height, width, batch_size, resize="opencv", n_threads=None, upright=False):
    """Read, decode, cut and resize images in several threads, in the order of `files`.

    While a batch is used the next one is read; no more than these two are in memory.

    Args:
        files: sequence of str, Path or FilePart, N.
        boxes: integers (N, 4), column and row of the upper left corner, width and height of what to cut out of each
            image (see `crop`); None takes the images whole.
        height: int > 0, pixels.
        width: int > 0, pixels; the aspect ratio is not kept.
        batch_size: int > 0.
        resize: "opencv", to the bit as the original (see `resize.resize`); or "fast", Pillow's bilinear filter, for
            which a large JPEG without a box is decoded no larger than needed. It smooths what it shrinks, so its
            images are not quite those that the original's weights know.
        n_threads: int > 0, or None for as many as `ThreadPoolExecutor` takes.
        upright: bool; True reads what a viewer shows (see `decode`), which the original does not.

    Returns:
        iterator of uint8 (batch_size, height, width, 3); the last may be shorter. Reading raises OSError if a file
        cannot be opened, ValueError if it is no image or its box does not begin inside it; both name the file.

    Raises:
        ValueError: if an argument is wrong.
    """
    if resize not in RESIZES:
        raise ValueError(f"Invalid resize. Expected one of {', '.join(RESIZES)}. Received: resize={resize!r}")
    for name, value in (("height", height), ("width", width), ("batch_size", batch_size), ("n_threads", n_threads)):
        if value is not None and value < 1:
            raise ValueError(f"Invalid {name}. Expected a positive integer. Received: {name}={value}")
    boxes = [None] * len(files) if boxes is None else boxes
    if len(boxes) != len(files):
        raise ValueError(f"Invalid boxes. Expected one for each of {len(files)} files. Received: {len(boxes)}")

    def read(file, box):
        return read_image(file, box, height, width, resize, upright)

    return _batches(read, files, boxes, batch_size, n_threads)


def _batches(read, files, boxes, batch_size, n_threads):
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = collections.deque()
        for start in range(0, len(files), batch_size):
            part = slice(start, start + batch_size)
            waiting.append(pool.map(read, files[part], boxes[part]))
            if len(waiting) == 2:
                yield np.stack(list(waiting.popleft()))
        while waiting:
            yield np.stack(list(waiting.popleft()))


def read_images(files, boxes, height, width, resize="opencv", n_threads=None, upright=False):
    """The batches of `image_batches` as one array, uint8 (N, height, width, 3).

    Args and Raises as there, and what reading raises.

    Example:
        >>> read_images([], None, 224, 224).shape
        (0, 224, 224, 3)
    """
    batches = image_batches(files, boxes, height, width, _BATCH, resize, n_threads, upright)
    images = np.empty((len(files), height, width, 3), np.uint8)
    for i, batch in enumerate(batches):
        images[i * _BATCH : i * _BATCH + len(batch)] = batch
    return images
