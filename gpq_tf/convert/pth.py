"""PyTorch's files (.pth, .pt) of a state_dict, read and written without PyTorch, and without running their pickle.

Since PyTorch 1.6 such a file is a zip archive, NAME/data.pkl and NAME/data/KEY for each storage, all stored as they
are (torch/serialization.py of pytorch/pytorch). Before, it was five pickles (a magic number, the layout's version, the
machine, the object, the keys of the storages) and then, in the order of the keys, the storages, each behind its length.
"""

import io
import re
import struct
import zipfile
from pathlib import Path

import numpy as np

from gpq_tf.convert import torch_pickle
from gpq_tf.data.unpickler import unpickle
from gpq_tf.files import replacing

_EXPECTED = "Expected what torch.save(network.state_dict(), path) writes."
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


def find(path):
    """The PyTorch file that `path` means, or None.

    Example:
        >>> find("no_such_file.pth") is None
        True
    """
    path = Path(path)
    return path if path.suffix in (".pth", ".pt") and path.is_file() else None


def read(path):
    """The tensors of a state_dict, verified as far as the layout allows: the older one has no checksums.

    Args:
        path: str or Path.

    Returns:
        dict of str -> numpy array, in the file's order, read-only, in the tensor's type; bfloat16, which NumPy does not
        have, becomes float32, whose values hold all of it. Tensors that share a storage share memory.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is damaged, is something else, or asks for anything but tensors of plain numbers.

    Example:
        >>> write("/tmp/gpq_tf_doctest.pth", {"fc.bias": np.float32([0.5, 1.0])})
        >>> read("/tmp/gpq_tf_doctest.pth")
        {'fc.bias': array([0.5, 1. ], dtype=float32)}
    """
    content = Path(path).read_bytes()
    try:
        tensors, contents = (_read_zip if content.startswith(b"PK") else _read_legacy)(content)
    except ValueError as error:
        raise ValueError(f"Invalid {str(path)!r}. {_EXPECTED} Found: {error}") from error
    # Once for each storage: of tensors that share one, each would take as much memory again.
    used = {(tensor.storage.key, tensor.dtype) for tensor in tensors.values()}
    numbers = {(key, dtype): _numbers(contents[key], dtype) for key, dtype in used}
    return {name: _array(numbers[tensor.storage.key, tensor.dtype], tensor) for name, tensor in tensors.items()}


def write(path, arrays):
    """Write a state_dict that torch.load reads, with weights_only=True as well as in PyTorch 1.7, which SPQ used.

    The same arrays give the same bytes, whatever the file's name.

    Args:
        path: str or Path; replaced only by a whole file.
        arrays: dict of str -> numpy array of float16, float32, float64, int8 to int64, uint8 or bool.

    Raises:
        ValueError: if a name or the type of an array is none of these.
        OSError: if the file cannot be written.

    Example:
        >>> write("/tmp/gpq_tf_doctest.pth", {"bn.num_batches_tracked": np.array(32)})
        >>> read("/tmp/gpq_tf_doctest.pth")
        {'bn.num_batches_tracked': array(32)}
    """
    little = {name: _little_endian(name, values) for name, values in arrays.items()}
    members = {
        "data.pkl": torch_pickle.dump_state_dict(little),
        "byteorder": b"little",
        **{f"data/{key}": values.tobytes() for key, values in enumerate(little.values())},
        "version": b"3\n",
    }
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(f"archive/{name}")  # PyTorch's name of the folder; the date is always the same
            member.create_system = 3  # which would depend on the machine
            archive.writestr(member, content)


def _little_endian(name, values):
    if type(name) is not str or not name.isprintable():
        raise ValueError(f"Invalid name. Expected text that can be printed. Received: {name!r}")
    values = np.asarray(values)
    values = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
    if values.dtype.str not in torch_pickle.STORAGES.values():
        raise ValueError(
            f"Invalid array {name!r}. Expected a type that PyTorch 1.7 has storages of. Received: {values.dtype}"
        )
    return values


def _read_zip(content):
    """(name -> Tensor, key -> bytes of the storage) of the layout since PyTorch 1.6."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except Exception as error:  # zipfile raises many of its kinds on damaged tables
        raise ValueError("a zip archive that is damaged or cut off") from error
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise ValueError("a zip archive with two members of one name")
    if any(member.compress_type or member.compress_size != member.file_size for member in members.values()):
        raise ValueError("a zip archive with compressed members, which a state_dict has not")
    # Members that lie on top of each other could claim a file many times over.
    claimed = sum(member.file_size for member in members.values())
    if claimed > len(content):
        raise ValueError(f"a zip archive of {len(content):,} bytes with members of {claimed:,}")
    folders = [name.removesuffix("data.pkl") for name in members if re.fullmatch("[^/]+/data.pkl", name)]
    if len(folders) != 1:
        raise ValueError(f"a zip archive with {len(folders)} members NAME/data.pkl")

    def member(name):
        if folders[0] + name not in members:
            raise ValueError(f"a zip archive without the member {name}")
        try:
            return archive.read(members[folders[0] + name])  # this compares the checksum
        except Exception as error:
            raise ValueError(f"a zip archive whose member {name} is damaged") from error

    if folders[0] + "byteorder" in members and member("byteorder") != b"little":
        raise ValueError("numbers written by a big-endian machine")
    tensors, storages = torch_pickle.load_state_dict(io.BytesIO(member("data.pkl")))
    contents = {key: member(f"data/{key}") for key in storages}
    for key, storage in storages.items():
        _check_size(storage, contents[key])
    return tensors, contents


def _read_legacy(content):
    """(name -> Tensor, key -> bytes of the storage) of the layout before PyTorch 1.6."""
    file = io.BytesIO(content)
    try:
        is_legacy = unpickle(file) == _LEGACY_MAGIC
    except ValueError:
        is_legacy = False
    if not is_legacy:
        raise ValueError("neither a zip archive nor the layout before PyTorch 1.6")
    if unpickle(file) != _LEGACY_VERSION:
        raise ValueError("an unknown version of the layout before PyTorch 1.6")
    machine = unpickle(file)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise ValueError("numbers of a machine that is not said to be little-endian")
    tensors, storages = torch_pickle.load_state_dict(file)
    keys = unpickle(file)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("a list of storages that is not the list of those that the tensors use")
    contents, at = {}, file.tell()
    for key in keys:
        if at + 8 > len(content):
            raise ValueError(f"storage {key} is cut off")
        (size,) = struct.unpack_from("<q", content, at)
        if size != storages[key].size:
            raise ValueError(f"storage {key} of {size:,} numbers where {storages[key].size:,} are claimed")
        start, at = at + 8, at + 8 + torch_pickle.n_bytes(storages[key])
        contents[key] = content[start:at]
        _check_size(storages[key], contents[key])
    if at != len(content):
        raise ValueError(f"{len(content) - at:,} bytes behind the last storage")
    return tensors, contents


def _check_size(storage, content):
    expected = torch_pickle.n_bytes(storage)
    if len(content) != expected:
        raise ValueError(f"storage {storage.key} in {len(content):,} bytes where {expected:,} are claimed")


def _numbers(content, dtype):
    """The numbers of a storage, in a row."""
    count = len(content) // torch_pickle.item_size(dtype)
    if dtype == torch_pickle.BFLOAT16:  # the upper half of a float32
        return (np.frombuffer(content, "<u2", count).astype("<u4") << 16).view("<f4")
    if dtype == "|b1":
        return np.frombuffer(content, "|u1") != 0
    return np.frombuffer(content, dtype, count)


def _array(numbers, tensor):
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
