"""Weights of the original programs -> RetrievalModel, with none of their frameworks installed.

One file per foreign format; `convert` picks by looking at the file.
"""

from pathlib import Path

from gpq_tf.convert import mat, tf_checkpoint


def is_source(path):
    """Whether `path` names a file (or checkpoint prefix) of a kind that `convert` reads.

    Example:
        >>> is_source("no_such_file")
        False
    """
    return tf_checkpoint.prefix_of(path) is not None or mat.find(path) is not None


def convert(source, n_book=None, legacy=False, architecture=None):
    """Build a RetrievalModel from a file of one of the originals.

    Args:
        source: str or Path: prefix of a TensorFlow 1 checkpoint of GPQ (or one of its files), or
            ImageNet_pretrained.mat.
        n_book: int M, or None to take it from the file's name or its sizes. It is in no file.
        legacy: bool, the model is to search as the original did.
        architecture: dict of RetrievalModel's arguments, used where the file says nothing (a .mat has no head).

    Returns:
        (model, lines): RetrievalModel; list of str, one per variable: used (shape, to where) or ignored (why).

    Raises:
        ValueError: if the file does not exist, is damaged, or is of no known kind.
    """
    prefix = tf_checkpoint.prefix_of(source)
    if prefix is not None:
        return tf_checkpoint.convert(prefix, n_book, legacy)
    mat_file = mat.find(source)
    if mat_file is not None:
        given = {**(architecture or {}), "legacy": legacy}
        return mat.convert(mat_file, {**given, "n_book": n_book} if n_book else given)
    path = Path(source)
    if not path.exists():
        received = "no such file"
        if Path(f"{source}.data-00000-of-00001").exists() or Path(f"{source}.meta").exists():
            received = f"a checkpoint without its index, {path.name}.index"
    elif path.is_dir():
        received = "a folder"
    else:
        received = "a file of another kind"
    raise ValueError(
        f"Invalid source {str(source)!r}. Expected the prefix of a TensorFlow 1 checkpoint (its .index beside it) "
        f"or a .mat file. Received: {received}"
    )
