"""MATLAB files of version 5: their arrays of numbers, read so that a damaged or hostile file is an error.

scipy.io.loadmat believes the indices of a sparse matrix: one changed bit of a file can end the process.
Format: "MAT-File Format", The MathWorks, chapter 1.
"""

import itertools
import math
import struct
import zlib
from pathlib import Path

import numpy as np

HEADER_BYTES = 128
MATRIX, COMPRESSED = 14, 15  # kinds of element that hold other elements
# kind of element -> type of its numbers
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
# class of matrix -> its type; the numbers may be stored in a smaller one
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
SPARSE = 5
IS_COMPLEX = 0x0800


def load_matlab(path, max_bytes=2**31):
    """Read the real arrays of a MATLAB file.

    Args:
        path: str or Path.
        max_bytes: int, the most bytes that compressed variables may grow to, together.

    Returns:
        dict: name -> numpy array of at least two axes, or scipy.sparse.csc_matrix. Variables of other classes
        (text, structures, cells, complex numbers) are left out.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no MATLAB file of version 5, is damaged or cut off, or grows beyond `max_bytes`.

    Example:
        >>> import scipy.io
        >>> scipy.io.savemat("/tmp/gpq_tf_doctest_matlab.mat", {"x": np.arange(6.0).reshape(2, 3)})
        >>> load_matlab("/tmp/gpq_tf_doctest_matlab.mat")
        {'x': array([[0., 1., 2.],
               [3., 4., 5.]])}
    """
    content = memoryview(Path(path).read_bytes())
    try:
        return _variables(content, max_bytes)
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"Invalid {path}. Expected a MATLAB file of version 5. Found: {error}") from error


def _variables(content, max_bytes):
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(bytes(content[HEADER_BYTES - 4 : HEADER_BYTES]))
    if order is None:
        raise ValueError("another header")
    variables = {}
    for kind, body in _elements(content[HEADER_BYTES:], order):
        if kind == COMPRESSED:
            stream = zlib.decompressobj()
            body = stream.decompress(body, max_bytes + 1)
            if not stream.eof or len(body) > max_bytes:
                raise ValueError(f"a variable that is cut off or grows beyond {max_bytes:,} bytes")
            max_bytes -= len(body)
            kind, body = next(_elements(memoryview(body), order), (None, None))
        if kind == MATRIX:
            name, array = _matrix(body, order)
            if array is not None:
                variables[name] = array
    return variables


def _elements(content, order):
    """Yield (kind, bytes) of the elements that follow each other in `content`."""
    place = 0
    while place < len(content):
        (kind,) = struct.unpack_from(order + "I", content, place)
        if kind >> 16:  # up to four bytes are kept within the eight of the tag
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
            end = place + 8
        else:
            (size,) = struct.unpack_from(order + "I", content, place + 4)
            start = place + 8
            end = start + size + (-size % 8 if kind != COMPRESSED else 0)
        if start + size > min(end, len(content)):
            raise ValueError(f"an element of {size:,} bytes that is cut off")
        yield kind, content[start : start + size]
        place = end


def _matrix(body, order):
    """(name, array) of one variable; the array is None when it is not made of real numbers."""
    parts = list(itertools.islice(_elements(body, order), 6))  # six at most: a sparse matrix
    if len(parts) < 3:
        raise ValueError("a variable without name and shape")
    flags, shape = _numbers(*parts[0], order), _numbers(*parts[1], order)
    name = bytes(parts[2][1]).decode("latin-1")
    if not len(flags):
        raise ValueError("a variable without a class")
    matrix_class = int(flags[0]) & 0xFF
    if int(flags[0]) & IS_COMPLEX or matrix_class not in (SPARSE, *CLASSES):
        return name, None
    values = [_numbers(*part, order) for part in parts[3:]]
    if shape.dtype.kind != "i" or not 2 <= len(shape) <= 8 or (shape < 0).any():
        raise ValueError(f"{name!r} without a plain shape")
    shape = tuple(shape.tolist())
    if matrix_class == SPARSE:
        return name, _sparse(name, shape, values)
    if len(values) != 1 or values[0].size != math.prod(shape):
        raise ValueError(f"{name!r} that claims shape {shape} for {sum(v.size for v in values)} numbers")
    return name, values[0].astype(CLASSES[matrix_class]).reshape(shape, order="F")


def _numbers(kind, content, order):
    if kind not in NUMBERS:
        raise ValueError(f"kind {kind} where numbers are expected")
    return np.frombuffer(content, order + NUMBERS[kind])


def _sparse(name, shape, values):
    """Columns as in scipy's CSC: column n has the values, at the rows, starts[n] to starts[n + 1]."""
    import scipy.sparse

    if len(values) != 3 or len(shape) != 2 or any(v.dtype.kind != "i" for v in values[:2]):
        raise ValueError(f"{name!r}, a sparse matrix without rows, columns and values")
    rows, starts, data = values
    n_stored = int(starts[-1]) if len(starts) else -1
    if len(starts) != shape[1] + 1 or starts[0] != 0 or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{name!r}, a sparse matrix whose column starts do not rise from 0")
    if n_stored > min(len(rows), len(data)):
        raise ValueError(f"{name!r}, a sparse matrix that claims {n_stored:,} values of {len(data):,}")
    rows, data = rows[:n_stored], data[:n_stored]
    if n_stored and not 0 <= rows.min() <= rows.max() < shape[0]:
        raise ValueError(f"{name!r}, a sparse matrix with rows outside 0..{shape[0] - 1}")
    native = data.astype(data.dtype.newbyteorder("="))
    return scipy.sparse.csc_matrix((native, rows.astype(np.int32), starts.astype(np.int32)), shape=shape)
