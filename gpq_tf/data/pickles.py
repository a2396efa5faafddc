"""CIFAR-10's batch files: pickles, read by an unpickler that runs no code.

A pickle is a program for a stack machine, and the usual unpickler lets it call any function. Here it may
build lists, dicts, tuples, strings and numbers, and name the four functions with which numpy and Python 2
pickled an array of numbers; in their place stand stubs that check what they are given.
"""

import io
import math
import pickle
import pickletools
import re
from pathlib import Path

import numpy as np

SIDE = 32  # pixels
ROW = 3 * SIDE * SIDE  # one image: 1024 red values, 1024 green, 1024 blue

# An opcode of one byte can take 70 bytes of memory; a batch of 10,000 images written by Python 3 has 80,000
# of them.
MAX_OPCODES = 1_000_000

# What Python 2 and 3 write for these at protocols 2 to 4.
# fmt: off
ADMITTED = [
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINGET",
    "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
]
# fmt: on


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
    try:
        return _Unpickler(content).load()
    except _RefusedError as error:
        found = f"{error}; nothing but arrays, strings, lists, dicts and numbers is read"
        raise _invalid(path, found) from error
    except Exception as error:  # a damaged program fails anywhere, with nearly any exception
        found = f"it is damaged, cut off or no pickle ({type(error).__name__} while reading)"
        raise _invalid(path, found) from error


def _entry(path, pickled, name):
    """The dict entry `name`, whose key Python 2 wrote as bytes and Python 3 as text."""
    if isinstance(pickled, dict):
        for key in (name.encode(), name):
            if key in pickled:
                return pickled[key]
    raise _invalid(path, f"there is no {name!r} in it")


def _invalid(path, found):
    return ValueError(f"Invalid {path}. Expected a file of CIFAR-10's python version. Found: {found}")


class _RefusedError(Exception):
    """The pickle asks for something that is not read."""


class _Dtype:
    """Stands for numpy.dtype("u1", False, True) and its state (3, "|", None, None, None, -1, -1, 0)."""

    def __init__(self, code, *_):
        code = code.decode() if isinstance(code, bytes) else code
        if not re.fullmatch("[iuf][1248]", code):
            raise _RefusedError(f"it asks for an array of dtype {code[:20]!r}, which is not a plain number")
        self.code = code
        self.dtype = None

    def __setstate__(self, state):
        version, order, *parts = state
        order = order.decode() if isinstance(order, bytes) else order
        if version != 3 or order not in ("<", ">", "=", "|") or parts != [None, None, None, -1, -1, 0]:
            raise _RefusedError("it asks for an array whose dtype is more than a plain number")
        self.dtype = np.dtype(order + self.code)


class _Array:
    """Stands for an empty numpy array; its state (1, shape, dtype, is_fortran, bytes) becomes `array`."""

    def __init__(self):
        self.array = None

    def __setstate__(self, state):
        _version, shape, dtype, is_fortran, raw = state
        if type(dtype) is not _Dtype or type(raw) is not bytes:
            raise _RefusedError("it asks for an array that is not made of plain numbers")
        is_plain = type(shape) is tuple and len(shape) <= 8
        if not (is_plain and all(type(n) is int and 0 <= n < 2**48 for n in shape)):
            raise _RefusedError("it has an array with no plain shape")
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise _RefusedError(
                f"it has an array that claims shape {shape} and dtype {dtype.dtype} in {len(raw)} bytes"
            )
        # A view of the bytes: nothing is allocated on the word of the file.
        self.array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(*_):
    return _Array()


class _Opcodes(dict):
    """Opcode -> method, for the admitted ones; refuses others, and too many."""

    left = MAX_OPCODES

    def __getitem__(self, code):
        self.left -= 1
        if self.left < 0:
            raise _RefusedError(f"it has more than {MAX_OPCODES:,} opcodes")
        return super().__getitem__(code)

    def __missing__(self, code):
        known = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
        if code not in known:
            raise ValueError(f"no opcode: {code}")
        raise _RefusedError(f"it asks for the opcode {known[code]}")


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python, whose memo is a dict: an index however large takes no memory."""

    def __init__(self, content):
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.dispatch = _Opcodes({getattr(pickle, name)[0]: self.handlers[name] for name in ADMITTED})
        self.text_left = len(content)

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of _reconstruct, never looked at
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("_codecs", "encode"):
            return self.encode
        raise _RefusedError(f"it asks for {module[:80]}.{name[:80]}")

    def encode(self, text, encoding):
        """Bytes as Python 3 pickles them at protocol 2. One text encoded many times would fill the memory."""
        self.text_left -= len(text)
        if encoding not in ("latin1", b"latin1") or self.text_left < 0:
            raise _RefusedError("it asks for _codecs.encode in another way than bytes need")
        return text.encode("latin-1")

    def load_setitems(self):
        items = self.pop_mark()
        # Only strings: the hash of nested tuples can take for ever.
        if not all(type(key) in (bytes, str) for key in items[::2]):
            raise _RefusedError("it has a dict whose keys are not strings")
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise ValueError("no dict to fill")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.metastack.append(self.stack)
        self.stack = [key, value]
        self.load_setitems()

    def load_build(self):
        # pickle's own would set attributes of whatever is on the stack.
        state = self.stack.pop()
        if type(self.stack[-1]) not in (_Array, _Dtype):
            raise _RefusedError(f"it sets the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    handlers = {name: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in ADMITTED}  # noqa: RUF012
    handlers |= {"SETITEMS": load_setitems, "SETITEM": load_setitem, "BUILD": load_build}
