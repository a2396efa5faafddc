"""Weights of the original programs -> RetrievalModel, with none of their frameworks installed.

One file per foreign format; `convert` picks by looking at the file.
"""

from pathlib import Path

from gpq_tf.convert import cgd_checkpoint, mat, mxnet_checkpoint, pth, spq_checkpoint, tf_checkpoint
from gpq_tf.network import in_precision, load_model

_FINDERS = (tf_checkpoint.find, mat.find, pth.find, mxnet_checkpoint.find)


def is_source(path):
    """Whether `path` names a file (or checkpoint prefix) of a kind that `convert` reads.

    Args:
        path: str or Path.

    Returns:
        bool. Only names are looked at: True says nothing about the content.

    Example:
        >>> is_source("no_such_file")
        False
    """
    return any(find(path) is not None for find in _FINDERS)


def convert(source, n_book=None, legacy=False, architecture=None):
    """Build a RetrievalModel from a file of one of the originals.

    Args:
        source: str or Path: prefix of a TensorFlow 1 checkpoint of GPQ (or one of its files), ImageNet_pretrained.mat
            (with or without ".mat"), a PyTorch checkpoint of SPQ (.pth), or an MXNet checkpoint of CGD (its prefix or
            one of its two files).
        n_book: int M, or None to take it from the file's name or its sizes. It is in no file.
        legacy: bool, the model is to search as the original did.
        architecture: dict of RetrievalModel's arguments, used where the file says nothing (a .mat has no head).

    Returns:
        (model, lines): RetrievalModel; list of str, the sizes and where M comes from, then one line per variable:
        used (shape, to where) or ignored (why).

    Raises:
        ValueError: if the source does not exist, is damaged, or is of no known kind, or n_book does not fit it.
        OSError: if a file cannot be read.

    Example:
        >>> model, lines = convert("models/48bits_example.ckpt")  # doctest: +SKIP
        >>> lines[0]  # doctest: +SKIP
        "n_book = 12 (the 48 bits in the file's name), n_word = 16, len_code = 12, width_multiplier = 1"
    """
    prefix = tf_checkpoint.find(source)
    if prefix is not None:
        return tf_checkpoint.convert(prefix, n_book, legacy)
    mat_file = mat.find(source)
    if mat_file is not None:
        return mat.convert(mat_file, n_book, legacy, architecture)
    if pth.find(source) is not None:
        return spq_checkpoint.convert(source, n_book, legacy)
    if mxnet_checkpoint.find(source) is not None:
        return cgd_checkpoint.convert(source, legacy)
    raise ValueError(
        f"Invalid source {str(source)!r}. Expected the prefix of a TensorFlow 1 checkpoint (its .index beside it), "
        f"that of an MXNet checkpoint (its -symbol.json), a .mat file or a .pth file. Received: {_what_is(source)}"
    )


def load(source, n_book=None, legacy=None, architecture=None, precision="float32"):
    """A model of any file: ours, by its path or the name of shipped weights, or one of the originals', converted.

    Args:
        source: str or Path.
        n_book, architecture: as of `convert`; our files know both.
        legacy: bool, or None for what our file says, False for others.
        precision: str, in which the model computes.

    Returns:
        (model, lines): RetrievalModel; list of str, what `convert` tells, empty for our files.

    Raises:
        ValueError: if there is no such model, it is damaged, or a file of a checkpoint is missing.
        OSError: if a file cannot be read.
    """
    if is_source(source):
        model, lines = convert(source, n_book, bool(legacy), architecture)
        return in_precision(model, precision), lines
    part = _incomplete(source)
    if part:
        raise ValueError(f"Invalid model {str(source)!r}. Expected all files of a checkpoint. Received: {part}")
    return load_model(source, legacy, precision), []


def _incomplete(source):
    path, prefix = Path(source), tf_checkpoint.without_suffix(source)
    is_part = prefix != str(source) and path.exists()
    if is_part or any(Path(prefix + end).exists() for end in (".meta", ".data-00000-of-00001")):
        return f"a checkpoint without its index, {Path(prefix).name}.index"
    return None if path.is_dir() else mxnet_checkpoint.missing(source)


def _what_is(source):
    path = Path(source)
    if path.is_dir():
        return "a folder"
    return _incomplete(source) or ("a file of another kind" if path.exists() else "no such file")
