import collections
import io
import math
import pickle
import pickletools
import re
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpq_tf.convert import pth
from tests import golden, torch_files

EXPECTED = r"Expected what torch\.save\(network\.state_dict\(\), path\) writes\. Found: "
RNG = np.random.default_rng(0)
ARRAYS = {
    "0.conv1.weight": RNG.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "0.bn1.weight": RNG.normal(size=4).astype(np.float32),
    "0.bn1.num_batches_tracked": np.array(32, np.int64),
    "empty": np.zeros((2, 0, 3), np.float32),
}
WRITERS = {"zip": torch_files.zip_file, "legacy": torch_files.legacy_file}
ZIP, LEGACY = (write(torch_files.state_dict(ARRAYS)) for write in WRITERS.values())
VARIANTS = golden.SPQ / "narrow" / "pth_variants"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("pth") / "checkpoint.pth"


def read(path, content):
    path.write_bytes(content)
    return pth.read(path)


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, values in found.items():
        assert (values.dtype, values.shape) == (expected[name].dtype, expected[name].shape), name
        assert values.tobytes() == expected[name].tobytes(), name


def refused(path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(path, content)
    text = str(error.value)
    assert text.startswith(f"Invalid {str(path)!r}. Expected what torch.save(network.state_dict(), path) writes. Found")
    assert text.isprintable() and len(text) < 500 + len(str(path))


# What the originals wrote


@golden.needs_golden
@pytest.mark.parametrize(
    ("name", "n_tensors"),
    [
        ("tiny_zip", 5),
        ("tiny_zip_cuda0_tag", 5),
        ("tiny_legacy_nonzip", 5),
        ("tiny_legacy_cuda0_tag", 5),
        ("tiny_strides_dtypes", 13),
    ],
)
def test_reads_every_variant_that_pytorch_wrote(name, n_tensors):
    found = pth.read(VARIANTS / f"{name}.pth")
    expected = golden.load("narrow/pth_variants/expected.npz", golden.SPQ)
    assert len(found) == n_tensors
    assert_equal(found, {name: expected[name] for name in found})


@golden.needs_golden
def test_reads_the_checkpoint_of_the_original():
    found = pth.read(golden.SPQ / "narrow" / "32_0.1667_checkpoint.pth")
    assert_equal(found, golden.load("narrow/state_dict_values.npz", golden.SPQ))


# What an independent writer writes


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:11"])
def test_reads_both_layouts(scratch, layout, protocol, device):
    content = WRITERS[layout](torch_files.state_dict(ARRAYS), device=device, protocol=protocol)
    assert_equal(read(scratch, content), ARRAYS)


@pytest.mark.parametrize("layout", WRITERS)
def test_reads_plain_dicts_and_parameters(scratch, layout):
    values = np.float32([1, 2])
    content = WRITERS[layout](
        {
            "a": torch_files.tensor(values),
            "b": torch_files.Parameter(torch_files.tensor(values)),
            "c": torch_files.Parameter(torch_files.tensor(values), ({"note": 3},)),
            "d": torch_files.OldTensor(torch_files.Storage(values.tobytes(), 2, "FloatStorage"), 1, (1,), (1,)),
        }
    )
    assert_equal(read(scratch, content), {"a": values, "b": values, "c": values, "d": values[1:]})


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("dtype", torch_files.CLASSES)
def test_reads_every_type(scratch, layout, dtype):
    values = np.array([0, 1, 100, 2**15, -1, 0.3]).astype(np.int64 if "int" in dtype else dtype).astype(dtype)
    assert_equal(read(scratch, WRITERS[layout]({"x": torch_files.tensor(values)})), {"x": values})


@pytest.mark.parametrize("layout", WRITERS)
def test_bfloat16_is_widened(scratch, layout):
    # sign, 8 bits of exponent, 7 of fraction: 1, -2, the largest, the smallest, -0, infinity
    bits = np.array([0x3F80, 0xC000, 0x7F7F, 0x0001, 0x8000, 0x7F80], "<u2")
    storage = torch_files.Storage(bits.tobytes(), 6, "BFloat16Storage")
    found = read(scratch, WRITERS[layout]({"x": torch_files.Tensor(storage, 0, (6,), (1,))}))
    values = np.float32([1, -2, (2 - 2**-7) * 2.0**127, 2.0**-133, -0.0, np.inf])
    assert_equal(found, {"x": values})


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_types_without_a_class_of_storages_are_read(scratch, layout, dtype):
    values = np.array([7, 1, 2**16 - 1], dtype)
    content = values.tobytes()
    storage = torch_files.Storage(content, len(content), "UntypedStorage")
    found = read(scratch, WRITERS[layout]({"x": torch_files.Tensor(storage, 1, (2,), (1,), dtype=dtype)}))
    assert_equal(found, {"x": values[1:]})


def test_a_bool_of_any_bits_is_true_or_false(scratch):
    storage = torch_files.Storage(b"\x00\x01\x02\xff", 4, "BoolStorage")
    found = read(scratch, torch_files.zip_file({"x": torch_files.Tensor(storage, 0, (4,), (1,))}))
    assert found["x"].view(np.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("layout", WRITERS)
def test_views_of_one_storage_share_it(scratch, layout):
    numbers = np.arange(24, dtype=np.float32)
    storage = torch_files.Storage(numbers.tobytes(), 24, "FloatStorage")
    found = read(
        scratch,
        WRITERS[layout](
            {
                "whole": torch_files.Tensor(storage, 0, (4, 6), (6, 1)),
                "transposed": torch_files.Tensor(storage, 0, (6, 4), (1, 6)),
                "part": torch_files.Tensor(storage, 8, (2, 3), (6, 1)),
                "diagonal": torch_files.Tensor(storage, 0, (4,), (7,)),
                "last": torch_files.Tensor(storage, 23, (), ()),
                "none": torch_files.Tensor(storage, 24, (0, 5), (5, 1)),
            }
        ),
    )
    whole = numbers.reshape(4, 6)
    expected = {"whole": whole, "transposed": whole.T, "part": whole[1:3, 2:5], "diagonal": whole.diagonal()}
    assert_equal(found, {**expected, "last": whole[3, 5], "none": whole[:0, :5]})
    assert np.shares_memory(found["whole"], found["part"])
    assert not any(values.flags.writeable for values in found.values())


def test_values_that_lie_unaligned_in_the_file_are_aligned(scratch):
    # the pickles of the older layout have any length
    for name in ("a", "ab", "abc", "abcd"):
        assert read(scratch, torch_files.legacy_file({name: torch_files.tensor(np.arange(3.0))}))[name].flags.aligned


def test_a_file_without_a_byte_order_is_read(scratch):
    members = torch_files.zip_members(torch_files.state_dict(ARRAYS))
    del members["byteorder"], members["version"]
    assert_equal(read(scratch, torch_files.zip_of(members, folder="32_0.7935_checkpoint")), ARRAYS)


# Writing

VALUES = hnp.arrays(
    dtype=st.sampled_from([*torch_files.CLASSES, ">f4", ">i8"]),
    shape=hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)
NAMES = st.text(st.characters(categories=["L", "M", "N", "P", "S"]), max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=5))
def test_reads_what_it_writes(scratch, arrays):
    pth.write(scratch, arrays)
    found = pth.read(scratch)
    assert_equal(found, {name: values.astype(values.dtype.newbyteorder("=")) for name, values in arrays.items()})


def test_writes_arrays_in_any_layout(scratch):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    pth.write(scratch, {"transposed": values.T, "every second": values[:, ::2], "reversed": values[::-1]})
    expected = {"transposed": values.T, "every second": values[:, ::2], "reversed": values[::-1]}
    assert_equal(pth.read(scratch), expected)


def test_the_bytes_depend_on_the_arrays_only(tmp_path):
    for name in ("a.pth", "b.pth"):
        pth.write(tmp_path / name, ARRAYS)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_the_archive_is_as_pytorch_lays_it_out(scratch):
    pth.write(scratch, ARRAYS)
    with zipfile.ZipFile(scratch) as archive:
        members = archive.infolist()
        contents = {member.filename: archive.read(member) for member in members}
    assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}
    assert scratch.read_bytes()[:4] == b"PK\x03\x04"  # by which torch.load knows this layout
    assert contents.pop("archive/version") == b"3\n"
    assert contents.pop("archive/byteorder") == b"little"
    pickled = contents.pop("archive/data.pkl")
    assert contents == {f"archive/data/{key}": values.tobytes() for key, values in enumerate(ARRAYS.values())}
    # All that torch.load(weights_only=True) is asked to do: opcodes that it knows, classes that it admits.
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickled)]
    assert opcodes[0] == ("PROTO", 2)
    assert {name for name, _ in opcodes} == {
        *("PROTO", "GLOBAL", "EMPTY_TUPLE", "REDUCE", "MARK", "BINUNICODE", "TUPLE", "BINPERSID"),
        *("BININT", "BININT1", "NEWFALSE", "SETITEMS", "STOP"),
    }
    assert {argument for name, argument in opcodes if name == "GLOBAL"} == {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "torch LongStorage",
    }


