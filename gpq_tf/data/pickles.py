"""CIFAR-10's batch files: pickles that name the four functions with which numpy and Python 2 pickled an array of
numbers, in whose place stand stubs that check what they are given (see `unpickler`).
"""

import io
import math
import re
from pathlib import Path

import numpy as np

from gpq_tf.data.unpickler import RefusedError, unpickle

SIDE = 32  # pixels
ROW = 3 * SIDE * SIDE  # one image: 1024 red values, 1024 green, 1024 blue


def load_cifar_batch(path, n_classes=10):
    """Read one batch of CIFAR-10's python version, such as `data_batch_1`.

    The file is a pickled dict of (Python 2 or 3) strings; used are `data`, uint8 (n, 3072), each row an image
    in channel, row, column order, and `labels`, a list of n ints.

    Args:
        path: str or Path.
        n_classes: int; labels must lie in 0..n_classes-1.

    Returns:
        (images, labels): uint8 (n, 32, 32, 3) and int64 (n,).

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is damaged, is something else, or asks for anything but arrays of numbers, strings,
            lists, dicts and numbers. Nothing it names is imported or called, and no size it claims is
            believed.

    Example:
        >>> import pickle
        >>> batch = {"data": np.arange(2 * 3072).reshape(2, 3072).astype("uint8"), "labels": [3, 5]}
        >>> _ = Path("/tmp/gpq_tf_doctest_batch").write_bytes(pickle.dumps(batch, protocol=2))
        >>> images, labels = load_cifar_batch("/tmp/gpq_tf_doctest_batch")
        >>> images.shape, images[0, 0, 3].tolist(), labels.tolist()
        ((2, 32, 32, 3), [3, 3, 3], [3, 5])
    """
    batch = _load(path)
    data = _entry(path, batch, "data")
    if not (isinstance(data, _Array) and data.array is not None):
        raise _invalid(path, f"data is a {type(data).__name__}, not an array")
    data = data.array
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != ROW:
        raise _invalid(path, f"data is {data.dtype} {data.shape}, not uint8 (n, {ROW})")
    labels = _entry(path, batch, "labels")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise _invalid(path, f"labels is not a list of {len(data)} ints, one an image")
    if not all(type(label) is int and 0 <= label < n_classes for label in labels):
        raise _invalid(path, f"labels are not all ints in 0..{n_classes - 1}")
    images = data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


def load_cifar_meta(path):
    """Read the class names from `batches.meta`.

    Args:
        path: str or Path.

    Returns:
        list of str; a label indexes it.

    Raises:
        OSError, ValueError: as `load_cifar_batch`.

    Example:
        >>> import pickle
        >>> _ = Path("/tmp/gpq_tf_doctest_meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
        >>> load_cifar_meta("/tmp/gpq_tf_doctest_meta")
        ['cat', 'dog']
    """
    names = _entry(path, _load(path), "label_names")
    if not isinstance(names, list) or not names or not all(type(name) in (bytes, str) for name in names):
        raise _invalid(path, "label_names is not a list of strings")
    try:
        return [name.decode() if isinstance(name, bytes) else name for name in names]
    except UnicodeDecodeError as error:
        raise _invalid(path, f"label_names is not UTF-8 ({error})") from error


def _load(path):
    content = Path(path).read_bytes()
    stand_ins = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): None,  # an argument of _reconstruct, never looked at
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Latin1(len(content)).encode,
    }
    set_state = {_Dtype: _Dtype.set_state, _Array: _Array.set_state}
    try:
        return unpickle(io.BytesIO(content), stand_ins, set_state)
    except ValueError as error:
        raise _invalid(path, error) from error


def _entry(path, pickled, name):
    """The dict entry `name`, whose key Python 2 wrote as bytes and Python 3 as text."""
    if isinstance(pickled, dict):
        for key in (name.encode(), name):
            if key in pickled:
                return pickled[key]
    raise _invalid(path, f"there is no {name!r} in it")


def _invalid(path, found):
    return ValueError(f"Invalid {path}. Expected a file of CIFAR-10's python version. Found: {found}")


class _Dtype:
    """Stands for numpy.dtype("u1", False, True) and its state (3, "|", None, None, None, -1, -1, 0)."""

    def __init__(self, code, _align, _copy):
        code = code.decode() if isinstance(code, bytes) else code
        if not re.fullmatch("[iuf][1248]", code):
            raise RefusedError(f"it asks for an array of dtype {code[:20]!r}, which is not a plain number")
        self.code = code
        self.dtype = None

    def set_state(self, state):
        version, order, *parts = state
        order = order.decode() if isinstance(order, bytes) else order
        if version != 3 or order not in ("<", ">", "=", "|") or parts != [None, None, None, -1, -1, 0]:
            raise RefusedError("it asks for an array whose dtype is more than a plain number")
        self.dtype = np.dtype(order + self.code)


class _Array:
    """Stands for an empty numpy array; its state (1, shape, dtype, is_fortran, bytes) becomes `array`."""

    def __init__(self):
        self.array = None

    def set_state(self, state):
        _version, shape, dtype, is_fortran, raw = state
        if type(dtype) is not _Dtype or type(raw) is not bytes:
            raise RefusedError("it asks for an array that is not made of plain numbers")
        is_plain = type(shape) is tuple and len(shape) <= 8
        if not (is_plain and all(type(n) is int and 0 <= n < 2**48 for n in shape)):
            raise RefusedError("it has an array with no plain shape")
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise RefusedError(f"it has an array that claims shape {shape} and dtype {dtype.dtype} in {len(raw)} bytes")
        # A view of the bytes: nothing is allocated on the word of the file.
        self.array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(_class, _shape, _code):
    return _Array()


class _Latin1:
    """Bytes as Python 3 pickles them at protocol 2. One text encoded many times would fill the memory."""

    def __init__(self, most):
        self.left = most

    def encode(self, text, encoding):
        self.left -= len(text)
        if encoding not in ("latin1", b"latin1") or self.left < 0:
            raise RefusedError("it asks for _codecs.encode in another way than bytes need")
        return text.encode("latin-1")
