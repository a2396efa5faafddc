"""TensorFlow 1 checkpoints of GPQ (prefix.index, prefix.data-00000-of-00001), read with TensorFlow 2 only."""

import math
import re
from pathlib import Path

from gpq_tf.convert import gpq_names
from gpq_tf.network import RetrievalModel


def prefix_of(source):
    """The checkpoint prefix that `source` means, or None: the prefix itself or one of its files (.index, .data, .meta).

    Example:
        >>> prefix_of("no_such.ckpt") is None
        True
    """
    name = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", str(source))
    return name if Path(f"{name}.index").is_file() else None


def convert(prefix, n_book=None, legacy=False):
    """Build a RetrievalModel from a TensorFlow 1 checkpoint of GPQ.

    Train-time checkpoints (with Adam's slots) and those of the demo are both read. The number of books is in no
    file: `n_book`, else the bits in the file's name divided by log2 K, else D / 12.

    Args:
        prefix: str, path without ".index".
        n_book: int M or None.
        legacy: bool, search as the original.

    Returns:
        (model, lines): RetrievalModel; list of str, one per variable of the file and one about the books.

    Raises:
        ValueError: if the checkpoint is damaged, incomplete, or not GPQ's.
    """
    shapes, read = _open(prefix)
    width = gpq_names.width_multiplier_of(prefix, shapes)
    for name in ("Z", "C", f"{gpq_names.SCOPE}/dense/kernel", f"{gpq_names.SCOPE}/dense/bias"):
        if name not in shapes:
            raise ValueError(f"Invalid checkpoint {prefix!r}. Expected the variable {name}. Received: none")
    n_word, size = _codebook_shape(prefix, shapes["Z"])
    n_book, why = _choose_n_book(prefix, n_book, n_word, size)
    model = RetrievalModel(
        n_book=n_book,
        bn_word=int(math.log2(n_word)),
        len_code=size // n_book,
        n_classes=shapes["C"][0],
        width_multiplier=width,
        legacy=legacy,
    )
    targets = {
        **gpq_names.backbone_targets(model.backbone),
        **gpq_names.statistics_targets(model.backbone),
        **gpq_names.head_targets(model.head),
    }
    missing = sorted(set(targets) - set(shapes))
    if missing:
        raise ValueError(f"Invalid checkpoint {prefix!r}. Expected the variable {missing[0]}. Received: none")
    lines = [f"n_book = {n_book} ({why}), n_word = {n_word}, len_code = {size // n_book}, width {width:g}"]
    arrays, moves = {}, []
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        if name == "Z":
            arrays[name] = read(name)
            books = (n_book, n_word, size // n_book)
            moves.append((model.head.quantizer.codebook, gpq_names.books_of(arrays[name], n_book)))
            lines.append(f"used     {name} {shape} -> head/quantizer/codebook {books}")
        elif name in targets:
            variable, where = targets[name]
            if shape != tuple(variable.shape):
                raise ValueError(
                    f"Invalid checkpoint {prefix!r}. Expected {name} {tuple(variable.shape)}. Received: {shape}"
                )
            arrays[name] = read(name)
            moves.append((variable, arrays[name]))
            lines.append(f"used     {name} {shape} -> {where}")
        else:
            lines.append(f"ignored  {name} {shape}: {_why_ignored(name)}")
    gpq_names.check_values(prefix, arrays)
    for variable, values in moves:
        variable.assign(values)
    return model, lines


def _open(prefix):
    """(shapes by name, function that reads one) of a checkpoint; sizes are checked against the files first."""
    import tensorflow as tf

    def failed(error):
        first_line = str(error).strip().split("\n")[0]
        return ValueError(f"Invalid checkpoint {prefix!r}. Expected a whole TensorFlow checkpoint. {first_line}")

    # What TensorFlow raises for damaged files depends on where the damage is.
    failures = (tf.errors.OpError, ValueError, RuntimeError, IndexError, KeyError, TypeError, OverflowError)
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        sizes = {name: dtype.size for name, dtype in reader.get_variable_to_dtype_map().items()}
    except failures as error:
        raise failed(error) from error
    stored = sum(file.stat().st_size for file in Path(prefix).parent.glob(Path(prefix).name + ".data-*"))
    claimed = sum(math.prod(shape) * sizes[name] for name, shape in shapes.items())
    if claimed > stored:
        raise ValueError(
            f"Invalid checkpoint {prefix!r}. Expected data files of at least {claimed} bytes. Received: {stored} bytes"
        )

    def read(name):
        try:
            return reader.get_tensor(name)
        except failures as error:
            raise failed(error) from error

    return shapes, read


def _codebook_shape(prefix, shape):
    if len(shape) != 2 or shape[0] < 2 or shape[0] & (shape[0] - 1):
        raise ValueError(
            f"Invalid checkpoint {prefix!r}. Expected Z (K, M * d), K a power of two. Received: {tuple(shape)}"
        )
    return shape


def _choose_n_book(prefix, n_book, n_word, size):
    """(M, where it comes from); the file knows only K and D = M * d."""
    if n_book is not None:
        if n_book < 1 or size % n_book:
            raise ValueError(
                f"Invalid n_book. Expected a positive integer dividing D={size}. Received: n_book={n_book}"
            )
        return n_book, "as given"
    bits_a_book = int(math.log2(n_word))
    named = re.search(r"(\d+)[ _-]?bits?", Path(prefix).name)
    if named:
        bits = int(named[1])
        if bits and bits % bits_a_book == 0 and size % (bits // bits_a_book) == 0:
            return bits // bits_a_book, f"from {bits} bits in the file's name"
    if size % 12:
        raise ValueError(
            f"Invalid n_book. Expected it to be given: it is not in {prefix!r}, and D={size} is not a multiple of 12"
        )
    return size // 12, f"D / 12 of D = {size}; give --n_book if it is another"


def _why_ignored(name):
    if name.endswith(("/Adam", "/Adam_1")):
        return "Adam's slot; a model holds no optimiser state"
    if name in ("beta1_power", "beta2_power"):
        return "Adam's step counter; a model holds no optimiser state"
    if name == "is_training":
        return "a switch of tflearn that GPQ does not read"
    return "no variable of GPQ's network"