def test_the_pickle_describes_the_same_as_the_independent_one(scratch):
    pth.write(scratch, ARRAYS)
    with zipfile.ZipFile(scratch) as archive:
        written = archive.read("archive/data.pkl")
    taken_down = []
    for content in (written, torch_files.zip_members(torch_files.state_dict(ARRAYS))["data.pkl"]):

        class Recorder(pickle.Unpickler):
            def find_class(self, module, name):
                return collections.OrderedDict if name == "OrderedDict" else lambda *given: (module, name, given)

            def persistent_load(self, claim):
                return claim[0], claim[1]()[:2], *claim[2:]

        taken_down.append(Recorder(io.BytesIO(content)).load())
    assert taken_down[0] == taken_down[1]


def test_pytorch_reads_what_it_writes(scratch):
    torch = pytest.importorskip("torch")
    pth.write(scratch, ARRAYS)
    found = torch.load(scratch, weights_only=True)
    assert type(found) is collections.OrderedDict
    assert_equal({name: values.numpy() for name, values in found.items()}, ARRAYS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": np.zeros(2, np.uint16)},
            "^Invalid array 'x'. Expected a type that PyTorch 1.7 has storages of. Received: ui",
        ),
        ({"x": np.zeros(2, np.complex64)}, "Received: complex64$"),
        ({"x": np.array(["text"])}, "Received: <U4$"),
        ({"x": np.array([None])}, "Received: object$"),
        ({"a\nb": np.zeros(2)}, r"^Invalid name. Expected text that can be printed. Received: 'a\\nb'$"),
        ({3: np.zeros(2)}, "^Invalid name. Expected text that can be printed. Received: 3$"),
    ],
)
def test_refuses_to_write_what_it_would_not_read(tmp_path, arrays, message):
    pth.write(tmp_path / "x.pth", {"y": np.zeros(1)})
    with pytest.raises(ValueError, match=message):
        pth.write(tmp_path / "x.pth", arrays)
    assert list(pth.read(tmp_path / "x.pth")) == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_large_sizes_are_written_as_such():
    # 2**31 numbers would fill the machine; their count alone need not be an array's.
    from gpq_tf.convert import torch_pickle

    assert pickle.loads(torch_pickle._integer(2**31 - 1) + b".") == 2**31 - 1
    assert pickle.loads(torch_pickle._integer(2**31) + b".") == 2**31
    assert pickle.loads(torch_pickle._integer(2**40 + 5) + b".") == 2**40 + 5


