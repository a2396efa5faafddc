"""Small files as PyTorch writes them, by Python's own pickler, for tests and for benchmarks/fuzz_convert.py."""

import collections
import dataclasses
import io
import pickle
import struct
import sys
import types
import zipfile
from unittest import mock

CLASSES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass(eq=False)
class Storage:
    content: bytes
    size: int  # numbers
    kind: str  # name of PyTorch's class


@dataclasses.dataclass(eq=False)
class Tensor:
    storage: Storage
    offset: int
    shape: tuple
    strides: tuple
    dtype: str = ""  # of one that is kept in an UntypedStorage
    metadata: tuple = ()  # its last argument, if any

    def __reduce__(self):
        module = sys.modules["torch._utils"]
        where = (self.storage, self.offset, self.shape, self.strides)
        if self.dtype:
            dtype = getattr(sys.modules["torch"], self.dtype)
            return module._rebuild_tensor_v3, (*where, False, collections.OrderedDict(), dtype)
        return module._rebuild_tensor_v2, (*where, False, collections.OrderedDict(), *self.metadata)


@dataclasses.dataclass(eq=False)
class OldTensor(Tensor):
    def __reduce__(self):
        function = sys.modules["torch._utils"]._rebuild_tensor
        return function, (self.storage, self.offset, self.shape, self.strides)


@dataclasses.dataclass(eq=False)
class Parameter:
    data: Tensor
    state: tuple = ()  # ({attribute: value},), if any

    def __reduce__(self):
        module = sys.modules["torch._utils"]
        function = module._rebuild_parameter_with_state if self.state else module._rebuild_parameter
        return function, (self.data, True, collections.OrderedDict(), *self.state)


def tensor(array):
    """A Tensor with a storage of its own."""
    strides, step = (), 1
    for length in reversed(array.shape):
        strides, step = (step, *strides), step * max(length, 1)
    return Tensor(Storage(array.tobytes(), array.size, CLASSES[array.dtype.name]), 0, array.shape, strides)


def state_dict(arrays):
    """An OrderedDict of Tensors, with the versions of modules that Module.state_dict() notes."""
    state = collections.OrderedDict((name, tensor(array)) for name, array in arrays.items())
    state._metadata = collections.OrderedDict({"": {"version": 1}, "0": {"version": 2}})
    return state


def _torch():
    """Modules that look to the pickler like PyTorch's: it compares what it names with what it finds there."""
    torch, utils, storage = (types.ModuleType(name) for name in ("torch", "torch._utils", "torch.storage"))

    class Dtype:
        def __init__(self, name):
            self.name = name

        def __reduce__(self):
            return self.name  # a global of this name

    for name in (*CLASSES.values(), "BFloat16Storage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("uint16", "uint32", "uint64"):
        setattr(torch, name, Dtype(name))
        getattr(torch, name).__module__ = "torch"
    storage.UntypedStorage = type("UntypedStorage", (), {"__module__": "torch.storage"})
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
    ):
        function = types.FunctionType((lambda *_: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    return {"torch": torch, "torch._utils": utils, "torch.storage": storage}


def _pickled(value, keys, device, protocol, more):
    """(pickle, key -> Storage); `more` is behind the five values of a storage's persistent id."""
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if not isinstance(item, Storage):
                return None
            key = next((key for key, storage in storages.items() if storage is item), None) or next(keys)
            storages[key] = item
            module = "torch.storage" if item.kind == "UntypedStorage" else "torch"
            return ("storage", getattr(sys.modules[module], item.kind), key, device, item.size, *more)

    file = io.BytesIO()
    with mock.patch.dict(sys.modules, _torch()):
        Pickler(file, protocol).dump(value)
    return file.getvalue(), storages


def zip_of(members, folder="archive"):
    """A zip archive of stored members, dict of name -> bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{folder}/{name}", content)
    return file.getvalue()


def zip_members(value, device="cpu", protocol=2):
    """What torch.save puts in its archive since PyTorch 1.6: dict of name -> bytes."""
    pickled, storages = _pickled(value, map(str, range(10**6)), device, protocol, ())
    data = {f"data/{key}": storage.content for key, storage in storages.items()}
    return {"data.pkl": pickled, "byteorder": b"little", **data, "version": b"3\n"}


def zip_file(value, device="cpu", protocol=2, folder="archive"):
    """What torch.save writes since PyTorch 1.6."""
    return zip_of(zip_members(value, device, protocol), folder)


def legacy_file(value, device="cpu", protocol=2, version=1001, little_endian=True):
    """What torch.save wrote before PyTorch 1.6."""
    # The keys were addresses.
    pickled, storages = _pickled(value, map(str, range(94627309907392, 2**62, 144)), device, protocol, (None,))
    machine = {
        "protocol_version": 1001,
        "little_endian": little_endian,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    head = b"".join(pickle.dumps(part, protocol) for part in (0x1950A86A20F9469CFC6C, version, machine))
    keys = pickle.dumps(sorted(storages), protocol)
    data = (struct.pack("<q", storages[key].size) + storages[key].content for key in sorted(storages))
    return head + pickled + keys + b"".join(data)
