"""The pickle within a PyTorch file: a state_dict, with a description in the place of each tensor's numbers.

PyTorch pickles a tensor as a call of a function of its own with the tensor's place in a storage, and a storage, a row
of numbers that is kept outside of the pickle, as a persistent id. Here stand-ins take both down, and check what is
claimed; that the storages are as long as they claim to be is for the reader of the file to see.
"""

import math
import struct
import typing

import numpy as np

from gpq_tf.data.unpickler import RefusedError, unpickle

BFLOAT16 = "bfloat16"  # NumPy has no such type
# PyTorch's class of storages -> type of the numbers
STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
# Types without a class of their own: their storages are bytes.
UNTYPED = {"uint16": "<u2", "uint32": "<u4", "uint64": "<u8"}
_MOST_AXES = 8
_LARGEST = 2**48  # of anything that is counted; products with the size of a number stay far below 2**63


class Storage(typing.NamedTuple):
    """What is claimed of a row of numbers that is kept outside of the pickle.

    Attributes:
        key: str of digits, its name within the file.
        dtype: str, NumPy's, or BFLOAT16.
        size: int, numbers.
    """

    key: str
    dtype: str
    size: int


class Tensor(typing.NamedTuple):
    """Where the numbers of a tensor lie; all within the storage, and no more numbers than the storage has.

    Attributes:
        storage: Storage.
        dtype: str, as in `Storage`; most often the storage's own.
        offset: int, of the first number, in numbers of `dtype`.
        shape: tuple of int.
        strides: tuple of int, in numbers.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple
    strides: tuple


def item_size(dtype):
    """Bytes of one number.

    Example:
        >>> item_size("<f4"), item_size(BFLOAT16)
        (4, 2)
    """
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def n_bytes(storage):
    """Bytes that a storage claims to have.

    Example:
        >>> n_bytes(Storage("0", "<f4", size=3))
        12
    """
    return storage.size * item_size(storage.dtype)


def load_state_dict(file):
    """Read the description of a state_dict.

    Args:
        file: binary file in memory; it is left behind the pickle.

    Returns:
        (tensors, storages): dict of str -> Tensor, in the file's order; dict of str -> Storage, all that are claimed.

    Raises:
        ValueError: if the pickle is damaged, asks for anything but what PyTorch writes for tensors of plain numbers,
            or is not a flat dict of them. It says what was found, not in which file.

    Example:
        >>> import io
        >>> tensors, storages = load_state_dict(io.BytesIO(dump_state_dict({"x": np.float32([[1, 2, 3]])})))
        >>> tensors["x"].shape, tensors["x"].strides, storages["0"].size
        ((1, 3), (3, 1), 3)
    """
    storages = {}

    def storage(claim):
        found = _storage(claim)
        if storages.setdefault(found.key, found) != found:
            raise RefusedError(f"it has two claims about storage {found.key}")
        return found

    pickled = unpickle(file, _STAND_INS, {dict: _ignore_metadata}, storage)
    if type(pickled) is not dict:
        raise ValueError(f"an object of type {type(pickled).__name__}, not a dict of tensors")
    for name, value in pickled.items():
        # Names are printed.
        if type(name) is not str or not name.isprintable():
            raise ValueError(f"a name that is no text, {name[:80]!r}")
        if type(value) is not Tensor:
            raise ValueError(f"{name[:80]!r} is of type {type(value).__name__}, not a tensor")
    return pickled, storages


def dump_state_dict(arrays):
    """The pickle of a state_dict, the numbers of the n-th array being in storage n.

    Args:
        arrays: dict of str -> numpy array whose type is in `STORAGES`.

    Returns:
        bytes, a pickle of protocol 2 as PyTorch 1.6 and later write them.

    Example:
        >>> dump_state_dict({})
        b'\\x80\\x02ccollections\\nOrderedDict\\n)R(u.'
    """
    classes = {dtype: name for name, dtype in STORAGES.items()}
    parts = [b"\x80\x02", _EMPTY_ORDERED_DICT, b"("]
    for key, (name, values) in enumerate(arrays.items()):
        steps = [max(length, 1) for length in values.shape]  # as PyTorch counts an empty axis
        strides = [math.prod(steps[axis + 1 :]) for axis in range(values.ndim)]
        parts += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage"),
            f"ctorch\n{classes[values.dtype.str]}\n".encode(),
            _text(str(key)),
            _text("cpu"),
            _integer(values.size),
            b"tQK\x00",  # the tuple is a persistent id; the tensor begins at its storage's number 0
            b"(" + b"".join(map(_integer, values.shape)) + b"t",
            b"(" + b"".join(map(_integer, strides)) + b"t",
            b"\x89" + _EMPTY_ORDERED_DICT + b"tR",  # needs no gradient, has no hooks
        ]
    return b"".join([*parts, b"u."])


_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _text(text):
    content = text.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def _integer(value):
    return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


class _Type(typing.NamedTuple):
    """Stands for a class of storages or a dtype."""

    dtype: str


def _ordered_dict():
    return {}


def _ignore_metadata(_, state):
    """The versions of the modules, which state_dict() puts on its dict; what is converted has only one."""
    if type(state) is not dict or list(state) != ["_metadata"]:
        raise RefusedError("it sets the state of a dict in another way than PyTorch does")


def _storage(claim):
    # The older layout has a sixth value: of what other storage this is a part. It is None since PyTorch 0.4.
    if type(claim) is not tuple or claim[:1] != ("storage",) or len(claim) < 5 or claim[5:] not in ((), (None,)):
        raise RefusedError("it has a persistent id that is no storage")
    kind, key, device, size = claim[1:5]
    is_key = type(key) is str and key.isascii() and key.isdigit() and len(key) <= 20
    if type(kind) is not _Type or not is_key or type(device) is not str or not _is_count(size):
        raise RefusedError("it has a storage without a plain type, name, device or size")
    return Storage(key, kind.dtype, size)


def _is_count(value):
    return type(value) is int and 0 <= value < _LARGEST


def _rebuild_tensor(storage, offset, shape, strides, _requires_grad=False, _hooks=None, metadata=None):
    if type(storage) is not Storage:
        raise RefusedError("it has a tensor without a storage")
    return _tensor(storage, storage.dtype, offset, shape, strides, metadata)


def _rebuild_tensor_v3(storage, offset, shape, strides, _requires_grad, _hooks, kind, metadata=None):
    if type(storage) is not Storage or type(kind) is not _Type:
        raise RefusedError("it has a tensor without a storage or a type")
    return _tensor(storage, kind.dtype, offset, shape, strides, metadata)


def _tensor(storage, dtype, offset, shape, strides, metadata):
    if metadata:
        raise RefusedError("it has a tensor whose numbers are yet to be negated or conjugated")
    is_plain = type(shape) is type(strides) is tuple and len(shape) == len(strides) <= _MOST_AXES
    is_plain = is_plain and all(map(_is_count, (offset, *shape, *strides)))
    # An empty tensor may have long axes beside the one of length 0.
    if not is_plain or math.prod(max(length, 1) for length in shape) >= _LARGEST:
        raise RefusedError("it has a tensor with no plain shape")
    size = n_bytes(storage) // item_size(dtype)
    n = math.prod(shape)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    # As many numbers as the storage at most: a view that repeats some could grow to any size when it is copied.
    if n > size or (last >= size if n else offset > size):
        raise RefusedError(
            f"it has a tensor of shape {shape} and strides {strides} from number {offset} of a storage of {size}"
        )
    return Tensor(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data, _requires_grad=False, _hooks=None, _state=None):
    if type(data) is not Tensor:
        raise RefusedError("it has a parameter that is no tensor")
    return data


_STAND_INS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch.storage", "UntypedStorage"): _Type("|u1"),
    **{("torch", name): _Type(dtype) for name, dtype in (STORAGES | UNTYPED).items()},
}