# Hostile pickles, as opcodes


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


def integers(values):
    """A tuple of ints of any size."""
    raw = [value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True) for value in values]
    return b"(" + b"".join(b"\x8a" + bytes([len(content)]) + content for content in raw) + b"t"


CPU = text(b"cpu")


def persistent(kind=b"ctorch\nFloatStorage\n", key=b"0", device=CPU, size=b"K\x08", more=b""):
    return b"(" + text(b"storage") + kind + text(key) + device + size + more + b"tQ"


STORAGE = persistent()
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"\x89ccollections\nOrderedDict\n)R"


def rebuild(storage=STORAGE, offset=b"K\x00", shape=(8,), strides=(1,), more=b""):
    return REBUILD + b"(" + storage + offset + integers(shape) + integers(strides) + HOOKS + more + b"tR"


def state(tensor=b"", name=b"x"):
    """A pickle of {name: tensor}."""
    return b"\x80\x02}(" + text(name) + (tensor or rebuild()) + b"u."


def archive(pickled, storage=bytes(32)):
    return torch_files.zip_of({"data.pkl": pickled, "data/0": storage})


def test_the_opcodes_of_these_tests_make_a_file_that_is_read(scratch):
    assert_equal(read(scratch, archive(state())), {"x": np.zeros(8, np.float32)})


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cos\nsystem\n(U\x0atouch owneatR.", "it asks for os.system;"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.", "it asks for posix.system;"),
        (b"cbuiltins\neval\n(U\x031+1tR.", "it asks for builtins.eval;"),
        (b"ctorch\nload\n(U\x01xtR.", "it asks for torch.load;"),
        (b"ctorch.hub\nload\n(U\x01xtR.", "it asks for torch.hub.load;"),
        (b"ctorch.nn.modules.container\nSequential\n)\x81.", "it asks for torch.nn.modules.container.Sequential;"),
        (b"ctorch\nComplexFloatStorage\n.", "it asks for torch.ComplexFloatStorage;"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x06latin1tR.", "it asks for _codecs.encode;"),
        (b"cnumpy.core.multiarray\n_reconstruct\n.", "it asks for numpy.core.multiarray._reconstruct;"),
        (b"cgpq_tf.convert.pth\nwrite\n.", "it asks for gpq_tf.convert.pth.write;"),
        (b"(U\x02lsios\nsystem\n.", "it asks for the opcode INST;"),
        (b"Pspam\n.", "it asks for the opcode PERSID;"),
        (b"ccollections\nOrderedDict\n)\x81.", "it asks for the opcode NEWOBJ;"),
        (b"ccollections\nOrderedDict\n]]U\x01aNeaa\x85R.", "it is damaged, cut off or no pickle"),
        (b"ccollections\nOrderedDict\n}b.", "it sets the state of a function;"),
        (b"ctorch\nFloatStorage\n}b.", "it sets the state of a _Type;"),
        (b"ctorch\nFloatStorage\n)R.", r"it is damaged, cut off or no pickle \(TypeError while reading\)"),
        (b"}}U\x08__call__Nsb.", "it sets the state of a dict in another way than PyTorch does;"),
        (b"}Nb.", "it sets the state of a dict in another way than PyTorch does;"),
        (b"}" * 1_000_001, "it has more than 1,000,000 opcodes;"),
        (b"}N}s.", "it has a dict whose keys are not strings;"),
        (b"N.", "an object of type NoneType, not a dict of tensors"),
        (rebuild() + b".", "an object of type Tensor, not a dict of tensors"),
        (b"](" + rebuild() + b"e.", "an object of type list, not a dict of tensors"),
        (state(b"K\x03", name=b"epoch"), "'epoch' is of type int, not a tensor"),
        (state(b"}", name=b"state_dict"), "'state_dict' is of type dict, not a tensor"),
        (b"}q\x00U\x01xh\x00s.", "a name that is no text, b'x'"),
        (b"}q\x00" + text(b"x") + b"h\x00s.", "'x' is of type dict, not a tensor"),  # it holds itself
        (b"]q\x00h\x00a.", "an object of type list"),
        (state(name=b"a\nb"), r"a name that is no text, 'a\\nb'"),
        (state(name=b"\xed\xa0\x80"), r"a name that is no text, '\\ud800'"),
        (b"}(" + text(b"x") + rebuild() + text(b"x") + rebuild() + b"u.", "it has a dict with the key 'x' twice;"),
    ],
)
def test_nothing_that_a_pickle_asks_for_is_run(tmp_path, monkeypatch, pickled, message):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path / "x.pth", archive(pickled), EXPECTED + message)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize(
    "claim",
    [
        b"NQ",
        b")Q",
        b"U\x01aQ",
        text(b"0") + b"Q",
        b"(" + text(b"module") + b"Nt" + b"Q",
        b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"tQ",
        persistent(more=b"(" + text(b"1") + b"K\x00K\x08t"),  # a part of another storage, as PyTorch 0.3 had them
        persistent(more=b"NN"),
    ],
)
def test_refuses_persistent_ids_that_are_no_storage(scratch, claim):
    refused(scratch, archive(state(rebuild(claim))), EXPECTED + "it has a persistent id that is no storage;")


