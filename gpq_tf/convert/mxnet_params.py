"""MXNet's lists of arrays (.params), read without MXNet.

Numbers are little-endian, nothing is aligned, and there is no checksum: a flipped bit in a weight cannot be seen here.
Whatever a file claims is compared with its size before memory is taken.

    uint64 0x112, uint64 0, uint64 number of arrays, arrays, uint64 number of names (0, or one an array), names

An array starts with a word that tells the version: one of the three below or, in the oldest files, the number of axes.
"""

import math
import struct
from pathlib import Path

import numpy as np

_LIST = 0x112
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # the last one is V2 by NumPy's rules of shapes
# Number of a type in mshadow -> type of the values.
TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "|u1", 4: "<i4", 5: "|i1", 6: "<i8", 7: "|b1"}
# How an array is stored (dense, row-sparse, CSR) -> number of arrays of indices.
_INDICES = {0: 0, 1: 1, 2: 2}
_MOST_ARRAYS = 10_000  # ResNet-152 has 932
_MOST_AXES = 32
_LARGEST = 2**48  # values; an array with an axis of length 0 has none, but NumPy multiplies the other axes
_SPARSE_ROOM = 2**28  # bytes of a file's sparse arrays when dense, which its size does not limit


def read(path):
    """The arrays of a .params file of any version: save_checkpoint's, mx.nd.save's, gluon's export and save_parameters.

    Args:
        path: str or Path.

    Returns:
        dict of str -> numpy array, dense, in the file's order and with the file's names: "arg:" or "aux:" is in front
        where save_checkpoint or export wrote it (`variable_name` takes it off); "0", "1", ... in a list without names.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no .params file, is cut off or otherwise damaged, has an array without values or of a type
            that NumPy lacks, or sparse ones that take more than 256 MiB when dense. The message says at which byte.

    Example:
        >>> array = struct.pack("<2I3if", 1, 1, 1, 0, 0, 2.5)  # one axis, of length 1; cpu(0); float32
        >>> whole = struct.pack("<3Q", 0x112, 0, 1) + array + struct.pack("<2Q1s", 1, 1, b"w")
        >>> _ = Path("/tmp/gpq_tf_doctest.params").write_bytes(whole)
        >>> read("/tmp/gpq_tf_doctest.params")
        {'w': array([2.5], dtype=float32)}
    """
    content = Path(path).read_bytes()
    try:
        return _named_arrays(content)
    except _DamageError as damage:
        raise ValueError(f"Invalid {str(path)!r}. {damage}") from None


def variable_name(name):
    """What the symbol calls the array that a file calls `name`.

    Example:
        >>> variable_name("aux:bn_moving_var")
        'bn_moving_var'
    """
    return name[4:] if name.startswith(("arg:", "aux:")) else name


class _DamageError(Exception):
    def __init__(self, at, expected, found):
        super().__init__(f"Expected {expected} at byte {at:,}. Found: {found}")


def _named_arrays(content):
    (mark, reserved, n_arrays), at = _numbers(content, 0, "QQQ", "the head of a .params file")
    if (mark, reserved) != (_LIST, 0):
        raise _DamageError(0, f"{_LIST:#x} and 0, which every .params file begins with", f"{mark:#x} and {reserved:#x}")
    if n_arrays > _MOST_ARRAYS:
        raise _DamageError(16, f"at most {_MOST_ARRAYS:,} arrays", f"{n_arrays:,}")
    arrays, room = [], _SPARSE_ROOM
    for _ in range(n_arrays):
        array, at, room = _array(content, at, room)
        arrays.append(array)
    (n_names,), end = _numbers(content, at, "Q", "the number of names")
    if n_names not in (0, n_arrays):
        raise _DamageError(at, f"as many names as arrays, {n_arrays:,}, or none", f"{n_names:,}")
    named = {} if n_names else {str(index): array for index, array in enumerate(arrays)}
    for array in arrays[:n_names]:
        start = end
        name, end = _name(content, start)
        if name in named:
            raise _DamageError(start, "a name that has not been before", repr(name))
        named[name] = array
    if end != len(content):
        raise _DamageError(end, "the end of the file", f"{len(content) - end:,} bytes more")
    return named


def _array(content, at, room):
    """(numpy array, place behind, what is left of the `room` for sparse arrays)."""
    start = at
    (version,), at = _numbers(content, at, "I", "an array")
    storage, stored = 0, None
    if version in (_V2, _V3):
        (storage,), at = _numbers(content, at, "i", "how an array is stored")
        if storage not in _INDICES:
            raise _DamageError(at - 4, f"how an array is stored, one of {', '.join(map(str, _INDICES))}", storage)
        if storage:
            stored, at = _shape(content, start, at, version)
    shape, at = _shape(content, start, at, version)
    shape_at = at - 8 * len(shape)
    (_, _), at = _numbers(content, at, "ii", "a device")  # which device wrote it is no matter
    dtype, at = _type(content, at)
    if not storage:
        return *_values(content, at, dtype, shape), room
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes > room:
        raise _DamageError(shape_at, f"the shape of a sparse array that takes up to {room:,} bytes when dense", shape)
    # What the indices are stands before the values, they themselves behind.
    kinds = []
    for _ in range(_INDICES[storage]):
        kind, at = _kind_of_indices(content, start, at)
        kinds.append(kind)
    values_at = at
    values, at = _values(content, at, dtype, stored)
    indices = []
    for kind in kinds:
        index, at = _values(content, at, *kind)
        indices.append(index)
    dense = _dense_rows if storage == 1 else _dense_csr
    return dense(values_at, shape, values, *indices), at, room - n_bytes


