"""Small images kept as JPEG files, one after the other, in one .npz."""

import numpy as np

from gpq_tf.data.images import opened

SIDE = 32  # pixels; height and width of every image


def load_jpegs(path, split):
    """Read and decode one split of a packed-JPEG file.

    The .npz holds, per split, `<split>_bytes` (uint8, whole JPEG files one after the other),
    `<split>_offsets` (integers, n + 1: file i is `bytes[offsets[i]:offsets[i + 1]]`) and `<split>_labels`
    (integers, n), and once `class_names` (C strings).

    Args:
        path: str or Path of the .npz.
        split: str, such as "train".

    Returns:
        (images, labels, class_names): uint8 (n, 32, 32, 3), int64 (n,), list of C str.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no such .npz, or if an image is not a 32x32 colour JPEG; the message names the
            image.

    Example:
        >>> from importlib.resources import files
        >>> images, labels, names = load_jpegs(files("gpq_tf.data") / "cifar10_sample.npz", "sample")
        >>> images.shape, names[labels[0]]
        ((12000, 32, 32, 3), 'airplane')
    """
    packed, offsets, labels, class_names = read_packed(path, split)
    images = np.empty((len(labels), SIDE, SIDE, 3), np.uint8)
    for i in range(len(labels)):
        images[i] = decode(packed[offsets[i] : offsets[i + 1]], where=f"{path}: image {i} of {split}")
    return images, labels, class_names


def read_packed(path, split):
    """Read one split, not decoded: (bytes uint8, offsets int64 (n + 1,), labels int64 (n,), class_names).

    Args and Raises as `load_jpegs`.
    """
    names = [f"{split}_bytes", f"{split}_offsets", f"{split}_labels", "class_names"]
    with open(path, "rb") as file:
        try:
            with np.load(file) as stored:
                packed, offsets, labels, class_names = (stored[name] for name in names)
        except Exception as error:  # zipfile and numpy raise nearly anything on a damaged file
            raise ValueError(f"Invalid {path}. Expected an .npz with {', '.join(names)}: {error}") from error

    def require(condition, expected, found):
        if not condition:
            raise ValueError(f"Invalid {path}. Expected {expected}. Found: {found.dtype} {found.shape}")

    require(packed.dtype == np.uint8 and packed.ndim == 1, f"{names[0]} uint8 (bytes,)", packed)
    rises = offsets.dtype.kind in "iu" and offsets.ndim == 1 and len(offsets) > 0
    rises = rises and offsets[0] == 0 and offsets[-1] == len(packed) and (offsets[1:] >= offsets[:-1]).all()
    require(rises, f"{names[1]} integers that rise from 0 to the {len(packed)} bytes", offsets)
    n = len(offsets) - 1
    are_classes = labels.dtype.kind in "iu" and ((labels >= 0) & (labels < class_names.size)).all()
    require(are_classes and labels.shape == (n,), f"{names[2]} integers ({n},) below {class_names.size}", labels)
    return (
        packed,
        offsets.astype(np.int64),
        labels.astype(np.int64),
        [str(name) for name in class_names.ravel()],
    )


def decode(jpeg, where):
    """Decode one 32x32 colour JPEG (uint8 array or bytes) to uint8 (32, 32, 3); errors begin with `where`."""
    with opened(bytes(jpeg), where, f"a {SIDE}x{SIDE} RGB JPEG", formats=["JPEG"]) as image:
        # The header is looked at before the pixels: a file that claims to be enormous takes no memory.
        if image.size != (SIDE, SIDE) or image.mode != "RGB":
            raise ValueError(f"its size is {image.size[0]}x{image.size[1]}, its mode {image.mode}")
        return np.asarray(image)