@pytest.mark.parametrize(
    "claim",
    [
        {"kind": b"N"},
        {"kind": text(b"<f4")},
        {"kind": STORAGE},
        {"kind": REBUILD},
        {"key": b""},
        {"key": b"../0"},
        {"key": b"/0"},
        {"key": "٣".encode()},
        {"key": b"0" * 21},
        {"device": b"N"},
        {"size": b"N"},
        {"size": b"\x88"},
        {"size": b"G" + bytes(8)},
        {"size": b"J\xff\xff\xff\xff"},
        {"size": b"\x8a\x07\x00\x00\x00\x00\x00\x00\x01"},
        {"size": b"\x8a\xff" + b"\x7f" * 255},
    ],
)
def test_refuses_storages_without_plain_claims(scratch, claim):
    message = "it has a storage without a plain type, name, device or size;"
    refused(scratch, archive(state(rebuild(persistent(**claim)))), EXPECTED + message)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"storage": b"N"}, "it has a tensor without a storage;"),
        ({"storage": b"(K\x00K\x08t"}, "it has a tensor without a storage;"),
        ({"offset": b"N"}, "it has a tensor with no plain shape;"),
        ({"offset": b"J\xff\xff\xff\xff"}, "it has a tensor with no plain shape;"),
        ({"shape": (-8,)}, "it has a tensor with no plain shape;"),
        ({"strides": (-1,)}, "it has a tensor with no plain shape;"),
        ({"shape": (8, 1)}, "it has a tensor with no plain shape;"),
        ({"shape": (1,) * 9, "strides": (1,) * 9}, "it has a tensor with no plain shape;"),
        ({"shape": (2**48,)}, "it has a tensor with no plain shape;"),
        ({"shape": (2**63,)}, "it has a tensor with no plain shape;"),
        ({"shape": (1,), "strides": (2**62,)}, "it has a tensor with no plain shape;"),
        ({"shape": (0, 2**40, 2**40), "strides": (1, 1, 1)}, "it has a tensor with no plain shape;"),
        ({"more": b"}" + text(b"neg") + b"\x88s"}, "it has a tensor whose numbers are yet to be negated or conj"),
    ],
)
def test_refuses_tensors_without_plain_claims(scratch, tensor, message):
    refused(scratch, archive(state(rebuild(**tensor))), EXPECTED + message)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (9,), (1,)),
        (1, (8,), (1,)),
        (0, (2,), (8,)),
        (0, (2, 2), (7, 1)),
        (8, (), ()),
        (9, (0,), (1,)),
        (2**47, (1,), (1,)),
        (0, (2**47,), (0,)),  # one number, again and again
        (0, (2**20, 2**20), (0, 0)),
        (0, (5, 4), (1, 1)),  # windows that overlap
        (0, (3, 3), (1, 1)),
    ],
)
def test_refuses_tensors_that_are_not_in_their_storage(scratch, offset, shape, strides):
    place = b"\x8a\x08" + struct.pack("<q", offset)
    message = f"it has a tensor of shape {shape} and strides {strides} from number {offset} of a storage of 8;"
    refused(scratch, archive(state(rebuild(STORAGE, place, shape, strides))), EXPECTED + re.escape(message))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"ctorch._utils\n_rebuild_parameter\n(N\x88Nt" + b"R", "it has a parameter that is no tensor;"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", r"it is damaged, cut off or no pickle \(TypeError while reading\)"),
        (
            b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"K\x00tR",
            r"it is damaged, cut off or no pickle \(TypeError",
        ),
        (
            b"ctorch._utils\n_rebuild_tensor_v3\n(" + STORAGE + b"K\x00))" + HOOKS + STORAGE + b"tR",
            "it has a tensor without a storage or a type;",
        ),
        (
            rebuild(persistent(more=b"N")) + rebuild(persistent(size=b"K\x07"), shape=(7,)) + b"\x86",
            "two claims about stor",
        ),
        (rebuild() + rebuild(persistent(b"ctorch\nIntStorage\n")) + b"\x86", "it has two claims about storage 0;"),
    ],
)
def test_refuses_calls_that_pytorch_does_not_write(scratch, pickled, message):
    refused(scratch, archive(state(pickled)), message)