def _kind_of_indices(content, start, at):
    """((dtype, shape), place behind), of an array of indices of the array that begins at `start`."""
    dtype, end = _type(content, at)
    if dtype not in (np.int32, np.int64):
        raise _DamageError(at, "a type of indices, int32 or int64", dtype)
    shape, end = _shape(content, start, end, _V2)
    return (dtype, shape), end


def _dense_rows(at, shape, values, rows):
    """A row-sparse array: `values` are some of its rows, `rows` their numbers, ascending."""
    fits = len(shape) > 0 and rows.ndim == 1 and values.shape == (len(rows), *shape[1:])
    if not (fits and _ascend(rows, shape[0])):
        raise _DamageError(at, f"rows of an array {shape}, with their numbers in ascending order", "others")
    array = np.zeros(shape, values.dtype)
    array[rows] = values
    return array


def _dense_csr(at, shape, values, ends, columns):
    """A CSR array: row i has `values[ends[i] : ends[i + 1]]` in these `columns`, which ascend."""
    n = values.size
    fits = len(shape) == 2 and ends.ndim == 1 and values.ndim == 1 and columns.shape == (n,)
    fits = fits and len(ends) == shape[0] + 1 and ends[0] == 0 and ends[-1] == n and (ends[1:] >= ends[:-1]).all()
    # Places in the array laid out as one row ascend if the columns of each row do.
    if fits and (n == 0 or 0 <= columns.min() <= columns.max() < shape[1]):
        rows = np.repeat(np.arange(shape[0]), np.diff(ends))
        if _ascend(rows * shape[1] + columns, math.prod(shape)):
            array = np.zeros(shape, values.dtype)
            array[rows, columns] = values
            return array
    raise _DamageError(at, f"rows of a CSR array {shape}, with their columns in ascending order", "others")


def _ascend(numbers, n):
    """Whether all are in 0 ... n - 1, each larger than the one before."""
    return len(numbers) == 0 or bool(numbers[0] >= 0 and numbers[-1] < n and (numbers[1:] > numbers[:-1]).all())


def _shape(content, start, at, version):
    """(tuple, place behind): number of axes and their lengths, of the array that begins at `start`."""
    if version in (_V1, _V2, _V3):
        (n_axes,), at = _numbers(content, at, "i", "a number of axes")
        kind = "q"
    else:
        n_axes, kind = version, "I"
    # Without axes there is one value by NumPy's rules and none, nor anything else of the array, by MXNet's own.
    fewest = 0 if version == _V3 else 1
    if not fewest <= n_axes <= _MOST_AXES:
        # A number that is far off is a damaged version rather than a number of axes.
        found = hex(n_axes) if n_axes > 0xFFFF else n_axes
        raise _DamageError(start, f"an array of {fewest} to {_MOST_AXES} axes", f"{found} axes")
    shape, end = _numbers(content, at, n_axes * kind, f"the lengths of {n_axes} axes")
    if min(shape, default=0) < 0 or math.prod(max(length, 1) for length in shape) > _LARGEST:
        raise _DamageError(at, "a shape that an array can have", shape)
    return shape, end


def _type(content, at):
    """(dtype, place behind)."""
    (number,), end = _numbers(content, at, "i", "a type")
    if number not in TYPES:
        raise _DamageError(at, f"the number of a type, one of {', '.join(map(str, TYPES))}", number)
    return np.dtype(TYPES[number]), end


def _values(content, at, dtype, shape):
    """(numpy array, place behind)."""
    n_values = math.prod(shape)
    end = at + n_values * dtype.itemsize
    if end > len(content):
        raise _DamageError(at, f"the values of {dtype} {shape} ({end - at:,} bytes)", f"{len(content) - at:,} bytes")
    # A copy, since values that are not aligned slow down whatever comes after.
    return np.frombuffer(content, dtype, n_values, at).reshape(shape).copy(), end


def _name(content, at):
    """(str, place behind)."""
    (length,), start = _numbers(content, at, "Q", "the length of a name")
    if length > len(content) - start:
        raise _DamageError(start, f"a name of {length:,} bytes", f"{len(content) - start:,} bytes")
    end = start + length
    raw = content[start:end]
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = "\0"
    # Names are printed.
    if not name.isprintable():
        raise _DamageError(start, "a name that can be printed", repr(raw[:40]))
    return name, end


def _numbers(content, at, kinds, what):
    """(tuple of numbers, place behind); `kinds` as in struct."""
    size = struct.calcsize("<" + kinds)
    if size > len(content) - at:
        raise _DamageError(at, f"{what} ({size} bytes)", f"{len(content) - at:,} bytes")
    return struct.unpack_from("<" + kinds, content, at), at + size
