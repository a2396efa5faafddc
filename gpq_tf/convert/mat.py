"""ImageNet_pretrained.mat: the backbone that GPQ's training starts from, 40 arrays without a head.

The original's file is not compressed, and such MATLAB files have no checksum: of a flipped bit in the weights nothing
can be seen unless it makes a value that no weight has (see `gpq_names.load`). Files that are compressed
(scipy.io.savemat(..., do_compression=True)) have one, which is compared.
"""

from pathlib import Path

import numpy as np

from gpq_tf.convert import gpq_names
from gpq_tf.data.matlab import load_matlab
from gpq_tf.files import find_file
from gpq_tf.network import RetrievalModel

# What compressed arrays may grow to together: the published network has 31 MB, one of four times its width 16 times it.
_LARGEST = 2**29


def find(path):
    """The .mat file that `path` means, or None; the original's setting leaves ".mat" out.

    Example:
        >>> find("no_such_file") is None
        True
    """
    return find_file(path, ".mat")


def convert(path, n_book=None, legacy=False, architecture=None):
    """Build a RetrievalModel whose backbone comes from the file; its head is drawn from the seed.

    Args:
        path: str or Path.
        n_book: int M, or None for that of `architecture`.
        legacy: bool, search as the original.
        architecture: dict of RetrievalModel's arguments for the head (n_book, bn_word, len_code, n_classes, seed)
            or None for their defaults. The width comes from the file.

    Returns:
        (model, lines): RetrievalModel; list of str, the sizes and where M comes from, one line per variable of the
        file, and one about the head.

    Raises:
        ValueError: if the file is seen to be damaged, incomplete, or another's, or a size is out of range.
        OSError: if the file cannot be read.
    """
    arrays = read(path)
    shapes = {name: values.shape for name, values in arrays.items()}
    given = {**(architecture or {}), "legacy": legacy}
    given["width_multiplier"] = gpq_names.width_multiplier_of(str(path), shapes)
    if n_book is not None:
        given["n_book"] = n_book
    model = RetrievalModel(**given)
    lines = load_backbone(model.backbone, path, arrays)
    why = "the setting; the file has no head" if n_book is None else "as given"
    seed = model.architecture["seed"]
    head = f"initialised  head (dense layer, Z, C) from seed {seed}: the file holds none of them"
    return model, [gpq_names.sizes(model, why), *lines, head]


def load_backbone(backbone, path, arrays=None):
    """Copy the file's 40 arrays into a backbone of the same width.

    Args:
        backbone: gpq_tf.backbones.vgg.VGG.
        path: str or Path.
        arrays: what `read(path)` returned, or None to read it now.

    Returns:
        list of str, one per variable of the file.

    Raises:
        ValueError: if the file is seen to be damaged, or an array is missing, has another shape, or cannot be weights.
        OSError: if the file cannot be read.
    """
    arrays = read(path) if arrays is None else arrays
    targets = gpq_names.backbone_targets(backbone)
    used = gpq_names.load(str(path), arrays, targets)
    ignored = [
        f"ignored  {name} {values.shape}: no variable of GPQ's backbone"
        for name, values in arrays.items()
        if name not in targets
    ]
    return used + ignored


def read(path):
    """The arrays of a MATLAB 5 file by name, without TensorFlow's ":0"; vectors, which MATLAB makes rows, are (n,).

    Args:
        path: str or Path.

    Returns:
        dict of str -> numpy array.

    Raises:
        ValueError: if it is not a whole MATLAB 5 file of numeric arrays.
        OSError: if the file cannot be read.
    """
    with Path(path).open("rb") as file:
        # This version is another format, HDF5, with as many words in front.
        if file.read(10) == b"MATLAB 7.3":
            raise ValueError(f"Invalid file {str(path)!r}. Expected MATLAB version 5 (save -v7). Received: version 7.3")
    arrays = {}
    for name, values in load_matlab(path, _LARGEST).items():
        if not isinstance(values, np.ndarray):
            raise ValueError(f"Invalid file {str(path)!r}. Expected dense arrays. Received: {name!r} is sparse")
        if not name.isprintable():
            raise ValueError(f"Invalid file {str(path)!r}. Expected names that can be printed. Received: {name!r}")
        arrays[name.removesuffix(":0")] = values[0] if values.ndim == 2 and len(values) == 1 else values
    return arrays