def test_names_of_one_tensor_share_its_memory(scratch):
    """Ten thousand names of a megabyte are no ten gigabytes, also when its type is widened."""
    kind = b"ctorch\nBFloat16Storage\n"
    tensor = rebuild(persistent(kind, size=b"J" + struct.pack("<i", 2**19)), shape=(2**19,))
    names = b"".join(text(b"%d" % number) + b"h\x00" for number in range(10_000))
    content = archive(b"\x80\x02}(" + text(b"x") + tensor + b"q\x00" + names + b"u.", bytes(2**20))
    scratch.write_bytes(content)
    tracemalloc.start()
    try:
        found = pth.read(scratch)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert len(found) == 10_001 and found["9999"].shape == (2**19,)


# Damaged archives


def central_directory(content):
    """(number of entries, their bytes, where they begin), from the end of an archive."""
    _, _, _, _, n, size, start, _ = struct.unpack("<IHHHHIIH", content[-22:])
    return n, content[start : start + size], start


def with_directory(content, n, directory):
    start = central_directory(content)[2]
    return content[:start] + directory + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, n, n, len(directory), start, 0)


def test_members_on_top_of_each_other_are_refused(scratch):
    content = torch_files.zip_of({"data.pkl": state(), "data/0": bytes(10_000)})
    n, directory, _ = central_directory(content)
    last = directory[directory.rindex(b"PK\x01\x02") :]
    copies = [last.replace(b"data/0", b"data/%d" % number) for number in range(1, 10)]
    message = r"a zip archive of 10,\d{3} bytes with members of 100,\d{3}$"
    refused(scratch, with_directory(content, n + 9, directory + b"".join(copies)), EXPECTED + message)


