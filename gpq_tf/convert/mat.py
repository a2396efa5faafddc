"""ImageNet_pretrained.mat: the backbone that GPQ's training starts from, 40 arrays without a head."""

from pathlib import Path

import numpy as np

from gpq_tf.convert import gpq_names
from gpq_tf.data.matlab import load_matlab
from gpq_tf.network import RetrievalModel


def find(path):
    """The .mat file that `path` means, or None; the original's setting leaves ".mat" out.

    Example:
        >>> find("no_such_file") is None
        True
    """
    for candidate in (Path(path), Path(f"{path}.mat")):
        if candidate.suffix == ".mat" and candidate.is_file():
            return candidate
    return None


def convert(path, architecture=None):
    """Build a RetrievalModel whose backbone comes from the file; its head is drawn from the seed.

    Args:
        path: str or Path.
        architecture: dict of RetrievalModel's arguments for the head (n_book, bn_word, len_code, n_classes, seed,
            legacy) or None for their defaults. The width comes from the file.

    Returns:
        (model, lines): RetrievalModel; list of str, one per variable of the file and one about the head.

    Raises:
        ValueError: if the file is damaged, incomplete, or another's.
    """
    arrays = read(path)
    shapes = {name: values.shape for name, values in arrays.items()}
    width = gpq_names.width_multiplier_of(str(path), shapes)
    model = RetrievalModel(**{**(architecture or {}), "width_multiplier": width})
    lines = load_backbone(model.backbone, path, arrays)
    seed = model.architecture["seed"]
    lines.append(f"initialised  head (dense layer, Z, C) from seed {seed}: the file holds none of them")
    return model, lines


def load_backbone(backbone, path, arrays=None):
    """Copy the file's 40 arrays into a backbone of the same width.

    Args:
        backbone: gpq_tf.backbones.vgg.VGG.
        path: str or Path.
        arrays: what `read(path)` returned, or None to read it now.

    Returns:
        list of str, one per variable of the file.

    Raises:
        ValueError: if an array is missing or has another shape.
    """
    arrays = read(path) if arrays is None else arrays
    targets = gpq_names.backbone_targets(backbone)
    for name, (variable, _) in targets.items():
        received = arrays[name].shape if name in arrays else "no such variable"
        if received != tuple(variable.shape):
            raise ValueError(
                f"Invalid file {str(path)!r}. Expected {name} {tuple(variable.shape)}. Received: {received}"
            )
    gpq_names.check_values(str(path), {name: arrays[name] for name in targets})
    lines = []
    for name, values in arrays.items():
        if name in targets:
            variable, where = targets[name]
            variable.assign(values.astype("float32"))
            lines.append(f"used     {name} {values.shape} -> {where}")
        else:
            lines.append(f"ignored  {name} {values.shape}: no variable of GPQ's backbone")
    return lines


def read(path):
    """The arrays of a MATLAB 5 file by name, without TensorFlow's ":0"; vectors, which MATLAB makes rows, are (n,).

    Args:
        path: str or Path.

    Returns:
        dict of str -> numpy array.

    Raises:
        ValueError: if it is not a whole MATLAB 5 file of numeric arrays.
    """
    arrays = {}
    for name, values in load_matlab(path).items():
        if not isinstance(values, np.ndarray):
            raise ValueError(f"Invalid file {str(path)!r}. Expected dense arrays. Received: {name} is sparse")
        arrays[name.removesuffix(":0")] = values[0] if values.ndim == 2 and len(values) == 1 else values
    return arrays
