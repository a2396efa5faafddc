"""TensorFlow's checkpoint format (prefix.index, prefix.data-XXXXX-of-XXXXX), read without TensorFlow.

TensorFlow's own reader ends the process on an index that claims impossible shapes. Here everything that a file claims
is checked before it is believed, and every byte of a number that is returned has been covered by a checksum.

The index is a sorted table of strings as LevelDB writes it (doc/table_format.md of google/leveldb): blocks, each with a
checksum, a block that lists the blocks, and a footer. Its values are protocol buffers (tensor_bundle.proto of
tensorflow/tensorflow): under the empty key a header, under each variable's name where its values lie in the data files.
"""

import math
import struct
import typing
from pathlib import Path

import numpy as np

from gpq_tf.convert.crc32c import crc32c

# Number of a type in types.proto -> type of the values; others (text, resources) are not arrays of plain numbers.
TYPES = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "|u1",
    5: "<i2",
    6: "|i1",
    9: "<i8",
    10: "|b1",
    17: "<u2",
    19: "<f2",
    22: "<u4",
    23: "<u8",
}
_FOOTER_BYTES = 48
_MAGIC = 0xDB4775248B80FB57
_LARGEST_INDEX = 4 * 2**20  # the originals' have 6 kB
_MOST_AXES = 8


class Entry(typing.NamedTuple):
    """Where the values of one variable lie.

    Attributes:
        name: str.
        dtype: str, NumPy's, or None when the values are no plain numbers.
        shape: tuple of int.
        path: Path of the data file.
        offset: int, bytes.
        size: int, bytes.
        checksum: int, CRC-32C of the bytes.
    """

    name: str
    dtype: str | None
    shape: tuple
    path: Path
    offset: int
    size: int
    checksum: int


def index_path(prefix):
    """The path of the index of a checkpoint.

    Example:
        >>> index_path("models/20.ckpt").name
        '20.ckpt.index'
    """
    return Path(f"{prefix}.index")


def read_index(prefix):
    """List the variables of a checkpoint; the data files are looked at for their sizes only.

    Args:
        prefix: str or Path, path without ".index".

    Returns:
        dict of str -> Entry, sorted by name. Together the entries claim no more bytes than the data files have.

    Raises:
        OSError: if the index cannot be opened.
        ValueError: if the index is damaged or no index, or a data file is absent or smaller than the index says.
    """
    index = index_path(prefix)
    size = index.stat().st_size
    try:
        if size > _LARGEST_INDEX:
            raise ValueError(f"{size:,} bytes")
        header, *variables = _table(index.read_bytes())
        if header[0]:
            raise ValueError("no header")
        n_shards = _n_shards(header[1])
        entries = [_entry(prefix, key, message, n_shards) for key, message in variables]
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"Invalid {str(index)!r}. Expected a TensorFlow checkpoint's index. Found: {error}") from error
    _check_sizes(entries)
    return {entry.name: entry for entry in sorted(entries)}


def read(entry):
    """The values of a variable, verified.

    Args:
        entry: Entry with a dtype.

    Returns:
        numpy array of the entry's shape and dtype, read-only.

    Raises:
        OSError: if the data file cannot be read.
        ValueError: if the values are not those that the checkpoint was written with.
    """
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        content = file.read(entry.size)
    if len(content) != entry.size or _masked(crc32c(content)) != entry.checksum:
        raise ValueError(
            f"Invalid {str(entry.path)!r}. Expected the values of {entry.name} that the index has the checksum of. "
            "Found: others; one of the two files is damaged or belongs to another checkpoint"
        )
    return np.frombuffer(content, entry.dtype).reshape(entry.shape)