def test_a_member_that_claims_to_be_larger_than_the_file_is_refused(scratch):
    content = archive(state())
    n, directory, _ = central_directory(content)
    claimed = struct.pack("<II", 32, 32)
    assert directory.count(claimed) == 1
    forged = with_directory(content, n, directory.replace(claimed, struct.pack("<II", 2**31, 2**31)))
    refused(scratch, forged, r"a zip archive of \d{3} bytes with members of 2,147,483,\d{3}")


def compressed(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(f"archive/{name}", content)
    return file.getvalue()


def test_compressed_members_are_refused_unread(scratch):
    content = compressed({"data.pkl": state(), "data/0": bytes(50_000_000)})
    tracemalloc.start()
    try:
        refused(scratch, content, EXPECTED + "a zip archive with compressed members, which a state_dict has not$")
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def twice(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in (state(), b"}."):
            zipped.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (twice("archive/data.pkl"), "a zip archive with two members of one name$"),
        (torch_files.zip_of({"data/0": b""}), "a zip archive with 0 members NAME/data.pkl$"),
        (torch_files.zip_of({"b/data.pkl": state()}), "a zip archive with 0 members NAME/data.pkl$"),
        (torch_files.zip_of({"data.pkl": state()}, folder="../.."), "a zip archive with 0 members NAME/data.pkl$"),
        (torch_files.zip_of({"data.pkl": state()}), "a zip archive without the member data/0$"),
        (archive(state(), bytes(31)), "storage 0 in 31 bytes where 32 are claimed$"),
        (archive(state(), bytes(33)), "storage 0 in 33 bytes where 32 are claimed$"),
        (
            archive(state(rebuild(persistent(size=b"\x8a\x06\x00\x00\x00\x00\x00\x40")))),
            "storage 0 in 32 bytes where 281,474,976,710,656 are claimed$",
        ),
        (
            torch_files.zip_of({"data.pkl": state(), "data/0": bytes(32), "byteorder": b"big"}),
            "numbers written by a big-endian machine$",
        ),
        (archive(b""), r"it is damaged, cut off or no pickle \(EOFError while reading\)$"),
        (b"PK\x03\x04", "a zip archive that is damaged or cut off$"),
        (b"PK\x05\x06" + bytes(18), "a zip archive with 0 members NAME/data.pkl$"),
        (b"", "neither a zip archive nor the layout before PyTorch 1.6$"),
        (b"\x89PNG\r\n\x1a\n", "neither a zip archive nor the layout before PyTorch 1.6$"),
        (pickle.dumps({"x": 1}), "neither a zip archive nor the layout before PyTorch 1.6$"),
    ],
)
def test_refuses_other_archives(scratch, content, message):
    refused(scratch, content, EXPECTED + message)


