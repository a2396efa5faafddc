"""SPQ's checkpoints (state_dict in a .pth) -> RetrievalModel, and back."""

from pathlib import Path

from keras import ops

from gpq_tf.convert import gpq_names, pth, spq_names
from gpq_tf.network import RetrievalModel


def convert(path, n_book=None, legacy=False):
    """Build a RetrievalModel from a checkpoint of SPQ.

    K, D and the width come from the shapes. The number of books is in no file: `n_book`, else the bits in the file's
    name, else D / 16 (see `spq_names.choose_n_book`).

    Args:
        path: str or Path of a .pth.
        n_book: int M or None.
        legacy: bool, kept with the model: how training goes on from it.

    Returns:
        (model, lines): RetrievalModel; list of str, the sizes and where M comes from, then one line per tensor.

    Raises:
        ValueError: if the file is damaged, or is not SPQ's, or n_book does not divide D.
        OSError: if it cannot be read.
    """
    arrays, source = pth.read(path), str(path)
    width, size, n_word = spq_names.sizes_of(source, {name: array.shape for name, array in arrays.items()})
    n_book, why = spq_names.choose_n_book(Path(path).name, n_book, n_word, size)
    sizes = {"n_book": n_book, "bn_word": n_word.bit_length() - 1, "len_code": size // n_book}
    try:
        model = RetrievalModel("spq", **sizes, width_multiplier=width, legacy=legacy)
    except ValueError as error:
        raise ValueError(f"Invalid file {source!r}. Expected sizes that a model can have. {error}") from error
    values = spq_names.to_keras(arrays, n_book)
    variables = {variable.path: variable for variable in model.weights}
    paths = {entry.name: entry.path for entry in spq_names.entries(width, size, n_word) if entry.path}
    targets = {name: (variables[path], path) for name, path in paths.items()}
    used = gpq_names.load(source, {name: values[path] for name, path in paths.items()}, targets)
    ignored = [
        f"ignored  {name} {array.shape}: {spq_names.why_ignored(name)}"
        for name, array in arrays.items()
        if name not in paths
    ]
    return model, [gpq_names.sizes(model, why), *used, *ignored]


def write(model, path):
    """Write a model as a checkpoint that the original's network loads.

    Args:
        model: RetrievalModel of the head spq.
        path: str or Path ending in .pth.

    Returns:
        list of str, one line per tensor.

    Raises:
        ValueError: if the model has another head.
        OSError: if the file cannot be written.
    """
    if model.head_name != "spq":
        raise ValueError(f"Invalid model. Expected one of the head spq for a .pth. Received: {model.head_name}")
    arrays = spq_names.to_names({variable.path: ops.convert_to_numpy(variable) for variable in model.weights})
    pth.write(path, arrays)
    return [f"written  {name} {array.shape}" for name, array in arrays.items()]