def _table(content):
    """(key, value) pairs of bytes, the keys rising."""
    footer = content[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or struct.unpack_from("<Q", footer, _FOOTER_BYTES - 8) != (_MAGIC,):
        raise ValueError("another kind of file, or one that is cut off")
    _, at = _handle(footer, 0)  # of a block that TensorFlow leaves empty
    index, _ = _handle(footer, at)
    pairs = []
    for _, value in _pairs(_block(content, *index)):
        handle, _ = _handle(value, 0)
        for pair in _pairs(_block(content, *handle)):
            # Strictly rising keys also rule out that a block is listed again and again.
            if pairs and pair[0] <= pairs[-1][0]:
                raise ValueError("keys that are not sorted")
            pairs.append(pair)
    if not pairs:
        raise ValueError("no header")
    return pairs


def _handle(content, at):
    """((offset, size), place behind) of a block."""
    offset, at = _varint(content, at)
    size, at = _varint(content, at)
    return (offset, size), at


def _block(content, offset, size):
    end = offset + size
    if end + 5 > len(content):
        raise ValueError("a block that is cut off")
    kind, checksum = struct.unpack_from("<BI", content, end)
    if _masked(crc32c(content[offset : end + 1])) != checksum:
        raise ValueError("a block with another checksum")
    if kind:
        raise ValueError("a compressed block, which TensorFlow does not write")
    return content[offset:end]


def _pairs(block):
    """(key, value) pairs of a block: each key is told by what differs from the key before."""
    (n_restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * n_restarts
    if end < 0:
        raise ValueError("a block without its end")
    at, key, pairs = 0, b"", []
    while at < end:
        n_shared, at = _varint(block, at)
        n_own, at = _varint(block, at)
        n_value, at = _varint(block, at)
        if n_shared > len(key) or at + n_own + n_value > end:
            raise ValueError("an entry that is cut off")
        key = key[:n_shared] + block[at : at + n_own]
        pairs.append((key, block[at + n_own : at + n_own + n_value]))
        at += n_own + n_value
    return pairs


def _varint(content, at):
    """(number, place behind): seven bits a byte, lowest first; a set eighth bit says that another byte follows."""
    value = 0
    for place in range(10):
        byte = content[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number without an end")


def _fields(message):
    """(field number, value) of a protocol buffer: int, or bytes of a message within."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif wire in (1, 5):
            value, at = struct.unpack_from("<Q" if wire == 1 else "<I", message, at)[0], at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"a field of kind {wire}")
        if at > len(message):
            raise ValueError("a field that is cut off")
        yield number, value


def _number(fields, number):
    """A field that is to be an integer; one that is left out is 0."""
    value = fields.get(number, 0)
    if not isinstance(value, int):
        raise ValueError(f"bytes where field {number} is a number")
    return value


def _n_shards(message):
    """Number of data files, from BundleHeaderProto."""
    fields = dict(_fields(message))
    n_shards = _number(fields, 1)
    if not 1 <= n_shards < 100_000:
        raise ValueError(f"{n_shards} data files")
    if _number(fields, 2):
        raise ValueError("numbers written by a big-endian machine")
    return n_shards


def _entry(prefix, key, message, n_shards):
    """Entry from BundleEntryProto."""
    name = key.decode()
    # Names are printed; parts of partitioned variables have names that are no text.
    if not name.isprintable():
        raise ValueError(f"a variable's name that is no text, {name!r}")
    fields = dict(_fields(message))
    kind, shard, offset, size, checksum = (_number(fields, number) for number in (1, 3, 4, 5, 6))
    shape, dtype = _shape(fields.get(2, b"")), TYPES.get(kind)
    if dtype and not 0 < size == np.dtype(dtype).itemsize * math.prod(shape):
        raise ValueError(f"{name} of shape {shape} in {size:,} bytes")
    if shard >= n_shards:
        raise ValueError(f"{name} in data file {shard} of {n_shards}")
    path = Path(f"{prefix}.data-{shard:05d}-of-{n_shards:05d}")
    return Entry(name, dtype, shape, path, offset, size, checksum)


def _shape(message):
    """tuple of int, from TensorShapeProto: its fields 2 are the axes, messages whose field 1 is the length."""
    if not isinstance(message, bytes):
        raise ValueError("a number where a shape is expected")
    axes = [value for number, value in _fields(message) if number == 2]
    if len(axes) > _MOST_AXES or any(isinstance(axis, int) for axis in axes):
        raise ValueError("a shape that is none")
    return tuple(_number(dict(_fields(axis)), 1) for axis in axes)


def _check_sizes(entries):
    for path in sorted({entry.path for entry in entries}):
        if not path.is_file():
            raise ValueError(f"Invalid checkpoint. Expected the data file {str(path)!r}. Found: no such file")
        stored = path.stat().st_size
        own = [entry for entry in entries if entry.path == path]
        # The sum as well: entries that lie on top of each other could claim a file many times over.
        claimed = max(max(entry.offset + entry.size for entry in own), sum(entry.size for entry in own))
        if claimed > stored:
            raise ValueError(f"Invalid {str(path)!r}. Expected at least {claimed:,} bytes. Found: {stored:,}")


def _masked(checksum):
    """A checksum as it is stored: turned and shifted, since checksums of texts that hold checksums are weak."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