def test_two_folders_are_refused(scratch):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("a/data.pkl", state())
        zipped.writestr("b/data.pkl", state())
    refused(scratch, file.getvalue(), EXPECTED + "a zip archive with 2 members NAME/data.pkl$")


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "byteorder"])
def test_a_flipped_bit_of_a_member_is_seen(scratch, member):
    members = torch_files.zip_members(torch_files.state_dict(ARRAYS))
    content = bytearray(torch_files.zip_of(members))
    place = content.index(members[member], content.index(b"archive/" + member.encode()))
    content[place + len(members[member]) // 2] ^= 4
    refused(scratch, bytes(content), EXPECTED + f"a zip archive whose member {member} is damaged$")


# The layout before PyTorch 1.6


def legacy_parts():
    """The five pickles and what is behind them."""
    file, parts = io.BytesIO(LEGACY), []
    for _ in range(5):
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        parts.append(LEGACY[start : file.tell()])
    return [*parts, LEGACY[file.tell() :]]


PARTS = legacy_parts()
KEYS = pickle.loads(PARTS[4])


def with_part(number, content):
    return b"".join([*PARTS[:number], content, *PARTS[number + 1 :]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch_files.legacy_file({}, version=1000), "an unknown version of the layout before PyTorch 1.6$"),
        (
            torch_files.legacy_file({}, little_endian=False),
            "numbers of a machine that is not said to be little-endian$",
        ),
        (with_part(2, b"N."), "numbers of a machine that is not said to be little-endian$"),
        (with_part(2, b"cos\nsystem\n."), "it asks for os.system;"),
        (with_part(3, b"cos\nsystem\n."), "it asks for os.system;"),
        (with_part(4, b"cos\nsystem\n."), "it asks for os.system;"),
        (with_part(4, STORAGE + b"."), "it asks for torch.FloatStorage;"),
        (
            with_part(4, pickle.dumps(KEYS[1:], 2)),
            "a list of storages that is not the list of those that the tensors use$",
        ),
        (with_part(4, pickle.dumps([*KEYS, KEYS[0]], 2)), "a list of storages that is not the list of those that"),
        (with_part(4, pickle.dumps([*KEYS[1:], "5"], 2)), "a list of storages that is not the list of those that"),
        (with_part(4, pickle.dumps([*KEYS[1:], 5], 2)), "a list of storages that is not the list of those that"),
        (with_part(4, pickle.dumps(dict.fromkeys(KEYS), 2)), "a list of storages that is not the list of those that"),
        (with_part(5, b""), "storage 94627309907392 is cut off$"),
        (with_part(5, PARTS[5][:200]), "storage 94627309907392 in 192 bytes where 432 are claimed$"),
        (
            with_part(5, struct.pack("<q", 2**60)),
            "storage 94627309907392 of 1,152,921,504,606,846,976 numbers where 108 are",
        ),
        (with_part(5, struct.pack("<q", -1)), "storage 94627309907392 of -1 numbers where 108 are claimed$"),
        (LEGACY + b"abc", "3 bytes behind the last storage$"),
    ],
)
def test_refuses_damaged_files_of_the_older_layout(scratch, content, message):
    refused(scratch, content, EXPECTED + message)


# Any damage


@pytest.mark.parametrize("whole", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_every_truncated_file_is_refused(scratch, whole):
    for end in range(len(whole)):
        refused(scratch, whole[:end], EXPECTED)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_archive_is_refused_or_read_as_it_was(scratch, data):
    changed = bytearray(ZIP)
    for place in data.draw(st.lists(st.integers(0, len(ZIP) - 1), min_size=1, max_size=3)):
        changed[place] = data.draw(st.integers(0, 255))
    try:
        found = read(scratch, bytes(changed))
    except ValueError as error:
        assert str(error).isprintable() and "Expected what torch.save" in str(error)
    else:
        assert_equal(found, ARRAYS)


HEAD = LEGACY.index(PARTS[5])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, HEAD), st.binary(max_size=4), st.integers(0, 6))
def test_a_changed_pickle_is_refused_or_describes_tensors(scratch, place, put_in, lost):
    _check(scratch, LEGACY[:place] + put_in + LEGACY[place + lost :])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEAD), st.integers(0, 7)), min_size=1, max_size=3))
def test_flipped_bits_of_a_pickle_are_refused_or_describe_tensors(scratch, flips):
    changed = bytearray(LEGACY)
    for place, bit in flips:
        changed[place] ^= 1 << bit
    _check(scratch, bytes(changed))


def _check(path, content):
    try:
        found = read(path, content)
    except ValueError as error:
        assert str(error).isprintable() and "Expected what torch.save" in str(error)
    else:
        assert all(name.isprintable() and math.prod(values.shape) <= 108 for name, values in found.items())
        assert sum(values.astype(float).size for values in found.values()) <= 4 * 108


# Names of files


def test_find(tmp_path):
    for name in ("a.pth", "b.pt", "c.ckpt", "pth"):
        (tmp_path / name).touch()
    (tmp_path / "d.pth").mkdir()
    assert pth.find(tmp_path / "a.pth") == tmp_path / "a.pth"
    assert pth.find(str(tmp_path / "b.pt")) == tmp_path / "b.pt"
    assert [pth.find(tmp_path / name) for name in ("c.ckpt", "pth", "d.pth", "e.pth", "a")] == [None] * 5


def test_an_absent_file_is_an_oserror_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"absent\.pth"):
        pth.read(tmp_path / "absent.pth")
